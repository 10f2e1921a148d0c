"""Who works on what in the ring of pipeline stages.

A batch is cut into as many micro-batches as there are stages. At tick t, stage s works on
micro-batch (t - s) mod S of token (t - s) div S: when the last stage has finished a micro-batch,
its sampled tokens enter the first stage at the very next tick, so that only the ends of a loop
leave a stage idle. It does not know what a stage computes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sharding.collectives import num_stages, stage_index

Index = jax.Array | int


@dataclass(frozen=True)
class Turn:
    """A micro-batch at one stage at one tick; `token` counts from 0 in this loop."""

    micro_batch: Index
    token: Index
    active: jax.Array | bool
    """False while the ring fills or drains."""


def num_ticks(num_tokens: Index) -> Index:
    """Ticks until every micro-batch has been through every stage `num_tokens` times."""
    stages = num_stages()
    return num_tokens * stages + stages - 1


def turn_at(tick: Index, stage: Index, num_tokens: Index) -> Turn:
    stages = num_stages()
    if stages == 1:
        return Turn(0, tick, True)
    age = tick - stage
    token = jnp.maximum(age // stages, 0)
    return Turn(age % stages, token, (age >= 0) & (age // stages < num_tokens))


def entering(tick: Index, num_tokens: Index) -> Turn:
    """The turn of the first stage."""
    return turn_at(tick, 0, num_tokens)


def here(tick: Index, num_tokens: Index) -> Turn:
    """The turn of this device's stage."""
    return turn_at(tick, stage_index(), num_tokens)


def leaving(tick: Index, num_tokens: Index) -> Turn:
    """The turn of the last stage."""
    return turn_at(tick, num_stages() - 1, num_tokens)
