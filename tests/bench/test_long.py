"""`bench/long.py` on a model small enough for a test, and on arrivals that are known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench.long import LONG, Gaps, Load, _Clients, run
from bench.random_model import random_model
from serve.errors import RequestError
from serve.request import FinishReason, Output

TINY = {"hidden": 32, "mlp": 64, "layers": 1, "heads": 2, "kv-heads": 1, "vocab": 64}
LOAD = Load(num_prompt=300, num_streams=2, num_asked=4, num_answered=40)


class FakeEngine:
    """Takes requests and answers none."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(vocab_size=8)
        self.requests = []

    def submit(self, request, sink) -> None:
        self.requests.append(request)


@pytest.fixture
def clients() -> _Clients:
    found = _Clients(FakeEngine(), LOAD)
    found.start()
    return found


def arrive(clients: _Clients, *arrivals: tuple[float, Output]) -> Gaps:
    for arrival in arrivals:
        clients._arrivals.put(arrival)
    return clients.watch(clients._arrivals.empty)


def test_streams_begin_at_different_places_of_their_answers(clients):
    lengths = [(len(r.prompt_ids), r.sampling.max_tokens) for r in clients._engine.requests]
    assert lengths == [(4, 40), (24, 20)]


def test_tokens_that_come_at_once_share_the_time(clients):
    assert not clients.all_decode
    gaps = arrive(
        clients, (1.0, Output("1", (5,))), (2.0, Output("2", (5,))), (5.0, Output("1", (5, 6)))
    )
    assert clients.all_decode
    assert gaps == Gaps(2, 2.0, 2.0, 2.0)


def test_a_stream_that_ends_is_followed_by_another_whose_first_token_is_no_gap(clients):
    arrive(clients, (1.0, Output("1", (5,))))
    ended = arrive(clients, (2.0, Output("1", (5,), finish_reason=FinishReason.LENGTH)))
    assert ended.num == 1
    assert clients._engine.requests[-1].request_id == "3"
    assert arrive(clients, (9.0, Output("3", (5,)))).num == 0


def test_the_long_prompts_tokens_are_not_the_streams(clients):
    assert arrive(clients, (3.0, Output(LONG, (5,)))).num == 0
    assert clients.long_began_s == 3.0
    assert not clients.long_ended
    arrive(clients, (4.0, Output(LONG, (5,), finish_reason=FinishReason.LENGTH)))
    assert clients.long_ended
    assert clients.long_began_s == 3.0


def test_a_request_that_fails_ends_the_bench(clients):
    with pytest.raises(RequestError, match="request 1 ended by error, not by its length: broken"):
        arrive(clients, (1.0, Output("1", (), finish_reason=FinishReason.ERROR, error="broken")))


@pytest.mark.parametrize(
    ("prompt", "overrides", "why"),
    [
        (500, [], "up to 516 tokens with its answer, and .* has a context of 512; name a model"),
        (300, ["cache.pages=20"], "404 tokens, and the cache holds 320; lower --prompt or --str"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_weights_are_read(
    tmp_path, monkeypatch, prompt, overrides, why
):
    monkeypatch.setattr("serve.build.load_weights", None)
    model = random_model(TINY | {"context": 512}, tmp_path, lambda line: None)
    with pytest.raises(RequestError, match=why):
        run(model, overrides, replace(LOAD, num_prompt=prompt))


def test_a_run_tells_what_streams_noticed_and_what_memory_was_taken(tmp_path):
    model = random_model(TINY | {"context": 512}, tmp_path, lambda line: None)
    overrides = ["schedule.chunk=16", "schedule.token_budget=16", "schedule.max_steps=1"]
    report = run(model, overrides, replace(LOAD, num_streams=1), baseline_s=0.2)
    assert report.alone.num > 0
    assert report.beside.num > 0
    assert report.num_steps >= 300 / 16
    assert report.pool_bytes >= (300 + 44) * 2 * 16 * 4
    assert 0 <= report.growth_bytes < 2**30
    assert json.loads(report.to_json())["figures"]["slowdown"] == report.slowdown
    table = replace(report, alone=Gaps(9, 0.01, 0.02, 0.1), beside=Gaps(9, 0.02, 0.05, 0.1))
    assert "| ratio | 2.00 | 2.50 | 1.00 |" in table.to_markdown()
    command = f"`weft bench long {model} --prompt 300 --streams 1 --set {overrides[0]} "
    assert command in table.to_markdown()
