"""What `weft bench split` makes of arrivals that are known, and of small engines."""

import io
import json
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import split, split_moving, split_server, split_soak
from bench.report import Machine
from bench.split_load import (
    Alone,
    Figures,
    Load,
    Played,
    Served,
    figures_of,
    measure_alone,
    play,
    ratios,
    request_of,
)
from bench.split_moving import measure_moving
from bench.split_report import ONE, Difference, Mixed, Report
from bench.split_server import PrefillServer, end_after
from bench.split_soak import Soak, Soaked, soak
from cache.transfers.counts import Outcome, TransferCounts
from serve.config import make_config
from serve.engine import ModelInfo
from serve.errors import RequestError
from serve.request import FinishReason, Output, TokenLogprobs
from tests.serve.harness import generate
from tests.serve.prefill.split import alone as one_engine
from tests.serve.prefill.split import local_sides

LOAD = Load(num_prompt=20, num_prompts=3, num_after=2, num_streams=2, num_asked=4, num_answered=6)
ALONE = Alone(long_first=1.0, short_first=0.1, gap=0.01)
MACHINE = Machine("a CPU", 2, 24.0, "Linux", "3.12", 0.5, "abc1234", dirty=False)
INFO = ModelInfo("m", "Llama", 100, 64, "float32", {}, 10, 16, 4, ())


class FakeEngine:
    """Answers at once, a token at a time; the token is its place in the answer, unless told."""

    info = INFO

    def __init__(self, reason=FinishReason.LENGTH, tokens=None):
        self.requests, self.aborted = [], []
        self.counts = TransferCounts()
        self._reason, self._tokens = reason, tokens or {}

    def submit(self, request, sink):
        self.requests.append(request)
        self.counts.outcomes[Outcome.COMPLETE] += 1
        wanted = request.sampling.max_tokens
        tokens = self._tokens.get(request.request_id, range(wanted))
        for i, token in enumerate(tokens):
            reason = self._reason if i == len(tokens) - 1 else None
            sink(Output(request.request_id, (token,), finish_reason=reason, error="broken"))

    def abort(self, request_id):
        self.aborted.append(request_id)

    def wait_idle(self, timeout_s):
        return True

    def transfers(self):
        return [self.counts]

    def load(self):
        return SimpleNamespace(pages_used=0, compiles_after_warmup=0, num_preemptions=0)


def served(name, is_long, sent_s, *arrivals, ended=True):
    request = request_of(name, 4, 8, 100)
    ended_s = arrivals[-1][0] if ended else None
    return Served(request, is_long, sent_s, list(arrivals), [], ended_s)


def test_a_gap_counts_as_beside_a_prompt_while_that_waits_for_its_first_token():
    played = Played(
        [
            served("long", True, 2.0, (3.0, 1), (3.1, 1)),
            # 0.5 s before the prompt came, one gap over its arrival, four tokens at once beside it,
            # and one after its first token.
            served("stream", False, 0.0, (1.2, 1), (1.7, 1), (2.1, 1), (2.9, 4), (3.05, 1)),
            served("next", False, 1.0, (1.5, 1)),
        ],
        begin_s=1.0,
        end_s=4.0,
    )
    found = figures_of(played, ALONE)
    assert found.gap_p50 == pytest.approx(0.2)  # 0.4, four of 0.2, and 0.15 that overlaps
    assert found.all_p50 == pytest.approx(0.2)
    assert found.all_p99 == pytest.approx(0.5, abs=0.01)
    assert found.gap_p99 == pytest.approx(0.4, abs=0.02)
    assert found.long_p50 == pytest.approx(1.0)
    assert found.short_p50 == pytest.approx(0.5), "that of the one that was sent meanwhile"
    assert found.tokens_per_s == pytest.approx((2 + 8 + 1) / 3.0)


def test_well_served_is_who_waits_no_longer_than_the_limit_for_the_first_and_each_token():
    played = Played(
        [
            served("good", False, 1.0, (1.5, 1), (1.54, 1)),
            served("late", False, 1.0, (1.6, 1), (1.64, 1)),
            served("stalled", False, 1.0, (1.4, 1), (1.5, 1)),
            served("long", True, 1.0, (5.9, 1)),
            served("before", False, 0.0, (0.9, 1)),
            served("still open", False, 1.0, (9.0, 1), ended=False),
        ],
        begin_s=1.0,
        end_s=6.0,
    )
    assert figures_of(played, ALONE).goodput == 2 / 4


def test_a_round_in_which_no_stream_began_says_nothing():
    played = Played([served("long", True, 1.0, (2.0, 1))], 1.0, 2.0)
    with pytest.raises(RequestError, match="none began anew, while long prompts came; lower"):
        figures_of(played, ALONE)


def test_ratios_are_medians_of_those_of_each_round():
    def rounds(*p99):
        return [Figures(*(value for _ in fields(Figures))) for value in p99]

    found = ratios(rounds(1.0, 4.0, 9.0), rounds(2.0, 2.0, 3.0))
    assert found.gap_p99 == 2.0
    assert ratios(rounds(0.0), rounds(0.0)).goodput == 1.0


def test_each_engine_is_asked_the_same_and_streams_go_on_until_the_last_prompt_has_its_answer():
    engines = FakeEngine(), FakeEngine()
    first, second = (play(engine, LOAD, "round 0", gap_s=0.005) for engine in engines)
    longs = [one for one in first.served if one.is_long]
    assert [one.request.request_id for one in longs] == [f"round 0, long {i}" for i in range(3)]
    assert all(len(one.request.prompt_ids) == 20 for one in longs)
    assert [len(one.token_ids) for one in longs] == [2, 2, 2]
    prompts = {one.request.request_id: one.request for one in first.served}
    common = [one.request for one in second.served if one.request.request_id in prompts]
    assert len(common) > 5
    assert all(prompts[request.request_id] == request for request in common)
    answers = [request.sampling.max_tokens for request in engines[0].requests[:2]]
    assert answers == [3, 6], "they end at different times"
    assert engines[0].aborted, "streams go on until then"
    assert LOAD.arrivals_s("round 0", 1.0) == LOAD.arrivals_s("round 0", 1.0)
    assert LOAD.arrivals_s("round 0", 1.0) != LOAD.arrivals_s("round 1", 1.0)


def test_a_request_that_fails_ends_the_round():
    with pytest.raises(RequestError, match="ended by error, not by its length: broken"):
        play(FakeEngine(FinishReason.ERROR), LOAD, "round 0", gap_s=0.001)


def test_what_things_take_alone_is_measured_without_long_prompts_beside():
    engine = FakeEngine()
    found = measure_alone(engine, LOAD)
    assert found.long_first > 0
    assert found.gap >= 0
    assert [len(request.prompt_ids) for request in engine.requests] == [4] * 2 + [20] * 5 + [4] * 5


class MarginEngine(FakeEngine):
    """Its two best logits are 0.25 apart."""

    def submit(self, request, sink):
        self.requests.append(request)
        logprobs = (TokenLogprobs(5, -0.5, (5, 6), (-0.5, -0.75)),)
        sink(Output(request.request_id, (5,), logprobs, finish_reason=FinishReason.LENGTH))


def test_where_answers_part_the_margin_of_the_choice_is_told():
    def round_of(tokens):
        one = served("a", False, 0.0, (1.0, 1))
        one.token_ids = tokens
        return [Played([one], 0.0, 1.0)]

    engine = MarginEngine()
    played = {ONE: round_of([1, 2, 3, 4]), "same": round_of([1, 2, 3]), "other": round_of([1, 9])}
    num_compared, differences = split._compare(engine, played)
    assert num_compared == 2
    assert differences == [Difference("other", "a", 1, 0.25)]
    [asked] = engine.requests
    assert asked.prompt_ids[-1] == 1, "after what both have"


def test_moving_is_what_a_first_token_takes_more_where_the_other_side_has_all(monkeypatch):
    taken_s = iter([1.0, 1.5, 0.3, 0.05] * 2)
    clock = iter([at_s for _ in range(8) for at_s in (0.0, next(taken_s))])

    def first(engine, requests):
        return [(next(clock), None)]

    monkeypatch.setattr(split_moving, "outputs_of", first)
    monkeypatch.setattr(split_moving, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine = SimpleNamespace(info=INFO, flush_cache=lambda: None)
    found = measure_moving(engine, engine, replace(LOAD, num_prompt=33), "here", 2)
    assert (found.num_pages, found.one_engine_s, found.split_s) == (2, 1.0, 1.5)
    assert found.moving_s == 0.25
    assert found.pages_per_s == 8.0
    assert found.later_s == 0.5
    assert found.hidden == -1.0


class FakeServer:
    def __init__(self):
        self.said = []

    def kill(self):
        self.said.append("kill")

    def start(self):
        self.said.append("start")


def run_soak(engine, asked, server=None):
    expected = {r.request_id: range(r.sampling.max_tokens) for r in asked.requests(100)}
    return soak(engine, expected, asked, {"decode": engine.load}, "here", server)


def test_a_clean_soak_has_every_answer():
    found = run_soak(FakeEngine(), Soak(40, cancel_share=0.0))
    assert (found.num_answered, found.num_cancelled, found.outcomes) == (40, 0, {"complete": 40})
    assert found.is_clean


def test_other_tokens_and_unasked_ends_are_found():
    wrong = run_soak(FakeEngine(tokens={"soak 3": [7, 7]}), Soak(8, cancel_share=0.0))
    assert wrong.wrong == ["soak 3"]
    assert not wrong.is_clean
    lost = run_soak(FakeEngine(FinishReason.ERROR), Soak(4, cancel_share=0.0))
    assert lost.lost == [f"soak {i}" for i in range(4)]
    assert not lost.is_clean


def test_the_server_is_killed_and_started_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(split_soak, "CALM_S", 0.001)
    server = FakeServer()
    found = run_soak(FakeEngine(), Soak(60, num_kills=3), server)
    assert server.said == ["kill", "start"] * 3
    assert found.num_kills == 3


def test_pages_that_keep_their_owner_are_told(monkeypatch):
    monkeypatch.setattr(split_soak, "LET_GO_S", 0.05)
    left = SimpleNamespace(pages_used=3, compiles_after_warmup=0, num_preemptions=0)
    engine = FakeEngine()
    engine.load = lambda: left
    found = run_soak(engine, Soak(4))
    assert found.pages_left == {"decode": 3}
    assert not found.is_clean
    with pytest.raises(TimeoutError, match="did not say how many pages"):
        split_soak._left(lambda: None)


def test_what_a_real_split_is_asked_while_requests_are_cancelled_leaves_nothing(monkeypatch):
    monkeypatch.setattr(split_soak, "PREFIX_TOKENS", 40)
    monkeypatch.setattr(split_soak, "MOST_PROMPT", 60)
    monkeypatch.setattr(split_soak, "MOST_ANSWER", 8)
    asked = Soak(60, cancel_share=0.3)
    single = one_engine()
    requests = asked.requests(single.info.vocab_size)
    expected = {name: one.token_ids for name, one in generate(single, requests).items()}
    sides = local_sides("tensor=1", "tensor=1")
    try:
        loads = {"decode": sides.decode.load, "prefill": sides.prefill.load}
        found = soak(sides.decode, expected, asked, loads, "one process")
    finally:
        sides.decode.stop()
    assert found.num_answered + found.num_cancelled == 60
    assert found.wrong == found.lost == []
    assert found.pages_left == {"decode": 0, "prefill": 0}
    assert found.outcomes["complete"] > 0


def server_of(monkeypatch, code):
    monkeypatch.setattr(split_server, "COMMAND", (sys.executable, "-c", code))
    return PrefillServer(make_config({"model": {"path": "/m"}}, "a test"))


def test_a_server_that_does_not_come_up_is_told(monkeypatch):
    server = server_of(monkeypatch, "raise SystemExit(3)")
    with pytest.raises(RequestError, match=r"no prefill server listens on 127.0.0.1:\d+; see"):
        server.__enter__()
    server.stop()


def test_a_killed_server_says_nothing_and_another_takes_its_address(monkeypatch):
    server = server_of(monkeypatch, "import sys; print(sys.stdin.read())")
    server.start()
    server.kill()
    assert server._process.returncode == -9
    assert server.load() is None
    server.start()
    server.stop()
    assert server._process.returncode == -15


def test_a_server_ends_after_whoever_started_it():
    ended = threading.Event()
    end_after(io.StringIO("the configuration has been read"), ended.set)
    assert ended.wait(10)


@pytest.mark.parametrize(
    ("longest", "pages", "message"),
    [
        (65, 10, r"up to 65 tokens .* context of 64; lower --prompt"),
        (60, 3, r"a request of 60 tokens doesn't fit the cache, which holds 48; leave"),
    ],
)
def test_what_does_not_fit_is_refused(longest, pages, message):
    with pytest.raises(RequestError, match=message):
        split._check(longest, replace(INFO, num_pages=pages))


def test_without_a_model_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(split, "MODEL", Path("nowhere"))
    with pytest.raises(ValueError, match="no MODEL is named"):
        split.run(None, [], LOAD, 1, Soak())


SOAKED = Soaked(
    "one process", 9, 1, [], [], 0, {"complete": 8}, {"decode": 0, "prefill": 0}, {}, 2, 3
)


def report(**changes):
    def rounds(p99):
        return [replace(Figures(*(1.0 for _ in fields(Figures))), gap_p99=p99)]

    mixed = Mixed(
        LOAD,
        ALONE,
        {ONE: rounds(0.04), split.HERE: rounds(0.01)},
        num_compared=7,
        differences=[Difference(split.HERE, "round 0, long 1", 3, 1e-6)],
        outcomes={split.HERE: {"complete": 3}},
        compiled_late=0,
    )
    moving = [split_moving.Moving("in one process", 10, 1.0, 1.1, 0.2, 0.05)]
    made = Report("a model", "weft bench split", MACHINE, mixed, moving, 4096, [SOAKED])
    return replace(made, **changes)


def test_a_report_tells_figures_and_their_ratios():
    text = report().to_markdown()
    assert "| split, one process | 1000.0 ms (1.00) | 10.0 ms (0.25) |" in text
    assert "| in one process | 10 | 200.0 ms | 50 | 1000.0 ms | 1100.0 ms | 50.0 ms | 75% |" in text
    assert "| one process | 9 | 1 | 0 | 0 | 0 | 2 | 0, 0 | 0 | 3 |" in text
    assert "6 of 7 answers have the tokens of one engine, one device" in text
    assert "token 3: the two best logits are 1e-06 apart" in text
    assert "split, one process: transfers: 3 complete." in text
    assert "commit abc1234; `weft bench split`." in text
    figures = json.loads(report().to_json())["figures"]
    assert figures["ratios"][split.HERE]["gap_p99"] == 0.25


def test_a_report_is_clean_where_nothing_is_lost_wrong_left_or_late():
    assert report().is_clean
    for fault in (
        {"lost": ["a"]},
        {"wrong": ["a"]},
        {"pages_left": {"prefill": 1}},
        {"compiled_late": {"decode": 1}},
    ):
        assert not report(soaked=[replace(SOAKED, **fault)]).is_clean
    assert not report(mixed=replace(report().mixed, compiled_late=1)).is_clean
    assert "a fault" in report(mixed=replace(report().mixed, compiled_late=1)).to_markdown()
