"""Calls that acceptors hand on, run as grpc.aio runs those of its own: interceptors, handler, status.

Takes what `grpc.aio.Server` takes, so that services are added the same way whoever accepts their calls.
Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc
import structlog

from photon_grpc.server.acceptors.messages import End, Headers, Metadata, Method, Next, Opened
from photon_grpc.server.status import RpcStatus

_log = structlog.get_logger(__name__)

# Responses of a call that an acceptor may have before the next one waits. One that does not wait saves the
# event loop a turn of the call's task; a client that does not read is noticed all the same.
_MOST_ON_THE_WAY = 2

Post = Callable[[Any], None]
"""Sends a message to the acceptor of a call; harmless when it has gone."""


class CallContext:
    """What servicers and interceptors use of `grpc.aio.ServicerContext`, of a call that an acceptor has."""

    __slots__ = (
        "_code",
        "_details",
        "_num_unwritten",
        "_on_room",
        "_opened",
        "_post",
        "_request",
        "_serialize",
        "_trailing_metadata",
        "_written",
    )

    def __init__(self, opened: Opened, post: Post, serialize: Callable[[Any], bytes]) -> None:
        self._opened = opened
        self._post = post
        self._serialize = serialize
        self._trailing_metadata: Metadata = ()
        self._code: grpc.StatusCode | int = 0
        self._details = ""
        self._request: asyncio.Future[bytes | None] | None = None
        self._num_unwritten = 0
        # Of whoever waits for the transport.
        self._written: asyncio.Future[None] | None = None
        self._on_room: Callable[[], None] | None = None

    def invocation_metadata(self) -> Metadata:
        return self._opened.metadata

    def peer(self) -> str:
        return self._opened.peer

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return self._opened.auth_context

    def time_remaining(self) -> float | None:
        deadline = self._opened.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing_metadata = tuple(metadata)

    def trailing_metadata(self) -> Metadata:
        return self._trailing_metadata

    def code(self) -> grpc.StatusCode | int:
        """The status that the call was ended with; 0 before that."""
        return self._code

    def details(self) -> str:
        return self._details

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._post(Headers(self._opened.call, tuple(metadata)))

    async def write(self, response: Any) -> None:
        """Send a response; waits while too many of the call are on their way."""
        self.write_now(response)
        if self._num_unwritten > _MOST_ON_THE_WAY:
            await self._until_at_most(_MOST_ON_THE_WAY)

    def has_room(self, on_room: Callable[[], None]) -> bool:
        """Whether `write_now` can be called; where not, `on_room` is called once it can."""
        if self._num_unwritten <= _MOST_ON_THE_WAY:
            return True
        self._on_room = on_room
        return False

    def write_now(self, response: Any) -> None:
        """As `write`, while there is room and nobody waits in one."""
        self._num_unwritten += 1
        self._post((self._opened.call, self._serialize(response)))

    async def flush(self) -> None:
        """Wait until the transport has taken every response."""
        await self._until_at_most(0)

    async def _until_at_most(self, num_unwritten: int) -> None:
        # Whoever writes so takes the room himself.
        self._on_room = None
        while self._num_unwritten > num_unwritten:
            self._written = asyncio.get_running_loop().create_future()
            try:
                await self._written
            finally:
                self._written = None

    def written(self) -> None:
        """The transport has taken a response."""
        self._num_unwritten -= 1
        if self._written is not None and not self._written.done():
            self._written.set_result(None)
        elif self._on_room is not None and self._num_unwritten <= _MOST_ON_THE_WAY:
            on_room, self._on_room = self._on_room, None
            on_room()

    async def requests(self) -> AsyncIterator[bytes]:
        """Those of a call that streams them, read as they are asked for."""
        while True:
            self._request = asyncio.get_running_loop().create_future()
            self._post(Next(self._opened.call))
            request = await self._request
            if request is None:
                return
            yield request

    def took(self, request: bytes | None) -> None:
        """The next request has come, or the client has none left."""
        if self._request is not None and not self._request.done():
            self._request.set_result(request)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """End the call. Raises AbortError."""
        if trailing_metadata:
            self._trailing_metadata = tuple(trailing_metadata)
        self.end(code, details)
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: RpcStatus) -> NoReturn:
        """End the call. Raises AbortError."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def end(self, code: grpc.StatusCode, details: str = "", response: bytes | None = None) -> None:
        """Send the call's status, with the trailing metadata that was set."""
        self._code, self._details = code, details
        # It leads back here: the whole call would wait for the garbage collector.
        self._on_room = None
        self._post(End(self._opened.call, code.value[0], details, self._trailing_metadata, response))


@dataclass(frozen=True, slots=True)
class _Details:
    """Of grpc.HandlerCallDetails: which method is asked for, by nobody in particular."""

    method: str
    invocation_metadata: Metadata = ()


class Dispatcher:
    """The services of one listener, and the live calls of them that acceptors have.

    `interceptors`, the outermost first, are asked once for each method: they may look at what a call brings
    inside of the handlers that they return.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        self._interceptors = tuple(interceptors)
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        self._intercepted: list[grpc.RpcMethodHandler] = []

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        """As `grpc.aio.Server.add_registered_method_handlers`. A method that streams requests streams its
        responses too, by an async generator."""
        for method, handler in handlers.items():
            assert handler.response_streaming or not handler.request_streaming
            self._handlers[f"/{service}/{method}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As `grpc.aio.Server.add_generic_rpc_handlers`; the registered ones are all that is looked at."""

    def methods(self) -> tuple[Method, ...]:
        """What acceptors have to know of the methods, in the order of their numbers."""
        return tuple(
            Method(name, handler.request_streaming, handler.response_streaming)
            for name, handler in self._handlers.items()
        )

    async def start(self) -> None:
        """Have the interceptors intercept what has been added."""
        self._intercepted = [await self._intercept(name) for name in self._handlers]

    async def _intercept(self, name: str) -> grpc.RpcMethodHandler:
        async def find(details: _Details) -> grpc.RpcMethodHandler:
            return self._handlers[details.method]

        for interceptor in reversed(self._interceptors):
            find = partial(interceptor.intercept_service, find)
        return await find(_Details(name))

    def open(self, opened: Opened, post: Post) -> DispatchedCall:
        """Begin to handle a call, whose acceptor is reached by `post`."""
        return DispatchedCall(self._intercepted[opened.method], opened, post)


class DispatchedCall:
    """A live call: its handler's task and its context."""

    def __init__(self, handler: grpc.RpcMethodHandler, opened: Opened, post: Post) -> None:
        self._handler = handler
        self._request = opened.request
        self.context = CallContext(opened, post, handler.response_serializer)
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        handler, context, request = self._handler, self.context, self._request
        self._request = b""
        try:
            if handler.request_streaming:
                async for response in handler.stream_stream(context.requests(), context):
                    await context.write(response)
                context.end(grpc.StatusCode.OK)
            elif handler.response_streaming:
                await handler.unary_stream(request, context)
                context.end(grpc.StatusCode.OK)
            else:
                response = await handler.unary_unary(request, context)
                context.end(grpc.StatusCode.OK, response=handler.response_serializer(response))
        except grpc.aio.AbortError:
            pass  # its status is on its way
        except asyncio.CancelledError:
            # The client has left, and this finds nobody; or the call is over without a status of its own.
            context.end(grpc.StatusCode.CANCELLED)
        except Exception:  # noqa: BLE001  # the error interceptor lets none through; a call needs a status
            _log.exception("call_handler_failed")
            context.end(grpc.StatusCode.INTERNAL, "internal error")
