"""`Transfer` of `proto/weft/v1`: prompts computed for other engines, whose pages are sent at once.

It does not know how an engine computes, or what the receiver does with pages.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import grpc

from cache.keys import Key, PageNames, root_key
from cache.tiers.record import RecordFormat
from cache.transfers.chunks import CHUNK_BYTES, chunks_of
from cache.transfers.sending import Sending
from serve.api.calls import Calls
from serve.api.grpc_server import Service
from serve.api.statuses import Context, abort, statuses
from serve.engine import Sink
from serve.errors import InvalidRequest, Mismatch
from serve.front import MAX_NAME_LENGTH, ModelInfo
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.prefill.asking import prefill_request
from serve.prefill.pulls import Offers
from serve.request import FinishReason, GenerateRequest, Output
from serve.to_thread import to_its_end

LONGEST_LEASE_S = 600.0
MESSAGE_BYTES = CHUNK_BYTES


class Engine(Protocol):
    """What is asked of the engine that computes."""

    @property
    def info(self) -> ModelInfo: ...
    def submit(self, request: GenerateRequest, sink: Sink, sending: Sending) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def wake(self) -> None: ...


class TransferService(pb_grpc.TransferServicer):
    def __init__(self, engine: Engine, form: RecordFormat, host: str = "") -> None:
        """`host` is where pages are offered that stay on devices; empty: they go over gRPC."""
        self._engine, self._form, self._host = engine, form, host
        self.calls = Calls()

    @classmethod
    def of(cls, engine: Engine, form: RecordFormat, host: str = "") -> Service:
        service = cls(engine, form, host)
        add = pb_grpc.add_TransferServicer_to_server
        return Service("Transfer", add, service, service.calls)

    async def Prefill(  # noqa: N802
        self, messages: AsyncIterator[pb.PrefillMessage], context: Context
    ) -> None:
        with self.calls.counted():
            async with statuses(context):
                await self._prefill(messages, context)

    async def _prefill(self, messages: AsyncIterator[pb.PrefillMessage], context: Context) -> None:
        opening = await anext(aiter(messages), pb.PrefillMessage())
        if not opening.HasField("request"):
            raise InvalidRequest("the first message has no request; send the prompt first")
        asked = self._checked(opening.request)
        # Whoever asks for offers takes records, too.
        offers = Offers(self._host) if asked.offers and self._host else None
        departure = _Departure(self._engine, self._form, asked, offers)
        await departure.run(messages, context)

    def _checked(self, asked: pb.PrefillRequest) -> pb.PrefillRequest:
        if asked.fingerprint != self._form.fingerprint:
            raise Mismatch(
                f"the pages asked for are {asked.fingerprint.hex()}, those here are "
                f"{self._form.fingerprint.hex()}; serve one model with one dtype, cache.dtype and "
                "cache.page_size on both sides"
            )
        for name in ("request_id", "tenant", "cache_salt"):
            if len(getattr(asked, name)) > MAX_NAME_LENGTH:
                raise InvalidRequest(
                    f"{name} has {len(getattr(asked, name))} characters; at most "
                    f"{MAX_NAME_LENGTH} are allowed"
                )
        if not 0 < asked.lease_s <= LONGEST_LEASE_S or math.isnan(asked.lease_s):
            raise InvalidRequest(
                f"lease_s is {asked.lease_s}; it must be above 0 and at most {LONGEST_LEASE_S:.0f}"
            )
        context = self._engine.info.max_context
        if len(asked.token_ids) > context:
            raise InvalidRequest(
                f"the prompt has {len(asked.token_ids)} tokens; a context of {context} has no room "
                "for it"
            )
        num_pages = (len(asked.token_ids) - 1) // self._engine.info.page_size
        if asked.first_page >= num_pages:
            raise InvalidRequest(
                f"pages from {asked.first_page} on are asked for; a prompt of "
                f"{len(asked.token_ids)} tokens has {max(num_pages, 0)} that can be sent"
            )
        return asked


class _Departure:
    """One prompt's pages on their way to a receiver."""

    def __init__(
        self,
        engine: Engine,
        form: RecordFormat,
        asked: pb.PrefillRequest,
        offers: Offers | None,
    ) -> None:
        size = engine.info.page_size
        num_pages = (len(asked.token_ids) - 1) // size
        self._engine, self._form, self._offers = engine, form, offers
        self._lease_s = asked.lease_s
        self._request = prefill_request(
            asked.request_id,
            asked.token_ids,
            num_pages,
            size,
            tenant=asked.tenant,
            cache_salt=asked.cache_salt,
            priority=asked.priority,
        )
        self._loop = asyncio.get_running_loop()
        self._ready: deque[tuple[int, Any] | str] = deque()
        """Pages that were read, or why there will be no more."""
        self._changed = asyncio.Event()
        """Something was read, or taken."""
        self._sending = Sending(
            asked.first_page,
            num_pages,
            self._deliver,
            on_lost=self._lose,
            stays_on_devices=offers is not None,
        )

    async def run(self, messages: AsyncIterator[pb.PrefillMessage], context: Context) -> None:
        # Else a call whose first message is held up could not be ended.
        await context.send_initial_metadata(())
        try:
            await self._send_all(messages, context)
        except TimeoutError:
            # All is let go by now; that it ended may be told when the receiver reads again.
            await abort(
                context,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"nothing was taken for {self._lease_s} s, as long as the lease; ask again",
            )

    async def _send_all(self, messages: AsyncIterator[pb.PrefillMessage], context: Context) -> None:
        """Raises TimeoutError when the receiver is behind for a lease."""
        following = asyncio.create_task(self._follow(messages))
        try:
            names = await to_its_end(self._submit)
            message = pb.PageChunks()
            for number in range(self._sending.first, self._sending.last):
                image = await self._next(context)
                async for chunk in self._chunks(number, names.keys[number], image):
                    message.chunks.append(chunk)
                    # Many small pages together: a message takes both sides longer than such a page.
                    if message.ByteSize() >= MESSAGE_BYTES:
                        await self._write(message, context)
                if not self._ready:
                    await self._write(message, context)
            await self._write(message, context)
        finally:
            following.cancel()
            self._sending.end()
            # It may have ended, and an id that is not there is ignored.
            await asyncio.to_thread(self._engine.abort, self._request.request_id)

    async def _write(self, message: pb.PageChunks, context: Context) -> None:
        """Sends what is in the message, if anything, and empties it."""
        if message.chunks:
            async with asyncio.timeout(self._lease_s):
                await context.write(message)
            del message.chunks[:]

    async def _chunks(self, number: int, key: Key, image: Any) -> AsyncGenerator[pb.PageChunk]:
        """A page on the wire."""
        if self._offers is not None:
            offer = await asyncio.to_thread(self._offers.of, image)
            yield pb.PageChunk(page=number, offer=offer)
            return
        if self._form.image_bytes > CHUNK_BYTES:  # which would hold up other streams
            record = await asyncio.to_thread(self._form.encode, key, image)
        else:
            record = self._form.encode(key, image)
        for chunk in chunks_of(number, record):
            yield pb.PageChunk(page=number, offset=chunk.offset, data=bytes(chunk.data))

    def _submit(self) -> PageNames:
        """The names of the prompt's pages, which the engine has been asked for."""
        request = self._request
        names = PageNames(root_key(request.tenant, request.cache_salt), self._engine.info.page_size)
        names.extend(request.prompt_ids)
        self._engine.submit(request, self._sink, self._sending)
        return names

    async def _next(self, context: Context) -> Any:
        """The next page's image. Raises TimeoutError when the receiver is behind for a lease."""
        while not self._ready:
            self._changed.clear()
            # A prompt may wait for others as long as it takes, for its receiver only so long.
            async with asyncio.timeout(self._lease_s if self._sending.is_blocked else None):
                await self._changed.wait()
        item = self._ready.popleft()
        if isinstance(item, str):
            await abort(context, grpc.StatusCode.INTERNAL, item)
        return item[1]

    async def _follow(self, messages: AsyncIterator[pb.PrefillMessage]) -> None:
        """Notes what the receiver has taken, so that more is read."""
        with suppress(grpc.RpcError):
            async for message in messages:
                self._sending.taken(message.taken.num_pages)
                self._changed.set()
                await asyncio.to_thread(self._engine.wake)

    def _deliver(self, number: int, images: Sequence[Any]) -> None:
        self._put(*((i, image) for i, image in enumerate(images, number)))

    def _lose(self) -> None:
        self._put("a page could not be read from the devices; ask another engine")

    def _sink(self, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:
            self._put(output.error)
        elif output.finish_reason is FinishReason.CANCELLED:
            self._put("the prompt was aborted here; ask another engine")

    def _put(self, *items: tuple[int, Any] | str) -> None:
        """From any thread."""
        self._ready.extend(items)
        with suppress(RuntimeError):  # the loop has closed, and the receiver's call with it
            self._loop.call_soon_threadsafe(self._changed.set)
