"""The standard health service: whether the endpoint takes requests."""

import asyncio
from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2

from serve.api.statuses import Context
from serve.front import Front

HEALTH_INTERVAL_S = 0.5
"""How soon those who watch the health hear that the engine failed."""


class HealthService(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue]
    """NOT_SERVING, for every service, while the engine drains or when it has failed."""

    def __init__(self, front: Front, services: Sequence[str]):
        super().__init__()
        self._front = front
        self._services = services

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
        for service in ("", *self._services):
            await self.set(service, status)

    async def follow(self) -> None:
        """Tells those who watch."""
        while True:
            await self.refresh()
            await asyncio.sleep(HEALTH_INTERVAL_S)
