"""What others' kernels are given, and what they are not asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan import comparator_trial
from plan.comparator_trial import library
from plan.devices import Devices
from plan.flashinfer_work import TILE
from plan.kinds.kernel import Kernel
from plan.trials import trial

CPU = Devices("cpu", 1)
DECODE = Kernel("decode_attention", "flashinfer", rows=3, context=130, cold_bytes=10**7)
FP8 = replace(DECODE, cache_dtype="float8_e4m3fn")
PREFILL = Kernel(
    "prefill_attention", "flashinfer", rows=2, context=70, prompt=150, chunk=64, cold_bytes=1
)
FA4 = replace(PREFILL, kernel="flash_attention4")
FA4_LARGE = replace(FA4, page_size=128)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the libraries were there; nothing can be called."""
    monkeypatch.setattr(comparator_trial, "ROOT", tmp_path)
    for name in ("xqa_bfloat16", "xqa_float8_e4m3fn", "fa3", "fa4_64", "fa4_128"):
        library(name).parent.mkdir(parents=True, exist_ok=True)
        library(name).touch()
    monkeypatch.setattr(comparator_trial, "_target", lambda name: name)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kernel", [DECODE, FP8, PREFILL, FA4, FA4_LARGE])
def test_what_is_built_is_covered(kernel: Kernel) -> None:
    assert not trial(kernel).uncovered()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        (DECODE, {"dtype": "float32"}, "dtype float32, only bfloat16"),
        (DECODE, {"cache_dtype": "int8"}, "cache_dtype int8, only bfloat16 and float8_e4m3fn"),
        (PREFILL, {"cache_dtype": "float8_e4m3fn"}, "cache_dtype float8_e4m3fn, only bfloat16"),
        (DECODE, {"page_size": 16}, "page_size 16, only 64"),
        (DECODE, {"model": "qwen3-0.6b"}, "queries of a kv head 2, only 4"),
        (PREFILL, {"head_dim": 256}, "head_dim 256, only 128"),
        (DECODE, {"window": 100}, "window 100, only 0"),
        (PREFILL, {"softcap": 20.0}, "softcap 20.0, only 0"),
        (DECODE, {"sinks": True}, "sinks True, only False"),
        (FA4, {"page_size": 16}, "page_size 16, only 64 and 128"),
        (FA4, {"model": "qwen3-0.6b"}, "queries of a kv head 2, only 4"),
    ],
)
def test_what_it_was_not_built_for_is_a_misfit(kernel, changes, said) -> None:
    kernel = replace(kernel, **changes)
    outcome = kernel.measure(CPU, None)
    assert outcome.misfit == f"{kernel.kernel} does not cover {said}; xla computes it"
    assert not kernel.jobs(CPU)


@pytest.mark.parametrize(
    ("kernel", "name"), [(DECODE, "xqa_bfloat16"), (PREFILL, "fa3"), (FA4, "fa4_64")]
)
def test_without_its_library_it_says_what_builds_it(kernel, name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(comparator_trial, "ROOT", tmp_path)
    said = f"a tree without build/comparators/{name}.so, which make comparators builds"
    assert said in kernel.measure(CPU, None).misfit


def attend(q_TGC: np.ndarray, k_SC: np.ndarray, v_SC: np.ndarray) -> np.ndarray:
    """Of the last tokens, each of which sees all before it and itself."""
    T, S = len(q_TGC), len(k_SC)
    scores = np.einsum("tgc,sc->tgs", q_TGC, k_SC) * k_SC.shape[-1] ** -0.5
    seen_TS = np.arange(S) <= np.arange(S - T, S)[:, None]
    scores = np.where(seen_TS[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("tgs,sc->tgc", weights / weights.sum(-1, keepdims=True), v_SC)


def xqa(q, keys, values, tables, ends, counts) -> tuple[np.ndarray, None]:
    """What FlashInfer says that its function computes."""
    assert (tables.dtype, ends.dtype, counts.dtype) == (np.int32, np.uint32, np.uint32)
    assert counts.shape == (q.shape[0] * keys.shape[2],)
    assert not counts.any()
    out = np.empty_like(q)
    for row, (table, end) in enumerate(zip(tables, ends, strict=True)):
        for head in range(keys.shape[2]):
            k, v = (x[table, :, head].reshape(-1, x.shape[-1])[:end] for x in (keys, values))
            out[row, :, head] = attend(q[row, :, head], k, v)
    return out, None


def fa3(q, keys, values, tables, tiles, starts) -> np.ndarray:
    assert len(starts) == 132 + 1
    assert starts[-1] == tiles.shape[1]
    group, channels = q.shape[-2:]
    queries = q.reshape(-1, q.shape[2] * group, channels)
    out = np.full_like(queries, np.nan)
    for tile, head, first, first_page, num_queries, num_keys, _ in tiles.T.tolist():
        begin, end = tile * TILE, min(num_queries, (tile + 1) * TILE)
        seen = num_keys - num_queries + end
        pages = tables.reshape(-1)[first_page : first_page - (-num_keys // keys.shape[1])]
        k, v = (x[pages, :, head // group].reshape(-1, channels)[:seen] for x in (keys, values))
        place = slice(first + begin, first + end)
        out[place, head] = attend(queries[place, head][:, None], k, v)[:, 0]
    return out.reshape(q.shape)


def fa4(q, keys, values, tables, begins, counts, lengths) -> np.ndarray:
    """As fa4.cu says it: a prompt's table is that of its first row."""
    group, channels = q.shape[-2:]
    queries = q.reshape(-1, q.shape[2] * group, channels)
    out = np.full_like(queries, np.nan)
    tables = tables.reshape(len(lengths), -1)
    for table, begin, count, length in zip(tables, begins, counts, lengths, strict=False):
        pages = table[: -(-length // keys.shape[1])]
        for head in range(queries.shape[1]):
            k, v = (x[pages, :, head // group].reshape(-1, channels) for x in (keys, values))
            mine = queries[begin : begin + count, head][:, None]
            out[begin : begin + count, head] = attend(mine, k[:length], v[:length])[:, 0]
    assert begins[-1] == len(queries)
    return out.reshape(q.shape)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("kernel", "function"), [(DECODE, xqa), (PREFILL, fa3), (FA4, fa4), (FA4_LARGE, fa4)]
)
def test_its_answer_to_what_it_is_given_is_the_references(
    kernel: Kernel, function: Callable[..., Any], monkeypatch
) -> None:
    def ffi_call(target: str, results: Any) -> Any:
        assert target.partition("_")[0] == function.__name__

        def call(*arguments: Any) -> Any:
            assert arguments[0].dtype == jax.tree.leaves(results)[0].dtype == jnp.bfloat16
            wide = (np.asarray(x) for x in arguments)
            found = function(
                *(x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for x in wide)
            )
            return jax.tree.map(jnp.asarray, found)

        return call

    monkeypatch.setattr(comparator_trial.jax.ffi, "ffi_call", ffi_call)
    tried, reference = trial(kernel), trial(replace(kernel, kernel="xla"))
    arguments = jax.jit(reference.make)()
    expected = np.asarray(jax.jit(reference.one)(*arguments))
    found = np.asarray(tried.one(*arguments))
    assert np.abs(found - expected).max() < tried.tolerance * np.abs(expected).max()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kernel", [DECODE, PREFILL, FA4])
def test_a_chain_calls_it_as_often_as_it_says(kernel: Kernel) -> None:
    tried = trial(kernel)
    lowered = jax.jit(tried.chain).lower(*jax.eval_shape(tried.make)).as_text()
    calls = lowered.count(f"custom_call @{tried.library_name}(")
    assert calls * (tried.num_calls // tried.at_once) == tried.num_calls > 1


@pytest.mark.parametrize("context", [1024, 8192])
def test_what_fp8_queries_and_weights_lose_is_tolerated(context: int) -> None:
    """Keys and values are fp8 on both sides; XQA multiplies the weights by 448 before it rounds."""
    keys = jax.random.split(jax.random.key(context), 3)
    q = jax.random.normal(keys[0], (32, 128))
    k, v = (rounded(jax.random.normal(key, (context, 128))) for key in keys[1:])

    def answer(q: jax.Array, round_weights: Any) -> jax.Array:
        scores = q @ k.T * 128**-0.5
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        return round_weights(weights * 448) / 448 @ v / weights.sum(-1, keepdims=True)

    exact, found = answer(q, lambda x: x), answer(rounded(q), rounded)
    away = jnp.abs(found - exact).max() / jnp.abs(exact).max()
    assert trial(DECODE).tolerance < away < trial(FP8).tolerance


def rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
