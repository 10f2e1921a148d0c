"""The client for asyncio."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client.blocking import DEFAULT_ADDRESS, OPTIONS
from serve.client.contexts import AsyncContexts
from serve.client.messages import (
    cache_events,
    cache_events_request,
    chunk,
    detokenize_request,
    errors,
    generate_request,
    is_serving_response,
    load_response,
    model_info_response,
    tokenize_request,
)
from serve.client.values import CacheEvents, Chunk, ModelInfo, Prompt, RequestOptions
from serve.errors import Unavailable
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import Load


class AsyncClient:
    """The calls of `Client` for asyncio; made and used on one running event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = None):
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._inference = pb_grpc.InferenceStub(self._channel)
        self._control = pb_grpc.ControlStub(self._channel)
        self.contexts = AsyncContexts(pb_grpc.ContextCacheStub(self._channel), address, timeout_s)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self, prompt: Prompt, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Sends the request at once and gives its chunks; closing the generator cancels it."""
        request = generate_request(prompt, options)
        return self._chunks(self._inference.Generate(request, timeout=self._timeout_s))

    async def _chunks(self, call: Any) -> AsyncGenerator[Chunk, None]:
        request_id = ""
        try:
            with errors(self.address):
                async for message in call:
                    request_id = request_id or message.request_id
                    yield chunk(request_id, message)
        finally:
            call.cancel()

    async def generate_text(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> str:
        return "".join([chunk.text async for chunk in self.generate(prompt, **options)])

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        response = await self._call(self._inference.Tokenize, tokenize_request(prompt))
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return (await self._call(self._inference.Detokenize, detokenize_request(token_ids))).text

    async def model_info(self) -> ModelInfo:
        return model_info_response(
            await self._call(self._control.GetModelInfo, pb.GetModelInfoRequest())
        )

    async def load(self) -> Load:
        return load_response(await self._call(self._control.GetLoad, pb.GetLoadRequest()))

    async def abort(self, request_id: str) -> None:
        await self._call(self._control.Abort, pb.AbortRequest(request_id=request_id))

    async def flush_cache(self) -> int:
        return (await self._call(self._control.FlushCache, pb.FlushCacheRequest())).num_pages

    def cache_events(
        self, epoch: str = "", sequence_number: int = 0
    ) -> AsyncGenerator[CacheEvents, None]:
        """What the server's cache holds, and from then on each change; it ends only by an error."""
        request = cache_events_request(epoch, sequence_number)
        return self._cache_events(
            self._control.SubscribeCacheEvents(request, timeout=self._timeout_s)
        )

    async def _cache_events(self, call: Any) -> AsyncGenerator[CacheEvents, None]:
        try:
            with errors(self.address):
                async for message in call:
                    yield cache_events(message)
        finally:
            call.cancel()

    async def drain(self) -> None:
        await self._call(self._control.Drain, pb.DrainRequest())

    async def is_serving(self) -> bool:
        try:
            return is_serving_response(
                await self._call(self._health.Check, health_pb2.HealthCheckRequest())
            )
        except Unavailable:
            return False

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        with errors(self.address):
            return await method(request, timeout=self._timeout_s)
