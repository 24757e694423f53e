"""A call inside an acceptor: what becomes of it when its client leaves, and what the event loop is told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from photon_grpc.options import TelemetryOptions, TlsOptions
from photon_grpc.processes.channel import Channel
from photon_grpc.server.acceptors.acceptor import _MOST_UNTOLD, _TOLD_AFTER_S, Acceptor, _Call
from photon_grpc.server.acceptors.messages import (
    MOST_ON_THE_WAY,
    End,
    Flush,
    Method,
    Opened,
    Setup,
    Write,
    Written,
)


class LeftContext:
    """Of a call whose client has left: grpc takes nothing any more, and says so before it cancels."""

    async def send_initial_metadata(self, metadata: Any) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    async def write(self, response: bytes) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


@pytest.mark.parametrize("what", ["headers", "response"])
async def test_what_the_transport_refuses_ends_by_the_cancellation_that_follows(what: str) -> None:
    """Not by an error of its own, which grpc would log and answer for the handler."""

    async def handle() -> None:
        call = _Call(1)
        if what == "headers":
            await call.send_headers(LeftContext(), ())
        else:
            await call.write(LeftContext(), b"")

    task = asyncio.create_task(handle())
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done, "it waits for grpc's cancellation"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- what the event loop is told of responses -----------------------------------------------------


class TakingContext:
    """Of a call whose transport takes everything at once."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write(self, response: bytes) -> None:
        self.written.append(response)

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:9"

    def auth_context(self) -> dict[str, tuple[bytes, ...]]:
        return {}


class EventLoopSide:
    """An acceptor that does not listen, and the other end of its channel."""

    def __init__(self, ours: Channel, acceptor: Acceptor) -> None:
        self.acceptor = acceptor
        self._ours = ours

    async def open(self) -> tuple[int, TakingContext, asyncio.Task[Any]]:
        context = TakingContext()
        handler = self.acceptor._handlers()["/s/m"].unary_stream
        task = asyncio.ensure_future(handler(b"", context))
        (opened,) = await self.told(0.0)
        assert isinstance(opened, Opened)
        return opened.call, context, task

    async def told(self, within_s: float) -> list[Any]:
        """What comes in a few turns, and within some time."""
        for _ in range(6):
            await asyncio.sleep(0)
        messages = self._ours.receive()
        if not messages and within_s:
            await asyncio.sleep(within_s)
            messages = self._ours.receive()
        return messages


@pytest.fixture
async def side() -> AsyncIterator[EventLoopSide]:
    ours, theirs = socket.socketpair()
    setup = Setup("127.0.0.1:0", (), (Method("/s/m", False, True),), TlsOptions(), TelemetryOptions())
    acceptor = Acceptor(Channel(theirs), setup)
    channel = Channel(ours)
    try:
        yield EventLoopSide(channel, acceptor)
    finally:
        acceptor._channel.close()
        await acceptor._server.stop(0)
        channel.close()


async def test_responses_are_told_of_in_time_and_together(side: EventLoopSide) -> None:
    call, context, task = await side.open()
    side.acceptor.receive([Write(call, b"one"), Write(call, b"two")])
    assert await side.told(0.0) == []
    assert context.written == [b"one", b"two"]
    assert await side.told(20 * _TOLD_AFTER_S) == [Written([call, call])]
    side.acceptor.receive([End(call, 0, "", (), None)])
    await task
    assert await side.told(4 * _TOLD_AFTER_S) == []


async def test_a_call_that_writes_fast_is_told_of_before_it_would_have_to_wait(side: EventLoopSide) -> None:
    assert _MOST_UNTOLD < MOST_ON_THE_WAY
    call, _, task = await side.open()
    side.acceptor.receive([Write(call, b"x")] * _MOST_UNTOLD)
    assert await side.told(0.0) == [Written([call] * _MOST_UNTOLD)]
    side.acceptor.receive([End(call, 0, "", (), None)])
    await task


async def test_a_flush_is_answered_at_once_and_behind_what_was_sent(side: EventLoopSide) -> None:
    call, context, task = await side.open()
    side.acceptor.receive([Write(call, b"one"), Flush(call), End(call, 0, "", (), None)])
    assert await side.told(0.0) == [Written([call])]
    assert context.written == [b"one"]
    await task
