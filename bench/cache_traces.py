"""Prompts as blocks of tokens, in the order in which they came: a trace's, or made up.

It does not know what becomes of them (`bench/cache_replay.py`).
"""

import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from plan.machine import ROOT

TRACE = ROOT.parent / "shared/assets/workloads/mooncake_conversation.jsonl"
BLOCK = 512
"""Tokens of a block of the trace."""


@dataclass(frozen=True)
class Request:
    """A prompt's blocks: equal ids mean equal tokens from the prompt's start on."""

    blocks: list[int]
    num_tokens: int


def read_trace(path: Path) -> list[Request]:
    """A trace in Mooncake's form. Raises ValueError where it is not."""
    requests = list[Request]()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            requests.append(Request(list(entry["hash_ids"]), int(entry["input_length"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: hash_ids and input_length are to be read, as in "
                f"Mooncake's traces: {error!r}"
            ) from error
    if not requests:
        raise ValueError(f"{path} has no requests")
    return requests


def tenants(num_requests: int = 6000, seed: int = 0) -> list[Request]:
    """Forty tenants with a system prompt each, of very different popularity, whose users come once
    or converse with gaps; a seventh are long prompts that come once. Half-way others are popular.
    """
    rng, ids = random.Random(seed), count()

    def new(num_blocks: int) -> list[int]:
        return list(islice(ids, num_blocks))

    systems = [new(rng.choice((1, 2, 4, 8, 16, 32))) for _ in range(40)]
    popularity = [(i + 1) ** -0.8 for i in range(len(systems))]
    turns, asked = list[tuple[float, int, list[int], int]](), list[list[int]]()
    for now in count():
        if now == num_requests // 2:
            rng.shuffle(popularity)
        while turns and turns[0][0] <= now:
            _, _, before, left = heapq.heappop(turns)
            asked.append([*before, *new(rng.choice((1, 1, 2, 3, 4)))])
            if left > 1:
                again = now + 10 + rng.expovariate(1 / 300)
                heapq.heappush(turns, (again, len(asked), asked[-1], left - 1))
        if rng.random() < 0.15:
            asked.append(new(rng.randint(20, 120)))
        else:
            [system] = rng.choices(systems, popularity)
            asked.append([*system, *new(rng.choice((1, 1, 2, 3, 8)))])
            if rng.random() < 0.35:
                again, left = now + 10 + rng.expovariate(1 / 300), 1 + int(rng.expovariate(1 / 4))
                heapq.heappush(turns, (again, len(asked), asked[-1], min(12, left)))
        if len(asked) >= num_requests:
            return [Request(blocks, len(blocks) * BLOCK) for blocks in asked[:num_requests]]
    raise AssertionError("time does not end")


def with_answers(requests: Sequence[Request], num_blocks: int = 1) -> list[Request]:
    """Each followed by blocks of its answer, which the trace does not name and nobody asks for."""
    ids = count(1 + max(max(request.blocks) for request in requests))
    return [
        Request([*request.blocks, *islice(ids, num_blocks)], request.num_tokens)
        for request in requests
    ]
