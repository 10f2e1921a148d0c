"""Sampling against slow references that sort, in NumPy and float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import sampling as sampler
from model.sampling import MAX_LOGPROBS, History, Logprobs, Sampling

R, V, MAX_ENDS = 8, 37, 4
INF = np.float32(np.inf)

sample = jax.jit(sampler.sample)
keep_likely = jax.jit(sampler.keep_likely)
many_rows = jax.jit(sampler.sample)
"""For the tests of distributions, with a shape of their own."""


def columns(rows: int = R, ends: list[list[int]] | None = None, **fields: Any) -> Sampling:
    """Sampling with each field the same for all rows, or one value per row."""
    values: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "logprobs": False,
        **fields,
    }
    dtypes = {"top_k": np.int32, "min_tokens": np.int32, "logprobs": np.bool_}
    arrays = {
        name: jnp.asarray(np.broadcast_to(np.asarray(value, dtypes.get(name, np.float32)), (rows,)))
        for name, value in values.items()
        if name != "seed"
    }
    seed = np.broadcast_to(np.asarray(fields.get("seed", np.arange(rows)), np.uint32), (rows,))
    ends = ends or [[]] * rows
    padded = [[*row, *[V] * (MAX_ENDS - len(row))] for row in ends]
    return Sampling(
        **arrays,
        seed=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.asarray(seed)], axis=1),
        end_ids=jnp.asarray(padded, jnp.int32),
    )


NO_HISTORY = History(jnp.zeros((R + 1, V), bool), jnp.zeros((R + 1, V), jnp.int32))


def draw(
    logits: np.ndarray,
    some: Sampling,
    history: History = NO_HISTORY,
    num_output: Any = 0,
) -> tuple[np.ndarray, Logprobs]:
    """Tokens of R rows in the slots of their own number."""
    count = jnp.asarray(np.broadcast_to(np.asarray(num_output, np.int32), (R,)))
    tokens, logprobs = sample(
        jnp.asarray(logits, jnp.float32), some, history, jnp.arange(R, dtype=jnp.int32), count
    )
    return np.asarray(tokens), jax.tree.map(np.asarray, logprobs)


def random_logits(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (R, V)).astype(np.float32)


def keep_likely_by_sorting(logits, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which of a row's logits are kept."""
    logits = np.asarray(logits, np.float64)
    order = np.sort(logits)[::-1]
    kept = np.ones(len(logits), bool)
    if top_k > 0:
        kept &= logits >= order[min(top_k, len(order)) - 1]
    weights = np.where(kept, np.exp(logits - order[0]), 0)
    if top_p < 1:
        sums = np.cumsum(np.sort(weights)[::-1])
        last = np.searchsorted(sums, top_p * sums[-1])
        kept &= weights >= np.sort(weights)[::-1][last]
    return kept & (weights >= min_p)


def kept_by(logits: Any, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0) -> np.ndarray:
    """Which logits [R, V] `keep_likely` keeps; those it keeps, it must not change."""
    rows = lambda x, dtype: jnp.asarray(np.broadcast_to(np.asarray(x, dtype), (R,)))  # noqa: E731
    logits = np.asarray(logits, np.float32)
    found = np.asarray(
        keep_likely(
            jnp.asarray(logits),
            rows(top_k, np.int32),
            rows(top_p, np.float32),
            rows(min_p, np.float32),
        )
    )
    kept = found != -INF
    np.testing.assert_array_equal(found[kept], logits[kept])
    return kept


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.01, 1.0, 5.0, 40.0]),
    top_k=st.lists(
        st.sampled_from([0, 1, 2, 5, V - 1, V, V + 1, 2**31 - 1]), min_size=R, max_size=R
    ),
    top_p=st.lists(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]), min_size=R, max_size=R),
    min_p=st.lists(st.sampled_from([0.0, 1e-3, 0.2, 0.99, 1.0]), min_size=R, max_size=R),
    num_barred=st.integers(0, 5),
)
def test_what_is_kept_is_what_sorting_keeps(seed, scale, top_k, top_p, min_p, num_barred):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (R, V)).astype(np.float32)
    logits[:, rng.permutation(V)[:num_barred]] = -INF
    kept = kept_by(logits, top_k, top_p, min_p)
    for row in range(R):
        # In float32 a logit within 1e-6 of a cut may fall on its other side.
        expected = keep_likely_by_sorting(logits[row], top_k[row], top_p[row], min_p[row])
        slack = 1e-6
        more = keep_likely_by_sorting(
            logits[row], top_k[row], min(top_p[row] + slack, 1), min_p[row] * (1 - slack)
        )
        less = keep_likely_by_sorting(
            logits[row], top_k[row], top_p[row] * (1 - slack), min_p[row] * (1 + slack)
        )
        finite = logits[row] != -INF
        assert (kept[row] <= more).all(), (row, expected)
        assert (kept[row] >= (less & finite)).all(), (row, expected)


def test_ties_at_a_cut_are_kept():
    logits = np.tile(np.repeat([3.0, 2.0, 1.0, -5.0], [1, 4, 10, V - 15]), (R, 1))
    assert kept_by(logits, top_k=2).sum(-1).tolist() == [5] * R
    assert kept_by(logits, top_k=5).sum(-1).tolist() == [5] * R
    assert kept_by(logits, top_k=6).sum(-1).tolist() == [15] * R
    assert kept_by(logits, top_p=0.4).sum(-1).tolist() == [5] * R
    assert kept_by(logits, min_p=0.3).sum(-1).tolist() == [5] * R


def test_equal_logits_are_all_kept():
    assert kept_by(np.full((R, V), -7.0), top_k=3, top_p=0.5, min_p=1.0).all()


def test_top_p_counts_what_top_k_left():
    """Of 0.5, 0.3, 0.2 the first two are 0.8; of those alone, the first is 0.625 of all."""
    logits = np.full((R, V), -INF)
    logits[:, :3] = np.log([0.5, 0.3, 0.2])
    assert kept_by(logits, top_p=0.62).sum(-1).tolist() == [2] * R
    assert kept_by(logits, top_k=2, top_p=0.62).sum(-1).tolist() == [1] * R


@pytest.mark.parametrize("top_p", [1e-3, 1e-7, 1e-30, 1e-39, 1e-45])
def test_tiny_top_p_keeps_the_likeliest(top_p):
    """Down to the smallest float32 above 0, which arithmetic may flush to 0."""
    logits = random_logits()
    kept = kept_by(logits, top_p=top_p)
    np.testing.assert_array_equal(kept, logits == logits.max(-1, keepdims=True))


@pytest.mark.parametrize("scale", [1e-30, 1e10, 1e36])
def test_cuts_hold_for_logits_of_any_size(scale):
    logits = random_logits() * np.float32(scale)
    kept = kept_by(logits, top_k=3)
    np.testing.assert_array_equal(kept, logits >= np.sort(logits)[:, -3:-2])


def test_rows_without_a_cut_keep_all():
    logits = random_logits()
    top_k = [0, 1] * (R // 2)
    kept = kept_by(logits, top_k=top_k)
    assert kept.sum(-1).tolist() == [V, 1] * (R // 2)


def test_temperature_zero_is_greedy_beside_random_rows():
    logits = random_logits()
    temperature = [0.0, 5.0] * (R // 2)
    found = np.array(
        [draw(logits, columns(temperature=temperature, top_k=30, seed=s))[0] for s in range(20)]
    )
    greedy = logits.argmax(-1)
    assert (found[:, ::2] == greedy[::2]).all()
    assert (found[:, 1::2] != greedy[1::2]).any()


def test_top_k_of_one_is_greedy_at_any_temperature():
    logits = random_logits()
    tokens, _ = draw(logits, columns(temperature=50.0, top_k=1))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_tiny_temperature_is_greedy(temperature, filters, shift):
    """Logits over the temperature may be infinite in float32."""
    logits = random_logits() + np.float32(shift)
    tokens, _ = draw(logits, columns(temperature=temperature, **filters))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e10, 3.4e38])
def test_huge_temperature_is_uniform_over_what_is_not_barred(temperature):
    ends = [[3, 4]] * R
    some = partial(columns, ends=ends, temperature=temperature, min_tokens=99)
    seeds = np.arange(40 * R).reshape(40, R)
    found = {int(t) for seed in seeds for t in draw(random_logits(), some(seed=seed))[0]}
    assert found == set(range(V)) - {3, 4}


def test_same_seed_gives_the_same_token_whatever_the_row_and_batch():
    rng = np.random.default_rng(1)
    row = rng.normal(0, 2, V).astype(np.float32)
    params = {"temperature": 0.8, "top_p": 0.95, "seed": 123}
    alone, _ = draw(np.tile(row, (R, 1)), columns(**params), num_output=5)
    assert len(set(alone.tolist())) == 1
    for place in range(R):
        logits = random_logits(seed=place)
        logits[place] = row
        mixed: dict[str, Any] = {
            name: np.where(np.arange(R) == place, value, other)
            for (name, value), other in zip(params.items(), (0.0, 0.5, 7), strict=True)
        }
        mixed["presence_penalty"] = np.where(np.arange(R) == place, 0.0, 1.0)
        tokens, _ = draw(logits, columns(**mixed), num_output=np.where(np.arange(R) == place, 5, 2))
        assert tokens[place] == alone[0]


def test_seed_and_count_change_the_token():
    logits = np.zeros((R, V))
    by_seed, _ = draw(logits, columns(seed=np.arange(R)))
    by_count, _ = draw(logits, columns(seed=9), num_output=np.arange(R))
    assert len(set(by_seed.tolist())) > 4
    assert len(set(by_count.tolist())) > 4


def test_both_words_of_the_seed_count():
    some = columns(seed=5)
    words = jnp.stack([jnp.arange(R, dtype=jnp.uint32), jnp.full(R, 5, jnp.uint32)], axis=1)
    tokens, _ = draw(np.zeros((R, V)), Sampling(**{**vars(some), "seed": words}))
    assert len(set(tokens.tolist())) > 4


NUM_DRAWS, FEW = 4000, 16
# Quantiles of 0.9999 by degrees of freedom; the seeds are fixed, so that chance has no part.
CHI_SQUARE = {2: 18.42, 4: 23.51, 7: 29.88, 15: 44.26}


@pytest.mark.parametrize("by", ["seed", "count"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 8, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.5, 12, 0.9, 0.2),
    ],
)
def test_draws_are_distributed_as_the_logits_say(by, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(4).normal(0, 1, FEW).astype(np.float32)
    each = np.arange(NUM_DRAWS)
    some = columns(
        NUM_DRAWS,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=each if by == "seed" else 77,
    )
    tokens, _ = many_rows(
        jnp.tile(jnp.asarray(logits), (NUM_DRAWS, 1)),
        some,
        History(jnp.zeros((1, FEW), bool), jnp.zeros((1, FEW), jnp.int32)),
        jnp.zeros(NUM_DRAWS, jnp.int32),
        jnp.asarray(each if by == "count" else each * 0, jnp.int32),
    )
    scaled = logits.astype(np.float64) / temperature
    kept = keep_likely_by_sorting(scaled, top_k, top_p, min_p)
    expected = np.where(kept, np.exp(scaled), 0)
    expected *= NUM_DRAWS / expected.sum()
    found = np.bincount(np.asarray(tokens), minlength=FEW)
    assert not found[~kept].any()
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < CHI_SQUARE[min(n for n in CHI_SQUARE if n >= kept.sum() - 1)]


def penalize_slowly(logits, prompt, output, repetition, presence, frequency) -> np.ndarray:
    logits = np.asarray(logits, np.float64).copy()
    for token in set(prompt) | set(output):
        logits[token] = (
            logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        )
    for token in set(output):
        logits[token] -= presence + frequency * output.count(token)
    return logits


def history_of(prompts: list[list[int]], outputs: list[list[int]]) -> History:
    in_prompt = np.zeros((R + 1, V), bool)
    num_output = np.zeros((R + 1, V), np.int32)
    for row in range(R):
        in_prompt[row, prompts[row]] = True
        num_output[row] = np.bincount(outputs[row], minlength=V)
    return History(jnp.asarray(in_prompt), jnp.asarray(num_output))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_penalties_are_those_of_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(R)]
    outputs = [rng.integers(0, V, rng.integers(0, 30)).tolist() for _ in range(R)]
    repetition = rng.choice([1.0, 0.5, 1.3, 4.0], R)
    presence, frequency = rng.choice([0.0, -2.0, 0.7, 2.0], (2, R))
    logits = rng.normal(0, 3, (R, V)).astype(np.float32)
    tokens, _ = draw(
        logits,
        columns(
            temperature=0.0,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        ),
        history_of(prompts, outputs),
        num_output=[len(output) for output in outputs],
    )
    for row in range(R):
        expected = penalize_slowly(
            logits[row], prompts[row], outputs[row], repetition[row], presence[row], frequency[row]
        )
        # Float32 may take either of two that are as good as equal.
        assert expected[tokens[row]] > expected.max() - 1e-4


def test_penalties_look_at_the_rows_slot():
    """Two rows swap slots, and with them what they have said before."""
    logits = np.zeros((R, V), np.float32)
    logits[:, 5], logits[:, 6] = 1.0, 0.9
    history = history_of([[]] * R, [[5], *[[]] * (R - 1)])
    slots = np.arange(R)
    slots[[0, 3]] = 3, 0
    tokens, _ = sample(
        jnp.asarray(logits),
        columns(temperature=0.0, presence_penalty=1.0),
        history,
        jnp.asarray(slots, jnp.int32),
        jnp.ones(R, jnp.int32),
    )
    assert np.asarray(tokens).tolist() == [5, 5, 5, 6, 5, 5, 5, 5]


def test_rows_without_penalties_are_untouched_by_those_with():
    logits = np.zeros((R, V), np.float32)
    logits[:, 5], logits[:, 6] = 1.0, 0.9
    history = history_of([[5]] * R, [[5]] * R)
    with_penalty = np.arange(R) % 2
    tokens, _ = draw(logits, columns(temperature=0.0, repetition_penalty=1 + with_penalty), history)
    assert tokens.tolist() == [5, 6] * (R // 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_min_tokens_bars_the_ends_until_it_is_reached(temperature):
    logits = np.full((R, V), -3.0, np.float32)
    logits[:, [0, 9, V - 1]] = 60.0 * max(temperature, 1.0)
    ends = [[0, 9, V - 1], [9], [], [0, 9, V - 1]] * 2
    some = columns(temperature=temperature, ends=ends, min_tokens=[3, 3, 3, 3, 0, 0, 0, 0])
    tokens, _ = draw(logits, some, num_output=[0, 1, 2, 3, 0, 1, 2, 3])
    likely = {0, 9, V - 1}
    assert tokens[0] not in likely
    assert tokens[1] in likely - {9}
    assert set(tokens[2:].tolist()) <= likely


def test_free_places_among_the_ends_bar_nothing():
    """They hold the vocabulary's size, which must not wrap to the last id."""
    logits = np.zeros((R, V), np.float32)
    logits[:, V - 1] = 5.0
    tokens, _ = draw(logits, columns(temperature=0.0, ends=[[0]] * R, min_tokens=9))
    assert tokens.tolist() == [V - 1] * R


def test_logprobs_are_those_before_penalties_and_temperature():
    logits = random_logits(scale=6.0)
    history = history_of([[1, 2]] * R, [[3]] * R)
    some = columns(
        temperature=3.0,
        top_k=4,
        presence_penalty=2.0,
        repetition_penalty=2.0,
        logprobs=[True] + [False] * (R - 1),
    )
    tokens, found = draw(logits, some, history)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.chosen, expected[np.arange(R), tokens], atol=1e-5)
    order = np.argsort(-expected, axis=-1)[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, -1), atol=1e-5)


def test_logprobs_are_skipped_when_nobody_wants_them():
    _, found = draw(random_logits(), columns())
    assert not found.chosen.any()
    assert found.top.shape == found.top_ids.shape == (R, MAX_LOGPROBS)


def test_vocabulary_smaller_than_the_alternatives_gives_all_of_it():
    found = sampler.logprobs(jnp.zeros((2, 5)), jnp.zeros(2, jnp.int32))
    assert found.top.shape == (2, 5)
    assert sampler.no_logprobs((2,), 5).top_ids.shape == (2, 5)
    np.testing.assert_allclose(found.chosen, -np.log(5), rtol=1e-6)


def test_logprobs_of_huge_logits_are_finite():
    logits = np.zeros((R, V), np.float32)
    logits[:, 1], logits[:, 2] = 3e38, -3e38
    tokens, found = draw(logits, columns(temperature=0.0, logprobs=True))
    assert tokens.tolist() == [1] * R
    np.testing.assert_array_equal(found.chosen, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_huge_logits_are_drawn_as_they_stand(temperature):
    logits = np.zeros((R, V), np.float32)
    logits[:, 11], logits[:, 12] = 3e38, -3e38
    tokens, _ = draw(logits, columns(temperature=temperature, top_p=0.9))
    assert tokens.tolist() == [11] * R


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_rows_nan_stays_its_own(poison):
    logits = random_logits()
    some = columns(
        temperature=[0.0, 0.7] * (R // 2),
        top_k=[0, 0, 5, 5] * 2,
        top_p=[1, 0.9] * (R // 2),
        min_p=0.01,
        presence_penalty=0.5,
        logprobs=True,
    )
    clean, clean_logprobs = draw(logits, some)
    for row in range(R):
        spoiled = logits.copy()
        spoiled[row] = poison
        tokens, found = draw(spoiled, some)
        others = np.arange(R) != row
        np.testing.assert_array_equal(tokens[others], clean[others])
        np.testing.assert_array_equal(found.chosen[others], clean_logprobs.chosen[others])
        assert 0 <= tokens[row] < V, "a token outside the vocabulary would go on to the embedding"


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_one_nan_logit_does_not_give_a_token_outside_the_vocabulary(filters):
    logits = random_logits()
    logits[:, 8] = np.nan
    tokens, _ = draw(logits, columns(temperature=1.0, **filters))
    assert ((tokens >= 0) & (tokens < V)).all()


@pytest.mark.parametrize("shape", [(3, 50), (2, 4, 33)])
def test_top_by_passes_is_a_stable_sort_without_sorting(shape, monkeypatch):
    """What GPUs run; few distinct numbers, so that many are equal, and one that is -inf."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, default, cpu: default(x))
    x = np.random.default_rng(0).integers(-3, 3, shape).astype(np.float32)
    x[..., 7] = -np.inf
    top, top_ids = sampler._top(jnp.asarray(x), 20)
    order = np.argsort(-x, axis=-1, kind="stable")[..., :20]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_array_equal(top, np.take_along_axis(x, order, axis=-1))
