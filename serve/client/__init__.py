"""A typed client of a Weft endpoint, blocking (`Client`) and asynchronous (`AsyncClient`).

    with Client("127.0.0.1:8500") as client:
        for chunk in client.generate("Once upon a time", max_tokens=100):
            print(chunk.text, end="", flush=True)

It knows the wire only: it imports nothing of the server, and no JAX.
"""

from serve.client.asynchronous import AsyncClient
from serve.client.blocking import DEFAULT_ADDRESS, Client
from serve.client.cache_view import CacheView
from serve.client.contexts import CachedContext
from serve.client.values import (
    CacheChange,
    CacheEvent,
    CacheEvents,
    Chunk,
    ModelInfo,
    Prompt,
    RequestOptions,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "CacheChange",
    "CacheEvent",
    "CacheEvents",
    "CacheView",
    "CachedContext",
    "Chunk",
    "Client",
    "ModelInfo",
    "Prompt",
    "RequestOptions",
]
