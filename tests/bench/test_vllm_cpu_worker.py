"""vLLM's side of the protocol, on an engine that hands out what the test says."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.peers.protocol import Job
from bench.peers.vllm_cpu_worker import environment, generate


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """No more of it than `generate` uses."""
    fake = SimpleNamespace(SamplingParams=lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "vllm", fake)


class FakeEngine:
    """Takes a step to begin with, then gives each request a token a step: 7, 8, 9, ...

    Requests are finished in the reverse of their order.
    """

    def __init__(self):
        self.requests: dict[str, Any] = {}
        self.num_steps = 0

    def add_request(self, request_id: str, prompt: dict[str, Any], sampling: Any) -> None:
        self.requests[request_id] = SimpleNamespace(prompt=prompt, sampling=sampling)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        self.num_steps += 1
        num_tokens = self.num_steps - 1
        if not num_tokens:
            return []
        outputs = [self._output(request_id, num_tokens) for request_id in self.requests]
        if outputs[0].finished:
            self.requests.clear()
        return outputs[::-1]

    def _output(self, request_id: str, num_tokens: int) -> Any:
        sampling = self.requests[request_id].sampling
        assert (sampling.temperature, sampling.ignore_eos) == (0.0, True)
        first = self.requests[request_id].prompt["prompt_token_ids"][-1]
        ids = [first + 1 + i for i in range(num_tokens)]
        logprobs = [
            {i: SimpleNamespace(logprob=-1.5), 0: SimpleNamespace(logprob=-1.0)} for i in ids
        ]
        return SimpleNamespace(
            request_id=request_id,
            finished=num_tokens == sampling.max_tokens,
            outputs=[
                SimpleNamespace(token_ids=ids, logprobs=logprobs if sampling.logprobs else None)
            ],
        )


def test_tokens_of_every_prompt_are_collected_in_the_jobs_order():
    answer = generate(FakeEngine(), Job([[1, 6], [40]], 3))
    assert answer.token_ids == [[7, 8, 9], [41, 42, 43]]
    assert answer.margins == []


def test_the_first_tokens_are_those_of_the_first_step_that_has_any():
    answer = generate(FakeEngine(), Job([[6]], 3))
    assert answer.num_first == 1
    assert 0 < answer.first_s < answer.total_s


def test_margins_are_the_two_best_apart():
    assert generate(FakeEngine(), Job([[6]], 2, margins=True)).margins == [[0.5, 0.5]]


def test_every_core_computes():
    wanted = environment({3, 0, 1}, Path("here"))
    assert wanted["OMP_NUM_THREADS"] == "3"
    assert wanted["KMP_AFFINITY"].endswith("proclist=[0,1,3]")
    assert wanted["LD_PRELOAD"] == str(Path("here/lib/libiomp5.so"))
