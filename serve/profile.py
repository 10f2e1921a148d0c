"""Where a step's time goes, and how long the device stood idle because of the host.

Phases are spans of the engine's thread: SCHEDULE, PACK, COMPILE (only where a program was missing)
and DISPATCH bring a step on its way; a turn of the loop later DEVICE is the wait for it, and COMMIT
and DELIVER take it in. Beside those of another step, they fill a turn, so their sum over steps is
the loop's time. A phase is as long as the clock says, time lost to other threads included.

DISPATCH is the call of the program. It is host time where the call only enqueues; a backend that
runs in the call what it should enqueue (XLA:CPU small programs, XLA:GPU loops it drives from the
host) shows device time there and little under DEVICE.

The host gap of a step is how long the device had nothing to do between the step before and it. The
moment when a step was done is not told by JAX (a thread that waited for it would be told when it
gets the interpreter, too late just where there is a gap), so its output is asked whether it is
there at the end of each phase, without waiting: it was done between the last no and the first yes.
Most often the answer after the next dispatch is still no: then the gap is zero, exactly. Otherwise
it lies between `Gap.least_s` and `Gap.most_s`: from the first yes to the begin of the dispatch, and
from the last no to its end, since the device may start anywhere within the call. `most_s` is what
is exported: it errs against us, by one phase and the call at most (a phase in which the thread was
stopped is a long one). A step that was done within its own call is taken to have begun and ended
with it. What a gap leaves out: pauses of the device inside a step, and idleness when there was
nothing to do.

It imports no JAX and takes its clock as an argument; it does not know what a step computes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from serve.telemetry import Histogram, Series

NUM_KEPT = 1_024
"""Steps that are kept one by one, the latest: about half a megabyte."""

TOKENS = tuple(2**i for i in range(15))
"""Bounds for the tokens of a step."""


class Phase(StrEnum):
    SCHEDULE = "schedule"
    PACK = "pack"
    COMPILE = "compile"
    DISPATCH = "dispatch"
    DEVICE = "device"
    COMMIT = "commit"
    DELIVER = "deliver"


class Kind(StrEnum):
    """What runs in a step."""

    DECODE = "decode"
    LOOP = "loop"
    """Decode of several tokens in one call."""
    MIXED = "mixed"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Gap:
    """How long the device stood idle before a step, as far as that is known."""

    least_s: float
    most_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is asked to do."""

    kind: Kind
    shape: str
    """The compiled program's."""
    num_rows: int
    num_tokens: int
    """Of prompts, and those that decode rows may choose."""


@dataclass(slots=True)
class Step:
    """One step's times, on the profile's clock; made by `Profile.begin`."""

    profile: "Profile" = field(repr=False)
    number: int
    spans: dict[Phase, tuple[float, float]] = field(
        default_factory=dict[Phase, tuple[float, float]]
    )
    work: Work | None = None
    """None until it is dispatched."""
    gap: Gap | None = None
    """None when it did not follow another step at once."""
    done_s: float | None = None
    """When it was first seen to be done."""

    def phase(self, phase: Phase) -> "Span":
        """A context: what runs in it is that phase."""
        return Span(self, phase)

    def dispatched(self, work: Work, is_done: Callable[[], bool]) -> None:
        """The program has been called; `is_done` says without waiting whether it has ended."""
        self.work = work
        self.profile.follow(self, is_done)

    def seconds(self, phase: Phase) -> float:
        began_s, ended_s = self.spans.get(phase, (0.0, 0.0))
        return ended_s - began_s

    @property
    def total_s(self) -> float:
        """What it took of the engine's thread."""
        return sum(ended_s - began_s for began_s, ended_s in self.spans.values())


class Span:
    """A phase of a step while it lasts."""

    __slots__ = ("_began_s", "_phase", "_step")

    def __init__(self, step: Step, phase: Phase) -> None:
        self._step, self._phase = step, phase
        self._began_s = 0.0

    def __enter__(self) -> None:
        self._began_s = self._step.profile.clock()

    def __exit__(self, *_: object) -> None:
        step, profile = self._step, self._step.profile
        ended_s = profile.clock()
        step.spans[self._phase] = (self._began_s, ended_s)
        if self._phase is Phase.DEVICE:
            profile.waited(step, ended_s)
        profile.look(ended_s)


class Profile:
    """The times of an engine's steps: the latest one by one, all of them as histograms.

    One thread records; `steps` and `series` may be called from any.
    """

    def __init__(self, clock: Callable[[], float], num_kept: int = NUM_KEPT) -> None:
        self.clock = clock
        self.num_steps = 0
        """Dispatched so far."""
        self._kept: deque[Step] = deque(maxlen=num_kept)
        self._phases = {phase: Histogram() for phase in Phase}
        self._gaps = Histogram()
        self._tokens = Histogram(TOKENS)
        self._last: Step | None = None
        """The step dispatched last, if the device is to go on without a pause."""
        self._is_done: Callable[[], bool] = bool
        self._busy_s = 0.0
        """When `_last` was last seen to be running."""

    def keep(self, num_steps: int) -> None:
        """From now on, keeps the latest `num_steps` steps."""
        self._kept = deque(self._kept, maxlen=num_steps)

    def steps(self) -> list[Step]:
        """The latest that are done and delivered, oldest first."""
        return list(self._kept)

    def series(self) -> list[Series]:
        return [
            *(
                Series("step_phase_seconds", histogram, {"phase": phase.value})
                for phase, histogram in self._phases.items()
            ),
            Series("step_host_gap_seconds", self._gaps),
            Series("iteration_tokens_total", self._tokens),
        ]

    def begin(self) -> Step:
        """The record of the step that is planned next."""
        return Step(self, self.num_steps + 1)

    def idle(self) -> None:
        """There is nothing to do: until the next step, the device stands idle for lack of work."""
        self._last = None

    def follow(self, step: Step, is_done: Callable[[], bool]) -> None:
        """`step` was dispatched: the gap before it is known, and from now on it is looked at."""
        began_s, ended_s = step.spans[Phase.DISPATCH]
        ran_in_call = is_done()
        if self._last is not None:
            latest_start_s = began_s if ran_in_call else ended_s
            step.gap = self._gap(self._last, began_s, latest_start_s)
        self._last, self._is_done = step, is_done
        self._busy_s = ended_s if ran_in_call else began_s
        step.done_s = ended_s if ran_in_call else None
        self.num_steps += 1

    def _gap(self, last: Step, earliest_start_s: float, latest_start_s: float) -> Gap:
        if last.done_s is None:
            return Gap(0.0, 0.0)
        least_s, most_s = earliest_start_s - last.done_s, latest_start_s - self._busy_s
        return Gap(max(0.0, least_s), max(0.0, most_s))

    def look(self, now_s: float) -> None:
        """Asks whether the step dispatched last has ended."""
        last = self._last
        if last is None or last.done_s is not None:
            return
        if self._is_done():
            last.done_s = now_s
        else:
            self._busy_s = now_s

    def waited(self, step: Step, now_s: float) -> None:
        """The wait for `step` is over. If it had not been seen to be done, it was until now."""
        if step.done_s is None:
            step.done_s = now_s
            if step is self._last:
                self._busy_s = now_s

    def finish(self, step: Step) -> None:
        """All that came of the step is delivered."""
        assert step.work is not None, "a step is dispatched before it is done"
        for phase, (began_s, ended_s) in step.spans.items():
            self._phases[phase].observe(ended_s - began_s)
        if step.gap is not None:
            self._gaps.observe(step.gap.most_s)
        self._tokens.observe(step.work.num_tokens)
        self._kept.append(step)
