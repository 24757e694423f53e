"""The live calls of InferenceService: their clocks, and the ways the server ends one.

grpc offers no way to end a call from outside its handler, so each call is a task that is cancelled
with a reason; leaving `Call` turns that cancellation into the reason's error, while a cancellation by
grpc itself (the client left) passes through as it is. Knows no message. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from photon_grpc.errors import DuplicateRequestError, MaxDurationError, PhotonError, SlowConsumerError
from photon_grpc.options import LimitOptions
from photon_grpc.server.sends import send_by

# How much later than the call behind it a cancellation may reach us.
_CANCELLATION_S = 0.1
# How much later than a write that the transport gave back.
_CLOSE_S = 2.0
# A stall is noticed at most this share of the timeout late; one sweep looks at every live call.
_SWEEPS_PER_TIMEOUT = 4


class Call:
    """One live call; a context manager around its whole handling.

    `deadline` is the moment of `time.monotonic()` at which the server ends the call.
    """

    __slots__ = (
        "_calls",
        "_deadline_timer",
        "_error",
        "_has_sent_headers",
        "_left",
        "_sends_headers",
        "_task",
        "_write_started",
        "deadline",
        "is_batch",
        "name",
    )

    def __init__(self, calls: Calls, deadline: float, task: asyncio.Task[Any]) -> None:
        self.deadline = deadline
        # The tenant and the id that it chose; ids of two tenants have nothing to do with each other.
        self.name: tuple[str, str] | None = None
        # Its requests are the engine's under ids of their own.
        self.is_batch = False
        self._calls = calls
        self._task = task
        self._error: PhotonError | None = None
        self._has_sent_headers = False
        self._sends_headers = False
        self._write_started: float | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        # Made by whoever waits for the call's end.
        self._left: asyncio.Event | None = None

    async def take_id(self, tenant: str, request_id: str) -> None:
        """Make `request_id` the call's, once an earlier attempt of the tenant that is ending has ended.

        A client that repeats a call need not know how far the server is with the end of the first one, nor in
        which order grpc hands on a cancellation and the call sent behind it. A call of that id that goes on
        is a duplicate: raises DuplicateRequestError.
        """
        name = (tenant, request_id)
        earlier = self._calls.find(name)
        if earlier is not None and not earlier.is_ending:
            with suppress(TimeoutError):
                await asyncio.wait_for(earlier.wait_left(), _CANCELLATION_S)
        while (earlier := self._calls.find(name)) is not None and earlier.is_ending:
            await earlier.wait_left()
        if earlier is not None:
            raise DuplicateRequestError(request_id)
        self.name = name
        self._calls.add_name(self, name)

    @property
    def is_ending(self) -> bool:
        """Whether the client has left, or the server ends the call, and its handler is on its way out."""
        return self._task.cancelling() > 0

    async def wait_left(self) -> None:
        """Return once the call's handling is over."""
        if self._left is None:
            self._left = asyncio.Event()
        await self._left.wait()

    def end(self, error: PhotonError) -> None:
        """End the call with `error`; the first reason given stands."""
        if self._error is None:
            self._error = error
            if not self._sends_headers:
                self._task.cancel()

    async def write(self, context: Any, message: Any) -> None:
        """Write one response, watched for a client that does not read.

        The headers go ahead on their own, at the moment of the first response: with them in its batch, a
        status that follows while that is pending would send them again, which grpc refuses, and the client
        would wait for a status for ever.
        """
        self._write_started = time.monotonic()
        try:
            if not self._has_sent_headers:
                await self._send_headers(context)
            await send_by(context, context.write(message))
        except grpc.aio.InternalError:
            # The client has left with the response pending; grpc cancels this task in a moment.
            await asyncio.sleep(_CLOSE_S)
            raise
        self._write_started = None

    async def flush(self, context: Any) -> None:
        """Return once the transport has taken every response; watched as a write is.

        With grpc's own contexts it has taken each when its write returns.
        """
        flush = getattr(context, "flush", None)
        if flush is not None:
            self._write_started = time.monotonic()
            await flush()
            self._write_started = None

    async def _send_headers(self, context: Any) -> None:
        """Not to be interrupted: grpc would count headers that are on their way as unsent."""
        self._sends_headers = True
        await send_by(context, context.send_initial_metadata(()))
        self._sends_headers, self._has_sent_headers = False, True
        if self._error is not None:
            self._task.cancel()
            await asyncio.sleep(0)

    def begin_wait(self) -> None:
        """Nothing can be written before the transport has taken more: watched as a write is."""
        if self._write_started is None:
            self._write_started = time.monotonic()

    def end_wait(self) -> None:
        """It can again."""
        self._write_started = None

    def stalled_since(self, moment: float) -> bool:
        """Whether one write has been pending since before `moment`."""
        return self._write_started is not None and self._write_started < moment

    def __enter__(self) -> Self:
        remaining = max(0.0, self.deadline - time.monotonic())
        loop = asyncio.get_running_loop()
        self._deadline_timer = loop.call_later(remaining, self.end, MaxDurationError())
        self._calls.add(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._deadline_timer is not None
        self._deadline_timer.cancel()
        self._calls.remove(self)
        if self._left is not None:
            self._left.set()
        # The traceback of an error that is raised here leads to this frame, and so to the call: one that kept
        # the error would be a cycle, and with it all that the call had would wait for the garbage collector.
        error, self._error = self._error, None
        try:
            if error is not None and isinstance(exc, asyncio.CancelledError):
                self._task.uncancel()
                raise error from None
        finally:
            del error


class Calls:
    """All live calls of one server, over all its listeners.

    Stalled writes are found by one timer that looks at every live call, not by a timer per write:
    a write costs two clock readings.
    """

    def __init__(self, limits: LimitOptions) -> None:
        self._limits = limits
        self._live: set[Call] = set()
        self._by_name: dict[tuple[str, str], Call] = {}
        self._refusal: Callable[[], PhotonError] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._sweep_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._live)

    def open(self, context: Any) -> Call:
        """The call of the running task. After `refuse` raises what that was given.

        A client without a deadline gets the default one; nobody gets more than the maximum.
        """
        if self._refusal is not None:
            raise self._refusal()
        remaining = context.time_remaining()
        if remaining is None:
            remaining = self._limits.default_deadline_s
        task = asyncio.current_task()
        assert task is not None
        return Call(self, time.monotonic() + min(remaining, self._limits.max_deadline_s), task)

    def refuse(self, make_error: Callable[[], PhotonError]) -> None:
        """Take no more calls, and answer each with an error of its own."""
        self._refusal = make_error

    def accept(self) -> None:
        """Take calls again."""
        self._refusal = None

    def end_all(self, make_error: Callable[[], PhotonError]) -> None:
        """End every live call with an error of its own."""
        for call in tuple(self._live):
            call.end(make_error())

    def end_batches(self, make_error: Callable[[], PhotonError], tenant: str = "") -> None:
        """End every live batch, or every one of a tenant."""
        for (owner, _), call in tuple(self._by_name.items()):
            if call.is_batch and tenant in ("", owner):
                call.end(make_error())

    def find_all(self, request_id: str, tenant: str = "") -> list[Call]:
        """The live calls that have taken this id: one at most of each tenant, or of the one that is named."""
        return [
            call
            for (owner, call_id), call in self._by_name.items()
            if call_id == request_id and tenant in ("", owner)
        ]

    async def wait_idle(self) -> None:
        """Return once no call is live."""
        await self._idle.wait()

    def add(self, call: Call) -> None:
        """Count `call`; done by entering it."""
        self._live.add(call)
        self._idle.clear()
        if self._sweep_timer is None:
            self._schedule_sweep()

    def find(self, name: tuple[str, str]) -> Call | None:
        """The live call of this tenant that has taken this id."""
        return self._by_name.get(name)

    def add_name(self, call: Call, name: tuple[str, str]) -> None:
        """Make `call` findable; done by its taking an id."""
        self._by_name[name] = call

    def remove(self, call: Call) -> None:
        """Forget `call`; done by leaving it."""
        self._live.discard(call)
        if call.name is not None:
            del self._by_name[call.name]
        if not self._live:
            self._idle.set()

    def _schedule_sweep(self) -> None:
        delay = self._limits.slow_consumer_timeout_s / _SWEEPS_PER_TIMEOUT
        self._sweep_timer = asyncio.get_running_loop().call_later(delay, self._sweep)

    def _sweep(self) -> None:
        moment = time.monotonic() - self._limits.slow_consumer_timeout_s
        for call in tuple(self._live):
            if call.stalled_since(moment):
                call.end(SlowConsumerError())
        self._sweep_timer = None
        if self._live:
            self._schedule_sweep()
