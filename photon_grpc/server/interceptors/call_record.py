"""Keeps a record of every call and hands it, once the call has ended, to who writes or counts it.

Health probes and reflection leave no record. The outermost interceptor, so that the record holds the
status that was sent. Event loop only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from photon_grpc.server.deserialize import Behavior
from photon_grpc.server.interceptors.errors import request_id_of
from photon_grpc.telemetry.call_record import CallRecord, current_call

_UNRECORDED_PREFIX = "/grpc."
_TRACE_HEADERS = ("traceparent", "tracestate")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

CallObserver = Callable[[CallRecord], None]


class CallRecordInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """`observers` hear of each call in turn; they must not block."""

    def __init__(self, observers: Sequence[CallObserver]) -> None:
        self._observers = tuple(observers)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming or method.startswith(_UNRECORDED_PREFIX):
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=self._recorded(handler.unary_stream, method))
        return handler._replace(unary_unary=self._recorded(handler.unary_unary, method))

    def _recorded(self, behavior: Behavior, method: str) -> Behavior:
        async def recorded(request: Any, context: Any) -> Any:
            record = CallRecord(method.lstrip("/"), time.monotonic(), trace_headers=_trace_headers(context))
            trace = _TRACE_PARENT.fullmatch(record.trace_headers.get("traceparent", ""))
            if trace is not None:
                record.log_context["trace_id"] = trace[1]
            token = current_call.set(record)
            try:
                response = await behavior(request, context)
                record.code = "OK"
                return response
            except grpc.aio.AbortError:
                record.code = _name_of(context.code())
                raise
            finally:
                current_call.reset(token)
                record.seconds = time.monotonic() - record.started
                record.request_id = request_id_of(context)
                for observe in self._observers:
                    observe(record)

        return recorded


def _trace_headers(context: Any) -> dict[str, str]:
    return {
        key: value
        for key, value in context.invocation_metadata() or ()
        if key in _TRACE_HEADERS and isinstance(value, str)
    }


def _name_of(code: int | grpc.StatusCode) -> str:
    for status in grpc.StatusCode:
        if code in (status, status.value[0]):
            return str(status.name)
    return str(code)
