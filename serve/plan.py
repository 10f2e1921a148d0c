"""What the scheduler hands to the runner: a step as a value.

It holds no device arrays; everything here is plain Python.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from cache.keys import Key, PageNames
from cache.transfers.sending import Sending
from serve.request import GenerateRequest, TokenLogprobs


class Incoming(Protocol):
    """Pages of a sequence on their way, in order (`cache/tiers/fetch.py`, `cache/transfers`)."""

    @property
    def is_near(self) -> bool:
        """They come within a few steps, so none is made long meanwhile."""
        ...

    def done(self) -> bool: ...

    def take(self, most: int) -> list[tuple[Key, Any]]:
        """Pages that have arrived; fewer than `most`, once it is `done`, are the last."""
        ...

    def tier_of(self, key: Key) -> str | None:
        """Where the page was kept; None where it was computed for this sequence."""
        ...

    def cancel(self) -> None: ...


@dataclass(slots=True)
class Sequence:
    """A request under way: its tokens so far, and how far the device has got.

    Steps are planned before the last ones' tokens are known, so two counts run ahead of `tokens`.
    """

    request: GenerateRequest
    order: int
    """Arrival number; the earlier goes first."""
    arrival_s: float
    max_length: int
    """Tokens at which it ends for length: prompt and output."""
    end_ids: frozenset[int]
    seed: int
    tokens: list[int]
    """The prompt, then the output as far as it has arrived on the host."""
    num_prompt: int
    names: PageNames | None = None
    """Of its full pages; None where prefixes are not cached."""
    num_named: int = 0
    """Pages in its row of the tables that have been named, from the start on."""
    num_cached: int = 0
    """Tokens of the prompt that were found in the cache."""
    fetched: Counter[str] = field(default_factory=Counter[str])
    """Those of them that came up from a tier, by its name."""
    num_sent: int = 0
    """Tokens of the prompt that another engine computed for it."""
    fetch: Incoming | None = None
    """Pages of its prompt on their way; it computes nothing meanwhile."""
    has_asked: bool = False
    """Whether another engine was asked to compute its prompt, since it was admitted."""
    sending: Sending | None = None
    """Who waits for its prompt's pages elsewhere."""
    slot: int | None = None
    """Its row in page tables and device state while it runs."""
    num_computed: int = 0
    """Tokens whose keys and values are cached, or will be by the steps under way."""
    prefill_end: int = 0
    """Tokens to compute since it was admitted last, before the next can be chosen."""
    num_in_flight: int = 0
    """Tokens being sampled by the steps under way."""
    finished: bool = False
    scheduled_s: float | None = None
    first_token_s: float | None = None
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Those computed so far, until they are reported with the first token."""
    prompt_reported: bool = False

    @property
    def num_output(self) -> int:
        """Tokens chosen so far, those in flight included."""
        return len(self.tokens) - self.num_prompt + self.num_in_flight

    @property
    def length(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def remaining(self) -> int:
        """Tokens it may still be given."""
        return self.max_length - len(self.tokens) - self.num_in_flight

    @property
    def prefilling(self) -> bool:
        return self.num_computed < self.prefill_end

    @property
    def can_prefill(self) -> bool:
        return self.prefilling and self.fetch is None

    @property
    def num_left(self) -> int:
        """Tokens of its prompt that are yet to be computed, as far as is known."""
        return max(self.prefill_end, len(self.tokens)) - self.num_computed

    @property
    def needs_all_computed(self) -> bool:
        """Whether the log probabilities of all its prompt's tokens are wanted."""
        return self.request.sampling.prompt_logprobs is not None and not self.prompt_reported

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The prompt's logprobs, once."""
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        self.prompt_reported = True
        return taken


class Row(NamedTuple):
    """A sequence's part in a step: one decode row, or up to a chunk of its prompt."""

    # A tuple, since a step makes hundreds: a frozen dataclass takes four times as long to make.

    sequence: Sequence
    slot: int
    start: int
    """Position of the first new token."""
    length: int
    num_output: int
    remaining: int
    num_tokens: int
    """Tokens the step chooses for it: 0 where the prompt goes on."""
    token_ids: tuple[int, ...] = ()
    """What a prefill row computes; a decode row's token is on the device."""
    targets: tuple[int, ...] = ()
    """The prompt's token after each of `token_ids`, when the request wants prompt logprobs."""


class Send(NamedTuple):
    """A page to read for an engine that waits for it."""

    sending: Sending
    number: int
    """Of its prompt's pages."""
    page: int


@dataclass(frozen=True)
class StepPlan:
    """Rows that advance together in one call of the device."""

    decode: list[Row] = field(default_factory=list[Row])
    chunks: list[Row] = field(default_factory=list[Row])
    num_tokens: int = 1
    """Tokens a decode row advances."""
    admitted: list[Sequence] = field(default_factory=list[Sequence])
    """Sequences whose slot is new to them: the device must learn their parameters."""
    saves: list[tuple[Key, int]] = field(default_factory=list[tuple[Key, int]])
    """Pages to read for the tiers before anything is written."""
    sends: list[Send] = field(default_factory=list[Send])
    """The same for other engines."""
    landings: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])
    """Images that came from tiers or engines, and the pages to write them to, before the step."""
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Pages to copy before the step: source and target."""
    prompt_cost: float = 0.0
    """Of the prefill rows, by `serve.pace.TokenCost`, as wide as they might be."""
    planned_s: float = 0.0

    @property
    def rows(self) -> list[Row]:
        return self.decode + self.chunks

    @property
    def moves_pages(self) -> bool:
        return bool(self.saves or self.sends or self.landings or self.copies)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks or self.admitted or self.moves_pages)
