"""Experts by every kernel against NumPy in float64, the tiles of their rows, and who is asked."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from model import kernel_choice, kernels
from model.kernel_choice import XLA, Kernels, kernels_for
from model.kernels import cpu_experts, pallas_experts, xla_experts
from model.kernels.expert_tiles import deal
from model.linear import Matrix
from model.matrix import apart_shape
from model.panels import to_panels
from plan.compiled import Kind, examine
from plan.described import CompilerMissing, compile_described, described_mesh
from sharding.mesh import MeshShape
from tests.model.kernels.cases import QUICKLY

E, D, F, TOP_K = 4, 64, 64, 2
SHAPES = [(6, 21, 2, 4), (3, 40, 3, 16), (5, 7, 1, 2), (2, 9, 4, 4)]
"""Of experts, tokens, most experts of a token, and rows of a tile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Case:
    x_ND: Any
    routed_EN: Any
    gate_up: Any
    down: Any
    gate_up_scale: Any = None
    down_scale: Any = None
    gate_up_bias_E2F: Any = None
    down_bias_ED: Any = None

    @property
    def weights(self) -> tuple[Matrix, Matrix]:
        return Matrix(self.gate_up, self.gate_up_scale), Matrix(self.down, self.down_scale)

    @property
    def around(self) -> dict[str, Any]:
        return {
            "activate": silu_times,
            "gate_up_bias_E2F": self.gate_up_bias_E2F,
            "down_bias_ED": self.down_bias_ED,
        }

    @property
    def expected(self) -> np.ndarray:
        """Each expert of each token, one by one."""
        x_ND, gate_up, down = double(self.x_ND), double(self.gate_up), double(self.down)
        if self.gate_up_scale is not None:
            gate_up *= double(self.gate_up_scale)[:, None]
            down *= double(self.down_scale)[:, None]
        sum_ND = np.zeros_like(x_ND)
        for e, n in np.argwhere(self.routed_EN):
            hidden_2F = np.einsum("d,dpf->pf", x_ND[n], gate_up[e])
            if self.gate_up_bias_E2F is not None:
                hidden_2F += double(self.gate_up_bias_E2F)[e]
            out_D = hidden_2F[0] / (1 + np.exp(-hidden_2F[0])) * hidden_2F[1] @ down[e]
            if self.down_bias_ED is not None:
                out_D += double(self.down_bias_ED)[e]
            sum_ND[n] += double(self.routed_EN)[e, n] * out_D
        return sum_ND


def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def double(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def routed(seed: int, num_experts: int, num_tokens: int, top_k: int) -> np.ndarray:
    """Weights [E, N] of up to `top_k` experts of each token, as on a device that holds some."""
    rng = np.random.default_rng(seed)
    scores_EN = rng.random((num_experts, num_tokens)).astype(np.float32) + 0.1
    among_EN = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1).T
    return np.where(among_EN < rng.integers(0, top_k + 1, num_tokens), scores_EN, 0)


def case(num_tokens: int, dtype: str, stored: str = "", has_bias: bool = False) -> Case:
    gate_up, down = normal(2, E, D, 2, F) / D**0.5, normal(3, E, F, D) / F**0.5
    extra: dict[str, Any] = {}
    if stored:
        scales = [np.abs(normal(seed, E, *shape)) / 50 for seed, shape in ((4, (2, F)), (5, (D,)))]
        extra = dict(zip(("gate_up_scale", "down_scale"), map(jnp.asarray, scales), strict=True))
        gate_up, down = gate_up * 300, down * 300
    if has_bias:
        biases = (normal(6, E, 2, F), normal(7, E, D))
        extra["gate_up_bias_E2F"], extra["down_bias_ED"] = (jnp.asarray(b, dtype) for b in biases)
    weights = (jnp.asarray(weight, stored or dtype) for weight in (gate_up, down))
    x_ND = jnp.asarray(normal(1, num_tokens, D), dtype)
    return Case(x_ND, jnp.asarray(routed(0, E, num_tokens, TOP_K)), *weights, **extra)


def apart(weight: Matrix) -> list[Matrix]:
    """Each expert's in panels."""
    shape = apart_shape(weight.numbers.shape[1:], weight.numbers.dtype)
    scales = [None] * E if weight.scale is None else list(weight.scale)
    return [
        Matrix(jnp.asarray(to_panels(numbers, shape)), scale)
        for numbers, scale in zip(weight.numbers, scales, strict=True)
    ]


def by_xla(c: Case) -> jax.Array:
    return xla_experts.experts(c.x_ND, c.routed_EN, *c.weights, **c.around)


def by_cpu(c: Case) -> jax.Array:
    return cpu_experts.experts(c.x_ND, c.routed_EN, *c.weights, top_k=TOP_K, **c.around)


def by_cpu_apart(c: Case) -> jax.Array:
    weights = [apart(weight) for weight in c.weights]
    return cpu_experts.experts(c.x_ND, c.routed_EN, *weights, top_k=TOP_K, **c.around)


def by_pallas(c: Case) -> jax.Array:
    compute = partial(pallas_experts.experts, top_k=TOP_K, interpret=True)
    return compute(c.x_ND, c.routed_EN, *c.weights, **c.around)


KERNELS = {
    "xla": jax.jit(by_xla),
    "cpu": jax.jit(by_cpu),
    "cpu apart": jax.jit(by_cpu_apart),
    "pallas": jax.jit(by_pallas, compiler_options=QUICKLY),
}


def check(kernel: str, c: Case, tolerance: float = 1e-5) -> None:
    found_ND = KERNELS[kernel](c)
    assert found_ND.dtype == jnp.float32
    np.testing.assert_allclose(
        double(found_ND), c.expected, rtol=tolerance, atol=tolerance * np.abs(c.expected).max()
    )


@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_gets_what_its_experts_make_of_it(kernel, num_tokens):
    check(kernel, case(num_tokens, "float32"))


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [
        # On a CPU x becomes an int8 number of 15 bits where weights are int8.
        ("float32", "int8", 2e-4),
        # What is multiplied, activated, biased and given is rounded, by 2**-9 each.
        ("bfloat16", "float8_e4m3fn", 2**-6),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_scaled_by_channel_then_biased(kernel, dtype, stored, tolerance):
    check(kernel, case(5, dtype, stored, has_bias=True), tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_device_with_no_tokens_expert_gives_zeros(kernel):
    c = replace(case(37, "float32"), routed_EN=jnp.zeros((E, 37)))
    np.testing.assert_array_equal(KERNELS[kernel](c), 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_tokens_may_want_the_same_experts(kernel):
    """As the rows that pad a batch do."""
    c = case(37, "float32")
    check(kernel, replace(c, routed_EN=jnp.zeros((E, 37)).at[jnp.array([1, 4])].set(0.5)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_without_a_number_spoils_no_other(kernel):
    c = case(37, "float32")
    spoilt = replace(c, x_ND=c.x_ND.at[3].set(jnp.nan))
    others = np.arange(37) != 3
    found_ND, expected_ND = (np.asarray(KERNELS[kernel](which)) for which in (spoilt, c))
    np.testing.assert_array_equal(found_ND[others], expected_ND[others])


@settings(max_examples=40, derandomize=True)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_every_row_lies_in_a_tile_of_its_expert_and_nobodys_in_none(shape, seed):
    num_experts, num_tokens, top_k, tile = shape
    routed_EN = routed(seed, num_experts, num_tokens, min(top_k, num_experts))
    found = dealt(routed_EN, top_k, tile)
    token_IX, row_NA, share_NA, first_E, end_E = (np.asarray(array) for array in found)
    rows = token_IX.reshape(-1)
    assert end_E[-1] <= len(token_IX)
    assert list(first_E) == [0, *end_E[:-1]]
    for e in range(num_experts):
        own = rows[first_E[e] * tile : end_E[e] * tile]
        assert list(own[own < num_tokens]) == list(routed_EN[e].nonzero()[0])
        assert (own < num_tokens).sum() > len(own) - tile
    assert (rows[end_E[-1] * tile :] == num_tokens).all()
    for n in range(num_tokens):
        chosen = routed_EN[:, n].nonzero()[0]
        assert list(share_NA[n]) == [*routed_EN[chosen, n], *[0] * (row_NA.shape[1] - len(chosen))]
        assert (rows[row_NA[n, : len(chosen)]] == n).all()
        assert (row_NA[n, len(chosen) :] == len(rows)).all()


@partial(jax.jit, static_argnums=(1, 2))
def dealt(routed_EN: jax.Array, top_k: int, tile: int) -> tuple[jax.Array, ...]:
    tiles = deal(routed_EN, top_k, tile)
    return tiles.token_IX, tiles.row_NA, tiles.share_NA, tiles.first_E, tiles.end_E


def test_tiles_suffice_when_every_last_one_is_nearly_empty():
    """5 + 5 + 1 rows in tiles of 4."""
    routed_EN = np.zeros((3, 8), np.float32)
    routed_EN[0, :5] = routed_EN[1, 3:] = routed_EN[2, 0] = 1
    token_IX, *_, end_E = dealt(routed_EN, 2, 4)
    assert list(end_E) == [2, 4, 5]
    assert len(token_IX) >= 5
    assert sorted(token_IX[token_IX < 8].tolist()) == [0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 7]


def test_a_weight_whose_rows_the_loop_does_not_divide_is_not_covered():
    wide, narrow = Matrix(jnp.zeros((2, 64, 2, 64))), Matrix(jnp.zeros((2, 24, 64)))
    assert "24 rows, no multiple of 64" in pallas_experts.uncovered(wide, narrow)
    assert pallas_experts.uncovered(wide, Matrix(jnp.zeros((2, 64, 64)))) == ""


def test_weights_beyond_the_kernels_offsets_are_not_covered():
    def reason(numbers: jax.Array) -> None:
        said.append(pallas_experts.uncovered(Matrix(numbers), Matrix(numbers)))

    said: list[str] = []
    jax.eval_shape(reason, jax.ShapeDtypeStruct((64, 4096, 2, 4096), jnp.int8))
    assert said == ["experts' weights of 2,147,483,648 numbers in int8"]


def test_pallas_compiles_for_a_gpu_that_is_not_there():
    try:
        whole = NamedSharding(described_mesh(MeshShape()), PartitionSpec())
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    c = jax.eval_shape(lambda: case(8, "bfloat16", "int8", has_bias=True))
    compute = partial(pallas_experts.experts, top_k=TOP_K)
    jitted = jax.jit(lambda c: compute(c.x_ND, c.routed_EN, *c.weights, **c.around))
    program = examine(compile_described(jitted, (c,), jax.tree.map(lambda _: whole, (c,))))
    assert len(program.of(Kind.KERNEL)) == 2
    assert not program.of(Kind.SORT)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[str, bool]]:
    """The kernels taken, each with whether it is interpreted; none computes anything."""
    taken = []
    for module in (xla_experts, cpu_experts, pallas_experts):

        def take(x_ND, *_, name=module.__name__, interpret=False, **__):
            taken.append((name.rpartition(".")[2], interpret))
            return x_ND

        monkeypatch.setattr(module, "experts", take)
    monkeypatch.setattr(kernel_choice, "fallbacks", kernel_choice.fallbacks.copy())
    kernel_choice.fallbacks.clear()
    return taken


def ask(asked: Kernels, width: int = F) -> None:
    gate_up, down = Matrix(jnp.zeros((E, D, 2, width))), Matrix(jnp.zeros((E, width, D)))
    x_ND, routed_EN = jnp.zeros((3, D)), jnp.zeros((E, 3))
    kernels.experts(asked, x_ND, routed_EN, gate_up, down, top_k=TOP_K, activate=silu_times)


@pytest.mark.parametrize(
    ("asked", "module", "interpret"),
    [
        (XLA, "xla_experts", False),
        (kernels_for("cpu"), "cpu_experts", False),
        (Kernels(experts="cpu_apart"), "cpu_experts", False),
        (kernels_for("gpu"), "pallas_experts", False),
        (Kernels(experts="pallas_interpreted"), "pallas_experts", True),
    ],
)
def test_kernel_asked_is_the_kernel_taken(taken, asked, module, interpret):
    ask(asked)
    assert taken == [(module, interpret)]
    assert not kernel_choice.fallbacks


def test_uncovered_widths_fall_back_and_are_counted(taken):
    ask(Kernels(experts="pallas"), width=40)
    assert taken == [("xla_experts", False)]
    assert list(kernel_choice.fallbacks) == [
        ("experts", "pallas", "experts' weights of 40 rows, no multiple of 64")
    ]
