"""Reports: medians, ratios, and what a reader sees."""

import json
from dataclasses import replace

from bench.report import Agreement, Difference, Machine, Report, Side, Workload, ratio, this_machine

OURS = Side("weft", {"jax": "1"}, "plain", 3.0, 2.0, 0.01, {"decode": [40.0, 50.0, 42.0]})
PEER = Side("other", {"torch": "2"}, "best", 1.0, 4.0, 0.5, {"decode": [20.0, 20.0, 30.0]})
REPORT = Report(
    command="weft bench offline --peer other",
    model="a model",
    machine=Machine("A CPU", 2, 23.6, "Linux x86_64", "3.12.1", 0.14, "abc1234", True),
    workloads=[Workload("decode", "128 in, 128 out")],
    sides=[OURS, PEER],
    agreements={"other": Agreement(9, 9, [])},
    bars={},
    not_measured={},
)


def test_ratio_is_of_medians_and_its_range_of_paired_runs():
    assert ratio(OURS, PEER, "decode") == (42 / 20, 42 / 30, 50 / 20)


def test_table_shows_medians_ranges_and_ratios():
    header, rule, row = REPORT.to_markdown().splitlines()[:3]
    assert header == "| tokens/s | weft | other | weft / other |"
    assert rule == "| --- | ---: | ---: | ---: |"
    assert row == (
        "| decode (128 in, 128 out) | 42 (40 to 50) | 20 (20 to 30) | 2.10 (1.40 to 2.50) |"
    )


def test_promised_ratio_stands_beside_the_ratio():
    report = replace(
        REPORT,
        workloads=[*REPORT.workloads, Workload("prefill", "1 in")],
        sides=[
            replace(side, samples=side.samples | {"prefill": [9.0] * 3}) for side in (OURS, PEER)
        ],
        bars={"other": {"decode": 1.9}},
    )
    header, _, decode, prefill = report.to_markdown().splitlines()[:4]
    assert header.endswith("| weft / other | bar |")
    assert decode.endswith("| 2.10 (1.40 to 2.50) | 1.90 |")
    assert prefill.endswith("| 1.00 (1.00 to 1.00) | none |")
    assert json.loads(report.to_json())["bars"] == {"other": {"decode": 1.9}}


def test_report_names_machine_commit_command_and_what_is_not_counted():
    text = REPORT.to_markdown()
    for part in (
        "A CPU, 2 cores, 24 GiB",
        "commit abc1234 with changes",
        "`weft bench offline --peer other`",
        "jax 1; plain; not counted: 3.0 s to load and compile, 2.0 s for a first round; "
        "while it was timed, everything else kept 0.01 cores busy.",
        "9 of 9 prompts were continued with the same tokens as by other.",
    ):
        assert part in text


def test_peer_that_is_missing_has_a_column_and_a_reason():
    report = replace(
        REPORT, sides=[OURS], agreements={}, not_measured={"other": "no Python\n3.11 here"}
    )
    text = report.to_markdown()
    assert "| tokens/s | weft | other |" in text
    assert "| 42 (40 to 50) | not measured |" in text
    assert "- other: not measured: no Python 3.11 here" in text


def test_disagreement_is_told_with_its_margins():
    difference = Difference("decode", 2, 0, 57, 11, 12, 1.2e-6, 3e-6)
    text = replace(REPORT, agreements={"other": Agreement(9, 8, [difference])}).to_markdown()
    assert "8 of 9 prompts were continued with the same tokens as by other, where" in text
    assert "decode, run 2, prompt 0, from token 57 on: 11 here, 12 there" in text
    assert "1.2e-06 apart here, 3e-06 there" in text


def test_json_has_samples_medians_and_ratios():
    found = json.loads(REPORT.to_json())
    assert found["sides"][1]["samples"]["decode"] == [20.0, 20.0, 30.0]
    assert found["figures"]["decode"] == {
        "median": {"weft": 42.0, "other": 20.0},
        "ratio": {"other": 2.1},
    }
    assert found["machine"]["commit"] == "abc1234"


def test_sources_without_a_commit_are_reported_so(tmp_path):
    machine = this_machine(tmp_path)
    assert machine.commit == "unknown (no commit here)"
    assert not machine.dirty
    assert machine.num_cores >= 1
