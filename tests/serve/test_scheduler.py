"""The scheduler against a device that computes nothing but checks everything.

The fake device keeps what it was told to write into pages, and reads a row's tokens back from there;
its next token is a hash of them. So a request gets the tokens it would get alone only if every
position, page and count of every plan was right.
"""

import zlib
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pages import PagePool
from cache.tables import PageTables
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded
from serve.plan import Row, StepPlan
from serve.plan import Sequence as Running
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams, TokenLogprobs
from serve.scheduler import Limits, RowResult, Scheduler

VOCAB = 11
EOS = frozenset({7})
UNREAD = -1
"""What the device answers for a row that had ended before the step."""


def next_token(tokens: list[int], num_output: int, min_tokens: int, ends: frozenset[int]) -> int:
    """The fake model's choice; the first `min_tokens` do not end."""
    token = zlib.crc32(bytes(tokens)) % VOCAB
    while token in ends and num_output < min_tokens:
        token = (token + 1) % VOCAB
    return token


def ends_of(request: GenerateRequest) -> frozenset[int]:
    sampling = request.sampling
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else EOS)


def alone(request: GenerateRequest, max_length: int) -> tuple[tuple[int, ...], FinishReason]:
    """What the request is given when nobody else is there."""
    tokens, ends = list(request.prompt_ids), ends_of(request)
    while True:
        num_output = len(tokens) - len(request.prompt_ids)
        tokens.append(next_token(tokens, num_output, request.sampling.min_tokens, ends))
        if tokens[-1] in ends:
            return tuple(tokens[len(request.prompt_ids) :]), FinishReason.STOP
        if len(tokens) >= max_length:
            return tuple(tokens[len(request.prompt_ids) :]), FinishReason.LENGTH


def longest(request: GenerateRequest, limits: Limits, pool: PagePool) -> int | None:
    """Tokens, prompt included, the request may come to; None when it must be refused."""
    num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
    memory = pool.num_usable * pool.page_size
    if num_prompt + 1 > min(limits.max_context, memory):
        return None
    if wanted is None:
        return min(limits.max_context, memory)
    length = min(num_prompt + wanted, limits.max_context)
    return length if length <= memory else None


class FakeDevice:
    """Runs plans in the order of their submission, on pages that remember who wrote what."""

    def __init__(self, tables: PageTables, limits: Limits) -> None:
        self.tables = tables
        self.limits = limits
        self.pages: dict[tuple[int, int], tuple[int, int, int]] = {}
        """(page, offset) -> (order of the request, position, token)."""
        self.tenant: dict[int, Running] = {}
        self.last_token: dict[int, int] = {}
        self.ended: dict[int, bool] = {}

    def run(self, plan: StepPlan) -> list[RowResult]:
        self._check_shape(plan)
        for sequence in plan.admitted:
            if not sequence.finished:
                assert sequence.slot is not None
                self.tenant[sequence.slot] = sequence
        return [self._decode(row, plan) for row in plan.decode] + [
            self._prefill(row) for row in plan.chunks
        ]

    def _check_shape(self, plan: StepPlan) -> None:
        limits = self.limits
        assert len(plan.decode) <= limits.max_batch
        assert len(plan.chunks) <= limits.max_chunk_rows
        assert sum(row.length for row in plan.rows) <= limits.token_budget
        assert plan.num_tokens == 1 or (1 < plan.num_tokens <= limits.max_steps and not plan.chunks)
        assert all(0 <= row.slot < limits.max_batch for row in plan.rows)
        assert len({row.slot for row in plan.decode}) == len(plan.decode)
        assert {row.slot for row in plan.decode}.isdisjoint(row.slot for row in plan.chunks)
        for before, after in zip(plan.chunks, plan.chunks[1:], strict=False):
            if before.slot == after.slot:
                assert after.start == before.start + before.length
            else:
                assert after.slot not in [row.slot for row in plan.chunks[: -len(plan.chunks)]]
        runs = [row.slot for i, row in enumerate(plan.chunks) if not i or
                plan.chunks[i - 1].slot != row.slot]
        assert len(runs) == len(set(runs)), "a sequence's prefill rows are not side by side"
