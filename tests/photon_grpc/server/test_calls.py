"""The life of a call without a network: reasons, clocks, and what is left afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from photon_grpc.errors import (
    EngineDrainingError,
    MaxDurationError,
    OperatorAbortError,
    SlowConsumerError,
)
from photon_grpc.options import LimitOptions
from photon_grpc.server.calls import Call, Calls


class Context:
    """A servicer context with a deadline and a client that takes messages when it likes."""

    def __init__(self, time_remaining: float | None = None) -> None:
        self._time_remaining = time_remaining
        self.may_write = asyncio.Event()
        self.may_write.set()

    def time_remaining(self) -> float | None:
        return self._time_remaining

    async def write(self, message: Any) -> None:
        await self.may_write.wait()


async def hold(calls: Calls, context: Context, opened: asyncio.Future[Call]) -> None:
    with calls.open(context) as call:
        opened.set_result(call)
        await asyncio.Event().wait()


async def start(calls: Calls, context: Context) -> tuple[asyncio.Task[None], Call]:
    opened: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(hold(calls, context, opened))
    return task, await opened


async def test_the_first_reason_stands() -> None:
    calls = Calls(LimitOptions())
    task, call = await start(calls, Context())
    call.end(OperatorAbortError())
    call.end(MaxDurationError())
    with pytest.raises(OperatorAbortError):
        await task
    assert len(calls) == 0
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_stays_one() -> None:
    calls = Calls(LimitOptions())
    task, _ = await start(calls, Context())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 0


async def test_the_deadline_of_the_caller_is_capped() -> None:
    calls = Calls(LimitOptions(max_deadline_s=0.05))
    for remaining in (None, 1000.0, -5.0):
        task, _ = await start(calls, Context(remaining))
        with pytest.raises(MaxDurationError):
            await task


async def test_refusing_and_ending_all() -> None:
    calls = Calls(LimitOptions())
    started = [await start(calls, Context()) for _ in range(3)]
    calls.refuse(EngineDrainingError)
    with pytest.raises(EngineDrainingError):
        calls.open(Context())
    calls.end_all(EngineDrainingError)
    async with asyncio.timeout(5):
        await calls.wait_idle()
    results = await asyncio.gather(*(task for task, _ in started), return_exceptions=True)
    assert all(isinstance(result, EngineDrainingError) for result in results)


async def write_for_ever(calls: Calls, context: Context) -> None:
    with calls.open(context) as call:
        while True:
            await call.write(context, "x")
            await asyncio.sleep(0)


async def test_the_end_of_a_call_waits_for_its_first_write() -> None:
    """grpc sends the headers with it, and cannot send a status once it was cancelled."""
    calls = Calls(LimitOptions())
    context = Context()
    context.may_write.clear()
    task = asyncio.create_task(write_for_ever(calls, context))
    await asyncio.sleep(0)
    calls.end_all(EngineDrainingError)
    await asyncio.sleep(0)
    assert task.cancelling() == 0
    context.may_write.set()
    with pytest.raises(EngineDrainingError):
        async with asyncio.timeout(30):
            await task
    assert task.cancelling() == 0
    assert len(calls) == 0


async def test_the_end_of_a_call_waits_for_no_later_write_and_for_no_first_one_that_hangs() -> None:
    calls = Calls(LimitOptions())
    begun, hanging = Context(), Context()
    hanging.may_write.clear()
    tasks = [asyncio.create_task(write_for_ever(calls, context)) for context in (begun, hanging)]
    await asyncio.sleep(0.01)
    begun.may_write.clear()
    await asyncio.sleep(0.01)
    calls.end_all(EngineDrainingError)
    assert [task.cancelling() for task in tasks] == [1, 0]
    for task in tasks:
        with pytest.raises(EngineDrainingError):
            async with asyncio.timeout(30):
                await task


async def test_only_a_single_long_write_is_a_stall() -> None:
    calls = Calls(LimitOptions(slow_consumer_timeout_s=0.1))
    stalled, reading = Context(), Context()
    tasks = [asyncio.create_task(write_for_ever(calls, context)) for context in (stalled, reading)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks)
    stalled.may_write.clear()
    with pytest.raises(SlowConsumerError):
        async with asyncio.timeout(5):
            await tasks[0]
    assert not tasks[1].done()
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]


async def test_waiting_for_tokens_is_no_stall() -> None:
    calls = Calls(LimitOptions(slow_consumer_timeout_s=0.04))
    context = Context()

    async def write_once_and_wait() -> None:
        with calls.open(context) as call:
            await call.write(context, "x")
            await asyncio.sleep(0.2)

    await asyncio.create_task(write_once_and_wait())


async def test_sweeping_ends_with_the_last_call_and_begins_with_the_next() -> None:
    calls = Calls(LimitOptions(slow_consumer_timeout_s=0.04))
    for _ in range(2):
        context = Context()
        context.may_write.clear()
        task = asyncio.create_task(write_for_ever(calls, context))
        with pytest.raises(SlowConsumerError):
            async with asyncio.timeout(5):
                await task
        await asyncio.sleep(0.05)
        assert calls._sweep_timer is None


async def test_an_error_of_the_handler_is_not_replaced() -> None:
    calls = Calls(LimitOptions())

    async def fail() -> None:
        with calls.open(Context()):
            raise ValueError

    with pytest.raises(ValueError):
        await asyncio.create_task(fail())
    assert len(calls) == 0
