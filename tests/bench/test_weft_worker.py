"""Weft's side of the protocol, on an engine that hands out what the test says."""

from collections.abc import Callable

import pytest

from bench.peers.protocol import Job
from bench.peers.weft_worker import generate
from serve.errors import RequestError
from serve.request import FinishReason, GenerateRequest, Output, TokenLogprobs


class FakeEngine:
    """Answers at once, in the outputs' order: `tokens[i]` of each request in its i-th output."""

    def __init__(self, *tokens: tuple[int, ...], reason: FinishReason = FinishReason.LENGTH):
        self.tokens = tokens
        self.reason = reason
        self.requests: list[GenerateRequest] = []

    def submit(self, request: GenerateRequest, sink: Callable[[Output], None]) -> None:
        self.requests.append(request)
        for i, token_ids in enumerate(self.tokens):
            sink(
                Output(
                    request.request_id,
                    token_ids,
                    logprobs=tuple(
                        TokenLogprobs(token, -1.0, (token, 0), (-1.0, -1.5)) for token in token_ids
                    ),
                    finish_reason=self.reason if i == len(self.tokens) - 1 else None,
                    error="it broke" if self.reason is FinishReason.ERROR else "",
                )
            )


def test_tokens_of_every_prompt_are_collected_in_the_jobs_order():
    answer = generate(FakeEngine((5,), (6, 7)), Job([[1], [2]], 3))
    assert answer.token_ids == [[5, 6, 7], [5, 6, 7]]


def test_tokens_that_came_with_the_first_are_counted():
    answer = generate(FakeEngine((5, 6), (7,), ()), Job([[1]], 3))
    assert answer.num_first == 2
    assert 0 < answer.first_s <= answer.total_s


def test_requests_are_greedy_and_of_fixed_length():
    engine = FakeEngine((5,))
    generate(engine, Job([[1, 2]], 1))
    (request,) = engine.requests
    assert request.prompt_ids == (1, 2)
    assert request.sampling.temperature == 0
    assert request.sampling.ignore_eos
    assert request.sampling.max_tokens == 1
    assert request.sampling.logprobs is None


def test_margins_are_the_two_best_apart():
    assert generate(FakeEngine((5,), (6,)), Job([[1]], 2, margins=True)).margins == [[0.5, 0.5]]


def test_request_that_ends_otherwise_is_an_error():
    with pytest.raises(RequestError, match="ended by error, not by its length: it broke"):
        generate(FakeEngine((5,), reason=FinishReason.ERROR), Job([[1]], 1))
