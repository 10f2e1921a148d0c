"""How much prompt a step may take in beside decode, so that streams under way hardly slow down.

What prompt and decode take is learned from the steps themselves, on any device. It takes times as
arguments and knows neither requests nor devices.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from model.config import ModelConfig
from model.weights import shapes

NUM_KEPT = 5
"""Steps of a kind that are remembered; their median passes over what the system did meanwhile."""
NUM_UNTIL_PROBE = 32
"""Steps with prompt after which one goes without: decode alone may have become slower."""
MOST_GROWTH = 5.0
"""Of a step over the largest that is remembered: a wrong guess shows before it hurts much. Above
the 4 between widths of rows, or none would ever be followed by the next."""
LEAST_S = 1e-9
"""Where a unit of cost seemed to take no time."""


@dataclass(frozen=True)
class TokenCost:
    """What computing a token of a prompt costs, in tokens that have no context."""

    by_window: tuple[tuple[float, float], ...] = ()
    """Of layers that see so many tokens at most: the cost of each token that they see."""

    def at(self, position: int) -> float:
        return 1 + sum(cost * min(position, window) for window, cost in self.by_window)

    def of_first(self, num_tokens: int) -> float:
        """Of computing the first tokens of a sequence."""
        total = float(num_tokens)
        for window, cost in self.by_window:
            growing = min(num_tokens, window)
            total += cost * (growing * (growing - 1) / 2 + (num_tokens - growing) * growing)
        return total


NO_CONTEXT_COST = TokenCost()


def token_cost(model: ModelConfig) -> TokenCost:
    """By multiplications: those of a layer's weights, and of queries with keys and values."""
    experts = model.experts
    weights = 0.0
    for name, shape in shapes(model).items():
        if name.startswith("layers.") and len(shape) > 1:
            used = experts.top_k / experts.num_experts if experts and ".moe." in name else 1
            weights += used * math.prod(shape)
    seen = model.num_heads * (model.head_dim + model.value_dim)
    by_window: dict[float, float] = {}
    for layer in model.layers:
        window = layer.window or math.inf
        by_window[window] = by_window.get(window, 0) + seen / weights
    return TokenCost(tuple(by_window.items()))


class Pace:
    """Bounds steps with prompt to `max_slowdown` times the time of decode alone."""

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._decode_s: dict[int, deque[float]] = {}
        """By the number of rows, in powers of two: seconds of a token of each."""
        self._costs: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)
        """Of steps with prompt: the prompt's cost, and the seconds that a unit of it added."""
        self._alone_s: deque[float] = deque(maxlen=NUM_KEPT)
        """Of steps with nothing but prompt: the seconds of a unit of cost."""
        self._probed: set[int] = set()
        self._num_until_probe = NUM_UNTIL_PROBE

    @property
    def unit_s(self) -> float:
        """Seconds that a unit of prompt's cost takes; 0 until it was seen."""
        seen = self._alone_s or [unit_s for _, unit_s in self._costs]
        return max(0.0, median(seen)) if seen else 0.0

    def allowed(self, num_decode: int, least: float) -> float:
        """The cost of prompt that a step may have beside `num_decode` rows, `least` or more.

        It is 0 now and then, so that decode alone is timed.
        """
        if not num_decode or math.isinf(self._max_slowdown):
            return math.inf
        size = num_decode.bit_length()
        if not self._num_until_probe or size not in self._probed:
            self._num_until_probe = NUM_UNTIL_PROBE
            self._probed.add(size)
            return 0.0
        self._num_until_probe -= 1
        decode_s = self._decode_s.get(size)
        if not decode_s or not self._costs:
            return least
        unit_s = max(LEAST_S, median(unit_s for _, unit_s in self._costs))
        most = MOST_GROWTH * max(cost for cost, _ in self._costs)
        return max(least, min(most, (self._max_slowdown - 1) * median(decode_s) / unit_s))

    def observe(self, num_decode: int, num_tokens: int, cost: float, seconds: float) -> None:
        """A step took `seconds`: `num_decode` rows by `num_tokens` each, and prompt of `cost`."""
        if not num_decode:
            if cost:
                self._alone_s.append(seconds / cost)
            return
        size = num_decode.bit_length()
        if not cost:
            self._probed.add(size)
            decode_s = self._decode_s.setdefault(size, deque(maxlen=NUM_KEPT))
            decode_s.append(seconds / num_tokens)
        elif decode_s := self._decode_s.get(size):
            self._costs.append((cost, (seconds - median(decode_s)) / cost))
