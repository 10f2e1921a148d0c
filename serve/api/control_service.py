"""`Control` of `proto/weft/v1`: what an operator and a router ask of an endpoint.

It does not know requests that are under way.
"""

from collections.abc import Awaitable, Callable

from serve.api import messages
from serve.api.statuses import Context, statuses
from serve.errors import InvalidRequest
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc


class ControlService(pb_grpc.ControlServicer):
    def __init__(self, front: Front, on_drain: Callable[[], Awaitable[None]]):
        """`on_drain` is called when the endpoint begins to refuse requests."""
        self._front = front
        self._on_drain = on_drain

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
        return pb.FlushCacheResponse(num_pages=self._front.engine.flush_cache())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        self._front.engine.drain()
        await self._on_drain()
        return pb.DrainResponse()
