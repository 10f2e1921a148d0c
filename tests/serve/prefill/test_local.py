"""Prompts computed on other devices of the process: the same tokens, and no page left behind."""

import random

import pytest

from cache.transfers.counts import Outcome
from serve.errors import Overloaded, Unavailable
from serve.request import FinishReason
from tests.serve.harness import DENSE, Answer, generate, greedy, random_prompts
from tests.serve.prefill.split import (
    TIMEOUT_S,
    alone,
    local_sides,
    mixed_requests,
    wait_until,
)

PROMPT = random_prompts(DENSE, [100])[0]


@pytest.fixture(scope="module")
def started():
    """On meshes that cut pages in different ways."""
    made = local_sides("tensor=2", "stage=2")
    yield made
    made.decode.stop()


@pytest.fixture(scope="module")
def single():
    return alone()


@pytest.fixture
def sides(started):
    """With nothing cached, and nothing left behind."""
    started.flush()
    yield started
    started.assert_all_let_go()


def outcomes(sides):
    return sides.decode.transfers()[0].outcomes


def test_a_prompt_comes_from_the_other_mesh_but_for_its_last_page(sides, single):
    [answer] = sides.answers([greedy("a", PROMPT, 8)])
    assert answer.token_ids == generate(single, [greedy("a", PROMPT, 8)])["a"].token_ids
    usage = answer.outputs[-1].usage
    assert usage.prefilled_tokens == 96
    assert usage.cached_tokens == 0


def test_only_what_is_not_cached_is_moved(sides):
    [first] = sides.answers([greedy("a", PROMPT[:60], 4)])
    before = sides.decode.transfers()[0].pages
    [answer] = sides.answers([greedy("b", PROMPT, 4)])
    usage = answer.outputs[-1].usage
    assert first.outputs[-1].usage.prefilled_tokens == 48
    assert (usage.cached_tokens, usage.prefilled_tokens) == (48, 48)
    assert sides.decode.transfers()[0].pages - before == 3
    # The side that computes has the beginning, too.
    assert sides.prefill.load().prefix_hits >= 48


def test_short_prompts_are_computed_where_they_are_decoded(sides):
    before = outcomes(sides)[Outcome.SHORT]
    [answer] = sides.answers([greedy("a", PROMPT[:20], 4)])
    assert answer.outputs[-1].usage.prefilled_tokens == 0
    assert outcomes(sides)[Outcome.SHORT] == before + 1


def test_whatever_is_asked_for_tokens_are_those_of_one_engine(sides, single):
    requests = mixed_requests(24)
    answers = sides.answers(requests)
    expected = generate(single, requests)
    for request, answer in zip(requests, answers, strict=True):
        one = expected[request.request_id]
        assert answer.token_ids == one.token_ids, request
        assert len(answer.prompt_logprobs) == len(one.prompt_logprobs)
    assert sum(answer.outputs[-1].usage.prefilled_tokens for answer in answers) > 0


def test_requests_that_end_at_any_moment_leave_nothing(sides, single):
    rng = random.Random(1)
    requests = mixed_requests(60, seed=1)
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        sides.decode.submit(request, answer)
        if rng.random() < 0.3:
            sides.decode.abort(rng.choice(requests).request_id)
    assert sides.decode.wait_idle(TIMEOUT_S)
    expected = generate(single, requests)
    served = 0
    for request, answer in zip(requests, answers, strict=True):
        tokens = expected[request.request_id].token_ids
        if answer.finish_reason is FinishReason.CANCELLED:
            assert answer.token_ids == tokens[: len(answer.token_ids)]
        else:
            assert answer.token_ids == tokens
            served += 1
    assert 0 < served < len(requests)


def test_refused_there_a_prompt_is_computed_where_it_is_decoded(sides, single, monkeypatch):
    def refuse(*arguments):
        raise Overloaded("the queue is full")

    monkeypatch.setattr(sides.prefill, "submit", refuse)
    before = outcomes(sides)[Outcome.FAILED]
    [answer] = sides.answers([greedy("a", PROMPT, 8)])
    assert answer.token_ids == generate(single, [greedy("a", PROMPT, 8)])["a"].token_ids
    assert outcomes(sides)[Outcome.FAILED] == before + 1


def test_the_side_that_computes_serves_nobody_else(sides):
    with pytest.raises(Unavailable, match=r"split.role is prefill"):
        sides.prefill.submit(greedy("a", PROMPT, 8), Answer())


@pytest.fixture(scope="module")
def small():
    """Where pages are few, and nobody waits for long."""
    made = local_sides("tensor=1", "tensor=1", num_pages=12, lease_s=1.0)
    yield made
    made.decode.stop()


def test_where_pages_are_few_requests_take_turns_and_get_their_tokens(small, single):
    """Preempted prompts are asked for again; what they have generated comes over with them."""
    requests = [
        greedy(f"r{i}", prompt, 30)
        for i, prompt in enumerate(random_prompts(DENSE, [70, 75, 40, 60, 90], seed=5))
    ]
    answers = small.answers(requests)
    expected = generate(single, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == expected[request.request_id].token_ids
    assert small.decode.load().num_preemptions > 0
    small.assert_all_let_go()


def test_where_nothing_comes_for_a_lease_the_prompt_is_computed(small, single, monkeypatch):
    small.flush()
    before = outcomes(small)[Outcome.LATE]
    monkeypatch.setattr(small.prefill, "submit", lambda *arguments: None)
    [answer] = small.answers([greedy("a", PROMPT, 8)])
    assert answer.token_ids == generate(single, [greedy("a", PROMPT, 8)])["a"].token_ids
    wait_until(lambda: outcomes(small)[Outcome.LATE] == before + 1)


def test_a_failed_engine_of_prompts_is_done_without(small, single):
    """The last of these: it does not come back."""
    small.flush()
    small.prefill._fail(RuntimeError("the device is lost"))
    before = outcomes(small)[Outcome.NOBODY]
    [answer] = small.answers([greedy("a", PROMPT, 8)])
    assert answer.token_ids == generate(single, [greedy("a", PROMPT, 8)])["a"].token_ids
    assert outcomes(small)[Outcome.NOBODY] == before + 1
