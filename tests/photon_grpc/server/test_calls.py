"""The life of a call without a network: reasons, clocks, and what is left afterwards."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import grpc
import pytest

import photon_grpc.server.calls
from photon_grpc.errors import (
    EngineDrainingError,
    MaxDurationError,
    OperatorAbortError,
    SlowConsumerError,
)
from photon_grpc.options import LimitOptions
from photon_grpc.server.calls import Call, Calls
from tests.support.grpc_harness import until


class Context:
    """A servicer context with a deadline and a client that takes messages when it likes."""

    def __init__(self, time_remaining: float | None = None) -> None:
        self._time_remaining = time_remaining
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.may_send_headers = asyncio.Event()
        self.may_send_headers.set()
        self.headers_sent = 0
        self.client_left = False

    def time_remaining(self) -> float | None:
        return self._time_remaining

    async def send_initial_metadata(self, metadata: Any) -> None:
        await self.may_send_headers.wait()
        self.headers_sent += 1

    async def write(self, message: Any) -> None:
        assert self.headers_sent == 1
        await self.may_write.wait()
        if self.client_left:
            raise grpc.aio.InternalError("the batch failed")


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


async def test_an_ended_call_is_freed_without_the_garbage_collector() -> None:
    calls = Calls(LimitOptions())

    async def catch(opened: asyncio.Future[Call]) -> weakref.ref[OperatorAbortError]:
        try:
            await hold(calls, Context(), opened)
        except OperatorAbortError as error:
            return weakref.ref(error)
        raise AssertionError("the call was not ended")

    async def end_one() -> weakref.ref[OperatorAbortError]:
        opened: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(catch(opened))
        (await opened).end(OperatorAbortError())
        return await task

    gc.disable()
    try:
        # What the error's traceback leads to is all that the call had: request, stream, context.
        assert [(await end_one())() for _ in range(3)] == [None] * 3
    finally:
        gc.enable()


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
    async with asyncio.timeout(30):
        await calls.wait_idle()
    results = await asyncio.gather(*(task for task, _ in started), return_exceptions=True)
    assert all(isinstance(result, EngineDrainingError) for result in results)


async def write_for_ever(calls: Calls, context: Context) -> None:
    with calls.open(context) as call:
        while True:
            await call.write(context, "x")
            await asyncio.sleep(0)


async def test_only_a_single_long_write_is_a_stall() -> None:
    calls = Calls(LimitOptions(slow_consumer_timeout_s=0.1))
    stalled, reading = Context(), Context()
    tasks = [asyncio.create_task(write_for_ever(calls, context)) for context in (stalled, reading)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks)
    stalled.may_write.clear()
    with pytest.raises(SlowConsumerError):
        async with asyncio.timeout(30):
            await tasks[0]
    assert not tasks[1].done()
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]


async def test_a_client_that_leaves_no_room_stalls_too_until_there_is_some() -> None:
    calls = Calls(LimitOptions(slow_consumer_timeout_s=0.1))
    (stalled_task, stalled), (reading_task, reading) = [await start(calls, Context()) for _ in range(2)]
    stalled.begin_wait()
    for _ in range(4):
        reading.begin_wait()
        await asyncio.sleep(0.05)
        # Asked again in vain: it counts from the first time.
        stalled.begin_wait()
        reading.end_wait()
    with pytest.raises(SlowConsumerError):
        async with asyncio.timeout(30):
            await stalled_task
    assert not reading_task.done()
    reading_task.cancel()
    await asyncio.gather(reading_task, return_exceptions=True)


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
            async with asyncio.timeout(30):
                await task
        await until(lambda: calls._sweep_timer is None)


async def test_an_error_of_the_handler_is_not_replaced() -> None:
    calls = Calls(LimitOptions())

    async def fail() -> None:
        with calls.open(Context()):
            raise ValueError

    with pytest.raises(ValueError):
        await asyncio.create_task(fail())
    assert len(calls) == 0


async def test_headers_go_once_ahead_of_the_first_response_and_not_before() -> None:
    calls, context = Calls(LimitOptions()), Context()

    async def write_twice() -> None:
        with calls.open(context) as call:
            assert not context.headers_sent
            await call.write(context, "x")
            await call.write(context, "y")

    await asyncio.create_task(write_twice())
    assert context.headers_sent == 1


async def test_a_call_that_is_ended_while_its_headers_are_sent_ends_behind_them() -> None:
    calls, context = Calls(LimitOptions()), Context()
    context.may_send_headers.clear()
    context.may_write.clear()
    task = asyncio.create_task(write_for_ever(calls, context))
    await asyncio.sleep(0)
    (call,) = calls._live
    call.end(OperatorAbortError())
    await asyncio.sleep(0.02)
    assert not task.done()
    context.may_send_headers.set()
    with pytest.raises(OperatorAbortError):
        await task
    assert context.headers_sent == 1


async def test_a_response_that_comes_back_because_the_client_left_is_a_cancellation() -> None:
    calls, context = Calls(LimitOptions()), Context()
    context.may_write.clear()
    task = asyncio.create_task(write_for_ever(calls, context))
    await asyncio.sleep(0)
    context.client_left = True
    context.may_write.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()  # as grpc does, a moment after it has failed the write
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 0


async def test_a_response_that_comes_back_to_a_client_that_stays_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(photon_grpc.server.calls, "_CLOSE_S", 0.01)
    calls, context = Calls(LimitOptions()), Context()
    context.client_left = True
    with pytest.raises(grpc.aio.InternalError):
        await asyncio.create_task(write_for_ever(calls, context))
    assert len(calls) == 0
