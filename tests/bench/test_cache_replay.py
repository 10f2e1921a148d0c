"""Replays of small traces: what a cache finds, and that it is told right."""

import json
import random
from dataclasses import replace

import pytest

from bench.cache_operations import Mix, time_lookup, time_operations
from bench.cache_replay import OLDEST, OURS, POLICIES, main, oracle, run
from bench.cache_replay import replay as replay_trace
from bench.cache_traces import BLOCK, Request, read_trace, tenants, with_answers
from cache.pages import OutOfPages

TRACE = [Request([0, 1, 2], 3 * BLOCK - 100), Request([0, 1, 3], 3 * BLOCK), Request([4], 10)]


@pytest.fixture(scope="module")
def conversations() -> list[Request]:
    return tenants(num_requests=300)


def num_different(requests) -> int:
    return len({block for request in requests for block in request.blocks})


def write(path, requests) -> str:
    entries = ({"hash_ids": r.blocks, "input_length": r.num_tokens} for r in requests)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(path)


def test_what_is_found_is_counted_in_tokens_and_in_the_work_of_computing_them():
    found = oracle(TRACE)
    assert found.tokens == pytest.approx(2 * BLOCK / (6 * BLOCK - 100 + 10))
    assert found.cost == pytest.approx((1 + 1 + 512 / 26_624) / (7 + 6 * 512 / 26_624))


def test_last_block_counts_as_many_tokens_as_the_prompt_has():
    twice = [Request([0, 1], BLOCK + 1), Request([0, 1], BLOCK + 1)]
    assert oracle(twice).tokens == pytest.approx(0.5)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("num_open", [0, 5])
def test_cache_of_all_blocks_finds_what_an_oracle_does(conversations, policy, num_open):
    pages = num_different(conversations)
    assert replay_trace(conversations, pages, policy, num_open) == oracle(conversations)


def test_pages_of_too_few_blocks_are_found_less(conversations):
    pages = num_different(conversations)
    found = [replay_trace(conversations, pages // share).tokens for share in (10, 4, 1)]
    assert found[0] < found[1] < found[2]


def test_oldest_goes_as_in_a_list_of_all_uses():
    rng, size = random.Random(0), 6
    requests = [Request([rng.randrange(9)], BLOCK) for _ in range(200)]
    kept, hits = list[int](), 0
    for [block] in (request.blocks for request in requests):
        hits += block in kept
        kept = [*(other for other in kept if other != block), block][-size:]
    for leaves_first in (True, False):
        policy = replace(OLDEST, leaves_first=leaves_first)
        assert replay_trace(requests, size, policy).tokens == pytest.approx(hits / 200)


def test_what_is_served_is_the_variant_that_is_said_to_be(conversations):
    pages = num_different(conversations) // 5
    variant = replay_trace(conversations, pages, replace(OURS, name="a variant"))
    assert variant == replay_trace(conversations, pages, OURS)


def test_served_policy_finds_more_than_by_age_alone():
    requests = tenants(num_requests=1500)
    pages = num_different(requests) // 10
    ours, oldest = (replay_trace(requests, pages, policy) for policy in (OURS, OLDEST))
    assert ours.tokens > oldest.tokens
    assert ours.cost > oldest.cost


def test_request_waits_until_others_have_given_their_pages_back():
    requests = [Request([3 * i, 3 * i + 1, 3 * i + 2], 3 * BLOCK) for i in range(5)]
    assert replay_trace([*requests, requests[-1]], 7, num_open=4).tokens == pytest.approx(1 / 6)


def test_trace_too_small_for_a_budget_is_refused(tmp_path):
    with pytest.raises(OutOfPages, match="a prompt has 3 blocks, and 2 are kept"):
        replay_trace(TRACE, 2)
    with pytest.raises(SystemExit, match="a prompt has 3 blocks, and 0 are kept"):
        main(["--trace", write(tmp_path / "small.jsonl", TRACE)])


def test_answers_take_pages_and_are_not_asked_for():
    answered = with_answers(TRACE)
    assert [request.blocks[:-1] for request in answered] == [r.blocks for r in TRACE]
    assert num_different(answered) == num_different(TRACE) + len(TRACE)
    assert oracle(answered) == oracle(TRACE)


def test_tenants_come_back_and_strangers_do_not(conversations):
    assert len(conversations) == 300
    assert 0.2 < oracle(conversations).tokens < 0.8
    assert conversations == tenants(num_requests=300)


def test_table_has_a_row_for_each_policy_and_says_what_could_be_found(conversations):
    found = run("a trace", conversations, lambda line: None)
    title, _, header, _, *rows = found.to_markdown().splitlines()
    assert title.startswith("a trace: 300 requests of ")
    assert header == "| what is found (of the work) | 5% | 10% | 25% | 50% | 100% |"
    assert [row.split(" | ")[0] for row in rows] == [
        *(f"| {policy.name}" for policy in POLICIES),
        "| as served, 300 open at once",
        "| the oldest leaf goes, 300 open at once",
    ]
    whole = f"{oracle(conversations).tokens:.2%}"
    assert whole in title
    assert all(whole in row.split(" | ")[-1] for row in rows)


def test_report_as_json_names_command_and_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.cache_replay.tenants", lambda: TRACE)
    monkeypatch.setattr("bench.cache_replay.BUDGETS", (1.0,))
    main(["--json", "--trace", write(tmp_path / "small.jsonl", TRACE)])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "python -m bench.cache_replay"
    assert report["machine"]["cpu"]
    assert report["replays"][0]["name"] == "small"
    assert report["replays"][0]["num_different"] == 5


def test_missing_trace_is_said_with_the_remedy(tmp_path):
    absent = tmp_path / "absent.jsonl"
    with pytest.raises(SystemExit, match=r"no trace at .*absent.jsonl .*: name one with --trace"):
        main(["--trace", str(absent)])


@pytest.mark.parametrize("line", ["{", "{}", '{"hash_ids": [1]}', '{"hash_ids": 1}', "[]"])
def test_trace_of_another_form_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    write(path, TRACE[:1])
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=r"line 2: hash_ids and input_length are to be read"):
        read_trace(path)
    with pytest.raises(SystemExit, match="line 2"):
        main(["--trace", str(path)])


def test_empty_trace_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl has no requests"):
        read_trace(tmp_path / "empty.jsonl")


def test_operations_are_counted_by_page():
    mix = Mix(page_size=2, num_pages=1000, num_requests=40)
    timed = time_operations(mix, runs=1)
    assert timed.num_pages % 3 == 0, "each page is found and adopted or evicted and named, released"
    assert timed.per_second > 0
    assert timed.to_markdown().splitlines()[0].endswith("| release | pages/s |")


def test_lookup_finds_the_whole_prompt():
    assert time_lookup(16, num_tokens=160, runs=1) > 0
