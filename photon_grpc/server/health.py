"""grpc.health.v1: a table of statuses that the server sets and probes read. Event loop only.

No probe creates engine work. Watch is our own because an open Watch of the stock servicer holds a
graceful stop for the whole of its grace; ours ends when the server leaves.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

READY_SERVICES = ("", "photon.v1.InferenceService", "photon.v1.ModelService")
LIVE_SERVICES = ("photon.liveness", "photon.v1.ControlService")

_Status = health_pb2.HealthCheckResponse.ServingStatus


class HealthServicer:
    """The methods of grpc.health.v1.Health, shared by all listeners.

    Two states are kept: *ready* (loaded, warmed up, alive, not draining) answers for the services
    that generate, *live* (the loop runs and the engine is not known dead) for the rest. Both begin
    as NOT_SERVING.
    """

    def __init__(self) -> None:
        self._status = dict.fromkeys((*READY_SERVICES, *LIVE_SERVICES), _Status.NOT_SERVING)
        self._changed = asyncio.Event()
        self._left = False

    def set_ready(self, ready: bool) -> None:
        """Tell every watcher of the generating services."""
        self._set(READY_SERVICES, ready)

    def set_live(self, live: bool) -> None:
        """Tell every watcher of liveness."""
        self._set(LIVE_SERVICES, live)

    def leave(self) -> None:
        """NOT_SERVING everywhere; every Watch sends that and ends, new ones end at once."""
        self._left = True
        self._set((*READY_SERVICES, *LIVE_SERVICES), False)

    def _set(self, services: tuple[str, ...], serving: bool) -> None:
        status = _Status.SERVING if serving else _Status.NOT_SERVING
        self._status.update(dict.fromkeys(services, status))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(
        self, message: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        status = self._status.get(message.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, message: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Write the status at once and on every change; unknown services are SERVICE_UNKNOWN."""
        sent = None
        while True:
            changed = self._changed
            status = self._status.get(message.service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if self._left:
                return
            await changed.wait()
