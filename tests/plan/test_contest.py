"""Who wins is what the records say, and so is why."""

from typing import Any

import pytest

from plan.contest import Reason, decide, differing
from plan.kinds import Contest
from plan.ledger import Record

CONTEST = Contest(
    setting="mesh",
    empty="one device",
    aside=("repeats",),
    rate="tokens_per_s",
    rate_low="low_per_s",
    rate_high="high_per_s",
    unmeasured=("floor_s", "sent_bytes"),
    unmeasured_means="",
    reasons=("num_kernels", "sent_bytes"),
    memory=(),
)


def record(mesh: str, batch: int = 1, status: Any = "ok", repeats: int = 5, **figures: float):
    settings = {"model": "tiny", "mesh": mesh, "batch": batch, "repeats": repeats}
    return Record(mesh, "step", settings, "abc", "d", status, "", figures, "2026", 1.0)


def timed(mesh: str, rate: float, spread: float = 0.0, **more: Any):
    low, high = rate - spread, rate + spread
    return record(mesh, tokens_per_s=rate, low_per_s=low, high_per_s=high, **more)


def test_the_highest_rate_wins_and_less_of_a_figure_is_its_reason():
    (verdict,) = decide(
        CONTEST,
        [
            timed("", 10, num_kernels=5, sent_bytes=0),
            timed("tensor=2", 30, num_kernels=5, sent_bytes=7),
            timed("stage=2", 20, num_kernels=9, sent_bytes=3, repeats=50),
        ],
    )
    assert (verdict.best, verdict.second, verdict.ratio) == ("tensor=2", "stage=2", 1.5)
    assert (verdict.figure, verdict.value, verdict.clear) == ("tokens_per_s", 30, True)
    assert verdict.reasons == [Reason("num_kernels", 5, 9)]
    assert verdict.where == {}


def test_each_case_has_a_verdict_in_the_records_order():
    batches = (8, 1, 4)
    found = decide(CONTEST, [timed(mesh, 5, batch=b) for mesh in ("", "stage=2") for b in batches])
    assert [verdict.where for verdict in found] == [{"batch": batch} for batch in batches]


@pytest.mark.parametrize(("spread", "clear"), [(0.9, True), (1.1, False)])
def test_quartiles_that_overlap_make_no_clear_winner(spread: float, clear: bool):
    (verdict,) = decide(CONTEST, [timed("", 10, spread), timed("tensor=2", 12, spread)])
    assert verdict.clear is clear


def test_what_was_not_run_is_decided_by_what_was_counted_ties_by_the_next():
    meshes = {"": (3.0, 0), "stage=2": (1.0, 9), "tensor=2": (1.0, 8)}
    records = [record(mesh, floor_s=f, sent_bytes=b) for mesh, (f, b) in meshes.items()]
    (verdict,) = decide(CONTEST, records)
    assert (verdict.best, verdict.second, verdict.figure) == ("tensor=2", "stage=2", "floor_s")
    assert (verdict.ratio, verdict.clear) == (1.0, True)


def test_what_does_not_fit_cannot_win_and_is_named():
    bad = record("", status="does not fit", floor_s=0.1)
    failed = record("stage=4", status="failed")
    good = record("tensor=2", floor_s=1.0, sent_bytes=1)
    (verdict,) = decide(CONTEST, [bad, failed, good])
    assert (verdict.best, verdict.second, verdict.ratio) == ("tensor=2", None, None)
    assert verdict.misfits == ["one device"]
    assert decide(CONTEST, [bad, failed]) == []


def test_settings_that_differ_are_found():
    assert differing([record("a", 1), record("a", 2)]) == ["batch"]
    assert differing([]) == []
