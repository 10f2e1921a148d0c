"""The kernel asked is the kernel taken, and what happens where it can't be."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import kernel_choice, kernels
from model.kernel_choice import XLA, Kernels, kernels_for
from model.kernels import (
    cpu_attention,
    cpu_matmul,
    pallas_attention,
    pallas_matmul,
    pallas_rotate,
    xla_8bit_matmul,
    xla_attention,
    xla_matmul,
    xla_rotate,
)
from model.linear import Matrix
from model.pages import Pages, empty_pages
from plan.kernel_choice import asked_kernels

PALLAS = Kernels(**asked_kernels("pallas"))
INTERPRETED = Kernels(**asked_kernels("pallas_interpreted"))


@pytest.fixture(autouse=True)
def fallbacks():
    """Those of one test."""
    before = kernel_choice.fallbacks.copy()
    kernel_choice.fallbacks.clear()
    yield kernel_choice.fallbacks
    kernel_choice.fallbacks.clear()
    kernel_choice.fallbacks.update(before)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[str, bool]]:
    """The kernels taken, each with whether it is interpreted; none computes anything."""
    taken = []
    attentions = (xla_attention, cpu_attention, pallas_attention)
    for module in (*attentions, xla_matmul, xla_8bit_matmul, cpu_matmul, pallas_matmul):
        name = "paged_attention" if module in attentions else "fused_matmul"

        def take(first, *_, name=module.__name__, interpret=False, **__):
            taken.append((name.rsplit(".", 1)[-1], interpret))
            return first

        monkeypatch.setattr(module, name, take)
    for module in (xla_rotate, pallas_rotate):

        def take_pages(first, *others, name=module.__name__, interpret=False):
            taken.append((name.rsplit(".", 1)[-1], interpret))
            return first, others[4]

        monkeypatch.setattr(module, "rotate_and_write", take_pages)
    return taken


def attend(asked: Kernels, num_new: int = 1, group: int = 2, channels: int = 64) -> jax.Array:
    rng = np.random.default_rng(0)
    q_RTKGC = rng.standard_normal((1, num_new, 1, group, channels)).astype(np.float32)
    keys, values = rng.standard_normal((2, 3, 16, 1, channels)).astype(np.float32)
    rows = (jnp.asarray([[1, 2]]), jnp.asarray([20 - num_new]), jnp.asarray([num_new]))
    return kernels.paged_attention(
        asked,
        jnp.asarray(q_RTKGC),
        Pages(jnp.asarray(keys), jnp.asarray(values)),
        *rows,
        scale=channels**-0.5,
        window=jnp.int32(2**30),
    )


def rotate(asked: Kernels, group: int = 2) -> None:
    pages = empty_pages((3, 16, 1, 64), (3, 16, 1, 64), jnp.float32)
    qkv_NKJC, freq = jnp.ones((2, 1, group + 2, 64)), jnp.ones(32)
    tokens = (jnp.asarray([0, 1]), freq, jnp.float32(1), pages, jnp.asarray([1, 1]))
    kernels.rotate_and_write(asked, qkv_NKJC, None, *tokens)


def multiply(asked: Kernels, rows: int = 2, depth: int = 256, dtype: str = "float32") -> None:
    weight = Matrix(jnp.ones((depth, 1, depth), dtype))
    kernels.fused_matmul(asked, jnp.ones((rows, depth)), weight)


@pytest.mark.parametrize(
    ("asked", "suffix", "interpret"),
    [(XLA, "xla", False), (PALLAS, "pallas", False), (INTERPRETED, "pallas", True)],
)
def test_kernel_asked_is_the_kernel_taken(taken, fallbacks, asked, suffix, interpret):
    attend(asked)
    attend(asked, num_new=4)
    rotate(asked)
    multiply(asked)
    operations = ("attention", "attention", "rotate", "matmul")
    assert taken == [(f"{suffix}_{operation}", interpret) for operation in operations]
    assert not fallbacks


def test_decode_and_prefill_rows_are_chosen_apart(taken):
    for asked in (Kernels(decode_attention="pallas"), Kernels(decode_attention="cpu")):
        attend(asked)
        attend(asked, num_new=4)
    assert [name for name, _ in taken] == [
        "pallas_attention",
        "xla_attention",
        "cpu_attention",
        "xla_attention",
    ]


def test_cpu_multiplies_in_its_own_way(taken):
    multiply(kernels_for("cpu"))
    assert taken == [("cpu_matmul", False)]


@pytest.mark.parametrize("rows", [1, 65])
def test_activations_are_rounded_beside_weights_in_8_bits(taken, fallbacks, rows):
    multiply(Kernels(small_matmul="xla_8bit"), rows, dtype="int8")
    assert taken == [("xla_8bit_matmul", False)]
    assert not fallbacks


def test_activations_are_left_as_they_are_beside_other_weights(taken, fallbacks):
    multiply(Kernels(small_matmul="xla_8bit"))
    assert taken == [("xla_matmul", False)]
    assert list(fallbacks) == [
        ("small_matmul", "xla_8bit", "weights in float32, as a head's always are")
    ]


def test_product_of_many_rows_is_left_to_xla_without_a_word(taken, fallbacks):
    multiply(PALLAS, rows=pallas_matmul.MOST_ROWS + 1)
    assert taken == [("xla_matmul", False)]
    assert not fallbacks


@pytest.mark.parametrize(
    ("ask", "operation", "reason"),
    [
        (lambda: attend(PALLAS, channels=512), "decode_attention", "heads of 512 channels"),
        (lambda: attend(PALLAS, num_new=2, group=200), "prefill_attention", "200 query heads"),
        (lambda: rotate(PALLAS, group=200), "rotate_and_write", "200 query heads"),
        (lambda: multiply(PALLAS, depth=100), "small_matmul", "weights of 100 rows"),
    ],
    ids=["decode", "prefill", "rotate", "matmul"],
)
def test_uncovered_shape_falls_back_and_says_so_once(
    taken, fallbacks, caplog, ask, operation, reason
):
    with caplog.at_level(logging.WARNING, "weft"):
        ask()
        ask()
    assert [name.split("_")[0] for name, _ in taken] == ["xla", "xla"]
    ((key, times),) = fallbacks.items()
    assert key[:2] == (operation, "pallas")
    assert reason in key[2]
    assert times == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{operation}: pallas does not cover {key[2]}; xla computes it"


def test_another_reason_is_said_too(caplog, taken):
    with caplog.at_level(logging.WARNING, "weft"):
        attend(PALLAS, channels=512)
        attend(PALLAS, group=200)
        attend(INTERPRETED, group=200)
    assert len(caplog.records) == 3


def test_what_falls_back_is_computed_all_the_same(fallbacks):
    np.testing.assert_array_equal(attend(INTERPRETED, channels=512), attend(XLA, channels=512))
    assert fallbacks.total() == 1
