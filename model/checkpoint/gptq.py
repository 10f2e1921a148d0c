"""A matrix rounded to 8 bits so that its products with known inputs change least.

GPTQ (arXiv:2210.17323), computed as what it equals: Babai's nearest plane (arXiv:2507.18553). A row
takes up the errors of those before it, as far as its input follows theirs. It does not know where
inputs come from (`model/checkpoint/calibrate.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from model.checkpoint.quantize import channel_scales, nearest
from model.checkpoint.source import CheckpointError
from model.config import Quantization
from model.weights import QUANTIZED_DTYPES

BLOCK = 128
"""Rows whose errors go into the others' by one product."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of products of inputs, which are all that rounding needs of them."""

    here_II: np.ndarray
    """Of inputs in the rounded model with themselves."""
    away_II: np.ndarray
    """Of inputs in the rounded model with what the original model's have more."""
    num_tokens: int

    @classmethod
    def of(cls, inputs: Iterable[tuple[ArrayLike, ArrayLike]]) -> "Moments":
        """Of tokens' inputs [N, I] in the rounded model and in the original one, some at a time."""
        here_II, away_II, num_tokens = 0.0, 0.0, 0
        for here, original in inputs:
            here_NI, original_NI = np.asarray(here), np.asarray(original)
            here_II = here_II + (here_NI.T @ here_NI).astype(np.float64)
            away_II = away_II + (here_NI.T @ (original_NI - here_NI)).astype(np.float64)
            num_tokens += len(here_NI)
        return cls(np.asarray(here_II), np.asarray(away_II), num_tokens)


def round_for(
    weight_IO: np.ndarray, inputs: Moments, quantization: Quantization, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """`weight_IO` rounded, and the float32 scales of its output channels.

    Its products with the rounded model's inputs come near to the original's products with the
    original's inputs, so that it makes up for what was rounded before it, too (arXiv:2504.02692).
    Raises CheckpointError, with `name`, where a number is not finite.
    """
    if not (np.isfinite(inputs.here_II).all() and np.isfinite(inputs.away_II).all()):
        raise CheckpointError(
            f"{name} is multiplied with numbers that are not finite, of the tokens given; convert "
            "without --calibrate"
        )
    metric_II = _damped(inputs)
    weight_IO = weight_IO.astype(np.float32)
    meant_IO = weight_IO + np.linalg.solve(metric_II, inputs.away_II @ weight_IO)
    meant_IO = meant_IO.astype(np.float32)
    scales_O = channel_scales(meant_IO, (0,), quantization, name)
    # Inputs that matter most come first, while there are others to make up for their errors.
    order = np.argsort(-metric_II.diagonal(), kind="stable")
    factor_II = _lower_factor(metric_II[np.ix_(order, order)])
    pull_II = (factor_II / factor_II.diagonal()[:, None]).astype(np.float32)
    del metric_II, factor_II  # of many inputs they are most of the memory
    numbers_IO = np.empty(meant_IO.shape, QUANTIZED_DTYPES[quantization])
    meant_IO = meant_IO[order]
    errors_IO = np.zeros_like(meant_IO)
    for start in range(0, len(order), BLOCK):
        rows = slice(start, start + BLOCK)
        pulled = meant_IO[rows] + pull_II[rows, :start] @ errors_IO[:start]
        for i, row_O in enumerate(pulled, start):
            row_O = row_O + pull_II[i, start:i] @ errors_IO[start:i]
            numbers_O = nearest(row_O / scales_O, quantization)
            errors_IO[i] = meant_IO[i] - numbers_O.astype(np.float32) * scales_O
            numbers_IO[order[i]] = numbers_O
    return numbers_IO, scales_O


def _damped(inputs: Moments) -> np.ndarray:
    """As if as many tokens more had been seen as there are inputs, along each input one.

    Few tokens say little of rare directions. docs/performance.md has what other amounts cost.
    """
    energy = np.trace(inputs.here_II) / max(inputs.num_tokens, 1)
    damped_II = inputs.here_II.copy()
    damped_II[np.diag_indices_from(damped_II)] += energy if energy > 0 else 1.0
    return damped_II


def _lower_factor(metric_II: np.ndarray) -> np.ndarray:
    """The lower triangular A of which A.T @ A is the metric (Cholesky's is that of A @ A.T)."""
    return np.linalg.cholesky(metric_II[::-1, ::-1])[::-1, ::-1].T
