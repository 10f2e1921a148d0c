"""One step of the batch: a pure function (weights, state, batch) -> (state, output) of one device.

It is jitted under `jax.shard_map` in one place (`serve/programs.py`) and knows rows, not requests.
The same function is a single step (one token each, prefill chunks beside decode rows), and the
K-step loop in which nothing but decode rows runs and no token visits the host.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model import sampling as sampler
from model.attention import Tokens
from model.decoder import Decoder
from model.pages import Pages
from model.sampling import History, Logprobs, Sampling
from sharding import pipeline
from sharding.collectives import from_last_stage, num_stages, stage_index, to_next_stage

PIECE = 64
"""Most tokens whose logits over the vocabulary are held at once for prompt logprobs."""


@dataclass(frozen=True)
class StepShape:
    """What is static in a step: the bucket it was compiled for."""

    num_decode: int
    """Decode rows, over all micro-batches."""
    num_chunks: int
    """Prefill rows, over all micro-batches."""
    chunk: int
    """Tokens of a prefill row."""
    max_tokens: int
    """Tokens a decode row may advance in one call; 1 where there are prefill rows."""

    @property
    def num_rows(self) -> int:
        return self.num_decode + self.num_chunks

    @property
    def num_tokens(self) -> int:
        """That are computed at once."""
        return self.num_decode + self.num_chunks * self.chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the device from step to step; donated to each."""

    pages: list[Pages]
    """This stage's layers."""
    last_token: Int[Array, "slots"]
    """By slot, the token a decode row continues; the last slot belongs to padding."""
    ended: Bool[Array, "slots"]
    """By slot, whether that token was the last: a step already under way then skips it."""
    history: History
    """By slot."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Decode rows, then prefill rows; a tick takes the leading axis [M] of micro-batches off."""

    slot: Int[Array, "R"]
    start: Int[Array, "R"]
    """Position of the row's first new token."""
    length: Int[Array, "R"]
    """New tokens; 0 marks padding."""
    num_output: Int[Array, "R"]
    """Tokens chosen for this request before."""
    remaining: Int[Array, "R"]
    """Tokens it may still be given, 1 or more."""
    sampled: Bool[Array, "R"]
    """False for a prefill row whose prompt goes on."""
    tables: Int[Array, "R W"]
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    rows: Rows
    chunk_tokens: Int[Array, "M R T"]
    chunk_targets: Int[Array, "M R T"]
    """The token after each, for prompt logprobs."""
    wants_prompt_logprobs: Bool[Array, "M"]
    num_tokens: Int[Array, ""]
    """Tokens to advance, at most the shape's max_tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """K tokens of each row; those after a row's end mean nothing."""

    tokens: Int[Array, "K M R"]
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    """[M, R, T] of the prefill rows; zeros where no row of the micro-batch wants them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Ring:
    """What goes from tick to tick."""

    tick: Int[Array, ""]
    x_ND: Float[Array, "N D"]
    """What the previous stage handed on."""
    active_MR: Bool[Array, "M R"]
    """Rows not yet at their end."""
    state: State
    output: StepOutput


def step(
    decoder: Decoder, shape: StepShape, state: State, batch: Batch
) -> tuple[State, StepOutput]:
    """Advances every row: decode rows by up to `batch.num_tokens`, prefill rows by their tokens."""
    stages = num_stages()
    assert shape.num_decode % stages == 0, "decode rows are dealt evenly to micro-batches"
    assert shape.num_chunks % stages == 0, "prefill rows are dealt evenly to micro-batches"
    ring = _start(decoder, shape, state, batch)
    if stages == 1 and shape.max_tokens == 1:
        ring = _tick(decoder, shape, batch, ring)
        return ring.state, ring.output
    last = pipeline.num_ticks(batch.num_tokens)
    ring = lax.while_loop(
        lambda ring: (ring.tick < last) & jnp.any(ring.active_MR),
        lambda ring: _tick(decoder, shape, batch, ring),
        ring,
    )
    return ring.state, ring.output


def _start(decoder: Decoder, shape: StepShape, state: State, batch: Batch) -> _Ring:
    M, vocab = num_stages(), decoder.config.vocab_size
    R, chunks = shape.num_rows // M, shape.num_chunks // M
    num_tokens = shape.num_decode // M + chunks * shape.chunk
    tokens_KMR = (shape.max_tokens, M, R)
    output = StepOutput(
        jnp.zeros(tokens_KMR, jnp.int32),
        sampler.no_logprobs(tokens_KMR, vocab),
        sampler.no_logprobs((M, chunks, shape.chunk), vocab),
    )
    x_ND = jnp.zeros((num_tokens, decoder.config.hidden_size), decoder.embedding.dtype)
    is_decode_R = jnp.arange(R) < shape.num_decode // M
    active_MR = (batch.rows.length > 0) & ~(is_decode_R & state.ended[batch.rows.slot])
    return _Ring(jnp.int32(0), x_ND, active_MR, state, output)


def _tick(decoder: Decoder, shape: StepShape, batch: Batch, ring: _Ring) -> _Ring:
    """Every stage runs its layers over a micro-batch; one enters, one leaves and is sampled."""
    enters, here, leaves = (
        turn(ring.tick, batch.num_tokens)
        for turn in (pipeline.entering, pipeline.here, pipeline.leaving)
    )
    x_ND = decoder.embed(_entering_tokens(shape, batch, ring, enters.micro_batch))
    if num_stages() > 1:
        x_ND = jnp.where(stage_index() == 0, x_ND, ring.x_ND)
    tokens = _place(shape, batch, ring, here)
    x_ND, pages = decoder.run(x_ND, ring.state.pages, tokens)

    rows = _micro_batch(batch.rows, leaves.micro_batch)
    logits_RV = decoder.logits(from_last_stage(x_ND[_last_places(shape, rows)]))
    num_output = rows.num_output + leaves.token
    chosen_R, logprobs = sampler.sample(
        logits_RV, rows.sampling, ring.state.history, rows.slot, num_output
    )
    was_active_R = ring.active_MR[leaves.micro_batch]
    ended_R = jnp.any(chosen_R[:, None] == rows.sampling.end_ids, axis=1)
    ended_R |= leaves.token + 1 >= rows.remaining
    state = _remember(
        replace(ring.state, pages=pages), rows, chosen_R, ended_R, was_active_R & leaves.active
    )
    active_R = was_active_R & ~(ended_R & leaves.active)
    output = StepOutput(
        ring.output.tokens.at[leaves.token, leaves.micro_batch].set(chosen_R),
        jax.tree.map(
            lambda all_, new: all_.at[leaves.token, leaves.micro_batch].set(new),
            ring.output.logprobs,
            logprobs,
        ),
        _prompt_logprobs(decoder, shape, batch, ring.output.prompt_logprobs, x_ND, leaves),
    )
    return _Ring(
        ring.tick + 1,
        to_next_stage(x_ND),
        ring.active_MR.at[leaves.micro_batch].set(active_R),
        state,
        output,
    )


def _micro_batch(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _entering_tokens(shape: StepShape, batch: Batch, ring: _Ring, micro_batch) -> jax.Array:
    slots_R = batch.rows.slot[micro_batch]
    decode_B = ring.state.last_token[slots_R[: shape.num_decode // num_stages()]]
    return jnp.concatenate([decode_B, batch.chunk_tokens[micro_batch].reshape(-1)])


def _place(shape: StepShape, batch: Batch, ring: _Ring, turn: pipeline.Turn) -> Tokens:
    """Positions of the micro-batch's tokens, and where their keys and values go."""
    rows = _micro_batch(batch.rows, turn.micro_batch)
    B, T = shape.num_decode // num_stages(), shape.chunk
    page_size = ring.state.pages[0].page_size
    is_decode_R = lax.iota(jnp.int32, rows.start.shape[0]) < B
    starts_R = rows.start + jnp.where(is_decode_R, turn.token, 0)
    lengths_R = jnp.where(ring.active_MR[turn.micro_batch] & turn.active, rows.length, 0)

    def places(rows_slice: slice, width: int) -> tuple[jax.Array, jax.Array]:
        at_RT = starts_R[rows_slice, None] + jnp.arange(width)
        page_RT = jnp.take_along_axis(
            rows.tables[rows_slice], at_RT // page_size, axis=1, mode="clip"
        )
        written_RT = jnp.arange(width) < lengths_R[rows_slice, None]
        # Padding is written to page 0, which nobody owns.
        return at_RT.reshape(-1), jnp.where(written_RT, page_RT, 0).reshape(-1)

    decode, chunks = places(slice(0, B), 1), places(slice(B, None), T)
    positions_N, page_N = (jnp.concatenate(pair) for pair in zip(decode, chunks, strict=True))
    return Tokens(positions_N, page_N, rows.tables, starts_R, lengths_R, B, T)


def _last_places(shape: StepShape, rows: Rows) -> jax.Array:
    """Where each row's last token stands among the micro-batch's tokens."""
    B = shape.num_decode // num_stages()
    chunks = lax.iota(jnp.int32, rows.slot.shape[0] - B)
    last = B + chunks * shape.chunk + jnp.maximum(rows.length[B:] - 1, 0)
    return jnp.concatenate([jnp.arange(B), last])


def _remember(
    state: State, rows: Rows, chosen_R: jax.Array, ended_R: jax.Array, active_R: jax.Array
) -> State:
    """The state after `chosen_R`, where a row was active and at its prompt's end."""
    kept_R = active_R & rows.sampled
    padding = state.last_token.shape[0] - 1
    slots_R = jnp.where(kept_R, rows.slot, padding)
    counted_R = (kept_R & sampler.uses_history(rows.sampling)).astype(jnp.int32)
    history = History(
        state.history.in_prompt,
        state.history.num_output.at[slots_R, chosen_R].add(counted_R),
    )
    return State(
        state.pages,
        state.last_token.at[slots_R].set(chosen_R),
        state.ended.at[slots_R].set(ended_R),
        history,
    )


def _prompt_logprobs(
    decoder: Decoder,
    shape: StepShape,
    batch: Batch,
    found: Logprobs,
    x_ND: jax.Array,
    turn: pipeline.Turn,
) -> Logprobs:
    """Logprobs of each prefill token's successor, a few tokens at a time to bound memory."""
    if not shape.num_chunks:
        return found
    B = shape.num_decode // num_stages()

    def compute() -> Logprobs:
        piece = next(n for n in range(PIECE, 0, -1) if shape.chunk % n == 0)
        x_STD = from_last_stage(x_ND[B:]).reshape(-1, piece, x_ND.shape[1])
        targets_ST = batch.chunk_targets[turn.micro_batch].reshape(-1, piece)
        new = lax.map(
            lambda some: sampler.logprobs(decoder.logits(some[0]), some[1]), (x_STD, targets_ST)
        )
        return jax.tree.map(
            lambda all_, one: all_.at[turn.micro_batch].set(one.reshape(all_.shape[1:])), found, new
        )

    wanted = batch.wants_prompt_logprobs[turn.micro_batch] & turn.active
    return lax.cond(wanted, compute, lambda: found)
