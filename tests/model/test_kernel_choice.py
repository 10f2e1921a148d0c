"""The kernels asked for, and those chosen where none is."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import get_args

import pytest

from model import kernel_choice
from model.kernel_choice import CHOSEN, NAMES, XLA, Kernels, kernels_for, note_fallback
from serve.config import Kernel


def names(kernels: Kernels) -> set[str]:
    return {getattr(kernels, field.name) for field in fields(Kernels)}


def test_reference_is_what_is_not_asked_otherwise():
    assert names(XLA) == {"xla"}
    assert kernels_for("metal") == XLA


def test_every_choice_is_of_a_known_kernel():
    for chosen in CHOSEN.values():
        assert names(chosen) <= set(NAMES)


def test_a_configuration_may_name_every_kernel():
    assert set(get_args(Kernel)) == {"auto", *NAMES}


def test_gpu_reads_pages_by_our_own_kernels():
    chosen = kernels_for("gpu")
    operations = ("decode_attention", "prefill_attention", "rotate_and_write")
    assert {getattr(chosen, operation) for operation in operations} == {"pallas"}


def test_operation_asked_is_changed_alone():
    asked = kernels_for("cpu", {"decode_attention": "xla", "small_matmul": "auto"})
    assert asked == replace(kernels_for("cpu"), decode_attention="xla")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rounded_activations_are_for_whoever_asks(platform):
    assert "xla_8bit" not in names(kernels_for(platform))
    assert kernels_for(platform, {"small_matmul": "xla_8bit"}).small_matmul == "xla_8bit"


@pytest.mark.parametrize(
    ("platform", "operation", "kernel", "error"),
    [
        ("cpu", "decode_attention", "pallas", "is pallas, which compiles for GPUs only"),
        ("gpu", "rotate_and_write", "cpu", "kernels.rotate_and_write has no kernel cpu"),
        ("gpu", "experts", "xla_8bit", "kernels.experts has no kernel xla_8bit; set it to auto"),
    ],
)
def test_kernel_that_cannot_run_is_refused(platform, operation, kernel, error):
    with pytest.raises(ValueError, match=error):
        kernels_for(platform, {operation: kernel})


def test_a_fallback_is_said_once_however_many_threads_trace(monkeypatch):
    said = []

    def warn(*words):
        time.sleep(0.02)  # as a handler that writes, which lets the others run
        said.append(words)

    monkeypatch.setattr(kernel_choice, "fallbacks", Counter())
    monkeypatch.setattr(kernel_choice.log, "warning", warn)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(note_fallback, "small_matmul", "pallas", "this")
    assert len(said) == 1
    assert kernel_choice.fallbacks.total() == 8
