"""The gRPC endpoint of `proto/weft/v1`, with the standard health and reflection services.

It does not know how text becomes tokens (`serve/front`) or when a request runs (`serve/engine`).
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.api.calls import Calls
from serve.api.control_service import ControlService
from serve.api.health_service import HealthService
from serve.api.inference_service import InferenceService
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 16 * 2**20
"""Far above any prompt; a larger message is refused before it is read."""
LAST_STATUSES_S = 1.0
"""Time for the last statuses to leave at a stop; calls that watch the health end only by force."""

_OPTIONS = (
    # A second server on the port fails instead of taking half of its connections.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A client whose machine is gone closes no connection: it is asked, and its calls cancelled.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may ask too, also between calls, and however often: who receives much, such as pages,
    # sends pings that measure the way, for which gRPC would hang up on it ("too_many_pings").
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Service(NamedTuple):
    """One of `proto/weft/v1`."""

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: Any
    calls: Calls | None = None
    """Those that a drain waits for."""


class GrpcServer:
    """Serves a front on `address`, HOST:PORT; for port 0 the system chooses one."""

    def __init__(self, front: Front, address: str, more: Sequence[Service] = ()):
        """`more` services than those that every endpoint has."""
        self.port = 0
        """The port, once started."""
        self._front = front
        self._address = _checked(address)
        self._inference = InferenceService(front)
        names = ["Inference", "Control", *(service.name for service in more)]
        self._names = [pb.DESCRIPTOR.services_by_name[name].full_name for name in names]
        self._health = HealthService(front, self._names)
        control = ControlService(front, self._health.refresh)
        self._services = [
            Service(
                "Inference",
                pb_grpc.add_InferenceServicer_to_server,
                self._inference,
                self._inference.calls,
            ),
            Service("Control", pb_grpc.add_ControlServicer_to_server, control),
            *more,
        ]
        self._following: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises OSError when the address cannot be listened on."""
        server = grpc.aio.server(options=_OPTIONS)
        for service in self._services:
            service.add(service.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
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
        for service in self._services:
            if service.calls is not None:
                await service.calls.idle.wait()

    async def stop(self) -> None:
        """Ends every call and frees the port; what still runs is cancelled."""
        if self._server is None or self._following is None:
            return
        for request_id in list(self._inference.running):
            self._front.engine.abort(request_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._inference.calls.idle.wait(), LAST_STATUSES_S)
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
