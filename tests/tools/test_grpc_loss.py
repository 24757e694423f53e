"""What grpc loses of messages that are cut short: how it is measured, and how a server's are counted."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from photon_grpc.options import LimitOptions
from photon_grpc.server.calls import Call, Calls
from tools.bench import grpc_loss
from tools.bench.grpc_loss import CutWrites, heap_bytes, measure

needs_mallinfo = pytest.mark.skipif(heap_bytes() is None, reason="malloc does not tell what is in use")


@needs_mallinfo
def test_the_heap_is_what_malloc_has_given_out() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 1000, 20_000
    before = heap_bytes()
    blocks = [libc.malloc(size) for _ in range(count)]
    during = heap_bytes()
    for block in blocks:
        libc.free(block)
    after = heap_bytes()
    assert before is not None
    assert during is not None
    assert after is not None
    # A block has a header of its own; what else this process does is far less.
    assert size * count <= during - before <= 1.1 * size * count
    assert during - after >= 0.9 * size * count


@needs_mallinfo
def test_every_call_of_the_measurement_cuts_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_loss, "_WARM_UP_CALLS", 60)
    monkeypatch.setattr(grpc_loss, "_CALLS", 140)
    loss = measure(100)
    assert loss is not None
    assert (loss.num_cut, loss.message_bytes) == (140, 100)
    # What warms up is most of it in so few calls, and is no page for each.
    assert abs(loss.bytes_per_write) < 1 << 14


async def test_writes_that_end_before_their_time_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "write", Call.write)
    cut = CutWrites()
    cut.watch()
    begun = asyncio.Event()

    async def write(how: str) -> None:
        begun.set()
        if how == "stuck":
            await asyncio.sleep(3600)
        if how == "broken":
            raise ConnectionError

    def context(how: str) -> Any:
        async def send_initial_metadata(metadata: Any) -> None: ...

        return SimpleNamespace(
            write=lambda message: write(how),
            send_initial_metadata=send_initial_metadata,
            time_remaining=lambda: 60.0,
        )

    async def one(how: str) -> None:
        with Calls(LimitOptions()).open(context(how)) as call:
            await call.write(context(how), b"")

    async def ended(run: Callable[[], Awaitable[None]]) -> int:
        before = cut.count
        await run()
        return cut.count - before

    async def cancelled() -> None:
        begun.clear()
        task = asyncio.create_task(one("stuck"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def broken() -> None:
        with pytest.raises(ConnectionError):
            await one("broken")

    assert await ended(lambda: one("well")) == 0
    assert await ended(cancelled) == 1
    assert await ended(broken) == 1
