"""`ContextCache` of `proto/weft/v1`: prompts with a name.

It does not know how they are kept (`serve/contexts.py`).
"""

from typing import Any

from serve.api import messages
from serve.api.grpc_server import Service
from serve.api.statuses import Context, statuses
from serve.contexts import ContextCache
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc

DEFAULT_LISTING = 100


class ContextsService(pb_grpc.ContextCacheServicer):
    def __init__(self, contexts: ContextCache):
        self._contexts = contexts

    @classmethod
    def of(cls, contexts: ContextCache) -> Service:
        return Service("ContextCache", pb_grpc.add_ContextCacheServicer_to_server, cls(contexts))

    async def Create(  # noqa: N802
        self, request: pb.CreateContextRequest, context: Context
    ) -> pb.CachedContext:
        async with statuses(context):
            made = await self._contexts.create(
                request.tenant,
                messages.prompt(request),
                cache_salt=request.cache_salt,
                display_name=request.display_name,
                ttl_s=_optional(request, "ttl_s"),
                expire_time=_optional(request, "expire_time"),
            )
            return messages.cached_context(*made)

    async def Get(  # noqa: N802
        self, request: pb.GetContextRequest, context: Context
    ) -> pb.CachedContext:
        async with statuses(context):
            return messages.cached_context(self._contexts.get(request.tenant, request.name))

    async def List(  # noqa: N802
        self, request: pb.ListContextsRequest, context: Context
    ) -> pb.ListContextsResponse:
        async with statuses(context):
            limit = request.page_size or DEFAULT_LISTING
            found = self._contexts.list(request.tenant, limit, request.page_token)
            return pb.ListContextsResponse(
                contexts=map(messages.cached_context, found.contexts),
                next_page_token=found.next_page_token,
            )

    async def Update(  # noqa: N802
        self, request: pb.UpdateContextRequest, context: Context
    ) -> pb.CachedContext:
        async with statuses(context):
            made = await self._contexts.update(
                request.tenant,
                request.name,
                messages.prompt(request) if request.WhichOneof("prompt") else None,
                ttl_s=_optional(request, "ttl_s"),
                expire_time=_optional(request, "expire_time"),
            )
            return messages.cached_context(*made)

    async def Delete(  # noqa: N802
        self, request: pb.DeleteContextRequest, context: Context
    ) -> pb.DeleteContextResponse:
        async with statuses(context):
            await self._contexts.delete(request.tenant, request.name)
            return pb.DeleteContextResponse()


def _optional(request: Any, name: str) -> float | None:
    return getattr(request, name) if request.HasField(name) else None
