"""What is packed on the host is what the step unpacks."""

from dataclasses import fields

import jax
import numpy as np
import pytest

from model.sampling import Sampling
from model.step import Batch, StepShape
from serve.packing import SAMPLING_COLUMNS, SAMPLING_WIDTH, Packing, padding_row, sampling_row
from serve.plan import Row, StepPlan
from serve.plan import Sequence as Running
from serve.request import MAX_STOP_IDS, GenerateRequest, SamplingParams

VOCAB, SLOTS, TABLE_WIDTH, CHUNK = 100, 9, 3, 5
"""Slots of sequences, and one more for padding."""

AWKWARD = SamplingParams(
    temperature=0.1,
    top_k=2**31 - 1,
    top_p=1e-45,
    min_p=0.30000001192092896,
    seed=2**63 - 2**31 - 7,
    repetition_penalty=1 / 3,
    presence_penalty=-0.0,
    frequency_penalty=-2.0,
    min_tokens=3,
    logprobs=0,
)


def running(slot: int = 0, sampling: SamplingParams = AWKWARD, **changes: object) -> Running:
    values: dict[str, object] = {
        "request": GenerateRequest(f"r{slot}", (1, 2, 3), sampling),
        "order": slot,
        "arrival_s": 0.0,
        "max_length": 50,
        "end_ids": frozenset({7, 2 + slot}),
        "seed": sampling.seed or 11 + slot,
        "tokens": [1, 2, 3],
        "num_prompt": 3,
        "slot": slot,
    }
    return Running(**(values | changes))  # type: ignore


def decode_row(slot: int, num_tokens: int = 1) -> Row:
    return Row(running(slot), slot, 10 + slot, 1, 20 + slot, 30 + slot, num_tokens)


def prefill_row(slot: int, length: int, num_tokens: int, targets: int = 0) -> Row:
    ids = tuple(range(slot * 10, slot * 10 + length))
    wanted = tuple(i + 1 for i in ids[:targets])
    return Row(running(slot), slot, 40 + slot, length, 0, 50 + slot, num_tokens, ids, wanted)


def slots_state() -> tuple[np.ndarray, np.ndarray]:
    """Sampling columns and page tables by slot."""
    rows = [sampling_row(running(slot), VOCAB) for slot in range(SLOTS)]
    tables = np.arange((SLOTS + 1) * TABLE_WIDTH, dtype=np.int32).reshape(SLOTS + 1, -1)
    tables[-1] = 0
    return np.stack([*rows, padding_row(VOCAB)]), tables


def round_trip(plan: StepPlan, micro_batches: int, decode: int = 8, chunks: int = 4) -> Batch:
    packing = Packing(StepShape(decode, chunks, CHUNK, 4), micro_batches, TABLE_WIDTH)
    packed = packing.pack(plan, *slots_state())
    assert packed.dtype == np.int32
    assert packed.shape == (micro_batches, packing.width)
    return jax.tree.map(np.asarray, jax.jit(packing.unpack)(packed))


PLAN = StepPlan(
    decode=[decode_row(slot) for slot in (4, 0, 7, 2, 5)],
    chunks=[prefill_row(1, 5, 0, targets=5), prefill_row(1, 2, 1, targets=1), prefill_row(8, 3, 1)],
)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_rows_come_back_in_their_places(micro_batches):
    batch = round_trip(PLAN, micro_batches)
    B, G = 8 // micro_batches, 4 // micro_batches
    _, tables = slots_state()
    expected = [(i // B, i % B, row) for i, row in enumerate(PLAN.decode)]
    expected += [(i // G, B + i % G, row) for i, row in enumerate(PLAN.chunks)]
    rows = batch.rows
    for m, r, row in expected:
        for name in ("slot", "start", "length", "num_output", "remaining"):
            assert getattr(rows, name)[m, r] == getattr(row, name), name
        assert rows.sampled[m, r] == (row.num_tokens > 0)
        assert rows.tables[m, r].tolist() == tables[row.slot].tolist()
        assert rows.sampling.seed[m, r].tolist() == [
            row.sequence.seed >> 32,
            row.sequence.seed % 2**32,
        ]
    assert rows.sampled.dtype == np.bool_
    assert (rows.length > 0).sum() == len(expected)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_all_other_rows_are_padding(micro_batches):
    batch = round_trip(PLAN, micro_batches)
    rows = batch.rows
    padding = rows.length == 0
    assert padding.sum() == 12 - 8
    assert (rows.slot[padding] == SLOTS).all()
    assert (rows.remaining[padding] == 1).all()
    assert not rows.sampled[padding].any()
    assert not rows.tables[padding].any(), "padding reads and writes the null page only"
    assert (rows.sampling.temperature[padding] == 0).all()
    assert (rows.sampling.end_ids[padding] == VOCAB).all()


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_prompt_tokens_and_targets_come_back(micro_batches):
    batch = round_trip(PLAN, micro_batches)
    tokens = batch.chunk_tokens.reshape(4, CHUNK)
    targets = batch.chunk_targets.reshape(4, CHUNK)
    for i, row in enumerate(PLAN.chunks):
        free = [0] * (CHUNK - row.length)
        assert tokens[i].tolist() == [*row.token_ids, *free]
        assert targets[i].tolist() == [*row.targets, *[0] * (CHUNK - len(row.targets))]
    wanted = {1: [True], 2: [True, False], 4: [True, True, False, False]}
    assert batch.wants_prompt_logprobs.tolist() == wanted[micro_batches]


def test_number_of_tokens_comes_back_without_prefill_rows():
    plan = StepPlan(decode=[decode_row(3, num_tokens=4)], num_tokens=4)
    batch = round_trip(plan, micro_batches=2, chunks=0)
    assert batch.num_tokens == 4
    assert batch.rows.slot[0, 0] == 3
    assert batch.chunk_tokens.shape == (2, 0, CHUNK)


def test_prefill_comes_back_without_decode_rows():
    batch = round_trip(StepPlan(chunks=PLAN.chunks), micro_batches=1, decode=0)
    assert batch.rows.slot.tolist() == [[1, 1, 8, SLOTS]]


def test_empty_plan_is_all_padding():
    batch = round_trip(StepPlan(), micro_batches=2)
    assert not batch.rows.length.any()
    assert not batch.wants_prompt_logprobs.any()


def test_sampling_keeps_every_bit():
    plan = StepPlan(decode=[decode_row(6)])
    sampling = round_trip(plan, micro_batches=1).rows.sampling
    for name, (dtype, width) in SAMPLING_COLUMNS.items():
        found = getattr(sampling, name)[0, 0]
        assert found.dtype == dtype
        assert found.size == width
        if name not in ("seed", "end_ids", "logprobs"):
            expected = np.asarray(getattr(AWKWARD, name), dtype)
            assert found.tobytes() == expected.tobytes(), name
    assert AWKWARD.seed is not None
    assert int(sampling.seed[0, 0, 0]) << 32 | int(sampling.seed[0, 0, 1]) == AWKWARD.seed
    assert sampling.end_ids[0, 0].tolist() == [7, 8] + [VOCAB] * (MAX_STOP_IDS - 2)
    assert sampling.logprobs[0, 0]


def test_columns_are_the_fields_of_sampling():
    assert set(SAMPLING_COLUMNS) == {field.name for field in fields(Sampling)}


def test_end_ids_outside_the_vocabulary_are_left_out():
    """Negative ones would count from its end."""
    row = running(end_ids=frozenset({-1, -(2**40), VOCAB - 1, VOCAB, 2**40}))
    ends = sampling_row(row, VOCAB)[-MAX_STOP_IDS - 2 : -2]
    assert ends.tolist() == [VOCAB - 1] + [VOCAB] * (MAX_STOP_IDS - 1)


def test_there_is_room_for_as_many_end_ids_as_a_request_may_have():
    row = running(end_ids=frozenset(range(MAX_STOP_IDS)))
    found = sampling_row(row, VOCAB)
    assert len(found) == SAMPLING_WIDTH
    assert found[-MAX_STOP_IDS - 2 : -2].tolist() == list(range(MAX_STOP_IDS))


def test_numbers_beyond_their_columns_become_the_largest():
    """The loop that serves everyone must not stop for one request's numbers."""
    wild = SamplingParams(temperature=1e300, repetition_penalty=1e-300, min_tokens=2**40)
    sampling = sampling_row(running(sampling=wild), VOCAB)
    floats = sampling.view(np.float32)
    assert floats[0] == np.inf
    assert sampling[-2] == 50
