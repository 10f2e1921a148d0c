"""A GPU report as Markdown and as JSON: figures to reach, then tables of all that was measured.

What was not measured is said to be so. It works nothing out but ratios.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plan.gpu_results import Results
from plan.gpu_targets import NOT_MEASURED, TARGETS
from plan.ledger import Record
from plan.units import show

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A header, and rows under it."""


def to_dict(results: Results, command: str) -> dict[str, Any]:
    """All that the report is made of."""
    return {
        "title": results.experiment.title,
        "command": command,
        "device": results.device,
        "commits": results.commits,
        "targets": [
            {
                "work": target.work,
                "unit": target.unit,
                "bar": target.bar,
                "goal": target.goal,
                "measured": target.measured(results),
            }
            for target in TARGETS
        ],
        "records": [asdict(record) for record in results.records],
        "missing": [point.key for point in results.run.missing],
        "problems": list(results.problems),
    }


def to_markdown(results: Results, command: str, picture: str | None) -> str:
    """`picture` is a file beside it; None: nothing was drawn."""
    days = ", ".join(sorted({record.started[:10] for record in results.records}))
    commits = ", ".join(results.commits)
    where = [f"`{command}`", results.device, f"commit {commits}", days, counts(results)]
    parts = [f"# {results.experiment.title}", "\n".join(f"- {line}" for line in where)]
    parts += [*loud(results), "## Figures to reach", targets_table(results)]
    parts.append(f"![{picture}]({picture})" if picture else "There is no picture of it.")
    for heading, table in TABLES.items():
        header, rows = table(results)
        if rows:
            parts += [f"## {heading}", markdown(header, rows)]
    if bad := [f"- {line}" for line in _bad(results)]:
        parts += ["## Not measured, and why", "\n".join(bad)]
    if missing := [f"- {point.key}" for point in results.run.missing]:
        parts += ["## Not reached", "The same command goes on here.", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """What someone who waits for it wants to know first."""
    parts = [*loud(results), targets_table(results), *_bad(results), counts(results)]
    return "\n".join(parts)


def loud(results: Results) -> list[str]:
    """What nobody may overlook."""
    faults = [f"**NOT USABLE HERE: {r.key}: {r.figures['fault']}**" for r in results.faults]
    return faults + [f"**STOPPED: {problem}**" for problem in results.problems]


def targets_table(results: Results) -> str:
    return markdown(
        ["Work", "Bar", "Goal", "Measured"],
        [
            [target.work, *map(target.show, (target.bar, target.goal, target.measured(results)))]
            for target in TARGETS
        ],
    )


def counts(results: Results) -> str:
    statuses = [record.status for record in results.records]
    said = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    said += [f"{len(results.run.missing)} not reached"] if results.run.missing else []
    wall_s = sum(record.wall_s for record in results.records)
    return f"{len(statuses) + len(results.run.missing)} points, {wall_s:.0f} s: {', '.join(said)}"


def _bad(results: Results) -> list[str]:
    bad = [record for record in results.records if record.status != "ok"]
    return [f"{r.key}: {r.status}: {' '.join(r.reason.split())}" for r in bad]


def _rates_table(results: Results) -> Rows:
    rows = [
        [
            "copy" if r.settings["work"] == "copy" else f"{r.settings['dtype']} products",
            _first(r, "bytes_per_s", "flops_per_s"),
        ]
        for r in results.ok("device")
    ]
    return ["work", "rate"], rows


def _kernels_table(results: Results) -> Rows:
    """Each shape's kernels beside each other, the fastest first."""

    def shape(record: Record) -> str:
        aside = ("operation", "kernel", "tiling", "repeats", "cold_bytes")
        return _said(record, *aside)

    records = [r for r in results.ok("kernel") if "call_s" in r.figures]
    records.sort(key=lambda r: (r.settings["operation"], shape(r), r.figures["call_s"]))
    references = {
        (r.settings["operation"], shape(r)): r.figures["call_s"]
        for r in records
        if r.settings["kernel"] == "xla"
    }
    rows: list[list[str]] = []
    for record in records:
        figures, operation = record.figures, record.settings["operation"]
        reference_s = references.get((operation, shape(record)))
        long = operation == "prefill_attention"
        fraction = (
            results.rates.of_products(figures["flops"], figures["call_s"], record.settings["dtype"])
            if long
            else results.rates.of_bandwidth(figures["moved_bytes"], figures["call_s"])
        )
        name = record.settings["kernel"]
        rows.append(
            [
                operation,
                shape(record),
                f"{name} {record.settings['tiling']}".strip(),
                show("_s", figures["call_s"]),
                _fraction(fraction) + (" of products" if long and fraction else ""),
                f"{reference_s / figures['call_s']:.2f}x" if reference_s else NOT_MEASURED,
                f"{figures['difference_fraction']:.1e}",
            ]
        )
    header = ["operation", "shape", "kernel", "time", "of bandwidth", "against xla", "difference"]
    return header, rows


def _steps_table(results: Results) -> Rows:
    rows: list[list[str]] = []
    for record in results.ok("step"):
        figures, rates = record.figures, results.rates
        if "step_s" not in figures:
            continue
        least = figures.get("least_bytes"), figures.get("least_flops")
        bandwidth = least[0] and rates.of_bandwidth(least[0], figures["step_s"])
        products = least[1] and rates.of_products(least[1], figures["step_s"], "bfloat16")
        floor_s = results.step_floor_s(record)
        rows.append(
            [
                record.settings["model"],
                record.settings["phase"],
                _said(record, "model", "phase", "max_context", "repeats", "in_flight"),
                show("_s", figures["step_s"]),
                show("_per_s", figures["tokens_per_s"]),
                show("_s", floor_s) if floor_s else NOT_MEASURED,
                _fraction(bandwidth),
                _fraction(products),
                show("num_kernels", figures.get("num_kernels")),
            ]
        )
    header = ["model", "phase", "with", "step", "tokens/s", "floor", "of bandwidth", "of products"]
    return [*header, "kernels"], rows


def _serving_table(results: Results) -> Rows:
    names = (
        "output_tokens_per_s",
        "decode_tokens_per_s",
        "ttft_median_s",
        "ttft_p99_s",
        "between_tokens_median_s",
        "between_tokens_p99_s",
    )
    rows = [
        [_said(r, "max_context", "max_batch", "token_budget"), *_shown(r, names)]
        for r in results.ok("serving")
    ]
    header = ["load", "output/s", "decode/s", "first token", "p99", "between tokens", "p99"]
    return header, rows


def _gaps_table(results: Results) -> Rows:
    phases = ("schedule_s", "pack_s", "dispatch_s", "device_s", "commit_s", "deliver_s")
    names = ("turn_s", *phases, "host_gap_least_s", "host_gap_s", "host_gap_p90_s")
    rows = [
        [_said(r, "max_context", "max_batch"), r.figures["step_kind"], *_shown(r, names)]
        for r in results.ok("serving")
        if "step_kind" in r.figures
    ]
    header = ["load", "steps", "turn", *(phase.removesuffix("_s") for phase in phases)]
    return [*header, "gap at least", "gap at most", "p90"], rows


def _peers_table(results: Results) -> Rows:
    rows = [
        [
            f"{theirs.settings['engine']}, {_said(theirs, 'engine')}",
            *_shown(theirs, ("output_tokens_per_s", "decode_tokens_per_s")),
            *_shown(ours, ("output_tokens_per_s", "decode_tokens_per_s")),
            *(
                f"{ours.figures[name] / theirs.figures[name]:.2f}x"
                if name in ours.figures and name in theirs.figures
                else NOT_MEASURED
                for name in ("output_tokens_per_s", "decode_tokens_per_s")
            ),
        ]
        for ours, theirs in results.pairs
    ]
    header = ["peer", "output/s", "decode/s", "ours", "ours, decode", "output", "decode"]
    return header, rows


TABLES: Mapping[str, Callable[[Results], Rows]] = {
    "What the device can do": _rates_table,
    "Steps": _steps_table,
    "Serving": _serving_table,
    "Where a step's time goes on the host, medians": _gaps_table,
    "Peers": _peers_table,
    "Kernels": _kernels_table,
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _said(record: Record, *aside: str) -> str:
    """The settings that its key names, but for those shown elsewhere."""
    words = record.key.split(" ")[1:]
    return " ".join(word for word in words if word.partition("=")[0] not in aside)


def _shown(record: Record, names: Sequence[str]) -> list[str]:
    return [
        show(name, record.figures[name]) if name in record.figures else NOT_MEASURED
        for name in names
    ]


def _first(record: Record, *names: str) -> str:
    return next(show(name, record.figures[name]) for name in names if name in record.figures)


def _fraction(value: float | None) -> str:
    return NOT_MEASURED if value is None else show("_fraction", value)
