"""A ledger survives being cut anywhere, and is one run's at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plan.ledger import Ledger, LedgerError, Record, latest, read_records

RECORD = Record(
    key="step model=tiny",
    kind="step",
    settings={"model": "tiny"},
    commit="abc",
    device="8 virtual devices",
    status="ok",
    reason="",
    figures={"step_s": 0.25, "text": "ünï\ncode"},
    started="2026-01-02T03:04:05+00:00",
    wall_s=1.5,
)


def records(number: int) -> list[Record]:
    return [replace(RECORD, key=f"point {i}") for i in range(number)]


def write(path: Path, number: int) -> None:
    with Ledger(path) as ledger:
        for record in records(number):
            ledger.append(record)


def test_what_was_appended_is_read_by_the_next(tmp_path: Path):
    path = tmp_path / "new" / "records.jsonl"
    assert read_records(path) == []
    write(path, 2)
    assert read_records(path) == records(2)
    with Ledger(path) as ledger:
        assert ledger.records == records(2)


@settings(max_examples=30)  # each syncs files
@given(st.data())
def test_a_ledger_cut_anywhere_keeps_whole_lines_and_goes_on(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "records.jsonl"
    write(path, 3)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert read_records(path) == records(kept)
    with Ledger(path) as ledger:
        ledger.append(RECORD)
    assert read_records(path) == [*records(kept), RECORD]


@pytest.mark.parametrize("line", ["{", "3", '{"key": "a"}', ""])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str):
    path = tmp_path / "records.jsonl"
    write(path, 1)
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(LedgerError, match=r"records\.jsonl:2 is not a record.*--fresh"):
        Ledger(path)
    with Ledger(path, fresh=True) as ledger:
        assert ledger.records == []


def test_a_second_run_on_the_same_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    with Ledger(path), pytest.raises(LedgerError, match="another run's at the moment"):
        Ledger(path)
    Ledger(path).__exit__()


def test_the_latest_record_of_a_point_counts_and_those_of_others_can_be_left_out():
    old, new = RECORD, replace(RECORD, wall_s=2.0)
    elsewhere = replace(RECORD, device="a GPU")
    changed = replace(RECORD, commit="def")
    assert latest([old, new]) == {RECORD.key: new}
    assert latest([new, elsewhere, changed], "abc", "8 virtual devices") == {RECORD.key: new}
    assert latest([new, elsewhere], device="none") == {}


@pytest.mark.parametrize(
    ("status", "settled"),
    [("ok", True), ("does not fit", True), ("failed", False), ("timed out", False)],
)
def test_what_failed_is_not_settled(status, settled: bool):
    assert replace(RECORD, status=status).settled is settled
