"""Contexts on a server: prompts with a name, computed once.

It knows no connection but the stub it is given.
"""

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

from serve.client.messages import errors, set_prompt, valid
from serve.client.values import Prompt
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class CachedContext:
    """A context without its tokens. Times are seconds since 1970."""

    name: str
    """What a request says: `generate(..., context=name)`."""
    display_name: str
    num_tokens: int
    create_time: float
    update_time: float
    expire_time: float
    cached_tokens: int
    """Those that had been computed before `create` or `update`, which took `compute_s`."""
    compute_s: float


class End(TypedDict, total=False):
    """When a context ends: one of the two, or neither."""

    ttl_s: float | None
    expire_time: float | None
    """Seconds since 1970."""


class CreateOptions(End, total=False):
    tenant: str
    cache_salt: str
    display_name: str


class Contexts:
    """Of a `Client`. Contexts belong to their tenant; there are none of others."""

    def __init__(self, stub: pb_grpc.ContextCacheStub, address: str, timeout_s: float | None):
        self._stub, self._address, self._timeout_s = stub, address, timeout_s

    def create(self, prompt: Prompt, **options: Unpack[CreateOptions]) -> CachedContext:
        """Returns when the prompt has been computed."""
        return _context(self._call(self._stub.Create, _create(prompt, options)))

    def get(self, name: str, tenant: str = "") -> CachedContext:
        return _context(self._call(self._stub.Get, _named(pb.GetContextRequest, name, tenant)))

    def list(self, tenant: str = "", page_size: int = 0) -> Generator[CachedContext]:
        """All of the tenant, by name; the server is asked for `page_size` at a time."""
        request = _list(tenant, page_size)
        while True:
            response = self._call(self._stub.List, request)
            yield from map(_context, response.contexts)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    def update(
        self, name: str, prompt: Prompt | None = None, tenant: str = "", **end: Unpack[End]
    ) -> CachedContext:
        """Appends a prompt, or sets another end, or both."""
        return _context(self._call(self._stub.Update, _update(name, prompt, tenant, end)))

    def delete(self, name: str, tenant: str = "") -> None:
        self._call(self._stub.Delete, _named(pb.DeleteContextRequest, name, tenant))

    def _call(self, method: Any, request: Any) -> Any:
        with errors(self._address):
            return method(request, timeout=self._timeout_s)


class AsyncContexts:
    """The calls of `Contexts`, of an `AsyncClient`."""

    def __init__(self, stub: pb_grpc.ContextCacheStub, address: str, timeout_s: float | None):
        self._stub, self._address, self._timeout_s = stub, address, timeout_s

    async def create(self, prompt: Prompt, **options: Unpack[CreateOptions]) -> CachedContext:
        return _context(await self._call(self._stub.Create, _create(prompt, options)))

    async def get(self, name: str, tenant: str = "") -> CachedContext:
        request = _named(pb.GetContextRequest, name, tenant)
        return _context(await self._call(self._stub.Get, request))

    async def list(
        self, tenant: str = "", page_size: int = 0
    ) -> AsyncGenerator[CachedContext, None]:
        request = _list(tenant, page_size)
        while True:
            response = await self._call(self._stub.List, request)
            for context in response.contexts:
                yield _context(context)
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def update(
        self, name: str, prompt: Prompt | None = None, tenant: str = "", **end: Unpack[End]
    ) -> CachedContext:
        return _context(await self._call(self._stub.Update, _update(name, prompt, tenant, end)))

    async def delete(self, name: str, tenant: str = "") -> None:
        await self._call(self._stub.Delete, _named(pb.DeleteContextRequest, name, tenant))

    async def _call(self, method: Any, request: Any) -> Any:
        with errors(self._address):
            return await method(request, timeout=self._timeout_s)


def _create(prompt: Prompt, options: CreateOptions) -> pb.CreateContextRequest:
    with valid():
        request = pb.CreateContextRequest(**options)
        set_prompt(request, prompt)
        return request


def _update(name: str, prompt: Prompt | None, tenant: str, end: End) -> pb.UpdateContextRequest:
    with valid():
        request = pb.UpdateContextRequest(name=name, tenant=tenant, **end)
        if prompt is not None:
            set_prompt(request, prompt)
        return request


def _list(tenant: str, page_size: int) -> pb.ListContextsRequest:
    with valid():
        return pb.ListContextsRequest(tenant=tenant, page_size=page_size)


def _named(kind: Any, name: str, tenant: str) -> Any:
    with valid():
        return kind(name=name, tenant=tenant)


def _context(message: pb.CachedContext) -> CachedContext:
    return CachedContext(
        **{field.name: getattr(message, field.name) for field in fields(CachedContext)}
    )
