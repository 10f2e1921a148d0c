"""The figures to reach on one H200, and where in a report's results they are found.

It does not know how figures were taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plan.gpu_results import Results
from plan.units import show

NOT_MEASURED = "not measured"


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


def _decode(model: str, batch: int) -> Callable[[Results], float | None]:
    """Of measured bandwidth: a step alone or in a loop, whichever a server would rather take."""

    def measured(results: Results) -> float | None:
        records = [
            record
            for phase in ("decode", "loop")
            for record in results.find("step", model=model, phase=phase, batch=batch, context=1024)
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


def _saturated(results: Results) -> float | None:
    found = results.find("serving", model="llama-3.1-8b", prompt=1000, output=1000)
    rates = [r.figures["output_tokens_per_s"] for r in found if r.settings["window_s"]]
    return max(rates, default=None)


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
        _saturated,
    ),
    Target("against transformers compiled, batch 64", 3.0, 6.0, "times", _against_peer),
)
"""The bars and goals of one H200."""
