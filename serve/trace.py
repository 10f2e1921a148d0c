"""What a profile comes to: a table of where steps' time went, and traces to look at.

    with traced(engine.profiles, Path("profile")):
        ...

leaves in the directory `host.json`, for chrome://tracing or ui.perfetto.dev, and JAX's own trace of
the device (TensorBoard, or the `.trace.json.gz` in it for Perfetto), and prints the table. It does
not know what is served.
"""

import json
import statistics
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from serve.profile import Kind, Phase, Profile, Step

NUM_KEPT = 100_000
"""Steps of a replica that a trace holds, the latest: some 50 MB."""

DEVICE_STEPS = range(3, 103)
"""Steps that JAX traces: a trace of more is too large to look at. The first compile."""

POLL_S = 0.005


@dataclass(frozen=True)
class Spread:
    """One duration over the steps of a kind."""

    median_s: float
    p90_s: float
    share: float
    """Its sum, of the sum of the steps' times."""


@dataclass(frozen=True)
class Summary:
    """Where the time of the steps of one kind went."""

    kind: Kind
    num_steps: int
    num_rows: float
    """Mean of a step; so are tokens."""
    num_tokens: float
    step: Spread
    phases: dict[Phase, Spread]
    gap_least: Spread
    """The host gap, as far as it is certain; the next is what it may have been."""
    gap_most: Spread


def summarize(steps: Sequence[Step]) -> list[Summary]:
    """A summary of each kind among `steps`, those left out that compiled a program."""
    return [
        _summarize(kind, some)
        for kind in Kind
        if (some := [s for s in steps if _work(s).kind is kind and Phase.COMPILE not in s.spans])
    ]


def table(steps: Sequence[Step]) -> str:
    """The summaries as text."""
    lines: list[str] = []
    for summary in summarize(steps):
        lines += [
            f"{summary.kind.value}: {summary.num_steps:,} steps, each of {summary.num_rows:.1f} "
            f"rows and {summary.num_tokens:.1f} tokens",
            f"  {'':<18}{'median':>11}{'p90':>11}{'share':>8}",
            *(_line(phase.value, spread) for phase, spread in summary.phases.items()),
            _line("all", summary.step),
            _line("host gap, least", summary.gap_least),
            _line("host gap, most", summary.gap_most),
        ]
    compiling = [step.seconds(Phase.COMPILE) for step in steps if Phase.COMPILE in step.spans]
    if compiling:
        lines.append(f"left out: {len(compiling)} steps that compiled, for {sum(compiling):.1f} s")
    return "\n".join(lines) or "no step was taken"


def chrome_trace(replicas: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Steps as Chrome's trace events: a process per replica, the host's phases over the device."""
    events: list[dict[str, Any]] = []
    for process, steps in enumerate(replicas):
        for thread, name in enumerate(("host", "device")):
            arguments = {"name": name}
            named = {"ph": "M", "name": "thread_name", "pid": process, "tid": thread}
            events.append(named | {"args": arguments})
        busy_until_s = 0.0
        for step in steps:
            events += _events(process, step, busy_until_s)
            busy_until_s = step.done_s or busy_until_s
    return {"traceEvents": events, "displayTimeUnit": "ms"}


@contextmanager
def traced(profiles: Sequence[Profile], directory: Path) -> Generator[None]:
    """Traces the engines while the context lasts; the table goes to stderr when it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    for profile in profiles:
        profile.keep(NUM_KEPT)
    ended = threading.Event()
    device = threading.Thread(target=_trace_device, args=(profiles, directory, ended))
    device.start()
    try:
        yield
    finally:
        ended.set()
        device.join()
        replicas = [profile.steps() for profile in profiles]
        (directory / "host.json").write_text(json.dumps(chrome_trace(replicas)))
        steps = [step for steps in replicas for step in steps]
        print(f"{table(steps)}\ntraces are in {directory}", file=sys.stderr, flush=True)


def _summarize(kind: Kind, steps: Sequence[Step]) -> Summary:
    totals = [step.total_s for step in steps]
    whole = sum(totals)
    phases = [phase for phase in Phase if phase is not Phase.COMPILE]
    gaps = [step.gap for step in steps if step.gap is not None]
    return Summary(
        kind=kind,
        num_steps=len(steps),
        num_rows=statistics.mean(_work(step).num_rows for step in steps),
        num_tokens=statistics.mean(_work(step).num_tokens for step in steps),
        step=_spread(totals, whole),
        phases={p: _spread([step.seconds(p) for step in steps], whole) for p in phases},
        gap_least=_spread([gap.least_s for gap in gaps], whole),
        gap_most=_spread([gap.most_s for gap in gaps], whole),
    )


def _spread(values: Sequence[float], whole: float) -> Spread:
    ordered = sorted(values) or [0.0]
    p90 = ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)]
    return Spread(statistics.median(ordered), p90, sum(ordered) / whole if whole else 0.0)


def _line(name: str, spread: Spread) -> str:
    median, p90 = (f"{seconds * 1e3:.3f} ms" for seconds in (spread.median_s, spread.p90_s))
    return f"  {name:<18}{median:>11}{p90:>11}{spread.share:>8.1%}"


def _work(step: Step):
    assert step.work is not None, "only dispatched steps are kept"
    return step.work


def _events(process: int, step: Step, busy_until_s: float) -> list[dict[str, Any]]:
    """The step's phases, and the device's work on it, which begins with its dispatch at best."""
    work = _work(step)
    about = {
        "step": step.number,
        "kind": work.kind.value,
        "shape": work.shape,
        "rows": work.num_rows,
        "tokens": work.num_tokens,
    }

    def event(thread: int, name: str, began_s: float, ended_s: float) -> dict[str, Any]:
        times = {"ts": began_s * 1e6, "dur": max(0.0, ended_s - began_s) * 1e6}
        return {"ph": "X", "name": name, "pid": process, "tid": thread, "args": about} | times

    events = [event(0, phase.value, *span) for phase, span in step.spans.items()]
    began_s = max(step.spans[Phase.DISPATCH][0], busy_until_s)
    return [*events, event(1, work.kind.value, began_s, step.done_s or began_s)]


def _trace_device(profiles: Sequence[Profile], directory: Path, ended: threading.Event) -> None:
    """JAX's trace of DEVICE_STEPS, fewer where the run has fewer."""

    def wait_for_step(number: int) -> bool:
        while sum(profile.num_steps for profile in profiles) < number:
            if ended.wait(POLL_S):
                return False
        return True

    if not wait_for_step(DEVICE_STEPS.start):
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Every call of Python would be slowed down and recorded.
    jax.profiler.start_trace(directory, profiler_options=options)
    wait_for_step(DEVICE_STEPS.stop)
    jax.profiler.stop_trace()
