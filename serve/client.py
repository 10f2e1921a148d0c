"""A typed client of a Weft endpoint, blocking (`Client`) and asynchronous (`AsyncClient`).

    with Client("127.0.0.1:8500") as client:
        for chunk in client.generate("Once upon a time", max_tokens=100):
            print(chunk.text, end="", flush=True)

It knows the wire only: it imports nothing of the server, and no JAX.
"""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self, TypedDict, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestError, Unavailable
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import FinishReason, Load, SamplingParams, Timings, TokenLogprobs, Usage

DEFAULT_ADDRESS = "127.0.0.1:8500"

_OPTIONS = (("grpc.max_receive_message_length", -1),)
_ERRORS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
}
_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))

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


class Client:
    """Blocking calls; threads may share a client.

    `timeout_s` bounds each call from its start to its end, streams included: one that takes
    longer raises TimeoutError. A call that the server refuses raises one of `serve.errors`,
    with the server's message.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = None):
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = pb_grpc.ControlStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Chunk]:
        """Sends the request at once and gives its chunks; closing the generator cancels it."""
        request = _generate_request(prompt, options)
        return self._chunks(self._inference.Generate(request, timeout=self._timeout_s))

    def _chunks(self, call: Any) -> Generator[Chunk]:
        request_id = ""
        try:
            with _errors(self.address):
                for message in call:
                    request_id = request_id or message.request_id
                    yield _chunk(request_id, message)
        finally:
            call.cancel()

    def generate_text(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> str:
        return "".join(chunk.text for chunk in self.generate(prompt, **options))

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids that the server makes of a text or of chat messages."""
        return list(self._call(self._inference.Tokenize, _tokenize_request(prompt)).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._call(self._inference.Detokenize, _detokenize_request(token_ids)).text

    def model_info(self) -> ModelInfo:
        return _model_info(self._call(self._control.GetModelInfo, pb.GetModelInfoRequest()))

    def load(self) -> Load:
        return _load(self._call(self._control.GetLoad, pb.GetLoadRequest()))

    def abort(self, request_id: str) -> None:
        """Ends a request, whoever sent it; an id that is not being served is ignored."""
        self._call(self._control.Abort, pb.AbortRequest(request_id=request_id))

    def flush_cache(self) -> int:
        """Makes the server forget all cached prefixes; returns how many pages that freed."""
        return self._call(self._control.FlushCache, pb.FlushCacheRequest()).num_pages

    def drain(self) -> None:
        """Makes the server refuse new requests; returns at once."""
        self._call(self._control.Drain, pb.DrainRequest())

    def is_serving(self) -> bool:
        """False also when no server can be reached."""
        try:
            return _serving(self._call(self._health.Check, health_pb2.HealthCheckRequest()))
        except Unavailable:
            return False

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        with _errors(self.address):
            return method(request, timeout=self._timeout_s)


class AsyncClient:
    """The calls of `Client` for asyncio; made and used on one running event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = None):
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = pb_grpc.ControlStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Sends the request at once and gives its chunks; closing the generator cancels it."""
        request = _generate_request(prompt, options)
        return self._chunks(self._inference.Generate(request, timeout=self._timeout_s))

    async def _chunks(self, call: Any) -> AsyncGenerator[Chunk, None]:
        request_id = ""
        try:
            with _errors(self.address):
                async for message in call:
                    request_id = request_id or message.request_id
                    yield _chunk(request_id, message)
        finally:
            call.cancel()

    async def generate_text(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> str:
        return "".join([chunk.text async for chunk in self.generate(prompt, **options)])

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        response = await self._call(self._inference.Tokenize, _tokenize_request(prompt))
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return (await self._call(self._inference.Detokenize, _detokenize_request(token_ids))).text

    async def model_info(self) -> ModelInfo:
        return _model_info(await self._call(self._control.GetModelInfo, pb.GetModelInfoRequest()))

    async def load(self) -> Load:
        return _load(await self._call(self._control.GetLoad, pb.GetLoadRequest()))

    async def abort(self, request_id: str) -> None:
        await self._call(self._control.Abort, pb.AbortRequest(request_id=request_id))

    async def flush_cache(self) -> int:
        return (await self._call(self._control.FlushCache, pb.FlushCacheRequest())).num_pages

    async def drain(self) -> None:
        await self._call(self._control.Drain, pb.DrainRequest())

    async def is_serving(self) -> bool:
        try:
            return _serving(await self._call(self._health.Check, health_pb2.HealthCheckRequest()))
        except Unavailable:
            return False

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        with _errors(self.address):
            return await method(request, timeout=self._timeout_s)


@contextmanager
def _errors(address: str) -> Generator[None]:
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
def _valid() -> Generator[None]:
    """Protobuf's refusal of a value, such as a negative token id, as InvalidRequest."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequest(str(error)) from error


def _generate_request(prompt: Prompt, options: RequestOptions) -> pb.GenerateRequest:
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    sampling = {name: given.pop(name) for name in _SAMPLING_FIELDS & given.keys()}
    for name in ("stop", "stop_token_ids"):
        if name in sampling:
            sampling[name] = tuple(sampling[name])
    SamplingParams(**sampling)  # A value out of range is told before anything is sent.
    with _valid():
        request = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **given)
        if isinstance(prompt, str):
            request.text = prompt
        elif _is_chat(prompt):
            request.chat.CopyFrom(_chat(prompt))
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))  # pyright: ignore[reportArgumentType]
        return request


def _tokenize_request(prompt: str | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    with _valid():
        if isinstance(prompt, str):
            return pb.TokenizeRequest(text=prompt)
        return pb.TokenizeRequest(chat=_chat(prompt))


def _detokenize_request(token_ids: Sequence[int]) -> pb.DetokenizeRequest:
    with _valid():
        return pb.DetokenizeRequest(token_ids=token_ids)


def _is_chat(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _chat(messages: Sequence[Any]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(**message) for message in messages])


def _chunk(request_id: str, message: pb.GenerateResponse) -> Chunk:
    usage = timings = None
    if message.HasField("usage"):
        usage = Usage(
            message.usage.prompt_tokens,
            message.usage.completion_tokens,
            message.usage.cached_tokens,
            dict(message.usage.fetched_tokens),
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


def _model_info(message: pb.GetModelInfoResponse) -> ModelInfo:
    values = {field.name: getattr(message, field.name) for field in fields(ModelInfo)}
    return ModelInfo(**values | {"mesh": dict(message.mesh), "eos_ids": tuple(message.eos_ids)})


def _load(message: pb.GetLoadResponse) -> Load:
    return Load(**{field.name: getattr(message, field.name) for field in fields(Load)})


def _serving(message: health_pb2.HealthCheckResponse) -> bool:
    return message.status == health_pb2.HealthCheckResponse.SERVING
