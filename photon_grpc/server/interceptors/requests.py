"""Has the only request of a call read in its handler's task, by `sends`.

grpc.aio reads it before the handler runs, and keeps 96 bytes of each call whose client leaves meanwhile. So
such methods are registered as if they took many requests, which on the wire is the same. Outside of all other
interceptors, and for listeners of grpc.aio's alone: acceptors do it themselves. Event loop only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from photon_grpc.server.deserialize import Behavior
from photon_grpc.server.sends import read_request


class RequestInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """For handlers that are coroutines and parse their requests themselves."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            reading = _reading(handler.unary_stream)
            return handler._replace(request_streaming=True, unary_stream=None, stream_stream=reading)
        reading = _reading(handler.unary_unary)
        return handler._replace(request_streaming=True, unary_unary=None, stream_unary=reading)


def _reading(behavior: Behavior) -> Behavior:
    async def read(_: Any, context: Any) -> Any:
        return await behavior(await read_request(context), context)

    return read
