"""What one step, one request and the queue may take.

It does not know what a configuration says (`serve/fit.py`).
"""

import math
from dataclasses import dataclass

from serve.pace import NO_CONTEXT_COST, TokenCost

LEAST_WIDTH = 4
"""Tokens of a prefill row: with fewer, a prompt hardly gets on."""


@dataclass(frozen=True)
class Limits:
    """What one step, one request and the queue may take."""

    max_batch: int
    """Sequences that run at once; each has a slot."""
    token_budget: int
    """New tokens of a step, decode rows and prefill together."""
    chunk: int
    """Tokens of a prefill row; a longer piece of prompt takes several rows of a step."""
    max_steps: int
    """Tokens a decode row advances in one call when nobody waits."""
    max_queue: int
    max_context: int
    max_slowdown: float = math.inf
    """Of a step with prompt over one of decode alone, where there is decode."""
    token_cost: TokenCost = NO_CONTEXT_COST

    def __post_init__(self) -> None:
        if self.token_budget <= self.max_batch:
            raise ValueError(
                f"schedule.token_budget is {self.token_budget}, schedule.max_batch "
                f"{self.max_batch}: a full batch would leave no tokens for prefill; raise "
                "token_budget above max_batch"
            )

    @property
    def max_chunk_rows(self) -> int:
        return max(1, self.token_budget // self.chunk)

    @property
    def widths(self) -> list[int]:
        """Tokens that the prefill rows of a step may have, widest first: a step beside decode has
        one row of less than `chunk` where more would take too long."""
        if math.isinf(self.max_slowdown):
            return [self.chunk]
        narrow = [self.chunk // 4, self.chunk // 16]
        return [self.chunk, *(width for width in narrow if width >= LEAST_WIDTH)]
