"""What a model's weights are multiplied with, noted while it is traced for whoever asks.

Calibration asks (`model/checkpoint/calibrate.py`); while a model is served, nobody does. It does
not know what is computed with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from model.linear import Norm, rms_norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Input:
    """Of a product, or of experts."""

    x_ND: Float[Array, "N D"]
    routed_EN: Float[Array, "E N"] | None = None
    """Of experts: each token's weight on each, zero where it isn't routed to it."""


_asked: ContextVar[list[Input] | None] = ContextVar("_asked", default=None)


@contextmanager
def noted_inputs() -> Iterator[list[Input]]:
    """Those of what is traced while the context lasts, in order."""
    inputs: list[Input] = []
    token = _asked.set(inputs)
    try:
        yield inputs
    finally:
        _asked.reset(token)


def note_input(
    x_ND: Float[Array, "N D"],
    norm: Norm | None = None,
    routed_EN: Float[Array, "E N"] | None = None,
) -> None:
    """That norm(x) is about to be multiplied with a weight, or given to experts."""
    if (inputs := _asked.get()) is not None:
        inputs.append(Input(x_ND if norm is None else rms_norm(x_ND, norm), routed_EN))
