"""Messages of `proto/weft/v1` to and from the values that the front works with.

It does not know connections or status codes (`serve/api/grpc_server.py`).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cache.contexts.context import Context
from cache.events import Batch, Change
from serve.errors import InvalidRequest
from serve.front import Chat, Delta, Front, Prompt
from serve.pb import inference_pb2 as pb
from serve.request import FinishReason, Load, SamplingParams, Timings, TokenLogprobs, Usage

MAX_POSITIONS = 2_048
"""Prompt positions whose log probabilities go into one message: with 20 alternatives each, well
under the 4 MiB that a gRPC client takes by default."""

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
_EVENT_KINDS = {
    Change.STORED: pb.CacheEvent.KIND_STORED,
    Change.REMOVED: pb.CacheEvent.KIND_REMOVED,
    Change.CLEARED: pb.CacheEvent.KIND_CLEARED,
}
_OPTIONAL = (
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "max_tokens",
    "min_tokens",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
)


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """What is left out has SamplingParams' default. Raises InvalidRequest."""
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        **given,
    )


def prompt(message: Any) -> Prompt:
    """What the message's oneof `prompt` holds. Raises InvalidRequest where it has none."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
        case "chat":
            messages = message.chat.messages
            return Chat(tuple({"role": m.role, "content": m.content} for m in messages))
        case _:
            forms = [field.name for field in message.DESCRIPTOR.oneofs_by_name["prompt"].fields]
            raise InvalidRequest(f"the request has no prompt; set one of {', '.join(forms)}")


def responses(delta: Delta) -> Iterator[pb.GenerateResponse]:
    """A delta as one message, or as several when its prompt has many log probabilities."""
    rest = delta.prompt_logprobs
    while len(rest) > MAX_POSITIONS:
        yield pb.GenerateResponse(prompt_logprobs=_positions(rest[:MAX_POSITIONS]))
        rest = rest[MAX_POSITIONS:]
    message = pb.GenerateResponse(token_ids=delta.token_ids, text=delta.text)
    if delta.logprobs:
        message.logprobs.extend(_positions(delta.logprobs))
    if rest:
        message.prompt_logprobs.extend(_positions(rest))
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if delta.usage is not None:
        message.usage.CopyFrom(_usage(delta.usage))
    if delta.timings is not None:
        message.timings.CopyFrom(_timings(delta.timings))
    yield message


def model_info_response(front: Front) -> pb.GetModelInfoResponse:
    info = front.engine.info
    return pb.GetModelInfoResponse(
        name=info.name,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        max_context=info.max_context,
        dtype=info.dtype,
        mesh=dict(info.mesh),
        num_pages=info.num_pages,
        page_size=info.page_size,
        max_batch=info.max_batch,
        eos_ids=info.eos_ids,
        has_tokenizer=front.tokenizer is not None,
        has_chat_template=front.chat_template is not None,
    )


def load_response(load: Load) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        pages_used=load.pages_used,
        pages_total=load.pages_total,
        max_batch=load.max_batch,
        max_queue=load.max_queue,
        num_preemptions=load.num_preemptions,
        prefix_queries=load.prefix_queries,
        prefix_hits=load.prefix_hits,
        num_finished=load.num_finished,
        generated_tokens=load.generated_tokens,
        prompt_tokens=load.prompt_tokens,
        compiles_after_warmup=load.compiles_after_warmup,
        draining=load.draining,
    )


def cache_events(epoch: str, batch: Batch) -> pb.CacheEvents:
    return pb.CacheEvents(
        epoch=epoch,
        sequence_number=batch.sequence_number,
        is_snapshot=batch.is_snapshot,
        is_snapshot_end=batch.is_snapshot_end,
        events=[
            pb.CacheEvent(
                kind=_EVENT_KINDS[event.change],
                tier=event.tier,
                replica=event.replica,
                key=event.key,
                parent_key=event.parent_key,
                num_tokens=event.num_tokens,
            )
            for event in batch.events
        ],
    )


def cached_context(
    context: Context, cached_tokens: int = 0, compute_s: float = 0.0
) -> pb.CachedContext:
    return pb.CachedContext(
        name=context.name,
        display_name=context.display_name,
        num_tokens=context.num_tokens,
        create_time=context.create_time,
        update_time=context.update_time,
        expire_time=context.expire_time,
        cached_tokens=cached_tokens,
        compute_s=compute_s,
    )


def _positions(logprobs: Iterable[TokenLogprobs]) -> Iterator[pb.TokenLogprobs]:
    for position in logprobs:
        yield pb.TokenLogprobs(
            token_id=position.token_id,
            logprob=position.logprob,
            top_ids=position.top_ids,
            top_logprobs=position.top_logprobs,
        )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        fetched_tokens=dict(usage.fetched_tokens),
        prefilled_tokens=usage.prefilled_tokens,
        saved_s=usage.saved_s,
    )


def _timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        scheduled_s=timings.scheduled_s,
        first_token_s=timings.first_token_s,
        finished_s=timings.finished_s,
        num_preemptions=timings.num_preemptions,
    )
