"""A step's rows as one int32 array: packed on the host, unpacked inside the jitted step.

One array is one transfer. Both directions stand here, read from one list of columns, so that they
cannot drift apart. It does not know the scheduler's rules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from model.sampling import Sampling
from model.step import Batch, Rows, StepShape
from serve.plan import Row, StepPlan
from serve.plan import Sequence as Running
from serve.request import MAX_STOP_IDS, GenerateRequest, SamplingParams

HEADER = 2
"""Tokens to advance; whether a row wants prompt logprobs."""

ROW_COLUMNS = ("slot", "start", "length", "num_output", "remaining", "sampled")

SAMPLING_COLUMNS: dict[str, tuple[type, int]] = {
    "temperature": (np.float32, 1),
    "top_k": (np.int32, 1),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 1),
    "seed": (np.uint32, 2),
    "repetition_penalty": (np.float32, 1),
    "presence_penalty": (np.float32, 1),
    "frequency_penalty": (np.float32, 1),
    "end_ids": (np.int32, MAX_STOP_IDS),
    "min_tokens": (np.int32, 1),
    "logprobs": (np.bool_, 1),
}
"""dtype and width of each field of `model.sampling.Sampling`."""

SAMPLING_WIDTH = sum(width for _, width in SAMPLING_COLUMNS.values())


def sampling_row(sequence: Running, vocab_size: int) -> NDArray[np.int32]:
    """A sequence's sampling parameters as columns [SAMPLING_WIDTH]; floats keep their bits."""
    sampling = sequence.request.sampling
    end_ids = sorted(id_ for id_ in sequence.end_ids if 0 <= id_ < vocab_size)
    special = {
        "seed": [sequence.seed >> 32, sequence.seed & 0xFFFFFFFF],
        "end_ids": end_ids + [vocab_size] * (MAX_STOP_IDS - len(end_ids)),
        "min_tokens": [min(sampling.min_tokens, sequence.max_length)],
        "logprobs": [sampling.logprobs is not None],
    }
    # A temperature beyond float32 becomes inf, which the sampler takes for what it means: uniform.
    with np.errstate(over="ignore"):
        columns = [
            np.asarray(special.get(name, getattr(sampling, name, None)), dtype).reshape(-1)
            for name, (dtype, _) in SAMPLING_COLUMNS.items()
        ]
    return np.concatenate(
        [c.astype(np.int32) if c.dtype == np.bool_ else c.view(np.int32) for c in columns]
    )


def padding_row(vocab_size: int) -> NDArray[np.int32]:
    """The columns of rows that are nobody's: greedy, without an end."""
    request = GenerateRequest("", (0,), SamplingParams(temperature=0.0))
    nobody = Running(request, 0, 0.0, 1, frozenset(), 0, [0], 1)
    return sampling_row(nobody, vocab_size)


@dataclass(frozen=True)
class Packing:
    """The layout of one bucket's array: [micro-batches, width]."""

    shape: StepShape
    micro_batches: int
    table_width: int

    @property
    def rows_per_micro_batch(self) -> tuple[int, int]:
        """Decode rows and prefill rows."""
        return (
            self.shape.num_decode // self.micro_batches,
            self.shape.num_chunks // self.micro_batches,
        )

    @property
    def width(self) -> int:
        """Columns of a micro-batch."""
        return sum(math.prod(shape) for shape in self._part_shapes)

    @property
    def _part_shapes(self) -> list[tuple[int, ...]]:
        """Header, rows, sampling, tables, prefill tokens, their targets."""
        B, G = self.rows_per_micro_batch
        widths = (len(ROW_COLUMNS), SAMPLING_WIDTH, self.table_width)
        tokens = (G, self.shape.chunk)
        return [(HEADER,), *((B + G, width) for width in widths), tokens, tokens]

    def pack(
        self,
        plan: StepPlan,
        sampling: NDArray[np.int32],
        tables: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """The array of `plan`; `sampling` and `tables` have a row per slot, the last padding's."""
        M, (B, G), T = self.micro_batches, self.rows_per_micro_batch, self.shape.chunk
        padding = len(sampling) - 1
        rows = np.zeros((M, B + G, len(ROW_COLUMNS)), np.int32)
        rows[..., 0] = padding
        rows[..., 4] = 1
        _fill(rows[:, :B], plan.decode)
        _fill(rows[:, B:], plan.chunks)
        tokens = np.zeros((M, G, T), np.int32)
        targets = np.zeros((M, G, T), np.int32)
        for i, row in enumerate(plan.chunks):
            tokens[i // G, i % G, : row.length] = row.token_ids
            targets[i // G, i % G, : len(row.targets)] = row.targets
        slots = rows[..., 0]
        header = np.zeros((M, HEADER), np.int32)
        header[:, 0] = plan.num_tokens
        for i, row in enumerate(plan.chunks):
            header[i // G, 1] |= bool(row.targets)
        parts = (header, rows, sampling[slots], tables[slots], tokens, targets)
        return np.concatenate([part.reshape(M, -1) for part in parts], axis=1)

    def unpack(self, packed: jax.Array) -> Batch:
        """The inverse, traced inside the step."""
        shapes = self._part_shapes
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        header, rows, sampling, tables, tokens, targets = (
            part.reshape(self.micro_batches, *shape)
            for part, shape in zip(jnp.split(packed, ends[:-1], axis=1), shapes, strict=True)
        )
        columns = {name: rows[..., i] for i, name in enumerate(ROW_COLUMNS)}
        columns["sampled"] = columns["sampled"] != 0
        return Batch(
            rows=Rows(**columns, tables=tables, sampling=_unpack_sampling(sampling)),
            chunk_tokens=tokens,
            chunk_targets=targets,
            wants_prompt_logprobs=header[:, 1] != 0,
            num_tokens=header[0, 0],
        )


_columns = attrgetter("slot", "start", "length", "num_output", "remaining", "num_tokens")
"""A row's ROW_COLUMNS, but for the last: whether it is sampled is whether it is given tokens."""


def _fill(columns: NDArray[np.int32], rows: Sequence[Row]) -> None:
    """Deals `rows` to micro-batches in order: the first fills up before the second begins."""
    values = np.fromiter(chain.from_iterable(map(_columns, rows)), np.int32)
    values = values.reshape(len(rows), len(ROW_COLUMNS))
    values[:, -1] = values[:, -1] > 0
    width = columns.shape[1]
    for first in range(0, len(rows), max(width, 1)):
        some = values[first : first + width]
        columns[first // width, : len(some)] = some


def _unpack_sampling(columns: jax.Array) -> Sampling:
    fields: dict[str, jax.Array] = {}
    at = 0
    for name, (dtype, width) in SAMPLING_COLUMNS.items():
        part = columns[..., at : at + width]
        at += width
        if dtype is np.bool_:
            part = part != 0
        elif dtype is not np.int32:
            part = jax.lax.bitcast_convert_type(part, dtype)
        fields[name] = part if width > 1 else part[..., 0]
    return Sampling(**fields)
