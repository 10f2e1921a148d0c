"""`Control` of `proto/weft/v1`: what an operator and a router ask of an endpoint.

It does not know requests that are under way.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress

from cache.events import EventLog, FellBehind, Subscription
from serve.api import messages
from serve.api.statuses import Context, statuses
from serve.errors import InvalidRequest, Overloaded
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc

MOST_EVENTS = 512
"""In one message: making it takes about a millisecond, which the streams' loop can spare."""
MOST_FOLLOWERS = 64
"""Each is woken whenever pages come and go: a thousand would slow down requests."""
GATHER_S = 0.01
"""From an event to the message that has it: a step's events travel together."""


class ControlService(pb_grpc.ControlServicer):
    def __init__(self, front: Front, on_drain: Callable[[], Awaitable[None]]):
        """`on_drain` is called when the endpoint begins to refuse requests."""
        self._front = front
        self._on_drain = on_drain
        self._num_followers = 0

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return messages.model_info_response(self._front)

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: Context
    ) -> pb.GetLoadResponse:
        return messages.load_response(self._front.engine.load())

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        async with statuses(context):
            if not request.request_id:
                raise InvalidRequest("request_id is empty; send the id of the request to abort")
            self._front.engine.abort(request.request_id)
            return pb.AbortResponse()

    async def FlushCache(  # noqa: N802
        self, request: pb.FlushCacheRequest, context: Context
    ) -> pb.FlushCacheResponse:
        # It waits for disks.
        num_pages = await asyncio.to_thread(self._front.engine.flush_cache)
        return pb.FlushCacheResponse(num_pages=num_pages)

    async def SubscribeCacheEvents(  # noqa: N802
        self, request: pb.SubscribeCacheEventsRequest, context: Context
    ) -> None:
        log = self._front.engine.cache_events
        async with statuses(context):
            if self._num_followers >= MOST_FOLLOWERS:
                raise Overloaded(
                    f"{MOST_FOLLOWERS} streams of cache events are open, as many as there may be; "
                    "close one, or share one"
                )
            self._num_followers += 1
            try:
                # Its first call waits for locks that an engine holds while it plans a step.
                subscription = await asyncio.to_thread(
                    log.subscribe, request.epoch, request.sequence_number
                )
                with closing(subscription):
                    await _send_events(log, subscription, context)
            finally:
                self._num_followers -= 1

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        self._front.engine.drain()
        await self._on_drain()
        return pb.DrainResponse()


async def _send_events(log: EventLog, subscription: Subscription, context: Context) -> None:
    """Until the client leaves, or is too slow (Overloaded)."""
    loop, more = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # The loop has closed, and its readers with it.
            loop.call_soon_threadsafe(more.set)

    while True:
        try:
            batch = subscription.take(MOST_EVENTS)
        except FellBehind as error:
            raise Overloaded(str(error)) from error
        if batch is not None:
            await context.write(messages.cache_events(log.epoch, batch))
            continue
        more.clear()
        subscription.call_when_more(wake)
        await more.wait()
        await asyncio.sleep(GATHER_S)
