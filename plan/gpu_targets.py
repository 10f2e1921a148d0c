"""The figures to reach on one H200, and where in a report's results they are found.

It does not know how figures were taken.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plan.gpu_results import Results
from plan.units import show

NOT_MEASURED = "not measured"

FP8_VARIANTS = (
    {"cache_dtype": "float8_e4m3fn"},
    {"cache_dtype": "float8_e4m3fn", "kernels": "small_matmul=xla_8bit"},
)
"""What else is fp8 in engines whose weights are, and that we are compared with: pages, and then
activations."""


@dataclass(frozen=True)
class Target:
    work: str
    bar: float
    goal: float
    unit: str
    """How it is shown, as `plan/units.py` has it: fraction, tokens_per_s, or times."""
    measured: Callable[[Results], float | None]

    def show(self, value: float | None) -> str:
        if value is None:
            return NOT_MEASURED
        return f"{value:.2f}x" if self.unit == "times" else show(f"_{self.unit}", value)


def _decode(
    model: str, batch: int, quantization: str = "none"
) -> Callable[[Results], float | None]:
    """Of measured bandwidth: a step alone or in a loop, whichever a server would rather take."""
    settings = {"model": model, "quantization": quantization, "batch": batch, "context": 1024}

    def measured(results: Results) -> float | None:
        records = [
            record
            for phase in ("decode", "loop")
            for record in results.find("step", phase=phase, **settings)
        ]
        fractions = [
            results.rates.of_bandwidth(r.figures["least_bytes"], r.figures["step_s"])
            for r in records
            if "least_bytes" in r.figures
        ]
        return max((fraction for fraction in fractions if fraction), default=None)

    return measured


def _prefill(results: Results) -> float | None:
    found = results.find("step", model="llama-3.1-8b", phase="prefill", batch=1, prompt=8192)
    fractions = [
        results.rates.of_products(r.figures["least_flops"], r.figures["step_s"], "bfloat16")
        for r in found
        if "least_flops" in r.figures
    ]
    return max((fraction for fraction in fractions if fraction), default=None)


def _saturated(
    *variants: Mapping[str, str], quantization: str = "none"
) -> Callable[[Results], float | None]:
    """The best of what is chosen untold and of `variants`."""
    settings = {"model": "llama-3.1-8b", "prompt": 1000, "output": 1000}

    def measured(results: Results) -> float | None:
        rates = [
            record.figures["output_tokens_per_s"]
            for variant in ({}, *variants)
            for record in results.find("serving", quantization=quantization, **settings, **variant)
            if record.settings["window_s"]
        ]
        return max(rates, default=None)

    return measured


def _fp8_pages(results: Results) -> float | None:
    """Their rate over that of bfloat16's with the same weights, whichever are better."""
    settings = {"model": "llama-3.1-8b", "phase": "decode", "batch": 64, "context": 8192}
    ratios = [
        ours.figures["tokens_per_s"] / theirs.figures["tokens_per_s"]
        for weights in ("none", "fp8")
        for ours in results.find(
            "step", quantization=weights, cache_dtype="float8_e4m3fn", **settings
        )
        for theirs in results.find("step", quantization=weights, **settings)
    ]
    return max(ratios, default=None)


def _against_peer(results: Results) -> float | None:
    ratios = [
        ours.figures["output_tokens_per_s"] / theirs.figures["output_tokens_per_s"]
        for ours, theirs in results.pairs
        if theirs.settings["concurrency"] == 64
        and theirs.settings["engine"] == "transformers-compiled"
    ]
    return max(ratios, default=None)


TARGETS = (
    Target(
        "8B bf16 decode, batch 1, 1k context, of measured bandwidth",
        0.75,
        0.90,
        "fraction",
        _decode("llama-3.1-8b", 1),
    ),
    Target(
        "8B bf16 decode, batch 64, 1k context, of measured bandwidth",
        0.70,
        0.85,
        "fraction",
        _decode("llama-3.1-8b", 64),
    ),
    Target(
        "0.6B bf16 decode, batch 1, 1k context, of measured bandwidth",
        0.45,
        0.65,
        "fraction",
        _decode("qwen3-0.6b", 1),
    ),
    Target("8B prefill of 8k, of measured GEMM rate", 0.60, 0.80, "fraction", _prefill),
    Target(
        "8B bf16, 1000/1000 at saturation, output tokens/s",
        7_000,
        12_000,
        "tokens_per_s",
        _saturated(),
    ),
    Target("against transformers compiled, batch 64", 3.0, 6.0, "times", _against_peer),
    Target(
        "8B int8 decode, batch 1, 1k context, of measured bandwidth",
        0.65,
        0.85,
        "fraction",
        _decode("llama-3.1-8b", 1, "int8"),
    ),
    Target(
        "8B fp8, 1000/1000 at saturation, output tokens/s",
        12_000,
        20_000,
        "tokens_per_s",
        _saturated(*FP8_VARIANTS, quantization="fp8"),
    ),
    Target("fp8 pages against bf16: decode at batch 64, 8k context", 1.4, 1.7, "times", _fp8_pages),
)
"""The bars and goals of one H200."""
