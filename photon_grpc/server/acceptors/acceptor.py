"""An acceptor from inside: the process that speaks gRPC with the clients, and hands everything on.

It knows methods by name and messages as bytes, and decides nothing: authentication, limits, parsing and
every status are the event loop's, one process away. What it takes off that loop is what a call and a
message cost inside grpc, which is several times what they cost outside of it. All acceptors of a server
listen on one port (SO_REUSEPORT), among which the kernel spreads connections.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import grpc
import structlog
import uvloop

from photon_grpc.errors import ConfigError
from photon_grpc.processes.channel import Channel
from photon_grpc.processes.child import begin, leave
from photon_grpc.processes.collector import quiet_collector
from photon_grpc.processes.heap import share_one_heap
from photon_grpc.processes.loop_channel import LoopChannel
from photon_grpc.server.acceptors.messages import (
    BindFailed,
    Bound,
    CertificateAccepted,
    CertificateRefused,
    End,
    Headers,
    Left,
    Metadata,
    Next,
    Opened,
    Ping,
    Pong,
    Request,
    Setup,
    Stop,
    Write,
    Written,
)
from photon_grpc.server.sends import read_request, send
from photon_grpc.server.tls import CertificateFiles
from photon_grpc.telemetry.logging import configure_logging
from photon_grpc.turns import Waker

# How long a handler waits for its client to take a status.
_STATUS_S = 2.0
# How long a call that is ended by an error goes on with what was written before.
_LAST_WORDS_S = 0.1
# How much later than a write that the transport gave back grpc may cancel a call.
_CLOSE_S = 2.0
# How long what was written may wait for what is being written, to be told of together.
_TOLD_AFTER_S = 0.001
_OK = grpc.StatusCode.OK.value[0]
_CODES = {code.value[0]: code for code in grpc.StatusCode}

_log = structlog.get_logger(__name__)

_Result = TypeVar("_Result")
_Item = Headers | Write | Next | End


def main(fd: int, parent: int) -> None:
    """Accept calls as the first message on the socket `fd` says, for the process `parent`."""
    # Before grpc has threads. They and the event loop hand their blocks to one another.
    share_one_heap()
    channel = begin(fd, parent)
    messages: list[Any] = []
    while not messages:
        channel.wait()
        messages = channel.receive()
    setup, *early = messages
    uvloop.run(_accept(channel, setup, early))


async def _accept(channel: Channel, setup: Setup, early: list[Any]) -> None:
    configure_logging(setup.telemetry)
    acceptor = Acceptor(channel, setup)
    acceptor.receive(early)
    if await acceptor.start():
        quiet_collector()
        await acceptor.run()


class _Status(NamedTuple):
    """What `ServicerContext.abort_with_status` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata


class _Call:
    """What the event loop has said of one call and its handler has not done yet."""

    __slots__ = ("_is_busy", "_items", "_task", "_waiter", "_was_interrupted", "number")

    # Of a `turns.Sleeper`: whether it goes before others.
    is_urgent = False

    def __init__(self, number: int) -> None:
        self.number = number
        self._items: deque[_Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._is_busy = self._was_interrupted = False

    @property
    def waits(self) -> bool:
        """Whether the handler has nothing to do."""
        return self._waiter is not None

    def put(self, item: _Item) -> None:
        """Add something to do; `wake` has it done."""
        self._items.append(item)
        if isinstance(item, End) and item.code != _OK:
            # What was written before is sent to a client that reads; nobody waits for one that does not.
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._interrupt)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> _Item:
        """The next thing to do, once there is one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()

    async def write(self, context: Any, response: bytes) -> None:
        """Send a response; returns early where the call is ended meanwhile, with the response on its way."""
        if not self._was_interrupted:
            await self._until_interrupted(send(context.write(response)))

    async def send_headers(self, context: Any, metadata: Metadata) -> None:
        """Send the initial metadata. Not to be interrupted: grpc would count it as unsent."""
        try:
            await send(context.send_initial_metadata(metadata))
        except grpc.aio.InternalError:
            await self._until_cancelled()
            raise

    async def read(self, context: Any) -> bytes | None:
        """The next request; None where none is left, or the call is ended meanwhile."""
        request = await self._until_interrupted(send(context.read()))
        return None if request is grpc.aio.EOF else request

    async def _until_interrupted(self, work: Awaitable[_Result]) -> _Result | None:
        try:
            self._is_busy = True
            return await work
        except asyncio.CancelledError:
            if not self._was_interrupted or self._task.uncancel():
                raise
            return None
        except grpc.aio.InternalError:
            await self._until_cancelled()
            raise
        finally:
            self._is_busy = False

    async def _until_cancelled(self) -> None:
        """The client has left meanwhile; grpc cancels the call's task in a moment."""
        await asyncio.sleep(_CLOSE_S)

    def _interrupt(self) -> None:
        """The client does not do its part: the status goes behind what the transport has already."""
        self._was_interrupted = True
        if self._is_busy:
            self._task.cancel()


class Acceptor:
    """One gRPC server whose every handler is somewhere else."""

    def __init__(self, channel: Channel, setup: Setup) -> None:
        self._setup = setup
        self._loop = asyncio.get_running_loop()
        self._channel = LoopChannel(channel, self.receive, self._on_end)
        self._calls: dict[int, _Call] = {}
        self._last_call = 0
        # Responses that the transport has not taken yet, and the calls of those that it has and nobody was
        # told of.
        self._num_writing = 0
        self._written: list[int] = []
        self._tell_timer: asyncio.TimerHandle | None = None
        # Whoever has something to write waits for a turn, so that calls are accepted meanwhile.
        self._waker: Waker[_Call] = Waker()
        self._server: grpc.aio.Server = grpc.aio.server(options=setup.channel_options)
        self._grace_s: asyncio.Future[float] = self._loop.create_future()

    async def start(self) -> bool:
        """Listen; False where that fails, which has been told."""
        self._server.add_generic_rpc_handlers((_Handlers(self._handlers()),))
        try:
            port = self._bind()
        except (RuntimeError, ConfigError) as error:
            # The address, or certificate files that have become bad since the server looked at them.
            _log.error("acceptor_cannot_listen", reason=str(error))
            self._channel.post(BindFailed())
            self._channel.close()
            await self._server.stop(0)
            return False
        await self._server.start()
        self._channel.post(Bound(port))
        return True

    async def run(self) -> None:
        """Hand calls on until it is told to stop, and leave."""
        grace_s = await self._grace_s
        await self._server.stop(grace_s)
        _log.info("acceptor_stopped", calls=self._last_call)
        self._channel.close()

    def _bind(self) -> int:
        """Raises RuntimeError for the address, ConfigError for certificate files that cannot be served."""
        tls = self._setup.tls
        if not tls.cert_file:
            return int(self._server.add_insecure_port(self._setup.address))
        credentials = CertificateFiles(tls, self).credentials(require_client_cert=tls.require_client_cert)
        return int(self._server.add_secure_port(self._setup.address, credentials))

    # --- a certificate's observer, on any thread ------------------------------------------------

    def observe_certificate(self, expires_at: float) -> None:
        self._post_from_any_thread(CertificateAccepted(expires_at))

    def observe_certificate_refused(self) -> None:
        self._post_from_any_thread(CertificateRefused())

    def _post_from_any_thread(self, message: Any) -> None:
        self._loop.call_soon_threadsafe(self._channel.post, message)

    # --- calls ----------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        handlers = {}
        for index, method in enumerate(self._setup.methods):
            # All as if they had many requests, for `sends.read_request`. On the wire that is the same.
            if method.response_streaming:
                handler = self._streaming(index, method.request_streaming)
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(handler)
            else:
                handlers[method.name] = grpc.stream_unary_rpc_method_handler(self._single(index))
        return handlers

    def _streaming(self, method: int, has_many_requests: bool) -> Callable[[Any, Any], Awaitable[None]]:
        async def stream(_: Any, context: Any) -> None:
            await self._relay(method, b"" if has_many_requests else await read_request(context), context)

        return stream

    def _single(self, method: int) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        async def single(_: Any, context: Any) -> bytes | None:
            return await self._relay(method, await read_request(context), context)

        return single

    async def _relay(self, method: int, request: bytes, context: Any) -> bytes | None:
        """Hand a call on and do what is said of it until it is ended; the response that it ends with."""
        self._last_call += 1
        number = self._last_call
        call = self._calls[number] = _Call(number)
        is_over = False
        try:
            self._channel.post(_opened(number, method, request, context))
            while True:
                match await call.take():
                    case (_, bytes(response)):
                        self._num_writing += 1
                        try:
                            await call.write(context, response)
                        finally:
                            self._num_writing -= 1
                        self._count_written(number)
                    case Headers(_, metadata):
                        await call.send_headers(context, metadata)
                    case Next():
                        self._channel.post(Request(number, await call.read(context)))
                    case End() as end:
                        is_over = True
                        await _end(context, end)
                        return end.response
        finally:
            del self._calls[number]
            self._waker.forget(number)
            if not is_over:
                self._channel.post(Left(number))

    def _count_written(self, number: int) -> None:
        self._written.append(number)
        if not self._num_writing:
            self._tell_written()
        elif self._tell_timer is None:
            self._tell_timer = self._loop.call_later(_TOLD_AFTER_S, self._tell_written)

    def _tell_written(self) -> None:
        if self._tell_timer is not None:
            self._tell_timer.cancel()
            self._tell_timer = None
        if self._written:
            written, self._written = self._written, []
            self._channel.post(Written(written))

    # --- the channel ----------------------------------------------------------------------------

    def receive(self, messages: list[_Item | Ping | Stop]) -> None:
        """Do, or give on to their calls, what the event loop has sent."""
        for message in messages:
            if isinstance(message, Ping):
                self._channel.post(Pong())
                continue
            if isinstance(message, Stop):
                if not self._grace_s.done():
                    self._grace_s.set_result(message.grace_s)
                continue
            # The number of the call comes first in all others.
            call = self._calls.get(message[0])
            if call is None:
                continue  # its client left while this was on its way
            call.put(message)
            if call.waits:
                self._waker.add(call.number, call)
        self._waker.start()

    def _on_end(self, error: Exception | None) -> None:
        """Without the event loop there is nobody to serve a call."""
        if error is not None:
            _log.error("acceptor_channel_not_understood", exc_info=error)
        leave()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handlers by the whole names of their methods."""

    def __init__(self, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(handler_call_details.method)


def _opened(number: int, method: int, request: bytes, context: Any) -> Opened:
    remaining = context.time_remaining()
    return Opened(
        number,
        method,
        tuple((key, value) for key, value in context.invocation_metadata() or ()),
        context.peer(),
        {key: tuple(values) for key, values in context.auth_context().items()},
        None if remaining is None else time.monotonic() + remaining,
        request,
    )


async def _end(context: Any, end: End) -> None:
    """Set, or send, the status of a call. Raises AbortError or, where the client does not take it,
    CancelledError: grpc goes on holding the status until the client reads or leaves."""
    if end.code == _OK:
        context.set_trailing_metadata(end.trailing_metadata)
        return
    status = _Status(_CODES[end.code], end.details, end.trailing_metadata)
    try:
        async with asyncio.timeout(_STATUS_S):
            await send(context.abort_with_status(status))
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
