"""A report shows what was recorded, and says what was not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plan.drive import known
from plan.experiment import make_experiment
from plan.kinds import KINDS
from plan.ledger import Record
from plan.pictures import draw
from plan.report import Report
from plan.units import show, title

TIMED = {
    "step_s": 0.002,
    "tokens_per_s": 500.0,
    "tokens_low_per_s": 490.0,
    "tokens_high_per_s": 510.0,
    "roofline_fraction": 0.25,
}
COUNTED = {
    "needed_bytes": 6_500_000,
    "weight_bytes": 2_000_000,
    "cache_bytes": 4_000_000,
    "temp_bytes": 500_000,
    "memory_bytes": 8_000_000,
    "step_flops": None,
    "num_kernels": 400.0,
    "ring_floor_s": 0.001,
    "collective_bytes": 0,
    "collectives": {},
}
SENT = {"collective_bytes": 2000, "collectives": {"all-reduce": {"runs": 17.0, "bytes": 2000}}}


def experiment(devices: str = "cpu:8"):
    matrix = {"kind": "step", "model": "tiny", "context": 100}
    matrix["mesh"] = ["", "tensor=2", "tensor=4", "tensor=8"]
    return make_experiment("some", {"title": "Some", "devices": devices, "matrix": [matrix]})


def report(**figures: dict[str, Any]) -> Report:
    """Of one device and tensor=2 with figures; tensor=4 did not fit, tensor=8 is missing."""
    asked = experiment()
    common = {"commit": "abc", "device": "8 virtual devices", "reason": "", "wall_s": 1.0}
    common |= {"started": "2026-01-02T03:04:05+00:00", "status": "ok"}
    records = {
        point.key: Record(key=point.key, **point.to_dict(), figures=figures[name], **common)
        for name, point in zip(("one", "two", "misfit"), asked.points, strict=False)
    }
    last = asked.points[2].key
    records[last] = replace(records[last], status="does not fit", reason="it needs 9 bytes")
    return Report(asked, known(asked, records), "weft mesh some.toml")


@pytest.fixture
def measured() -> Report:
    slower = TIMED | {"tokens_per_s": 250, "tokens_low_per_s": 240, "tokens_high_per_s": 260}
    return report(one=TIMED | COUNTED, two=slower | COUNTED | SENT, misfit=COUNTED)


def test_the_winner_stands_with_its_lead_and_its_reasons(measured: Report):
    assert (
        "| one device | 500 tokens/s | 2.00 x tensor=2 | "
        "collective bytes 0 B against 2 kB; tensor=4 did not fit |"
    ) in measured.to_markdown()


def test_every_figure_stands_in_its_units_and_columns_without_figures_are_left_out(measured):
    text = measured.to_markdown()
    assert "| mesh | step | tokens/s | roofline |\n| --- | ---: | ---: | ---: |" in text
    assert "| one device | 2 ms | 500 | 25.0% |" in text
    assert "| tensor=2 | 6.5 MB | 2 MB | 4 MB | 500 kB |" in text
    assert "| tensor=2 | 400 | 2 kB | 17 all-reduce (2 kB) |" in text


def test_circumstances_misfits_and_what_is_missing_are_said(measured: Report):
    text = measured.to_markdown()
    for said in (
        "# Some\n",
        "- `weft mesh some.toml`",
        "- 8 virtual devices; commit abc",
        "- 2026-01-02",
        "- 4 points: 2 ok, 1 does not fit, 1 not measured yet",
        "mesh=tensor=4 context=100: does not fit: it needs 9 bytes",
        "The same command goes on with these.\n\n- step model=tiny mesh=tensor=8 context=100",
    ):
        assert said in text


def test_floors_are_said_to_be_of_the_hardware_they_were_worked_out_for(measured: Report):
    said = "- floors are those of configs/hardware/cpu.toml"
    assert said not in measured.to_markdown()
    timed = TIMED | COUNTED
    assert said in report(one=timed | {"floor_s": 1e-3}, two=timed, misfit=COUNTED).to_markdown()


def test_what_was_only_compiled_is_said_not_to_be_measured():
    found = report(one=COUNTED, two=COUNTED | {"ring_floor_s": 0.0005}, misfit=COUNTED)
    text = found.to_markdown()
    assert "Nothing was run, so no rate was measured. The least ring floor wins" in text
    assert "| tensor=2 | 500 µs ring floor | 2.00 x one device |" in text
    assert "tokens/s" not in text


def test_an_empty_run_makes_a_report_too():
    asked = experiment()
    text = Report(asked, known(asked, {}), "weft mesh some.toml").to_markdown()
    assert "nothing was measured yet" in text
    assert "4 not measured yet" in text


def test_the_short_form_and_json_have_the_verdicts(measured: Report):
    assert measured.summary().splitlines() == [
        "step: one device, 2.00 x tensor=2",
        "4 points: 2 ok, 1 does not fit, 1 not measured yet",
    ]
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["verdicts"]["step"][0]["best"] == "one device"
    assert len(found["records"]) == 3
    assert found["missing"] == ["step model=tiny mesh=tensor=8 context=100"]


def test_pictures_are_drawn_and_shown_or_their_absence_is_said(measured: Report, tmp_path: Path):
    contest = KINDS["step"].contest
    assert contest is not None
    names = draw(contest, measured.kinds["step"], tmp_path, "step")
    assert names == ["step-tokens-per-s.png", "step-memory.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = measured.to_markdown(names)
    assert all(f"![{name}]({name})" in text for name in names)
    assert "matplotlib is not installed" in measured.to_markdown(None)


def test_nothing_that_fits_makes_no_pictures(tmp_path: Path):
    contest = KINDS["step"].contest
    assert contest is not None
    assert draw(contest, [], tmp_path, "step") == []


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("step_s", 0.0123, "12.3 ms"),
        ("step_s", 3.4e-6, "3.4 µs"),
        ("compile_s", 75.0, "75 s"),
        ("weight_bytes", 16_060_522_496, "16.1 GB"),
        ("collective_bytes", 0, "0 B"),
        ("step_flops", 2.5e12, "2.5 TFLOP"),
        ("copy_bytes_per_s", 4.3e12, "4.3 TB/s"),
        ("tokens_per_s", 12345.6, "12,346"),
        ("roofline_fraction", 0.987, "98.7%"),
        ("num_kernels", 12.5, "12.5"),
        ("step_flops", None, "-"),
    ],
)
def test_a_figure_is_shown_by_the_unit_in_its_name(name: str, value: float, shown: str):
    assert show(name, value) == shown


@pytest.mark.parametrize(
    ("name", "said"),
    [("num_kernels", "kernels"), ("tokens_per_s", "tokens/s"), ("step_s", "step")],
)
def test_a_figures_title_leaves_its_unit_out(name: str, said: str):
    assert title(name) == said
