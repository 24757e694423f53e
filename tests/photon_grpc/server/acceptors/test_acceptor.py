"""A call inside an acceptor: what becomes of it when its client leaves in the middle of something."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from photon_grpc.server.acceptors.acceptor import _Call


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
