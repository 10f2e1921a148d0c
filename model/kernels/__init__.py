"""The operations that have kernels: each one signature, dispatched here and nowhere else.

It does not know layers or requests. `model/kernel_choice.py` says which kernel is taken where; one
that does not cover a shape leaves it to the reference, which covers all.
"""

from typing import Any

import jax

from model.kernel_choice import Kernels, note_fallback
from model.kernels import (
    cpu_attention,
    cpu_matmul,
    pallas_attention,
    pallas_matmul,
    pallas_rotate,
    xla_attention,
    xla_matmul,
    xla_rotate,
)
from model.pages import Pages

INTERPRET = {"pallas": False, "pallas_interpreted": True}
"""Names of our own kernels, and whether they are interpreted."""


def paged_attention(
    kernels: Kernels, q_RTKGC: jax.Array, pages: Pages, *rows: jax.Array, **rules: Any
) -> jax.Array:
    """`xla_attention.paged_attention` by the kernel chosen for rows of one query, or of many."""
    operation = "decode_attention" if q_RTKGC.shape[1] == 1 else "prefill_attention"
    kernel = getattr(kernels, operation)
    if kernel in INTERPRET:
        if not (reason := pallas_attention.uncovered(q_RTKGC, pages)):
            rules["interpret"] = INTERPRET[kernel]
            return pallas_attention.paged_attention(q_RTKGC, pages, *rows, **rules)
        note_fallback(operation, kernel, reason)
    if kernel == "cpu":
        return cpu_attention.paged_attention(q_RTKGC, pages, *rows, **rules)
    return xla_attention.paged_attention(q_RTKGC, pages, *rows, **rules)


def rotate_and_write(
    kernels: Kernels, qkv_NKJC: jax.Array, norms: Any, *tokens: Any
) -> tuple[jax.Array, Pages]:
    """`xla_rotate.rotate_and_write` by the kernel chosen."""
    kernel, pages = kernels.rotate_and_write, tokens[3]
    if kernel in INTERPRET:
        if not (reason := pallas_rotate.uncovered(qkv_NKJC, pages)):
            interpret = INTERPRET[kernel]
            return pallas_rotate.rotate_and_write(qkv_NKJC, norms, *tokens, interpret=interpret)
        note_fallback("rotate_and_write", kernel, reason)
    return xla_rotate.rotate_and_write(qkv_NKJC, norms, *tokens)


def fused_matmul(
    kernels: Kernels, x_ND: jax.Array, weight_DPF: jax.Array, **around: Any
) -> jax.Array:
    """`xla_matmul.fused_matmul` by the kernel chosen for few rows; XLA's own for many."""
    kernel = kernels.small_matmul
    if kernel in INTERPRET and x_ND.shape[0] <= pallas_matmul.MOST_ROWS:
        if not (reason := pallas_matmul.uncovered(x_ND)):
            around["interpret"] = INTERPRET[kernel]
            return pallas_matmul.fused_matmul(x_ND, weight_DPF, **around)
        note_fallback("small_matmul", kernel, reason)
    if kernel == "cpu":
        return cpu_matmul.fused_matmul(x_ND, weight_DPF, **around)
    return xla_matmul.fused_matmul(x_ND, weight_DPF, **around)
