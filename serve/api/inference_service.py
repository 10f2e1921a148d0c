"""`Inference` of `proto/weft/v1`: prompts in, streams of tokens out.

It does not know how text becomes tokens (`serve/front`) or when a request runs (`serve/engine`).
"""

import asyncio
from collections.abc import Generator
from contextlib import aclosing, contextmanager

import grpc

from cache.contexts.context import Context as Kept
from serve.api import messages
from serve.api.calls import Calls
from serve.api.statuses import Context, abort, statuses
from serve.front import Chat, Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import FinishReason, GenerateRequest

LONG_TEXT = 2_000
"""Characters from which a text is encoded on another thread, to keep the streams' loop free."""


class InferenceService(pb_grpc.InferenceServicer):
    def __init__(self, front: Front):
        self._front = front
        self.running: list[str] = []
        """Ids the engine was given; twice while one is refused as a duplicate."""
        self.calls = Calls()
        """Of Generate."""

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        with self.calls.counted():
            async with statuses(context):
                prepared = await self._prepare(request)
                with self._known(prepared.request_id):
                    await self._stream(prepared, context)

    async def _stream(self, prepared: GenerateRequest, context: Context) -> None:
        async with aclosing(self._front.generate(prepared)) as deltas:
            request_id = prepared.request_id
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ERROR:
                    await abort(context, grpc.StatusCode.INTERNAL, delta.error)
                for message in messages.responses(delta):
                    if request_id:
                        message.request_id, request_id = request_id, ""
                    await context.write(message)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        async with statuses(context):
            return pb.TokenizeResponse(token_ids=await self._encode(request))

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        async with statuses(context):
            ids = request.token_ids
            if len(ids) > LONG_TEXT:
                return pb.DetokenizeResponse(text=await asyncio.to_thread(self._front.decode, ids))
            return pb.DetokenizeResponse(text=self._front.decode(ids))

    async def _prepare(self, request: pb.GenerateRequest) -> GenerateRequest:
        sampling = messages.sampling_params(request.sampling)
        after = None
        if request.context:
            after = self._front.context(request.tenant, request.context)
        return self._front.prepare(
            await self._encode(request, after),
            sampling,
            request_id=request.request_id,
            tenant=request.tenant,
            session_id=request.session_id,
            cache_salt=request.cache_salt,
            priority=request.priority,
            context=after,
            keep=[(kept.position, kept.ttl) for kept in request.keep],
        )

    async def _encode(
        self, request: pb.GenerateRequest | pb.TokenizeRequest, after: Kept | None = None
    ) -> tuple[int, ...]:
        prompt = messages.prompt(request)
        if isinstance(prompt, Chat) or (isinstance(prompt, str) and len(prompt) > LONG_TEXT):
            return await asyncio.to_thread(self._front.encode_prompt, prompt, after)
        return self._front.encode_prompt(prompt, after)

    @contextmanager
    def _known(self, request_id: str) -> Generator[None]:
        self.running.append(request_id)
        try:
            yield
        finally:
            self.running.remove(request_id)
