"""The kernels asked for, and those chosen where none is."""

from dataclasses import fields, replace

import pytest

from model.kernel_choice import CHOSEN, NAMES, XLA, Kernels, kernels_for


def names(kernels: Kernels) -> set[str]:
    return {getattr(kernels, field.name) for field in fields(Kernels)}


def test_reference_is_what_is_not_asked_otherwise():
    assert names(XLA) == {"xla"}
    assert kernels_for("metal") == XLA


def test_every_choice_is_of_a_known_kernel():
    for chosen in CHOSEN.values():
        assert names(chosen) <= set(NAMES)


def test_gpu_reads_pages_by_our_own_kernels():
    chosen = kernels_for("gpu")
    operations = ("decode_attention", "prefill_attention", "rotate_and_write")
    assert {getattr(chosen, operation) for operation in operations} == {"pallas"}


def test_with_all_asks_one_kernel_for_every_operation():
    assert names(XLA.with_all("pallas")) == {"pallas"}


def test_operation_asked_is_changed_alone():
    asked = kernels_for("cpu", {"decode_attention": "xla", "small_matmul": "auto"})
    assert asked == replace(kernels_for("cpu"), decode_attention="xla")


@pytest.mark.parametrize(
    ("platform", "operation", "kernel", "error"),
    [
        ("cpu", "decode_attention", "pallas", "is pallas, which compiles for GPUs only"),
        ("gpu", "rotate_and_write", "cpu", "kernels.rotate_and_write has no kernel cpu"),
    ],
)
def test_kernel_that_cannot_run_is_refused(platform, operation, kernel, error):
    with pytest.raises(ValueError, match=error):
        kernels_for(platform, {operation: kernel})


def test_auto_leaves_the_choice():
    assert kernels_for("gpu").with_all("auto") == kernels_for("gpu")
