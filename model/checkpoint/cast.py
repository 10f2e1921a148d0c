"""Conversion between floating dtypes that refuses to make infinities.

It does not know where the numbers go.
"""

import ml_dtypes
import numpy as np

from model.checkpoint.source import CheckpointError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STEP = 1 << 20  # elements converted at a time, so that the temporaries are small


def target_dtype(stored: np.dtype, wanted: np.dtype | None) -> np.dtype:
    """What a tensor becomes: `wanted` if it is of floating type, else itself."""
    return wanted if wanted is not None and stored in DTYPES.values() else stored


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` as `dtype`, rounded to nearest; NaN and infinities stay what they are.

    Raises CheckpointError, with `name`, where a finite value is too large for `dtype`.
    """
    if array.dtype == dtype:
        return array
    source = array.reshape(-1)
    result = np.empty(source.shape, dtype)
    for start in range(0, len(source), STEP):
        part = source[start : start + STEP]
        with np.errstate(over="ignore"):
            converted = part.astype(dtype)
        if (np.isinf(converted) & np.isfinite(part)).any():
            largest = float(np.abs(part[np.isfinite(part)]).max())
            raise CheckpointError(
                f"{name} holds {largest:.6g}, beyond {dtype}'s largest value "
                f"{float(ml_dtypes.finfo(dtype).max):.6g}; convert to bfloat16 or float32"
            )
        result[start : start + STEP] = converted
    return result.reshape(array.shape)
