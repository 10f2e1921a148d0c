"""Experts as they are tried: what a call moves, which weights it meets, and that kernels agree."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from model.linear import Matrix
from plan.devices import Devices
from plan.experts_trial import Experts
from plan.kernels import measure
from plan.kinds.kernel import Kernel
from plan.trials import trial

CPU = Devices("cpu", 1)
TINY = Kernel("experts", "xla", model="tiny-moe", rows=3, dtype="float32", cold_bytes=1, repeats=2)


def experts(kernel: Kernel) -> Experts:
    tried = trial(kernel)
    assert isinstance(tried, Experts)
    return tried


def test_each_token_is_routed_to_as_many_experts_as_it_has() -> None:
    routed_EN = experts(replace(TINY, rows=20)).routed_EN
    assert routed_EN.shape == (8, 20)
    assert ((routed_EN > 0).sum(axis=0) == 2).all()
    np.testing.assert_allclose(routed_EN.sum(axis=0), 1, rtol=1e-6)


def test_a_call_reads_the_experts_that_are_chosen_alone() -> None:
    one, many = experts(replace(TINY, rows=1)), experts(replace(TINY, rows=100))
    weights = 3 * 64 * 64
    assert one.moved_bytes == (2 * weights + 2 * 64) * 4
    assert many.moved_bytes == (8 * weights + 100 * 2 * 64) * 4
    assert many.flops == 100 * 2 * weights * 2


def test_weights_of_8_bits_are_read_as_such_and_have_scales() -> None:
    tried = experts(replace(TINY, rows=1, weight_dtype="float8_e4m3fn"))
    assert tried.moved_bytes == 2 * 3 * 64 * 64 + 2 * 64 * 4
    _, _, ((gate_up, down), *_), _ = jax.eval_shape(tried.make)
    assert [leaf.dtype.name for leaf in gate_up + down] == ["float8_e4m3fn", "float32"] * 2
    assert [scale.shape for _, scale in (gate_up, down)] == [(8, 2, 64), (8, 64)]


def test_the_calls_of_a_chain_meet_other_weights_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = experts(replace(TINY, cold_bytes=10**6))
    compute, calls = tried._compute, list[int]()

    def counted(x_ND: Any, routed_EN: Any, weights: Any) -> jax.Array:
        calls.append(id(weights[0].numbers))
        return compute(x_ND, routed_EN, weights)

    monkeypatch.setattr(tried, "_compute", counted)
    traced = jax.make_jaxpr(tried.chain)(*jax.eval_shape(tried.make))
    (loop,) = [equation for equation in traced.eqns if equation.primitive.name == "scan"]
    assert len(set(calls)) * loop.params["length"] == tried.num_calls
    weight_bytes = tried.moved_bytes - TINY.rows * 64 * 8
    assert 10**6 - weight_bytes < tried.num_weights * weight_bytes <= 10**6


@pytest.mark.parametrize(
    ("kernel", "weight_dtype"), [("cpu", "float8_e4m3fn"), ("pallas_interpreted", "auto")]
)
def test_a_kernel_is_near_the_reference_and_timed(kernel: Any, weight_dtype: Any) -> None:
    outcome = measure(replace(TINY, kernel=kernel, weight_dtype=weight_dtype), CPU)
    assert not outcome.misfit
    assert "fault" not in outcome.figures
    assert outcome.figures["difference_fraction"] < 1e-5
    assert outcome.figures["call_s"] > 0


@pytest.mark.parametrize(("most_apart", "kinds"), [(8, [list, list]), (7, [Matrix, Matrix])])
def test_a_cpu_takes_few_experts_apart_and_many_as_they_are(
    monkeypatch: pytest.MonkeyPatch, most_apart: int, kinds: list[type]
) -> None:
    monkeypatch.setattr("plan.experts_trial.MOST_APART", most_apart)
    tried, found = experts(replace(TINY, kernel="cpu")), list[type]()

    def noted(x_ND: jax.Array, routed_EN: jax.Array, weights: Any) -> jax.Array:
        found.extend(map(type, weights))
        return x_ND

    monkeypatch.setattr(tried, "_compute", noted)
    jax.eval_shape(lambda: tried.one(*tried.make()))
    assert found == kinds


def test_widths_that_pallas_does_not_cover_are_said_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.kernels.pallas_experts.DEPTH", 128)
    outcome = measure(replace(TINY, kernel="pallas_interpreted"), CPU)
    assert outcome.misfit == (
        "pallas_interpreted does not cover experts' weights of 64 rows, no multiple of 128; xla "
        "computes it"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "tiny"}, "model is tiny, which has no experts; choose one that has, such as"),
        ({"weight": "down"}, "small_matmul needs one of qkv, out, gate_up and down"),
        ({"kernel": "flashinfer"}, "flashinfer is for attention, not experts"),
        ({"operation": "rotate_and_write", "kernel": "cpu"}, "cpu is tried for experts, not"),
    ],
)
def test_senseless_settings_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TINY, **changes)
