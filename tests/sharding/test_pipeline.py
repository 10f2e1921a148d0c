"""The ring's turns as a table: which micro-batch and token each stage has at each tick."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import pipeline
from sharding.collectives import to_next_stage
from sharding.mesh import STAGE, MeshShape, make_meshes

Work = tuple[int, int]
"""Micro-batch and token."""


@pytest.fixture
def table(monkeypatch):
    """`turns[tick][stage]` for a number of stages and tokens; None where a stage is idle."""

    def turns(stages: int, num_tokens: int) -> list[list[Work | None]]:
        monkeypatch.setattr(pipeline, "num_stages", lambda: stages)

        def work(tick: int, stage: int) -> Work | None:
            turn = pipeline.turn_at(tick, stage, num_tokens)
            return (int(turn.micro_batch), int(turn.token)) if turn.active else None

        ticks = int(pipeline.num_ticks(num_tokens))
        return [[work(tick, stage) for stage in range(stages)] for tick in range(ticks)]

    return turns


RINGS = list(itertools.product([1, 2, 3, 4], [1, 2, 5]))


@pytest.mark.parametrize(("stages", "num_tokens"), RINGS)
def test_each_stage_works_once_on_each_token_of_each_micro_batch(table, stages, num_tokens):
    every = sorted(itertools.product(range(stages), range(num_tokens)))
    for column in zip(*table(stages, num_tokens), strict=True):
        assert sorted(filter(None, column)) == every


@pytest.mark.parametrize(("stages", "num_tokens"), RINGS)
def test_work_goes_from_stage_to_stage_at_the_next_tick(table, stages, num_tokens):
    """So that what a stage is handed is what it works on."""
    for one, after in itertools.pairwise(table(stages, num_tokens)):
        assert after[1:] == one[:-1]


@pytest.mark.parametrize(("stages", "num_tokens"), RINGS)
def test_micro_batch_enters_after_its_last_token_left(table, stages, num_tokens):
    """Its token is sampled when it leaves, and enters at the tick after."""
    turns = table(stages, num_tokens)
    entered = {row[0]: tick for tick, row in enumerate(turns) if row[0]}
    left = {row[-1]: tick for tick, row in enumerate(turns) if row[-1]}
    for (micro_batch, token), tick in entered.items():
        if token:
            assert tick == left[micro_batch, token - 1] + 1


@pytest.mark.parametrize(("stages", "num_tokens"), RINGS)
def test_stages_idle_only_while_the_ring_fills_and_drains(table, stages, num_tokens):
    turns = table(stages, num_tokens)
    for stage, column in enumerate(zip(*turns, strict=True)):
        busy = [tick for tick, work in enumerate(column) if work]
        assert busy == list(range(stage, stage + stages * num_tokens))
    assert turns[-1][-1] == (stages - 1, num_tokens - 1), "no tick is left over"


@pytest.mark.parametrize(("stages", "num_tokens"), [(2, 2), (4, 3)])
def test_idle_turns_point_within_the_batch(monkeypatch, stages, num_tokens):
    """Idle stages compute all the same; they must not index beyond their arrays."""
    monkeypatch.setattr(pipeline, "num_stages", lambda: stages)
    for tick, stage in itertools.product(range(pipeline.num_ticks(num_tokens)), range(stages)):
        turn = pipeline.turn_at(tick, stage, num_tokens)
        assert 0 <= turn.micro_batch < stages
        assert turn.token >= 0
        assert turn.token < num_tokens or not turn.active


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_devices_follow_the_table(table, stages):
    """Under shard_map each device sees its own turn, and is handed what it is to work on."""
    num_tokens = 3
    mesh = make_meshes(MeshShape(stage=stages))[0]

    def ring() -> jax.Array:
        def tick(handed, at):
            enters, here = (turn(at, num_tokens) for turn in (pipeline.entering, pipeline.here))
            leaves = pipeline.leaving(at, num_tokens)
            first = jax.lax.axis_index(STAGE) == 0
            name = lambda turn: 10 * turn.micro_batch + turn.token  # noqa: E731
            x = jnp.where(first, name(enters), handed)
            seen = (x, name(here), here.active, leaves.active)
            return to_next_stage(x), jnp.stack([jnp.int32(part) for part in seen])

        _, seen = jax.lax.scan(tick, jnp.int32(0), jnp.arange(pipeline.num_ticks(num_tokens)))
        return seen[None]

    run = jax.shard_map(ring, mesh=mesh, in_specs=(), out_specs=P(STAGE), check_vma=False)
    found = np.asarray(jax.jit(run)())
    for at, row in enumerate(table(stages, num_tokens)):
        for stage, work in enumerate(row):
            handed, own, active, leaving = found[stage, at]
            assert active == (work is not None)
            assert leaving == (row[-1] is not None)
            if work:
                assert handed == own == 10 * work[0] + work[1]
