"""What it costs to move a prompt's pages, and how much of that is hidden behind computing them.

It is told by first tokens alone, so it does not know how pages travel.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.outputs import outputs_of
from bench.split_load import Load
from serve.request import GenerateRequest


@dataclass(frozen=True)
class Moving:
    """Medians over prompts, each asked for alone; seconds to first tokens."""

    way: str
    num_pages: int
    """Of a prompt, that are moved."""
    one_engine_s: float
    """Nothing is cached, and one engine does all."""
    split_s: float
    """Nothing is cached, and pages come from where they are computed."""
    moving_s: float
    """How much later it is where the other side has all pages than where they are here: they
    are moved and not computed."""
    later_s: float
    """How much later the split's first token is than one engine's."""

    @property
    def pages_per_s(self) -> float:
        return self.num_pages / self.moving_s

    @property
    def hidden(self) -> float:
        """Share of moving that the first token does not notice."""
        return 1 - self.later_s / self.moving_s


def measure_moving(one: Any, split: Any, load: Load, way: str, num_prompts: int) -> Moving:
    """`split` asks another engine for prompts, `one` does all itself. Raises RequestError."""
    size = split.info.page_size
    alone_s: list[float] = []
    split_s: list[float] = []
    moving_s: list[float] = []
    for i in range(num_prompts):
        request = load.long_request(f"moved {way}, {i}", split.info.vocab_size)
        alone_s.append(_first_s(one, request))
        split_s.append(_first_s(split, request))
        split.flush_cache()  # this side's; the other still has all of it
        there_s = _first_s(split, request)
        moving_s.append(there_s - _first_s(split, request))
    return Moving(
        way,
        (load.num_prompt - 1) // size,
        median(alone_s),
        median(split_s),
        median(moving_s),
        median(b - a for a, b in zip(alone_s, split_s, strict=True)),
    )


def _first_s(engine: Any, request: GenerateRequest) -> float:
    sent_s = time.perf_counter()
    return outputs_of(engine, [request])[0][0] - sent_s
