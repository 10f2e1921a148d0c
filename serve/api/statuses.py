"""How a gRPC call ends that could not be served.

It does not know what calls there are.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import grpc

from serve.errors import (
    DuplicateRequest,
    InvalidRequest,
    Mismatch,
    NotFound,
    Overloaded,
    RequestError,
    Unavailable,
)

MAX_DETAILS = 1_000
"""Characters of an error message: it travels in the trailers, which clients limit to 8 KiB."""

_STATUS = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Mismatch: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

type Context = grpc.aio.ServicerContext


@asynccontextmanager
async def statuses(context: Context) -> AsyncGenerator[None]:
    """Ends the call with the status of the RequestError raised inside."""
    try:
        yield
    except RequestError as error:
        await abort(context, _STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error))


async def abort(context: Context, status: grpc.StatusCode, details: str) -> None:
    await context.abort(status, details[:MAX_DETAILS])
