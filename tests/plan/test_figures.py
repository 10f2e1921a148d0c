"""A step is built as the server would run it, and its figures are those of its program."""

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import jax
import numpy as np
import pytest

from model.attention import NO_WINDOW
from model.config import Layer, Rope
from model.weights import QUANTIZED_DTYPES, shapes
from plan import figures, fill, steps
from plan.devices import Devices, environment, inherited_flags, parse_devices
from plan.hardware import Precision, RowWork, step_work
from plan.kinds.step import Step
from plan.models import load_model
from plan.timing import WARM_UP, time_calls

CPU = Devices("cpu", 8)
TINY = Step("tiny", context=20, page_size=16, batch=3, repeats=2)


def built(**changes: Any) -> steps.BuiltStep:
    return steps.build(replace(TINY, **changes), CPU)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (4, 0, 1)),
        ({"mesh": "stage=8"}, (8, 0, 1)),
        ({"phase": "loop", "steps": 5}, (4, 0, 5)),
        ({"phase": "prefill", "prompt": 65}, (0, 8, 1)),
        ({"phase": "mixed", "prompt": 65}, (4, 2, 1)),
    ],
)
def test_the_program_is_the_one_the_server_would_choose(changes, shape):
    found = built(**changes).shape
    assert (found.num_decode, found.num_chunks, found.max_tokens) == shape


@pytest.mark.parametrize(
    "changes", [{}, {"phase": "loop", "steps": 30}, {"phase": "prefill", "prompt": 50}]
)
def test_rows_have_pages_of_their_own_for_all_they_write(changes):
    step = built(**changes)
    last = TINY.context + step.step.longest_new - 1
    pages = [row[: last // 16 + 1].tolist() for row in step.tables[:3]]
    owned = sorted(chain.from_iterable(pages))
    assert owned == list(range(1, step.programs.cache.num_pages))
    assert not step.tables[3].any(), "padding has the null page"


def test_the_work_is_that_of_the_rows():
    assert built().work == [RowWork(1, 20)] * 3
    assert built(phase="loop", steps=5).work == [RowWork(1, 22)] * 3
    assert built(phase="prefill", prompt=130).work == [RowWork(130, 20)] * 3
    assert built(phase="mixed", prompt=130).work == [RowWork(1, 20)] * 3 + [RowWork(130, 0)]


@pytest.mark.parametrize(("stages", "steps_per_call", "ticks"), [(1, 1, 1), (4, 1, 7), (2, 8, 17)])
def test_ticks_are_those_of_the_ring(stages: int, steps_per_call: int, ticks: int):
    step = built(mesh=f"stage={stages}", phase="loop", steps=steps_per_call)
    assert step.ticks_per_step * steps_per_call == ticks


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """The figures of one device and of four stages of two, timed."""
    outcomes = {m: figures.measure(replace(TINY, mesh=m), CPU, "cpu") for m in ("", MESH)}
    assert not any(outcome.misfit for outcome in outcomes.values())
    return {mesh: {**outcome.figures} for mesh, outcome in outcomes.items()}


MESH = "stage=4,tensor=2"


def test_bytes_are_those_of_the_arrays_on_one_device(found):
    model = load_model("tiny")
    sizes = {name: math.prod(shape) for name, shape in shapes(model).items()}
    constants = model.num_layers * (model.head_dim // 2 + 2)
    assert found[""]["weight_bytes"] == 4 * (sum(sizes.values()) + constants)
    pages = 3 * 2 + 1
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    assert found[""]["cache_bytes"] == pages * 16 * token_bytes
    assert found[MESH]["cache_bytes"] * 8 == found[""]["cache_bytes"]
    assert found[""]["lost_donation_bytes"] == 0
    parts = ("weight_bytes", "cache_bytes", "temp_bytes")
    assert found[""]["needed_bytes"] > sum(found[""][part] for part in parts)


def test_collectives_are_those_that_a_step_needs(found):
    assert found[""]["collectives"] == {}
    sent = found[MESH]["collectives"]
    # Two sums for each of two layers, one of the embedding, one from the last stage; seven ticks.
    assert sent["all-reduce"]["runs"] == 7 * (2 * 2 + 2)
    assert found[MESH]["num_collectives"] == sum(kind["runs"] for kind in sent.values())
    assert found[MESH]["collective_bytes"] == sum(kind["bytes"] for kind in sent.values()) > 0


def test_times_agree_with_one_another(found):
    for of in found.values():
        assert 0 < of["step_low_s"] <= of["step_s"] <= of["step_high_s"]
        assert of["tokens_per_s"] == pytest.approx(3 / of["step_s"])
        assert of["roofline_fraction"] == pytest.approx(of["floor_s"] / of["step_s"])
        assert of["compile_s"] > 0
    assert found[MESH]["idle_fraction"] == pytest.approx(3 / 7)


def test_a_step_whose_floor_is_not_known_is_measured_all_the_same():
    outcome = figures.measure(replace(TINY, dtype="float16"), CPU, "cpu")
    assert outcome.figures["no_floor"].startswith("two CPU cores has no rate of float16 products")
    assert outcome.figures["step_s"] > 0
    assert not {"floor_s", "roofline_fraction"} & set(outcome.figures)


def test_a_step_that_does_not_fit_says_by_how_many_bytes_and_is_not_run(monkeypatch):
    monkeypatch.setattr(figures, "find_memory_bytes", lambda *_: 1_000_000)
    monkeypatch.setattr(figures, "random_weights", None)
    outcome = figures.measure(TINY, CPU, "cpu")
    needed = f"{outcome.figures['needed_bytes']:,}"
    assert outcome.misfit.startswith(f"it needs {needed} bytes a device (2,101,824 of weights, ")
    assert "which has 1,000,000; use more devices" in outcome.misfit
    assert "step_s" not in outcome.figures


def test_a_model_that_does_not_divide_does_not_fit():
    outcome = figures.measure(Step("llama-125m", mesh="tensor=8"), CPU, "cpu")
    assert "12 query heads do not divide over tensor=8" in outcome.misfit


def test_no_row_ever_ends_so_that_every_call_is_the_same_work():
    step = built(phase="loop", steps=4, mesh="stage=8")
    programs = step.programs
    compiled = programs.jit_step(step.shape).lower(*step.arguments).compile()
    state, output = compiled(fill.random_weights(programs), programs.new_state(), step.packed())
    assert not np.asarray(state.ended)[:3].any()
    last = np.asarray(output.tokens)[-1, :3, 0]  # a row for each of the first micro-batches
    assert np.asarray(state.last_token)[:3].tolist() == last.tolist()


def test_random_weights_have_the_windows_of_the_model(monkeypatch):
    rope = Rope(10_000.0)
    model = replace(load_model("tiny"), layers=(Layer(rope, 12), Layer(rope), Layer(rope, 5)))
    monkeypatch.setattr(steps, "load_model", lambda name, quantization: model)
    programs = built(mesh="stage=2").programs
    _, weights = programs.abstract_weights()
    filled = jax.tree.unflatten(jax.tree.structure(weights), fill.random_weights(programs))
    windows = [layer["attention"]["window"][...] for layer in filled["layers"].values()]
    assert np.array(windows).T.tolist() == [[12, NO_WINDOW], [5, 12]]


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_weights_are_counted_and_filled_as_they_are_stored(quantization):
    # A CPU's own products would have fp8 weights as floats.
    programs = built(quantization=quantization, kernels="small_matmul=xla").programs
    _, weights = programs.abstract_weights()
    filled = jax.tree.unflatten(jax.tree.structure(weights), fill.random_weights(programs))
    numbers = filled["layers"][0]["mlp"]["down"][...]
    assert numbers.dtype == QUANTIZED_DTYPES[quantization]
    assert len(np.unique(np.asarray(numbers, np.float32))) > 50
    layers = jax.tree.leaves(filled["layers"])
    plain = step_work(load_model("tiny"), [RowWork(1, 8)], Precision("float32"))
    found = step_work(
        load_model("tiny", quantization=quantization), [RowWork(1, 8)], Precision("float32")
    )
    assert found.weight_flops == plain.weight_flops
    saved = sum(3 * x.size for x in layers if x.dtype == QUANTIZED_DTYPES[quantization])
    scales = sum(x.nbytes for x in jax.tree.leaves(_scales(filled["layers"])))
    assert plain.weight_bytes - found.weight_bytes == saved - scales


def _scales(layers) -> list[jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(layers)[0]
    return [leaf for path, leaf in leaves if "_scale" in jax.tree_util.keystr(path)]


def test_the_middle_half_of_timed_calls_is_told_and_the_first_calls_are_not_timed():
    seconds = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    now, calls = [0.0], []

    def call() -> None:
        calls.append(now[0])
        if len(calls) > WARM_UP:
            now[0] += next(seconds)

    times = time_calls(call, 5, clock=lambda: now[0])
    assert (times.low_s, times.median_s, times.high_s) == (2.0, 3.0, 4.0)
    assert len(calls) == WARM_UP + 5


def test_a_worker_sees_as_many_devices_as_are_asked_whatever_ours_sees():
    inherited = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_b", "HOME": "/"}
    changed = environment(parse_devices("cpu:2"), "--xla_c", inherited)
    assert changed["XLA_FLAGS"] == "--xla_b --xla_force_host_platform_device_count=2 --xla_c"
    assert (changed["JAX_PLATFORMS"], changed["HOME"]) == ("cpu", "/")
    assert inherited_flags(inherited) == "--xla_b"
    on_gpu = environment(parse_devices("gpu"), "", inherited)
    assert on_gpu["XLA_FLAGS"] == "--xla_b"
    assert "JAX_PLATFORMS" not in on_gpu


def test_virtual_devices_share_the_processor_and_its_memory():
    whole = figures.find_hardware(CPU, "cpu")
    shared = figures.find_hardware(CPU, None, sharing=4)
    assert whole is not None
    assert shared is not None
    assert shared.copy_bytes_per_s * 4 == whole.copy_bytes_per_s
    assert shared.rate("float32") * 4 == whole.rate("float32")
    assert figures.find_memory_bytes(CPU, None, 4) == figures.find_memory_bytes(CPU, None) // 4
    described = figures.find_hardware(Devices("h200", 8), "h200", sharing=8)
    assert figures.find_memory_bytes(Devices("h200", 8), described, 8) == 141_000_000_000
