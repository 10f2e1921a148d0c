"""Messages of `proto/weft/v1` from and to what a client is told and given, errors included.

It knows no connection.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from serve.client.values import (
    CacheChange,
    CacheEvent,
    CacheEvents,
    Chunk,
    ModelInfo,
    Prompt,
    RequestOptions,
)
from serve.errors import (
    DuplicateRequest,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
)
from serve.pb import inference_pb2 as pb
from serve.request import FinishReason, Load, SamplingParams, Timings, TokenLogprobs, Usage

_ERRORS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
}
_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_CACHE_CHANGES = {
    pb.CacheEvent.KIND_STORED: CacheChange.STORED,
    pb.CacheEvent.KIND_REMOVED: CacheChange.REMOVED,
    pb.CacheEvent.KIND_CLEARED: CacheChange.CLEARED,
}
_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


@contextmanager
def errors(address: str) -> Generator[None]:
    """Raises a call's error status as ours."""
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
            # gRPC's own refusal: the same message will be too large later as well.
            raise InvalidRequest(f"{address}: {details}") from None
        if code in _ERRORS:
            raise _ERRORS[code](details) from None
        raise RequestError(f"{address}: {code.name}: {details}") from None


@contextmanager
def valid() -> Generator[None]:
    """Protobuf's refusal of a value, such as a negative token id, as InvalidRequest."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error)) from error


def generate_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    sampling = {name: given.pop(name) for name in _SAMPLING_FIELDS & given.keys()}
    for name in ("stop", "stop_token_ids"):
        if name in sampling:
            sampling[name] = tuple(sampling[name])
    SamplingParams(**sampling)  # A value out of range is told before anything is sent.
    with valid():
        keep = [pb.Breakpoint(position=at, ttl=ttl) for at, ttl in given.pop("keep", ())]
        request = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), keep=keep, **given)
        set_prompt(request, prompt)
        return request


def set_prompt(request: Any, prompt: Prompt) -> None:
    """Sets the oneof `prompt` of a request."""
    if isinstance(prompt, str):
        request.text = prompt
    elif _is_chat(prompt):
        request.chat.CopyFrom(_chat(prompt))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))  # pyright: ignore[reportArgumentType]


def tokenize_request(prompt: str | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    with valid():
        if isinstance(prompt, str):
            return pb.TokenizeRequest(text=prompt)
        return pb.TokenizeRequest(chat=_chat(prompt))


def detokenize_request(token_ids: Sequence[int]) -> pb.DetokenizeRequest:
    with valid():
        return pb.DetokenizeRequest(token_ids=token_ids)


def _is_chat(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Any]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(**message) for message in messages])


def chunk(request_id: str, message: pb.GenerateResponse) -> Chunk:
    usage = timings = None
    if message.HasField("usage"):
        usage = Usage(
            message.usage.prompt_tokens,
            message.usage.completion_tokens,
            message.usage.cached_tokens,
            dict(message.usage.fetched_tokens),
            message.usage.prefilled_tokens,
            message.usage.saved_s,
        )
    if message.HasField("timings"):
        timings = Timings(
            message.timings.scheduled_s,
            message.timings.first_token_s,
            message.timings.finished_s,
            message.timings.num_preemptions,
        )
    return Chunk(
        request_id,
        message.text,
        tuple(message.token_ids),
        _logprobs(message.logprobs),
        _logprobs(message.prompt_logprobs),
        _FINISH_REASONS.get(message.finish_reason),
        usage,
        timings,
    )


def _logprobs(positions: Sequence[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(p.token_id, p.logprob, tuple(p.top_ids), tuple(p.top_logprobs))
        for p in positions
    )


def model_info_response(message: pb.GetModelInfoResponse) -> ModelInfo:
    values = {field.name: getattr(message, field.name) for field in fields(ModelInfo)}
    return ModelInfo(**values | {"mesh": dict(message.mesh), "eos_ids": tuple(message.eos_ids)})


def load_response(message: pb.GetLoadResponse) -> Load:
    return Load(**{field.name: getattr(message, field.name) for field in fields(Load)})


def cache_events_request(epoch: str, sequence_number: int) -> pb.SubscribeCacheEventsRequest:
    with valid():
        return pb.SubscribeCacheEventsRequest(epoch=epoch, sequence_number=sequence_number)


def cache_events(message: pb.CacheEvents) -> CacheEvents:
    return CacheEvents(
        message.epoch,
        message.sequence_number,
        message.is_snapshot,
        message.is_snapshot_end,
        tuple(
            CacheEvent(
                _CACHE_CHANGES[event.kind],
                event.tier,
                event.replica,
                event.key,
                event.parent_key,
                event.num_tokens,
            )
            for event in message.events
        ),
    )


def is_serving_response(message: health_pb2.HealthCheckResponse) -> bool:
    return message.status == health_pb2.HealthCheckResponse.SERVING
