"""The acceptors of one listener, as the event loop sees them: started, heard, replaced, stopped.

An acceptor that dies takes its connections with it, and nothing else: its calls end as if their clients had
left, the others go on, and another one takes its place. Event loop only.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from photon_grpc.errors import ListenError
from photon_grpc.options import TelemetryOptions, TlsOptions
from photon_grpc.processes.parent import ChildProcess
from photon_grpc.server.acceptors.dispatcher import DispatchedCall, Dispatcher
from photon_grpc.server.acceptors.messages import (
    BindFailed,
    Bound,
    CertificateAccepted,
    CertificateRefused,
    Left,
    Opened,
    Ping,
    Request,
    Setup,
    Stop,
    Written,
)
from photon_grpc.server.tls import CertificateObserver

_log = structlog.get_logger(__name__)

_CHILD = "photon_grpc.server.acceptors.acceptor"
# Between the end of an acceptor and the beginning of the next in its place; twice as long after each that did
# not come to listen, up to the second.
_RESTART_S = 1.0
_MOST_RESTART_S = 30.0
# One that has not answered so many pings in a row is frozen or hangs. Counted, since time also passes while
# it is this loop that is held up.
_PING_S = 5.0
_MOST_UNANSWERED = 6
# Beyond the grace that calls are given.
_LEAVE_S = 5.0


class AcceptorProcess:
    """One process, and the calls that it has. `ended` hears when it has gone without having been told to."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        certificate_observer: CertificateObserver | None,
        ended: Callable[[AcceptorProcess], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._certificate_observer = certificate_observer
        self._ended = ended
        self._child = ChildProcess("acceptor", _CHILD, self._receive, self._on_end)
        self._calls: dict[int, DispatchedCall] = {}
        loop = asyncio.get_running_loop()
        self._port: asyncio.Future[int] = loop.create_future()
        self._gone = asyncio.Event()
        self._is_leaving = False
        self._num_unanswered = 0

    @property
    def process_id(self) -> int | None:
        """None while there is no process."""
        return self._child.process_id

    async def start(self, setup: Setup) -> int:
        """The port that it listens on. Raises OSError for one that does not come to that."""
        self._child.start((setup,))
        return await self._port

    def ping(self) -> None:
        """Kill the process if it has said nothing for too long."""
        if self._num_unanswered >= _MOST_UNANSWERED:
            _log.error("acceptor_process_silent", pid=self.process_id)
            self._child.kill()
            return
        self._num_unanswered += 1
        self._child.post(Ping())

    async def stop(self, grace_s: float) -> None:
        """Close the listener, give calls `grace_s` to end, and wait for the process to leave."""
        self._is_leaving = True
        if self._child.process_id is None:
            return
        self._child.post(Stop(grace_s))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), grace_s + _LEAVE_S)
        # One that has not even closed its channel has had its time, and is killed.
        rest_s = _LEAVE_S if self._gone.is_set() else 0.0
        await asyncio.get_running_loop().run_in_executor(None, self._child.join, rest_s)

    def _receive(self, messages: list[Any]) -> None:
        self._num_unanswered = 0
        for message in messages:
            match message:
                case Written(numbers):
                    for number in numbers:
                        call = self._calls.get(number)
                        if call is not None:
                            call.context.written()
                case Opened():
                    self._open(message)
                case Request(number, request):
                    call = self._calls.get(number)
                    if call is not None:
                        call.context.took(request)
                case Left(number):
                    call = self._calls.get(number)
                    if call is not None:
                        call.task.cancel()
                case Bound(port):
                    if not self._port.done():  # or whoever waited for it has been cancelled
                        self._port.set_result(port)
                case BindFailed():
                    if not self._port.done():
                        self._port.set_exception(OSError("the acceptor cannot listen"))
                case CertificateAccepted(expires_at):
                    if self._certificate_observer is not None:
                        self._certificate_observer.observe_certificate(expires_at)
                case CertificateRefused():
                    if self._certificate_observer is not None:
                        self._certificate_observer.observe_certificate_refused()

    def _open(self, opened: Opened) -> None:
        call = self._calls[opened.call] = self._dispatcher.open(opened, self._child.post)
        call.task.add_done_callback(partial(self._forget, opened.call))

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        # One whose client left before it began is kept by the error that its task ended by, which keeps the
        # call in turn. Thousands of them would wait for the garbage collector.
        del self._calls.pop(number).task

    def _on_end(self, error: Exception | None) -> None:
        if error is not None:
            _log.error("acceptor_process_not_understood", exc_info=error)
            self._child.kill()
        for call in self._calls.values():
            call.task.cancel()
        self._gone.set()
        if not self._port.done():
            self._port.set_exception(OSError("the acceptor died before it listened"))
        elif not self._is_leaving and not self._port.cancelled() and self._port.exception() is None:
            _log.error("acceptor_process_died", pid=self.process_id)
            self._ended(self)


class AcceptorPool:
    """`size` acceptors that listen on one port. Stands in for a `grpc.aio.Server` that has been started."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        size: int,
        *,
        tls: TlsOptions,
        telemetry: TelemetryOptions,
        channel_options: Sequence[tuple[str, int]],
        certificate_observer: CertificateObserver | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        """`on_death` hears of each acceptor that has died."""
        self._on_death = on_death
        self._dispatcher = dispatcher
        self._size = size
        self._tls = tls
        self._telemetry = telemetry
        self._channel_options = tuple(channel_options)
        self._certificate_observer = certificate_observer
        self._host = ""
        self._port = 0
        self._acceptors: list[AcceptorProcess] = []
        self._restarts: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()

    @property
    def process_ids(self) -> list[int]:
        """Of the acceptors that there are at the moment. May be read on any thread."""
        return [number for acceptor in tuple(self._acceptors) if (number := acceptor.process_id) is not None]

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which is a free one for 0. Raises ListenError, with nothing left listening."""
        self._host, self._port = host, port
        self._watch = asyncio.get_running_loop().create_task(self._ping_all())
        try:
            if port:
                # Among those who share a port the kernel would take another server for one of ours.
                await _require_free(host, port)
            await self._dispatcher.start()
            self._port = await self._start_one()
            await asyncio.gather(*(self._start_one() for _ in range(self._size - 1)))
        except OSError as error:
            await self.stop(0)
            raise ListenError(f"the public listener cannot bind {address_of(host, port)}") from error
        return self._port

    async def stop(self, grace_s: float) -> None:
        """Close the listener, give calls `grace_s` to end, and wait for every process to leave."""
        self._leaving.set()
        if self._watch is not None:
            self._watch.cancel()
        acceptors, self._acceptors = self._acceptors, []
        await asyncio.gather(*(acceptor.stop(grace_s) for acceptor in acceptors), *self._restarts)

    async def _ping_all(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            for acceptor in tuple(self._acceptors):
                acceptor.ping()

    async def _start_one(self) -> int:
        """Raises OSError for one that does not come to listen."""
        acceptor = AcceptorProcess(self._dispatcher, self._certificate_observer, self._replace)
        self._acceptors.append(acceptor)
        setup = Setup(
            address_of(self._host, self._port),
            self._channel_options,
            self._dispatcher.methods(),
            self._tls,
            self._telemetry,
        )
        try:
            return await acceptor.start(setup)
        except OSError:
            if acceptor in self._acceptors:
                self._acceptors.remove(acceptor)
            await acceptor.stop(0)
            raise

    def _replace(self, acceptor: AcceptorProcess) -> None:
        if self._leaving.is_set():
            return
        self._acceptors.remove(acceptor)
        if self._on_death is not None:
            self._on_death()
        restart = asyncio.get_running_loop().create_task(self._restart(acceptor))
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _restart(self, dead: AcceptorProcess) -> None:
        await dead.stop(0)
        delay_s = _RESTART_S
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), delay_s)
            if self._leaving.is_set():
                return
            try:
                await self._start_one()
            except OSError:
                delay_s = min(2 * delay_s, _MOST_RESTART_S)
                _log.error("acceptor_not_replaced", next_try_s=delay_s)
            else:
                _log.info("acceptor_replaced")
                return


def address_of(host: str, port: int) -> str:
    """As grpc takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _require_free(host: str, port: int) -> None:
    """Raises OSError where anybody listens on the port, willing to share it or not.

    What else speaks against an address is for grpc to find.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
