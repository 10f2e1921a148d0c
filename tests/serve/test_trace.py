"""Tables and traces of steps whose times are known."""

import json
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from serve import trace
from serve.profile import Gap, Kind, Phase, Profile, Step, Work
from serve.trace import chrome_trace, summarize, table, traced

ORDER = [phase for phase in Phase if phase is not Phase.COMPILE]


def step(number: int, kind: Kind = Kind.DECODE, ms: float = 1.0, gap_ms: float = 0.0) -> Step:
    """Six phases of `ms` each; steps of one number begin at once."""
    made = Step(Profile(float), number, work=Work(kind, "4 decode x 1", 4, 8))
    for i, phase in enumerate(ORDER):
        began_s = number + i * ms / 1e3
        made.spans[phase] = (began_s, began_s + ms / 1e3)
    made.gap = Gap(gap_ms / 2e3, gap_ms / 1e3)
    made.done_s = made.spans[Phase.DEVICE][1]
    return made


def test_summary_has_medians_and_shares_of_each_kind() -> None:
    steps = [step(i, ms=ms, gap_ms=3 * ms) for i, ms in enumerate((1, 2, 3, 4, 40))]
    decode, loop = summarize([*steps, step(9, Kind.LOOP)])
    assert (decode.kind, decode.num_steps) == (Kind.DECODE, 5)
    assert (loop.kind, loop.num_steps) == (Kind.LOOP, 1)
    assert (decode.num_rows, decode.num_tokens) == (4, 8)
    pack = decode.phases[Phase.PACK]
    assert pack.median_s == pytest.approx(3e-3)
    assert pack.p90_s == pytest.approx(40e-3)
    assert pack.share == pytest.approx(1 / 6)
    assert decode.step.median_s == pytest.approx(18e-3)
    assert decode.gap_most.share == pytest.approx(3 / 6)
    assert decode.gap_least.median_s == pytest.approx(4.5e-3)


def test_steps_that_compiled_are_left_out_and_said_to_be() -> None:
    slow = step(2)
    slow.spans[Phase.COMPILE] = (0.0, 30.0)
    assert summarize([slow, step(1)])[0].num_steps == 1
    assert "left out: 1 steps that compiled, for 30.0 s" in table([slow, step(1)])


def test_table_names_every_phase_and_the_gap() -> None:
    lines = table([step(1, gap_ms=1.5)]).splitlines()
    assert lines[0] == "decode: 1 steps, each of 4.0 rows and 8.0 tokens"
    words = [line.split() for line in lines[2:]]
    assert [row[0] for row in words[: len(ORDER)]] == [phase.value for phase in ORDER]
    assert ["host", "gap,", "most", "1.500", "ms", "1.500", "ms", "25.0%"] in words
    assert table([]) == "no step was taken"


def test_chrome_trace_shows_phases_over_the_device() -> None:
    found = chrome_trace([[step(1), step(2)], [step(3)]])["traceEvents"]
    spans = [event for event in found if event["ph"] == "X"]
    assert len(spans) == 3 * (len(ORDER) + 1)
    schedule = spans[0]
    assert (schedule["name"], schedule["pid"], schedule["tid"]) == ("schedule", 0, 0)
    assert (schedule["ts"], schedule["dur"]) == (1e6, pytest.approx(1e3))
    shown = {"step": 1, "kind": "decode", "shape": "4 decode x 1", "rows": 4, "tokens": 8}
    assert schedule["args"] == shown
    device = [event for event in spans if event["tid"] == 1]
    assert [event["pid"] for event in device] == [0, 0, 1]
    # From the dispatch, the third phase, to the end of the wait, the fourth.
    assert device[0]["ts"] == pytest.approx(1.002e6)
    assert device[0]["dur"] == pytest.approx(2e3)


def test_traced_run_leaves_both_traces_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "DEVICE_STEPS", range(1, 3))
    start, is_tracing = jax.profiler.start_trace, threading.Event()

    def start_trace(*args: Any, **options: Any) -> None:
        start(*args, **options)
        is_tracing.set()

    monkeypatch.setattr(jax.profiler, "start_trace", start_trace)
    profile = Profile(float)
    with traced([profile], tmp_path / "new"):
        for _ in range(5):
            one = profile.begin()
            with one.phase(Phase.DISPATCH):
                jax.numpy.ones(3).block_until_ready()
            one.dispatched(Work(Kind.LOOP, "4 decode x 8", 4, 32), lambda: True)
            profile.finish(one)
            assert is_tracing.wait(60)
    events = json.loads((tmp_path / "new" / "host.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" and event["tid"] == 0 for event in events) == 5
    assert list((tmp_path / "new").glob("plugins/profile/*/*.xplane.pb"))
    printed = capsys.readouterr().err
    assert "loop: 5 steps" in printed
    assert f"traces are in {tmp_path / 'new'}" in printed


def test_run_too_short_for_the_devices_trace_has_the_hosts(tmp_path: Path) -> None:
    with traced([Profile(float)], tmp_path):
        pass
    assert (tmp_path / "host.json").is_file()
    assert not (tmp_path / "plugins").exists()
