"""The gRPC endpoint of `proto/weft/v1`, with the standard health and reflection services.

It does not know how text becomes tokens (`serve/front`) or when a request runs (`serve/engine`).
"""

import asyncio
import signal
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.api import messages
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded, RequestError, Unavailable
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.request import FinishReason, GenerateRequest

MAX_MESSAGE_BYTES = 16 * 2**20
"""Far above any prompt; a larger message is refused before it is read."""
LONG_TEXT = 2_000
"""Characters from which a text is encoded on another thread, to keep the streams' loop free."""
MAX_DETAILS = 1_000
"""Characters of an error message: it travels in the trailers, which clients limit to 8 KiB."""
HEALTH_INTERVAL_S = 0.5
"""How soon those who watch the health hear that the engine failed."""
LAST_STATUSES_S = 1.0
"""Time for the last statuses to leave at a stop; calls that watch the health end only by force."""

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())

_OPTIONS = (
    # A second server on the port fails instead of taking half of its connections.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A client whose machine is gone closes no connection: it is asked, and its calls cancelled.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may ask too, also between calls.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_STATUS = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

type Context = grpc.aio.ServicerContext


class GrpcServer:
    """Serves a front on `address`, HOST:PORT; for port 0 the system chooses one."""

    def __init__(self, front: Front, address: str):
        self.port = 0
        """The port, once started."""
        self._front = front
        self._address = _checked(address)
        self._inference = _Inference(front)
        self._health = _Health(front)
        self._following: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises OSError when the address cannot be listened on."""
        server = grpc.aio.server(options=_OPTIONS)
        pb_grpc.add_InferenceServicer_to_server(self._inference, server)
        pb_grpc.add_ControlServicer_to_server(_Control(self._front, self._health), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.port = _listen(server, self._address)
        await self._health.refresh()
        await server.start()
        self._server = server
        self._following = asyncio.create_task(self._health.follow())

    async def drain(self) -> None:
        """Refuses new requests with UNAVAILABLE; returns when those that were taken have ended."""
        self._front.engine.drain()
        await self._health.refresh()
        await self._inference.idle.wait()

    async def stop(self) -> None:
        """Ends every call and frees the port; what still runs is cancelled."""
        if self._server is None or self._following is None:
            return
        for request_id in list(self._inference.running):
            self._front.engine.abort(request_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._inference.idle.wait(), LAST_STATUSES_S)
        self._following.cancel()
        await self._server.stop(LAST_STATUSES_S)
        self._server = None


async def run_until_signalled(server: GrpcServer, grace_s: float) -> None:
    """Waits for SIGTERM or SIGINT, drains for at most `grace_s`, stops.

    A second signal ends the drain. The engine's thread is the caller's to stop.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[None] = asyncio.Queue()
    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, signals.put_nowait, None)
    try:
        await signals.get()
        ends = {asyncio.create_task(server.drain()), asyncio.create_task(signals.get())}
        await asyncio.wait(ends, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        await server.stop()
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


class _Inference(pb_grpc.InferenceServicer):
    def __init__(self, front: Front):
        self._front = front
        self._num_running = 0
        self.running: list[str] = []
        """Ids the engine was given; twice while one is refused as a duplicate."""
        self.idle = asyncio.Event()
        """Set while no Generate runs."""
        self.idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        with self._counted():
            async with _statuses(context):
                prepared = await self._prepare(request)
                with self._known(prepared.request_id):
                    await self._stream(prepared, context)

    async def _stream(self, prepared: GenerateRequest, context: Context) -> None:
        async with aclosing(self._front.generate(prepared)) as deltas:
            request_id = prepared.request_id
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ERROR:
                    await _abort(context, grpc.StatusCode.INTERNAL, delta.error)
                for message in messages.responses(delta):
                    if request_id:
                        message.request_id, request_id = request_id, ""
                    await context.write(message)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        async with _statuses(context):
            return pb.TokenizeResponse(token_ids=await self._encode(request))

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        async with _statuses(context):
            ids = request.token_ids
            if len(ids) > LONG_TEXT:
                return pb.DetokenizeResponse(text=await asyncio.to_thread(self._front.decode, ids))
            return pb.DetokenizeResponse(text=self._front.decode(ids))

    async def _prepare(self, request: pb.GenerateRequest) -> GenerateRequest:
        sampling = messages.sampling_params(request.sampling)
        return self._front.prepare(
            await self._encode(request),
            sampling,
            request_id=request.request_id,
            tenant=request.tenant,
            session_id=request.session_id,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )

    async def _encode(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "text":
                if len(request.text) > LONG_TEXT:
                    return await asyncio.to_thread(self._front.encode, request.text)
                return self._front.encode(request.text)
            case "chat":
                chat = [{"role": m.role, "content": m.content} for m in request.chat.messages]
                return await asyncio.to_thread(self._front.encode_chat, chat)
            case "token_ids" if isinstance(request, pb.GenerateRequest):
                return tuple(request.token_ids.ids)
            case _:
                forms = [f.name for f in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
                raise InvalidRequest(f"the request has no prompt; set one of {', '.join(forms)}")

    @contextmanager
    def _known(self, request_id: str) -> Generator[None]:
        self.running.append(request_id)
        try:
            yield
        finally:
            self.running.remove(request_id)

    @contextmanager
    def _counted(self) -> Generator[None]:
        self._num_running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self.idle.set()


class _Control(pb_grpc.ControlServicer):
    def __init__(self, front: Front, health: "_Health"):
        self._front = front
        self._health = health

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        return messages.model_info_response(self._front)

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: Context
    ) -> pb.GetLoadResponse:
        return messages.load_response(self._front.engine.load())

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        async with _statuses(context):
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
        await self._health.refresh()
        return pb.DrainResponse()


class _Health(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue]
    """NOT_SERVING, for every service, while the engine drains or when it has failed."""

    def __init__(self, front: Front):
        super().__init__()
        self._front = front

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse | None:
        await self.refresh()
        return await super().Check(request, context)

    async def refresh(self) -> None:
        engine = self._front.engine
        status = health_pb2.HealthCheckResponse.SERVING
        if engine.failure is not None or engine.load().draining:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self.set(service, status)

    async def follow(self) -> None:
        """Tells those who watch."""
        while True:
            await self.refresh()
            await asyncio.sleep(HEALTH_INTERVAL_S)


@asynccontextmanager
async def _statuses(context: Context) -> AsyncGenerator[None]:
    """Ends the call with the status of the RequestError raised inside."""
    try:
        yield
    except RequestError as error:
        await _abort(context, _STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error))


async def _abort(context: Context, status: grpc.StatusCode, details: str) -> None:
    await context.abort(status, details[:MAX_DETAILS])


def _checked(address: str) -> str:
    """gRPC would take port 70000 as 4464, and find a host for none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(
            f"cannot listen on {address!r}; give HOST:PORT with a port from 0 to 65535"
        )
    return address


def _listen(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        raise OSError(
            f"cannot listen on {address}: {_why_not(address)}; choose another host:port"
        ) from None


def _why_not(address: str) -> str:
    """gRPC does not say why it could not listen; the system does."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host.strip("[]"), int(port)), family=family):
            return "gRPC could not, the system can"
    except OSError as error:
        return str(error)
