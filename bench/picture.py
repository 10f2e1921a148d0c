"""A bench report as a picture: bars of tokens/s, one engine beside the other.

    python -m bench.picture bench/results/cpu-float32-2026-11-21.json docs/cpu-figures.png

It does not know how the figures were taken (`bench/report.py`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

COLORS = ("#1f6f8b", "#c4c9cf")
"""Of ours and of the peers."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Medians as bars, lowest to highest as whiskers; one panel a workload, since units differ."""
    workloads = report["workloads"]
    figure, panels = plt.subplots(1, len(workloads), figsize=(9, 3.2), layout="constrained")
    for panel, workload in zip(panels, workloads, strict=True):
        for place, side in enumerate(report["sides"]):
            runs = sorted(side["samples"][workload["name"]])
            median = report["figures"][workload["name"]]["median"][side["name"]]
            error = [[median - runs[0]], [runs[-1] - median]]
            panel.bar(place, median, yerr=error, color=COLORS[place > 0], width=0.6, capsize=3)
            panel.text(place, median / 2, f"{median:,.0f}", ha="center", va="center")
        names = [side["name"] for side in report["sides"]]
        panel.set_xticks(range(len(names)), names, fontsize=8 if len(names) < 4 else 6.5)
        panel.set_title(f"{workload['name']}\n{workload['description']}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens/s")
    machine = report["machine"]
    figure.suptitle(f"{report['model']}; {machine['num_cores']} cores", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a report of `weft bench offline`.")
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
