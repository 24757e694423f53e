"""ControlService: what operators and routers may do; on the admin listener only. Event loop only."""

from __future__ import annotations

from typing import Any

import structlog

from photon_grpc.errors import InvalidRequestError, OperatorAbortError
from photon_grpc.frontend.base import FrontDoor
from photon_grpc.options import LimitOptions
from photon_grpc.server import convert
from photon_grpc.server.calls import Calls
from photon_grpc.server.lifecycle import Lifecycle, State
from photon_grpc.v1 import control_pb2

_MAX_LOGGED_REASON_CHARS = 256
_STATES = {
    State.STARTING: control_pb2.WatchStateResponse.STATE_STARTING,
    State.READY: control_pb2.WatchStateResponse.STATE_READY,
    State.DRAINING: control_pb2.WatchStateResponse.STATE_DRAINING,
    State.FAILED: control_pb2.WatchStateResponse.STATE_FAILED,
}
_log = structlog.get_logger(__name__)


class ControlServicer:
    """The methods of photon.v1.ControlService."""

    def __init__(
        self, front_door: FrontDoor, lifecycle: Lifecycle, calls: Calls, limits: LimitOptions
    ) -> None:
        self._front_door = front_door
        self._lifecycle = lifecycle
        self._calls = calls
        self._limits = limits

    async def Abort(self, message: control_pb2.AbortRequest, context: Any) -> control_pb2.AbortResponse:
        """End one live request or all, of every tenant or of the one that is named.

        A request that ends by itself meanwhile is ALREADY_FINISHED.
        """
        target = message.WhichOneof("target")
        if target == "request_id":
            if not message.request_id:
                raise InvalidRequestError.of("request_id", "must not be empty")
            aborted = self._abort_one(message.request_id, message.tenant)
        elif target == "all":
            # Batches first, or their next items would take the places of those that are ended.
            self._calls.end_batches(OperatorAbortError, message.tenant)
            aborted = self._front_door.abort_all(tenant=message.tenant)
        else:
            raise InvalidRequestError.of("target", "one of request_id and all is required")
        _log.info("abort", target=target, aborted=aborted, reason=message.reason[:_MAX_LOGGED_REASON_CHARS])
        outcome = (
            control_pb2.AbortResponse.OUTCOME_ABORTED
            if aborted or target == "all"
            else control_pb2.AbortResponse.OUTCOME_ALREADY_FINISHED
        )
        return control_pb2.AbortResponse(outcome=outcome, aborted=aborted)

    def _abort_one(self, request_id: str, tenant: str) -> int:
        """The number ended. Raises RequestNotFoundError or InvalidRequestError."""
        calls = self._calls.find_all(request_id, tenant)
        if len(calls) > 1:
            raise InvalidRequestError.ambiguous_id()
        # The engine knows the items of a batch, and not the batch.
        if calls and calls[0].is_batch:
            calls[0].end(OperatorAbortError())
            return 1
        return self._front_door.abort(request_id, tenant=tenant)

    async def Drain(self, message: control_pb2.DrainRequest, context: Any) -> control_pb2.DrainResponse:
        """Begin a drain, or take it back. Answers at once with the calls that are in flight."""
        grace_s, undo = convert.decode_drain(message, self._limits)
        if undo:
            self._lifecycle.undo_drain()
        else:
            self._lifecycle.drain(grace_s)
        return control_pb2.DrainResponse(in_flight=len(self._calls))

    async def GetLoad(self, message: control_pb2.GetLoadRequest, context: Any) -> control_pb2.GetLoadResponse:
        return convert.encode_load(self._front_door.load())

    async def WatchState(self, message: control_pb2.WatchStateRequest, context: Any) -> None:
        """Write the whole state at once, on every change, and every `load_interval`; ends with the server.

        A change that another one overtakes before it is written is not shown: what is written is what is.
        """
        interval_s = convert.decode_watch_state(message, self._limits)
        lifecycle = self._lifecycle
        while True:
            revision, has_left = lifecycle.revision, lifecycle.has_left
            await context.write(
                control_pb2.WatchStateResponse(
                    instance_id=lifecycle.instance_id,
                    revision=revision,
                    state=_STATES[lifecycle.state],
                    detail=lifecycle.detail,
                    load=convert.encode_load(self._front_door.load()),
                )
            )
            if has_left:
                return
            await lifecycle.wait_beyond(revision, interval_s)

    async def FlushCache(
        self, message: control_pb2.FlushCacheRequest, context: Any
    ) -> control_pb2.FlushCacheResponse:
        """Forget every cached prefix, with `wait_idle` once no request lives; the call's deadline bounds
        that wait."""
        blocks_freed = await self._front_door.flush_cache(wait_idle=message.wait_idle)
        _log.info("cache flushed", blocks_freed=blocks_freed)
        return control_pb2.FlushCacheResponse(blocks_freed=blocks_freed)
