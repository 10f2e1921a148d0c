"""Decode against the roofline: tokens per second by batch, and the most that the device allows.

It needs matplotlib, and does not know where the figures are from.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from plan.gpu_results import Curve

COLORS = ("#1f6f8b", "#d98e04", "#7a4b94", "#5b8c2a", "#b03a48")


def draw(curves: Sequence[Curve], device: str, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for place, curve in enumerate(curves):
        color = COLORS[place % len(COLORS)]
        axes.plot(curve.batches, curve.floors_per_s, "--", color=color, linewidth=0.9)
        axes.plot(curve.batches, curve.tokens_per_s, "o-", color=color, label=curve.label)
    axes.plot([], [], "--", color="gray", label="the most at measured rates")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({batch for curve in curves for batch in curve.batches})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("rows decoded together")
    axes.set_ylabel("tokens/s")
    axes.set_title(device, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
