"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, seeds, logprobs.

Every parameter is a column, so no combination of requests compiles anything anew; what no row of
the batch asks for is skipped at run time (`lax.cond`). It does not know requests.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

MAX_LOGPROBS = 20
"""Alternatives kept per token; `serve.request` allows as many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """One column per parameter; `serve.request.SamplingParams` says what each means."""

    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    seed: UInt32[Array, "R two"]
    repetition_penalty: Float[Array, "R"]
    presence_penalty: Float[Array, "R"]
    frequency_penalty: Float[Array, "R"]
    end_ids: Int[Array, "R A"]
    """Ids that end the row; free places hold the vocabulary's size."""
    min_tokens: Int[Array, "R"]
    logprobs: Bool[Array, "R"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What penalties look back on, by slot."""

    in_prompt: Bool[Array, "slots V"]
    num_output: Int[Array, "slots V"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms, of the distribution before penalties and temperature."""

    chosen: Float[Array, "*R"]
    top: Float[Array, "*R A"]
    top_ids: Int[Array, "*R A"]


def sample(
    logits_RV: Float[Array, "R V"],
    sampling: Sampling,
    history: History,
    slots_R: Int[Array, "R"],
    num_output_R: Int[Array, "R"],
) -> tuple[Int[Array, "R"], Logprobs]:
    """The next token of each row, and its logprobs (zeros when no row wants them).

    `num_output_R` counts the tokens a row has chosen before: with the seed it decides the random
    numbers, so a row's choice does not depend on its batch.
    """
    is_plain_R = (sampling.temperature == 0) & ~uses_history(sampling)
    is_plain_R &= num_output_R >= sampling.min_tokens

    def choose() -> jax.Array:
        penalized_RV = _penalize(logits_RV, sampling, history, slots_R, num_output_R)
        greedy_R = _argmax(penalized_RV)
        return lax.cond(
            jnp.any(sampling.temperature > 0),
            lambda: _draw(penalized_RV, greedy_R, sampling, num_output_R),
            lambda: greedy_R,
        )

    chosen_R = lax.cond(jnp.all(is_plain_R), lambda: _argmax(logits_RV), choose)
    return chosen_R, lax.cond(
        jnp.any(sampling.logprobs),
        lambda: logprobs(logits_RV, chosen_R),
        lambda: no_logprobs(chosen_R.shape, logits_RV.shape[-1]),
    )


def logprobs(logits: Float[Array, "*R V"], chosen: Int[Array, "*R"]) -> Logprobs:
    """The logprob of each chosen id, and the most likely ids."""
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = _top(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    picked = jnp.take_along_axis(logits, chosen[..., None], axis=-1)
    return Logprobs((picked - log_total)[..., 0], top - log_total, top_ids)


def _top(x: Float[Array, "*R V"], count: int) -> tuple[jax.Array, jax.Array]:
    """The largest numbers and their places, in order; of equals the first places first.

    XLA on GPU sorts all of x for `lax.top_k`; there each number is found by two passes that write
    nothing.
    """

    def by_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        vocab = x.shape[-1]
        place = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)

        def find(last: tuple[jax.Array, jax.Array], _: None):
            peak, where = (part[..., None] for part in last)
            later = (x < peak) | ((x == peak) & (place > where))
            peak = jnp.max(jnp.where(later, x, -jnp.inf), axis=-1, keepdims=True)
            at_peak = jnp.where(later & (x == peak), place, vocab - 1)
            found = peak[..., 0], jnp.min(at_peak, axis=-1)
            return found, found

        before_all = jnp.full(x.shape[:-1], jnp.inf), jnp.full(x.shape[:-1], -1)
        _, found = lax.scan(find, before_all, None, length=count)
        top, top_ids = (jnp.moveaxis(part, 0, -1) for part in found)
        return top, top_ids

    top, top_ids = lax.platform_dependent(
        x, cpu=lambda x: tuple(lax.top_k(x, count)), default=by_passes
    )
    return top, top_ids


def no_logprobs(shape: tuple[int, ...], vocab_size: int) -> Logprobs:
    top = (*shape, min(MAX_LOGPROBS, vocab_size))
    return Logprobs(jnp.zeros(shape), jnp.zeros(top), jnp.zeros(top, jnp.int32))


def _penalize(
    logits_RV: jax.Array,
    sampling: Sampling,
    history: History,
    slots_R: jax.Array,
    num_output_R: jax.Array,
) -> jax.Array:
    def penalties(logits_RV: jax.Array) -> jax.Array:
        num_output_RV = history.num_output[slots_R]
        seen_RV = history.in_prompt[slots_R] | (num_output_RV > 0)
        factor = sampling.repetition_penalty[:, None]
        repeated_RV = jnp.where(logits_RV > 0, logits_RV / factor, logits_RV * factor)
        logits_RV = jnp.where(seen_RV, repeated_RV, logits_RV)
        logits_RV -= sampling.frequency_penalty[:, None] * num_output_RV
        return logits_RV - sampling.presence_penalty[:, None] * (num_output_RV > 0)

    def no_end(logits_RV: jax.Array) -> jax.Array:
        early_R = num_output_R < sampling.min_tokens
        rows_R1 = jnp.arange(logits_RV.shape[0])[:, None]
        barred = jnp.where(early_R[:, None], sampling.end_ids, logits_RV.shape[1])
        return logits_RV.at[rows_R1, barred].set(-jnp.inf, mode="drop")

    logits_RV = lax.cond(jnp.any(uses_history(sampling)), penalties, lambda x: x, logits_RV)
    return lax.cond(jnp.any(num_output_R < sampling.min_tokens), no_end, lambda x: x, logits_RV)


def uses_history(sampling: Sampling) -> Bool[Array, "R"]:
    """Rows with a penalty."""
    return (
        (sampling.repetition_penalty != 1)
        | (sampling.presence_penalty != 0)
        | (sampling.frequency_penalty != 0)
    )


def _draw(
    logits_RV: jax.Array, greedy_R: jax.Array, sampling: Sampling, num_output_R: jax.Array
) -> jax.Array:
    """Gumbel-max over what temperature, top-k, top-p and min-p leave; greedy rows stay greedy."""
    random_R = sampling.temperature > 0
    # Beyond these bounds a choice is greedy or uniform anyway, and 1 / temperature may be inf or 0.
    temperature_R = jnp.clip(sampling.temperature, 1e-30, 1e30)
    scaled_RV = (logits_RV - logits_RV.max(-1, keepdims=True)) / temperature_R[:, None]
    filtered_R = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    scaled_RV = lax.cond(
        jnp.any(random_R & filtered_R),
        lambda x: keep_likely(x, sampling.top_k, sampling.top_p, sampling.min_p),
        lambda x: x,
        scaled_RV,
    )

    def noise(seed: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), count)
        return jax.random.gumbel(key, scaled_RV.shape[1:])

    noisy_RV = scaled_RV + jax.vmap(noise)(sampling.seed, num_output_R)
    return jnp.where(random_R, _argmax(noisy_RV), greedy_R)


def _argmax(x_RV: Float[Array, "R V"]) -> Int[Array, "R"]:
    """The first place of each row's maximum; the last place of a row of NaN.

    Two plain reductions: XLA on CPU takes four times as long for the one of pairs.
    """
    vocab = x_RV.shape[1]
    places_V = lax.iota(jnp.int32, vocab)
    is_peak_RV = x_RV == x_RV.max(-1, keepdims=True)
    return jnp.min(jnp.where(is_peak_RV, places_V, vocab - 1), axis=-1)


def keep_likely(
    logits_RV: Float[Array, "R V"],
    top_k_R: Int[Array, "R"],
    top_p_R: Float[Array, "R"],
    min_p_R: Float[Array, "R"],
) -> Float[Array, "R V"]:
    """Logits with -inf where top-k, then top-p of the rest, or min-p cut. Ties are kept.

    No sort: each cut is a threshold, found by 32 halvings over the ordered bits of a float32.
    """
    vocab = logits_RV.shape[1]
    bits_RV = _ordered_bits(logits_RV)
    top_k_R = jnp.where(top_k_R > 0, jnp.minimum(top_k_R, vocab), vocab)

    def at_least(cut_R: jax.Array) -> jax.Array:
        return bits_RV >= cut_R[:, None]

    cut_R = _largest_cut(lambda cut_R: at_least(cut_R).sum(-1) >= top_k_R, top_k_R.shape)
    weights_RV = jnp.where(
        at_least(cut_R), jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True)), 0.0
    )
    # Weights are relative to the likeliest token's, which is 1: min-p's own unit.
    # The likeliest is wanted even of a top-p so small that the product is 0.
    wanted_R = jnp.maximum(top_p_R * weights_RV.sum(-1), jnp.finfo(jnp.float32).tiny)
    nucleus_R = _largest_cut(
        lambda cut_R: jnp.where(at_least(cut_R), weights_RV, 0).sum(-1) >= wanted_R,
        top_k_R.shape,
    )
    cut_R = jnp.maximum(cut_R, jnp.where(top_p_R < 1, nucleus_R, 0))
    kept_RV = at_least(cut_R) & (weights_RV >= min_p_R[:, None])
    return jnp.where(kept_RV, logits_RV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest_cut(enough, shape: tuple[int, ...]) -> jax.Array:
    """The largest uint32 per row for which `enough` still holds; it holds at 0."""

    def halve(i, cut_R):
        higher_R = cut_R | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(higher_R), higher_R, cut_R)

    return lax.fori_loop(0, 32, halve, jnp.zeros(shape, jnp.uint32))
