"""The operations that have kernels: each one signature, dispatched here and nowhere else.

It does not know layers or requests. `model/kernel_choice.py` says which kernel is taken where; one
that does not cover a shape leaves it to the reference, which covers all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from model.inputs import note_input
from model.kernel_choice import Kernels, note_fallback
from model.kernels import (
    cpu_attention,
    cpu_experts,
    cpu_matmul,
    pallas_attention,
    pallas_experts,
    pallas_matmul,
    pallas_rotate,
    xla_8bit_matmul,
    xla_attention,
    xla_experts,
    xla_matmul,
    xla_rotate,
)
from model.kernels.xla_matmul import Activate
from model.linear import Matrix, Norm
from model.pages import Pages

INTERPRET = {"pallas": False, "pallas_interpreted": True}
"""Names of our own kernels, and whether they are interpreted."""


def paged_attention(
    kernels: Kernels,
    q_RTKGC: Float[Array, "R T K G C"],
    pages: Pages,
    tables_RW: Int[Array, "R W"],
    starts_R: Int[Array, "R"],
    lengths_R: Int[Array, "R"],
    *,
    scale: float,
    window: Int[Array, ""],
    softcap: float | None = None,
    sinks_KG: Float[Array, "K G"] | None = None,
) -> Float[Array, "R T K G U"]:
    """`xla_attention.paged_attention` by the kernel chosen for rows of one query, or of many."""
    operation = "decode_attention" if q_RTKGC.shape[1] == 1 else "prefill_attention"
    kernel = getattr(kernels, operation)
    attend = xla_attention.paged_attention
    if kernel in INTERPRET:
        if reason := pallas_attention.uncovered(q_RTKGC, pages):
            note_fallback(operation, kernel, reason)
        else:
            attend = partial(pallas_attention.paged_attention, interpret=INTERPRET[kernel])
    elif kernel == "cpu":
        attend = cpu_attention.paged_attention
    rules = {"scale": scale, "window": window, "softcap": softcap, "sinks_KG": sinks_KG}
    return attend(q_RTKGC, pages, tables_RW, starts_R, lengths_R, **rules)


def rotate_and_write(
    kernels: Kernels,
    qkv_NKJC: Float[Array, "N K J C"],
    norms: tuple[Norm, Norm] | None,
    positions_N: Int[Array, "N"],
    inv_freq_H: Float[Array, " H"],
    rope_factor: Float[Array, ""],
    pages: Pages,
    page_N: Int[Array, "N"],
) -> tuple[Float[Array, "N K G C"], Pages]:
    """`xla_rotate.rotate_and_write` by the kernel chosen."""
    kernel, rotate = kernels.rotate_and_write, xla_rotate.rotate_and_write
    if kernel in INTERPRET:
        if reason := pallas_rotate.uncovered(qkv_NKJC, pages):
            note_fallback("rotate_and_write", kernel, reason)
        else:
            rotate = partial(pallas_rotate.rotate_and_write, interpret=INTERPRET[kernel])
    return rotate(qkv_NKJC, norms, positions_N, inv_freq_H, rope_factor, pages, page_N)


def fused_matmul(
    kernels: Kernels,
    x_ND: Float[Array, "N D"],
    weight_DPF: Matrix,
    *,
    norm: Norm | None = None,
    activate: Activate | None = None,
    residual_NF: Float[Array, "N F"] | None = None,
) -> Float[Array, "N F"]:
    """`xla_matmul.fused_matmul` by the kernel chosen; Pallas leaves many rows to XLA."""
    note_input(x_ND, norm)
    kernel, multiply = kernels.small_matmul, xla_matmul.fused_matmul
    if kernel in INTERPRET and x_ND.shape[0] <= pallas_matmul.MOST_ROWS:
        if reason := pallas_matmul.uncovered(x_ND):
            note_fallback("small_matmul", kernel, reason)
        else:
            multiply = partial(pallas_matmul.fused_matmul, interpret=INTERPRET[kernel])
    elif kernel == "xla_8bit":
        if reason := xla_8bit_matmul.uncovered(weight_DPF):
            note_fallback("small_matmul", kernel, reason)
        else:
            multiply = xla_8bit_matmul.fused_matmul
    elif kernel == "cpu":
        multiply = cpu_matmul.fused_matmul
    return multiply(x_ND, weight_DPF, norm=norm, activate=activate, residual_NF=residual_NF)


def experts(
    kernels: Kernels,
    x_ND: Float[Array, "N D"],
    routed_EN: Float[Array, "E N"],
    gate_up: Matrix | Sequence[Matrix],
    down: Matrix | Sequence[Matrix],
    *,
    top_k: int,
    activate: Activate,
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None,
    down_bias_ED: Float[Array, "E D"] | None = None,
) -> Float[Array, "N D"]:
    """`xla_experts.experts` by the kernel chosen; of a token, `top_k` weights at most aren't 0."""
    note_input(x_ND, routed_EN=routed_EN)
    kernel, compute = kernels.experts, xla_experts.experts
    around: dict[str, Any] = {
        "activate": activate,
        "gate_up_bias_E2F": gate_up_bias_E2F,
        "down_bias_ED": down_bias_ED,
    }
    if kernel in ("cpu", "cpu_apart"):
        return cpu_experts.experts(x_ND, routed_EN, gate_up, down, top_k=top_k, **around)
    assert isinstance(gate_up, Matrix), "only the kernel cpu takes experts apart"
    assert isinstance(down, Matrix), "only the kernel cpu takes experts apart"
    if kernel in INTERPRET:
        if reason := pallas_experts.uncovered(gate_up, down):
            note_fallback("experts", kernel, reason)
        else:
            compute = partial(pallas_experts.experts, top_k=top_k, interpret=INTERPRET[kernel])
    return compute(x_ND, routed_EN, gate_up, down, **around)
