"""What a client is told and given. It knows no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict

from serve.request import FinishReason, Timings, TokenLogprobs, Usage

type Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages: {"role": ..., "content": ...} each."""


class RequestOptions(TypedDict, total=False):
    """What may be said of a request: SamplingParams' fields, and who asks."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int | None
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    request_id: str
    tenant: str
    session_id: str
    cache_salt: str
    priority: int
    context: str
    """The name of a context that the prompt goes on after (`Client.contexts`)."""
    keep: Sequence[tuple[int, str]]
    """Up to 4 positions in the prompt, 0 for its end, and for how long the pages before each are to
    be kept: "5m" or "1h", anew with each use."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came since the chunk before; the last one has a finish reason, usage and timings."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    usage: Usage | None
    timings: Timings | None


class CacheChange(StrEnum):
    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"
    """All pages of the replica's tier are gone."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """A page comes or goes; proto/weft/v1 says what each field means."""

    change: CacheChange
    tier: str
    replica: int
    key: bytes
    parent_key: bytes
    num_tokens: int


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Successive events, or a part of a snapshot; `CacheView` applies them."""

    epoch: str
    sequence_number: int
    """Of the last event; of a snapshot, of the last one before it."""
    is_snapshot: bool
    is_snapshot_end: bool
    events: tuple[CacheEvent, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves; proto/weft/v1 says what each field means."""

    name: str
    architecture: str
    vocab_size: int
    max_context: int
    dtype: str
    mesh: dict[str, int]
    num_pages: int
    page_size: int
    max_batch: int
    eos_ids: tuple[int, ...]
    has_tokenizer: bool
    has_chat_template: bool
