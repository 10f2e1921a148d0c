"""Fractions are of what the same run measured; what was not measured is said to be so."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from plan.drive import Run
from plan.experiment import Point, make_experiment, make_point
from plan.gpu_results import Results, slug
from plan.gpu_tables import summary, to_dict, to_markdown
from plan.gpu_targets import TARGETS
from plan.hardware import StepWork
from plan.ledger import Record
from plan.pictures import draw_curves

DEVICE = "1 NVIDIA H200 beside 16 cores of X, jax 0.11.2"
MODEL = {"model": "llama-3.1-8b"}
SERVED = {**MODEL, "concurrency": 64, "prompt": 100, "output": 10}


def record(kind: str, settings: dict[str, Any], status: Any = "ok", **figures: Any) -> Record:
    point = make_point(kind, settings)
    reason = "" if status == "ok" else "it\nbroke"
    day = "2026-11-21T10:00:00+00:00"
    return Record(
        point.key, kind, asdict(point.settings), "c0ffee", DEVICE, status, reason, figures, day, 2.5
    )


COPY = record("device", {"work": "copy"}, bytes_per_s=4e12)
PRODUCTS = record("device", {"work": "product"}, flops_per_s=800e12)


def results(*records: Record, missing: tuple[Point, ...] = (), problems=()) -> Results:
    matrix = [{"kind": "device", "work": "copy"}]
    experiment = make_experiment("x", {"title": "A GPU", "devices": "gpu", "matrix": matrix})
    return Results(experiment, Run(list(records), missing), problems)


def step(phase: str = "decode", num_bytes: float = 1e9, seconds: float = 1e-3, **settings: Any):
    """Half of the bytes are weights, half are keys and values."""
    figures = {"step_s": seconds, "tokens_per_s": 1 / seconds, "least_flops": 1e9}
    figures |= {"work": asdict(StepWork(int(num_bytes / 2), int(num_bytes / 2), int(1e9), 0))}
    prompt = {"prompt": 8192, "context": 0} if phase == "prefill" else {}
    settings = {**MODEL, "phase": phase, **prompt, **settings}
    return record("step", settings, least_bytes=num_bytes, **figures)


def target(number: int, *records: Record) -> float | None:
    return TARGETS[number].measured(results(*records))


def test_without_figures_every_target_is_not_measured() -> None:
    assert all(one.measured(results()) is None for one in TARGETS)
    text = to_markdown(results(), "make gpu-report", None)
    assert text.count("not measured") == len(TARGETS)


def test_the_fastest_products_of_a_dtype_are_its_rate() -> None:
    sizes = {16384: 7e14, 8192: 8e14, 4096: 5e14}
    found = [
        record("device", {"work": "product", "size": n}, flops_per_s=x) for n, x in sizes.items()
    ]
    assert results(*found).rates.flops_per_s == {"bfloat16": 8e14}


def test_decode_is_a_fraction_of_the_bandwidth_that_was_measured() -> None:
    assert target(0, COPY, step(num_bytes=3e9)) == pytest.approx(3e9 / 1e-3 / 4e12)
    assert target(0, step(num_bytes=3e9)) is None, "no rate was measured"
    assert target(1, COPY, step(batch=64)) == pytest.approx(0.25)
    assert target(2, COPY, step(model="qwen3-0.6b")) == pytest.approx(0.25)


def test_a_loop_stands_for_decode_where_it_is_faster() -> None:
    found = target(0, COPY, step(num_bytes=1e9), step("loop", num_bytes=2e9))
    assert found == pytest.approx(0.5)


def test_variants_are_not_taken_for_what_is_served() -> None:
    variants = [
        step(kernels="small_matmul=pallas"),
        step(cache_dtype="int8"),
        step(quantization="int8"),
        step(flags="--xla_x=1"),
        step(context=8192, max_context=9216),
    ]
    assert target(0, COPY, *variants) is None


def test_prefill_is_a_fraction_of_the_products_that_were_measured() -> None:
    prompt = step("prefill", max_context=9216)
    assert target(3, PRODUCTS, prompt) == pytest.approx(1e9 / 1e-3 / 800e12)


def test_saturation_is_the_closed_loop_of_a_thousand_tokens() -> None:
    loop = {**MODEL, "concurrency": 320, "window_s": 5.0}
    loaded = record("serving", loop, output_tokens_per_s=7100.0)
    batch = record("serving", {**loop, "window_s": 0.0}, output_tokens_per_s=9000.0)
    other = record("serving", {**loop, "prompt": 128}, output_tokens_per_s=9900.0)
    assert target(4, loaded, batch, other) == 7100.0


def test_weights_of_8_bits_have_targets_of_their_own() -> None:
    quantized = step(quantization="int8", num_bytes=2e9), step(quantization="fp8", num_bytes=3e9)
    assert target(6, COPY, *quantized) == pytest.approx(0.5)
    assert target(6, COPY, step(num_bytes=2e9)) is None


def test_fp8_at_saturation_may_have_fp8_pages_and_activations() -> None:
    loop = {**MODEL, "concurrency": 320, "window_s": 5.0}
    fp8 = {**loop, "quantization": "fp8"}
    pages = {**fp8, "cache_dtype": "float8_e4m3fn"}
    rounded = {**pages, "kernels": "small_matmul=xla_8bit"}
    rates = zip((fp8, pages, rounded), (8e3, 9e3, 1e4), strict=True)
    found = [record("serving", load, output_tokens_per_s=rate) for load, rate in rates]
    bf16 = record("serving", loop, output_tokens_per_s=2e4)
    int8_pages = record("serving", {**fp8, "cache_dtype": "int8"}, output_tokens_per_s=2e4)
    for count, best in enumerate((8e3, 9e3, 1e4), 1):
        assert target(7, *found[:count], bf16, int8_pages) == best
    assert target(4, *found) is None


def test_fp8_pages_are_compared_beside_the_same_weights() -> None:
    long = {"batch": 64, "context": 8192, "max_context": 9216}
    bf16 = [step(seconds=s, cache_dtype=d, **long) for s, d in ((2e-3, "auto"), (1e-3, "int8"))]
    assert target(8, *bf16) is None
    fp8 = step(seconds=1.6e-3, cache_dtype="float8_e4m3fn", **long)
    assert target(8, *bf16, fp8) == pytest.approx(1.25)
    pairs = [
        step(seconds=s, cache_dtype=d, quantization="fp8", **long)
        for s, d in ((1.5e-3, "auto"), (1e-3, "float8_e4m3fn"))
    ]
    assert target(8, *bf16, fp8, *pairs) == pytest.approx(1.5)


def test_a_peer_is_compared_over_the_same_requests() -> None:
    peer = record("peer", {"engine": "transformers-compiled", **SERVED}, output_tokens_per_s=1000.0)
    ours = record("serving", SERVED, output_tokens_per_s=3500.0)
    longer = record("serving", {**SERVED, "output": 20}, output_tokens_per_s=9000.0)
    single = record("serving", {**SERVED, "max_steps": 1}, output_tokens_per_s=9000.0)
    assert target(5, peer, ours, longer, single) == pytest.approx(3.5)
    assert target(5, ours) is None


def test_curves_are_decode_by_batch_beside_the_floor() -> None:
    steps = [step(batch=64, num_bytes=2e9), step(batch=1), step(batch=8, cache_dtype="int8")]
    (curve,) = results(COPY, PRODUCTS, *steps).curves
    assert curve.label == "llama-3.1-8b, context 1,024"
    assert curve.batches == [1, 64]
    assert curve.floors_per_s == pytest.approx([1 / 0.25e-3, 64 / 0.5e-3])
    assert not results(*steps).curves, "without rates there is no floor"


def test_the_floor_is_that_of_weights_and_then_of_attention() -> None:
    floor_s = results(COPY, PRODUCTS).rates.floor_s(
        StepWork(int(4e9), int(4e9), int(8e11), int(16e11)), "bfloat16"
    )
    assert floor_s == pytest.approx(1e-3 + 2e-3)


def test_a_fault_is_shown_before_all_figures_and_fails_the_report() -> None:
    kernel = {"operation": "decode_attention", "rows": 8}
    wrong = record("kernel", kernel, fault="it is wrong: 0.5", difference_fraction=0.5)
    found = results(COPY, wrong)
    text = to_markdown(found, "make gpu-report", None)
    assert text.index("**NOT USABLE HERE: kernel operation=decode") < text.index("| Work |")
    assert "it is wrong: 0.5" in summary(found)
    assert not found.is_complete


def test_kernels_stand_beside_the_reference_of_their_shape() -> None:
    def kernel(name: str, seconds: float, **more: Any) -> Record:
        settings = {"operation": "decode_attention", "kernel": name, **more}
        figures = {"call_s": seconds, "moved_bytes": 4e6, "flops": 1, "difference_fraction": 1e-3}
        return record("kernel", settings, **figures)

    found = [kernel("xla", 4e-6), kernel("pallas", 2e-6), kernel("pallas", 1e-6, rows=8)]
    text = to_markdown(results(COPY, *found), "make gpu-report", None)
    assert "| pallas | 2 µs | 50.0% | 2.00x | 1.0e-03 |" in text
    assert "| rows=8 | pallas | 1 µs | 100.0% | not measured |" in text


def test_what_failed_and_what_was_not_reached_is_listed() -> None:
    failed = record("peer", {"engine": "transformers-paged", **SERVED}, "failed")
    missing = (make_point("device", {"work": "product"}),)
    text = to_markdown(results(COPY, failed, missing=missing), "make gpu-report", "x.png")
    assert "concurrency=64 prompt=100 output=10: failed: it broke" in text
    assert "## Not reached\n\nThe same command goes on here.\n\n- device work=product" in text
    assert "![x.png](x.png)" in text


@pytest.mark.parametrize(
    ("found", "complete"),
    [
        (results(COPY), True),
        (results(COPY, record("peer", {"engine": "transformers-paged", **SERVED}, "failed")), True),
        (results(COPY, record("step", MODEL, "does not fit")), True),
        (results(COPY, record("step", MODEL, "failed")), False),
        (results(COPY, missing=(make_point("device", {"work": "copy"}),)), False),
        (results(COPY, problems=["no GPU"]), False),
    ],
)
def test_a_report_is_complete_without_peers_and_what_does_not_fit(
    found: Results, complete: bool
) -> None:
    assert found.is_complete == complete


def test_every_record_and_target_is_in_the_json() -> None:
    found = to_dict(results(COPY, PRODUCTS, step(num_bytes=3e9)), "make gpu-report")
    assert found["targets"][0]["measured"] == pytest.approx(0.75)
    assert [one["key"] for one in found["records"]][:2] == [
        "device work=copy",
        "device work=product",
    ]
    assert (found["device"], found["commits"]) == (DEVICE, ["c0ffee"])


def test_files_are_named_for_the_device_and_the_first_day() -> None:
    assert results(COPY).name == "h200-2026-11-21"
    assert slug("1 NVIDIA H100 80GB HBM3 beside 16 cores") == "h100"
    assert slug("1 virtual devices on 2 cores of X") == "cpu"
    assert slug("1 Radiant 7 beside 2 cores") == "1-radiant-7"


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    draw_curves(results(COPY, PRODUCTS, step(), step(batch=8)).curves, DEVICE, path)
    assert path.read_bytes().startswith(b"\x89PNG")
