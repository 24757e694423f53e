"""ControlService: what operators and routers may do; on the admin listener only. Event loop only."""

from __future__ import annotations

from typing import Any

import structlog

from photon_grpc.errors import InvalidRequestError, UnsupportedFeatureError
from photon_grpc.frontend.base import FrontDoor
from photon_grpc.server import convert
from photon_grpc.v1 import control_pb2

_MAX_LOGGED_REASON_CHARS = 256
_log = structlog.get_logger(__name__)


class ControlServicer:
    """The methods of photon.v1.ControlService."""

    def __init__(self, front_door: FrontDoor) -> None:
        self._front_door = front_door

    async def Abort(self, message: control_pb2.AbortRequest, context: Any) -> control_pb2.AbortResponse:
        """End one live request, or all. A request that ends by itself meanwhile is ALREADY_FINISHED."""
        if message.tenant:
            raise UnsupportedFeatureError("tenant", "tenants are not supported")
        target = message.WhichOneof("target")
        if target == "request_id":
            if not message.request_id:
                raise InvalidRequestError.of("request_id", "must not be empty")
            aborted = self._front_door.abort(message.request_id)
        elif target == "all":
            aborted = self._front_door.abort_all()
        else:
            raise InvalidRequestError.of("target", "one of request_id and all is required")
        _log.info("abort", target=target, aborted=aborted, reason=message.reason[:_MAX_LOGGED_REASON_CHARS])
        outcome = (
            control_pb2.AbortResponse.OUTCOME_ABORTED
            if aborted or target == "all"
            else control_pb2.AbortResponse.OUTCOME_ALREADY_FINISHED
        )
        return control_pb2.AbortResponse(outcome=outcome, aborted=aborted)

    async def GetLoad(self, message: control_pb2.GetLoadRequest, context: Any) -> control_pb2.GetLoadResponse:
        return convert.encode_load(self._front_door.stats())
