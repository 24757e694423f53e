"""A call inside an acceptor: what becomes of it when its client leaves in the middle of something."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import pytest

from photon_grpc.options import TelemetryOptions, TlsOptions
from photon_grpc.processes.channel import Channel
from photon_grpc.server.acceptors import acceptor
from photon_grpc.server.acceptors.acceptor import Acceptor, _Call
from photon_grpc.server.acceptors.messages import Left, Method, Opened, Setup, Written
from tests.support.grpc_harness import until


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


class SlowContext:
    """Of a call whose responses the transport takes when the test says so."""

    def __init__(self) -> None:
        self.may_write = asyncio.Semaphore(0)
        self.num_begun = 0

    def time_remaining(self) -> None: ...

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:9"

    async def write(self, response: bytes) -> None:
        self.num_begun += 1
        await self.may_write.acquire()


async def test_what_is_written_is_told_at_once_where_nothing_else_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptor, "_TOLD_AFTER_S", 3600.0)
    ours, theirs = socket.socketpair()
    loop = Channel(theirs)
    methods = (Method("/s/M", False, True),)
    one = Acceptor(Channel(ours), Setup("", (), methods, TlsOptions(), TelemetryOptions()))
    contexts = [SlowContext() for _ in range(2)]
    calls = [asyncio.create_task(one._relay(0, b"", context)) for context in contexts]

    async def turns() -> list[Any]:
        for _ in range(10):
            await asyncio.sleep(0)
        return loop.receive()

    assert [type(message) for message in await turns()] == [Opened, Opened]
    one.receive([(1, b"x"), (2, b"x")])
    assert await turns() == []
    assert [context.num_begun for context in contexts] == [1, 1]
    contexts[0].may_write.release()
    assert await turns() == [], "the other one is being written"
    contexts[1].may_write.release()
    assert await turns() == [Written([1, 2])]
    one.receive([(2, b"x")])
    contexts[1].may_write.release()
    assert await turns() == [Written([2])]
    # One whose client leaves meanwhile is not waited for.
    one.receive([(1, b"x"), (2, b"x")])
    await turns()
    calls[1].cancel()
    assert await turns() == [Left(2)]
    contexts[0].may_write.release()
    assert await turns() == [Written([1])]
    calls[0].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    one._channel.close()
    loop.close()
    await one._server.stop(0)


async def test_what_is_written_is_told_in_a_moment_whatever_else_is_being_written() -> None:
    ours, theirs = socket.socketpair()
    loop = Channel(theirs)
    methods = (Method("/s/M", False, True),)
    one = Acceptor(Channel(ours), Setup("", (), methods, TlsOptions(), TelemetryOptions()))
    contexts = [SlowContext() for _ in range(2)]
    calls = [asyncio.create_task(one._relay(0, b"", context)) for context in contexts]
    await asyncio.sleep(0)
    one.receive([(1, b"x"), (2, b"x")])
    contexts[0].may_write.release()
    heard: list[Any] = []

    def is_told() -> bool:
        heard.extend(loop.receive())
        return Written([1]) in heard

    await until(is_told)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    one._channel.close()
    loop.close()
    await one._server.stop(0)
