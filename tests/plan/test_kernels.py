"""Kernels are compared with the reference, then timed; what can't be used says why."""

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from model.attention import NO_WINDOW
from plan import kernels
from plan.devices import Devices
from plan.kinds.kernel import Kernel
from plan.trials import TRIALS, trial

CPU = Devices("cpu", 1)
TINY: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "cache_dtype": "float32",
    "page_size": 16,
    "cold_bytes": 1,
    "repeats": 2,
}
DECODE = Kernel("decode_attention", "xla", rows=3, context=40, **TINY)
PREFILL = Kernel("prefill_attention", "xla", rows=2, context=40, prompt=20, chunk=16, **TINY)
ROTATE = Kernel("rotate_and_write", "xla", rows=2, **TINY)
PRODUCT = Kernel("small_matmul", "xla", rows=2, weight="down", **TINY)


def pairs(kernel: Kernel) -> tuple[int, set[tuple[int, int]]]:
    """Of query and key, and the tokens of each prompt that are seen, counted one by one."""
    tried, window, count, seen = trial(kernel), kernel.window or NO_WINDOW, 0, set()
    rows = zip(tried.sequence_R, tried.starts_R, tried.lengths_R, strict=True)
    for sequence, start, length in rows:
        for at in range(start, start + length):
            keys = [key for key in range(at + 1) if key > at - window]
            count += len(keys)
            seen |= {(int(sequence), key) for key in keys}
    return count, seen


@pytest.mark.parametrize("kernel", [DECODE, PREFILL, replace(PREFILL, window=7)])
def test_work_is_what_the_rows_see(kernel: Kernel) -> None:
    tried, (count, seen) = trial(kernel), pairs(kernel)
    heads, channels = tried.model.num_heads, tried.model.head_dim
    assert tried.flops == count * heads * channels * 2 * 2
    cached = len(seen) * tried.model.num_kv_heads * 2 * channels * 4
    new = int(sum(tried.lengths_R)) * heads * channels
    assert tried.moved_bytes == cached + 2 * new * 4


def test_a_prompt_is_cut_into_rows_that_follow_each_other() -> None:
    tried = trial(PREFILL)
    assert list(tried.sequence_R) == [0, 0, 1, 1]
    assert list(tried.starts_R) == [40, 56, 33, 49]
    assert list(tried.lengths_R) == [16, 4, 16, 4]


def test_the_calls_of_a_chain_read_other_pages_each() -> None:
    tried = trial(replace(DECODE, cold_bytes=10**6))
    tables = np.asarray(jax.jit(tried.make)()[2])
    assert tables.shape[0] == tried.num_calls >= 10**6 / tried.moved_bytes
    pages = [set(table.flatten().tolist()) for table in tables[: tried.num_tables]]
    assert sum(map(len, pages)) == len(set().union(*pages)), "no page is in two tables"


@pytest.mark.parametrize("kernel", [DECODE, PREFILL, ROTATE, PRODUCT])
def test_a_chain_is_as_many_calls_as_it_says(kernel: Kernel, monkeypatch) -> None:
    """Each is counted as it is traced, times the turns of the loop it is in."""
    calls = 0

    def count(original):
        def counted(self, *arguments):
            nonlocal calls
            calls += 1
            return original(self, *arguments)

        return counted

    class_ = TRIALS[kernel.operation]
    name = {"decode_attention": "_attend", "prefill_attention": "_attend"}.get(
        kernel.operation, "_rotate" if kernel is ROTATE else "_multiply"
    )
    monkeypatch.setattr(class_, name, count(getattr(class_, name)))
    tried = trial(kernel)
    traced = jax.make_jaxpr(tried.chain)(*jax.eval_shape(tried.make))
    (loop,) = [equation for equation in traced.eqns if equation.primitive.name == "scan"]
    assert calls * loop.params["length"] == tried.num_calls


@pytest.mark.parametrize(
    "kernel",
    [
        replace(DECODE, kernel="pallas_interpreted", cache_dtype="int8", tiling="splits=2"),
        replace(PREFILL, kernel="cudnn", context=0),
        replace(ROTATE, kernel="pallas_interpreted"),
        replace(PRODUCT, kernel="pallas_interpreted"),
    ],
)
def test_a_right_kernel_is_near_the_reference_and_timed(kernel: Kernel) -> None:
    outcome = kernel.measure(CPU, None)
    assert not outcome.misfit
    assert "fault" not in outcome.figures
    assert outcome.figures["difference_fraction"] < 1e-5
    rate = outcome.figures["bytes_per_s"] * outcome.figures["call_s"]
    assert rate == pytest.approx(outcome.figures["moved_bytes"])


@pytest.mark.parametrize("weight_dtype", ["int8", "float8_e4m3fn"])
def test_rounded_activations_are_as_far_from_the_reference_as_they_may_be(
    weight_dtype: Any,
) -> None:
    kernel = replace(PRODUCT, kernel="xla_8bit", weight="gate_up", weight_dtype=weight_dtype)
    figures = kernel.measure(CPU, None).figures
    assert "fault" not in figures
    assert figures["difference_fraction"] > 1e-4


def test_a_wrong_kernel_is_a_fault_and_timed_all_the_same(monkeypatch) -> None:
    class_ = TRIALS["decode_attention"]
    right = class_._attend

    def wrong(self, q, pages, tables, starts, *rest):
        return right(self, q, pages, tables, starts - 1, *rest)

    kernel = replace(DECODE, kernel="pallas_interpreted", rows=2, tiling="splits=1")
    expected = kernels._program(replace(kernel, kernel="xla", tiling=""), "one", CPU)
    assert expected is not None
    monkeypatch.setattr(class_, "_attend", wrong)
    figures = kernel.measure(CPU, None).figures
    assert "it is wrong" in figures["fault"]
    assert figures["difference_fraction"] > 1e-4
    assert figures["call_s"] > 0


def test_numbers_that_are_none_are_a_fault() -> None:
    found, expected = np.array([1.0, np.nan]), np.array([1.0, 2.0])
    assert not kernels._difference(found, expected) <= 1.0


def test_what_does_not_compile_is_a_fault_with_the_compilers_words() -> None:
    figures = replace(DECODE, kernel="pallas", rows=1).measure(CPU, None).figures
    assert figures["fault"].startswith("it does not compile: ")
    assert "Only interpret mode is supported on CPU" in figures["fault"]


def test_what_a_kernel_does_not_cover_is_said_not_tried() -> None:
    kernel = replace(PRODUCT, kernel="pallas_interpreted", weight="qkv")
    outcome = kernel.measure(CPU, None)
    assert "does not cover weights of 64 rows" in outcome.misfit
    assert "xla computes it" in outcome.misfit
    assert not kernel.jobs(CPU)
    wide = replace(PRODUCT, kernel="xla_8bit").measure(CPU, None)
    assert wide.misfit.startswith("xla_8bit does not cover weights in float32")
    many = replace(PRODUCT, kernel="pallas_interpreted", rows=65)
    assert "65 rows, of 64 possible" in many.measure(CPU, None).misfit


@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        (DECODE, {"rows": 0}, "rows is 0; it must be 1 or more"),
        (DECODE, {"prompt": 3}, "prompt is 3 with decode_attention"),
        (PREFILL, {"prompt": 0}, "prompt is 0 with prefill_attention"),
        (PRODUCT, {"weight": ""}, "small_matmul needs one of qkv, out, gate_up and down"),
        (DECODE, {"weight": "qkv"}, "nothing else takes one"),
        (DECODE, {"weight_dtype": "int8"}, "only small_matmul and experts have weights"),
        (DECODE, {"kernel": "xla_8bit"}, "xla_8bit is for small_matmul, not decode_attention"),
        (PREFILL, {"kernel": "cudnn"}, "cudnn is for prefill_attention with context 0"),
        (ROTATE, {"kernel": "flashinfer"}, "flashinfer is for attention, not rotate_and_write"),
        (DECODE, {"kernel": "flash_attention4"}, "is for prefill_attention, not decode_attention"),
        (DECODE, {"kernel": "flashinfer", "tiling": "keys=32"}, "only Pallas attention has one"),
        (DECODE, {"kernel": "pallas", "tiling": "warps=8"}, "it must be some of queries=N"),
        (DECODE, {"kernel": "pallas", "tiling": "keys=8,"}, "it must be some of queries=N"),
        (DECODE, {"tiling": "keys=32"}, "only Pallas attention has one"),
        (DECODE, {"model": "tinny"}, "there is no model tinny"),
    ],
)
def test_senseless_settings_are_refused(kernel: Kernel, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(kernel, **changes)
