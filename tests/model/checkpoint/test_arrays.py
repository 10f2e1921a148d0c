"""The array helpers: contiguous, cast, resolve, Recent."""

import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from model.checkpoint.cast import DTYPES, STEP, cast, target_dtype
from model.checkpoint.contiguous import contiguous
from model.checkpoint.recent import Recent
from model.checkpoint.source import CheckpointError, resolve

BFLOAT16 = DTYPES["bfloat16"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint8])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_contiguous_is_what_numpy_copies(dtype, order):
    array = np.arange(3 * 300 * 130).reshape(3, 300, 130).astype(dtype).transpose(order)
    copy = contiguous(array)
    assert copy.flags.c_contiguous
    assert copy.dtype == dtype
    assert copy.tobytes() == np.ascontiguousarray(array).tobytes()


def test_contiguous_gives_back_what_is_contiguous():
    array = np.zeros((4, 5))
    assert contiguous(array) is array


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 200, 1), (300,)])
def test_contiguous_takes_degenerate_shapes(shape):
    array = np.ones(shape).T
    np.testing.assert_array_equal(contiguous(array), array)


@pytest.mark.parametrize("target", list(DTYPES.values()))
@pytest.mark.parametrize("source", list(DTYPES.values()))
def test_cast_is_numpys_and_keeps_nan_and_infinity(source, target):
    array = np.array([[0.0, -0.0, 1.5, -2.25], [np.nan, np.inf, -np.inf, 1e-3]]).astype(source)
    converted = cast(array, target, "x")
    assert converted.dtype == target
    # As float32, since NumPy does not take bfloat16's NaNs for equal.
    expected = array.astype(target).astype(np.float32)
    np.testing.assert_array_equal(converted.astype(np.float32), expected)


def test_cast_to_float16_refuses_a_finite_value_it_cannot_hold():
    array = np.zeros(STEP + 3, np.float32)
    array[-1] = -70_000
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.down holds 70000, beyond float16's .*65504"
    ):
        cast(array, DTYPES["float16"], "layers.0.mlp.down")


def test_cast_to_bfloat16_refuses_what_would_round_to_infinity():
    with pytest.raises(CheckpointError, match="beyond bfloat16"):
        cast(np.array([np.finfo(np.float32).max]), BFLOAT16, "x")


def test_only_floating_tensors_change_dtype():
    assert target_dtype(np.dtype(np.float32), BFLOAT16) == BFLOAT16
    assert target_dtype(np.dtype(np.int8), BFLOAT16) == np.int8
    assert target_dtype(np.dtype(np.float16), None) == np.float16


def test_resolve_fills_in_and_bounds_slices():
    assert resolve((slice(2, None), slice(None)), (5, 6, 7)) == (
        slice(2, 5),
        slice(0, 6),
        slice(0, 7),
    )
    assert resolve((slice(4, 99),), (5,)) == (slice(4, 5),)
    assert resolve((slice(3, 1),), (5,)) == (slice(3, 3),)


def test_resolve_refuses_steps():
    with pytest.raises(ValueError, match="has a step"):
        resolve((slice(0, 4, 2),), (5,))


def keep(recent: Recent[bytes], key: str, made: list[str]) -> bytes:
    def make() -> bytes:
        made.append(key)
        return key.encode() * 4

    return recent.get(key, make)


def test_recent_makes_again_what_was_used_longest_ago():
    recent, made = Recent[bytes](8, len), []
    for key in "abacab":
        assert keep(recent, key, made) == key.encode() * 4
    assert made == ["a", "b", "c", "b"]


def test_recent_keeps_the_last_value_however_large():
    recent, made = Recent[bytes](1, len), []
    for key in "aabba":
        keep(recent, key, made)
    assert made == ["a", "b", "a"]


def test_recent_of_no_bytes_keeps_nothing():
    recent, made = Recent[bytes](0, len), []
    for key in "aa":
        keep(recent, key, made)
    assert made == ["a", "a"]


def test_recent_makes_a_value_once_for_many_threads():
    recent, made, start = Recent[bytes](100, len), [], threading.Barrier(8)

    def ask(_: int) -> bytes:
        start.wait()
        return keep(recent, "a", made)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {b"aaaa"}
    assert made == ["a"]


def test_recent_does_not_keep_an_error():
    recent, made = Recent[bytes](100, len), []
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: bytes(1 // 0))
    assert keep(recent, "a", made) == b"aaaa"
