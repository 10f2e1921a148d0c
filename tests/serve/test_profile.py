"""A device of known times under the profile: what it says of gaps holds for what they were."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.profile import Kind, Phase, Profile, Step, Work

WORK = Work(Kind.DECODE, "2 decode x 1", num_rows=2, num_tokens=2)


@dataclass
class Machine:
    """A host and a device on one clock; the engine's loop is `turn`."""

    now_s: float = 0.0
    starts_s: list[float] = field(default_factory=list[float])
    ends_s: list[float] = field(default_factory=list[float])
    steps: list[Step] = field(default_factory=list[Step])

    def __post_init__(self) -> None:
        self.profile = Profile(lambda: self.now_s)

    def spend(self, step: Step, phase: Phase, seconds: float) -> None:
        with step.phase(phase):
            self.now_s += seconds

    def dispatch(self, device_s: float, host_s: float = 1.0, inline: bool = False) -> Step:
        """The device may begin halfway through the call; `inline`, the call is its work."""
        step = self.profile.begin()
        self.spend(step, Phase.SCHEDULE, host_s)
        self.spend(step, Phase.PACK, host_s)
        with step.phase(Phase.DISPATCH):
            self.now_s += 0.0 if inline else host_s / 2
            start_s = max([self.now_s, *self.ends_s[-1:]])
            end_s = start_s + device_s
            self.now_s = end_s if inline else self.now_s + host_s / 2
        self.starts_s.append(start_s)
        self.ends_s.append(end_s)
        self.steps.append(step)
        step.dispatched(WORK, lambda: self.now_s >= end_s)
        return step

    def collect(self, step: Step, host_s: float = 1.0) -> None:
        with step.phase(Phase.DEVICE):
            self.now_s = max(self.now_s, self.ends_s[self.steps.index(step)])
        self.spend(step, Phase.COMMIT, host_s)
        self.spend(step, Phase.DELIVER, host_s)
        self.profile.finish(step)

    def run(self, device_s: list[float], host_s: list[float], inline: bool = False) -> None:
        """As the engine does: a step is collected after the next is dispatched."""
        last = None
        for device, host in zip(device_s, host_s, strict=True):
            step = self.dispatch(device, host, inline)
            if last is not None:
                self.collect(last, host)
            last = step

    @property
    def gaps_s(self) -> list[float]:
        return [start - end for end, start in zip(self.ends_s, self.starts_s[1:], strict=False)]


def done_in_call(step: Step) -> bool:
    return step.done_s == step.spans[Phase.DISPATCH][1]


durations = st.lists(st.integers(0, 40).map(float), min_size=2, max_size=20)


@given(durations, durations, st.booleans())
def test_gap_is_never_outside_its_bounds(
    device_s: list[float], host_s: list[float], inline: bool
) -> None:
    num_steps = min(len(device_s), len(host_s))
    machine = Machine()
    machine.run(device_s[:num_steps], host_s[:num_steps], inline)
    assert machine.steps[0].gap is None
    for last, step, gap_s in zip(machine.steps, machine.steps[1:], machine.gaps_s, strict=False):
        assert step.gap is not None
        # A step that was done within its call is taken to have begun and ended with it.
        slack_s = 0.0
        if not inline:
            slack_s = sum(s.seconds(Phase.DISPATCH) / 2 for s in (last, step) if done_in_call(s))
        assert step.gap.least_s - slack_s <= gap_s + 1e-9
        assert gap_s <= step.gap.most_s + slack_s + 1e-9


def test_gap_is_zero_when_the_next_step_is_dispatched_in_time() -> None:
    machine = Machine()
    machine.run([20.0] * 5, [1.0] * 5)
    assert [(s.gap.least_s, s.gap.most_s) for s in machine.steps[1:] if s.gap] == [(0, 0)] * 4


def test_slow_host_shows_as_a_gap_to_within_a_phase_and_the_call() -> None:
    machine = Machine()
    machine.run([2.0] * 5, [1.0] * 5)
    for step, gap_s in zip(machine.steps[2:], machine.gaps_s[1:], strict=True):
        assert step.gap is not None
        assert gap_s > 0
        assert step.gap.most_s - step.gap.least_s <= 2.0


def test_gap_after_a_step_that_was_waited_for_is_known_up_to_the_call() -> None:
    """Nothing could be planned before its tokens were there."""
    machine = Machine()
    machine.collect(machine.dispatch(50.0))
    machine.dispatch(50.0)
    gap = machine.steps[1].gap
    assert gap is not None
    assert machine.gaps_s == [4.5]
    assert (gap.least_s, gap.most_s) == (4.0, 5.0)


def test_idleness_for_lack_of_work_is_no_gap() -> None:
    machine = Machine()
    machine.collect(machine.dispatch(5.0))
    machine.profile.idle()
    machine.now_s += 1_000
    assert machine.dispatch(5.0).gap is None


def test_a_step_that_is_done_is_not_asked_again() -> None:
    machine, asked = Machine(), []
    step = machine.profile.begin()
    machine.spend(step, Phase.DISPATCH, 1.0)
    step.dispatched(WORK, lambda: bool(asked.append(1)) or len(asked) > 2)
    for _ in range(5):
        machine.spend(machine.profile.begin(), Phase.SCHEDULE, 1.0)
    assert len(asked) == 3
    assert step.done_s == 3.0


def test_phases_of_a_turn_fill_it() -> None:
    machine = Machine()
    machine.run([3.0, 9.0, 1.0, 30.0, 2.0], [1.0, 2.0, 0.5, 1.0, 4.0])
    machine.collect(machine.steps[-1])
    spans = sorted(span for step in machine.steps for span in step.spans.values())
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert sum(step.total_s for step in machine.steps) == machine.now_s


def test_every_step_is_counted_and_the_latest_are_kept() -> None:
    machine = Machine()
    machine.profile.keep(2)
    for _ in range(5):
        machine.collect(machine.dispatch(5.0))
    assert [step.number for step in machine.profile.steps()] == [4, 5]
    series = {
        (one.name, one.labels.get("phase")): one.histogram for one in machine.profile.series()
    }
    assert series["step_phase_seconds", "device"].total == 5 * 4.5
    assert sum(series["step_phase_seconds", "pack"].counts) == 5
    assert sum(series["step_phase_seconds", "compile"].counts) == 0
    assert sum(series["step_host_gap_seconds", None].counts) == 4
    assert series["iteration_tokens_total", None].total == 10


def test_a_phase_that_raises_is_timed_and_raises() -> None:
    machine = Machine()
    step = machine.profile.begin()

    def fail() -> None:
        with step.phase(Phase.PACK):
            machine.now_s += 3
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert step.seconds(Phase.PACK) == 3
    assert step.seconds(Phase.COMMIT) == 0
