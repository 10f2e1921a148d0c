"""Weights rounded to 8 bits, each output channel scaled so that its largest number is the largest.

It does not know which weights are to be rounded (`model/weights.py`) or where they go.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from model.checkpoint.source import CheckpointError
from model.config import Quantization
from model.weights import QUANTIZED_DTYPES

LARGEST: dict[Quantization, float] = {
    "int8": 127.0,
    "fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max),
}
STEP = 1 << 22
"""Numbers rounded at a time, so that the temporaries are small."""


def quantize(
    array: np.ndarray, summed: tuple[int, ...], quantization: Quantization, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """`array` rounded to nearest, and the float32 scales of its output channels.

    They are of its shape without the axes `summed`. Raises CheckpointError, with `name`, where a
    number is not finite.
    """
    scales = channel_scales(array, summed, quantization, name)
    numbers = np.empty(array.shape, QUANTIZED_DTYPES[quantization])
    for rows in _steps(array):
        divisors = np.expand_dims(scales if 0 in summed else scales[rows], summed)
        numbers[rows] = nearest(array[rows].astype(np.float32) / divisors, quantization)
    return numbers, scales


def channel_scales(
    array: np.ndarray, summed: tuple[int, ...], quantization: Quantization, name: str
) -> np.ndarray:
    """What makes each output channel's largest number the largest; as `quantize`."""
    kept = tuple(size for axis, size in enumerate(array.shape) if axis not in summed)
    peaks = np.zeros(kept, np.float32)
    for rows in _steps(array):
        found = np.abs(array[rows].astype(np.float32)).max(summed)
        if 0 in summed:
            np.maximum(peaks, found, out=peaks)
        else:
            peaks[rows] = found
    if not np.isfinite(peaks).all():
        raise CheckpointError(
            f"{name} holds numbers that are not finite, which {quantization} can't; convert "
            "without --quantize"
        )
    # Of a channel of zeros it is not zero, since numbers are divided by it.
    return np.maximum(peaks / np.float32(LARGEST[quantization]), np.finfo(np.float32).tiny)


def nearest(parts: np.ndarray, quantization: Quantization) -> np.ndarray:
    """The nearest numbers there are; beyond the largest, that."""
    parts = np.clip(parts, -LARGEST[quantization], LARGEST[quantization])
    if quantization == "int8":
        parts = np.rint(parts)
    return parts.astype(QUANTIZED_DTYPES[quantization])


def _steps(array: np.ndarray) -> Iterator[slice]:
    rows = max(1, STEP // max(1, array[0].size))
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)
