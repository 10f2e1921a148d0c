"""What a client is told and given. It knows no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
