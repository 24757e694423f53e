"""One structured log line per finished call; health probes leave none.

Holds method, status, request id and duration: never a request or a response. Event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from photon_grpc.server.deserialize import Behavior
from photon_grpc.server.interceptors.errors import request_id_of

_QUIET_PREFIX = "/grpc."
_log = structlog.get_logger(__name__)


def _logged(behavior: Behavior, method: str) -> Behavior:
    async def call_and_log(request: Any, context: Any) -> Any:
        start = time.monotonic()
        code = "CANCELLED"
        try:
            response = await behavior(request, context)
            code = "OK"
            return response
        except grpc.aio.AbortError:
            code = _name_of(context.code())
            raise
        finally:
            _log.info(
                "call finished",
                method=method,
                code=code,
                request_id=request_id_of(context),
                seconds=round(time.monotonic() - start, 6),
            )

    return call_and_log


def _name_of(code: int | grpc.StatusCode) -> str:
    for status in grpc.StatusCode:
        if code in (status, status.value[0]):
            return str(status.name)
    return str(code)


class CallLogInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Outermost but for nothing: sees the status that the error interceptor chose."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming or method.startswith(_QUIET_PREFIX):
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=_logged(handler.unary_stream, method))
        return handler._replace(unary_unary=_logged(handler.unary_unary, method))
