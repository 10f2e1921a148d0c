"""A request for tokens, and what comes back for it.

It does not know text: token ids go in and come out; strings are the front's (`serve/front.py`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from serve.errors import InvalidRequest

if TYPE_CHECKING:
    from cache.retention import Retention  # the client, which knows no cache, imports this module

MAX_STOP_IDS = 16
"""End ids of one request: they are arrays of this width inside the jitted step."""
MAX_LOGPROBS = 20
"""Alternatives reported per token; the limit of OpenAI's API."""
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1_000
"""Characters of a stop string: each is searched for in every stream that names it."""


class FinishReason(Enum):
    STOP = "stop"
    """An end id or a stop string."""
    LENGTH = "length"
    """max_tokens, or the context, is full."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Out-of-range values raise InvalidRequest."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """Same seed, same tokens, whatever the batch; None lets the engine choose one."""
    repetition_penalty: float = 1.0
    """Over prompt and output, as in CTRL (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Over output, as in OpenAI's API; so is the next."""
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    """None: until the context is full."""
    min_tokens: int = 0
    """No end id is chosen before as many tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Alternatives to report beside each chosen token's logprob; None reports nothing."""
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, value: object, allowed: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} is {value}; it must be {allowed}")

        # A comparison with NaN is false, so each range is written as what must hold.
        check(
            0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more"
        )
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1 is off)")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        check(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more")
        check(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0 (1 is off)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check(-2 <= value <= 2, name, value, "from -2 to 2 (0 is off)")
        check(
            self.max_tokens is None or self.max_tokens >= 1,
            "max_tokens",
            self.max_tokens,
            "1 or more; leave it out to fill the context",
        )
        limit = math.inf if self.max_tokens is None else self.max_tokens
        check(0 <= self.min_tokens <= limit, "min_tokens", self.min_tokens, "from 0 to max_tokens")
        if self.seed is not None:
            check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "the number of stop strings",
            len(self.stop),
            f"at most {MAX_STOP_STRINGS}",
        )
        check(all(self.stop), "a stop string", "''", "one character or more")
        longest = max(map(len, self.stop), default=0)
        check(
            longest <= MAX_STOP_LENGTH,
            "the length of a stop string",
            longest,
            f"at most {MAX_STOP_LENGTH} characters",
        )
        check(
            len(self.stop_token_ids) <= MAX_STOP_IDS // 2,
            "the number of stop_token_ids",
            len(self.stop_token_ids),
            f"at most {MAX_STOP_IDS // 2}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            allowed = f"from 0 to {MAX_LOGPROBS}"
            check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, allowed)


@dataclass(frozen=True)
class GenerateRequest:
    """Token ids to continue."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    session_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    context: str = ""
    """The name of the context that the prompt begins with."""
    keep: "Retention | None" = None
    """What of the prompt will be asked for again."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log probabilities of one position, before temperature and penalties."""

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those whose keys and values were found."""
    fetched_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of these, those that came up from a tier below the device, by its name."""
    prefilled_tokens: int = 0
    """Of the prompt, those whose keys and values another engine sent (`serve/prefill`)."""
    saved_s: float = 0.0
    """What computing the cached tokens would have taken, by what prompts were seen to take."""


@dataclass(frozen=True)
class Timings:
    """Seconds since the engine took the request, on the engine's clock."""

    scheduled_s: float
    first_token_s: float
    finished_s: float
    num_preemptions: int = 0


@dataclass(frozen=True)
class Output:
    """Tokens of one request that came together; the last one carries a finish reason."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token when the request asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """One per prompt token after the first, all in one Output, before or with the first token."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """With the finish reason; so are timings."""
    timings: Timings | None = None
    error: str = ""
    """Why, when finish_reason is ERROR."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is."""

    num_running: int
    num_waiting: int
    pages_used: int
    pages_total: int
    max_batch: int
    max_queue: int
    num_preemptions: int
    prefix_queries: int
    """Tokens of prompts that were looked up in the cache, and, next, those that were found."""
    prefix_hits: int
    num_finished: int
    generated_tokens: int
    prompt_tokens: int
    compiles_after_warmup: int
    draining: bool
