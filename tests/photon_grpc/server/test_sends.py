"""Sends that run to their end apart from their call, and what grpc then keeps of them: nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Sequence
from typing import Any

import grpc
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.server.sends import send, send_by
from tests.support import cut_writes, lost_requests
from tests.support.heap_bytes import heap_bytes


class Batches:
    """Coroutines as those of grpc.aio: each waits for one batch, and frees what it holds behind that."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[None]] = []
        self.num_freed = 0

    async def operation(self, error: Exception | None = None) -> str:
        future = asyncio.get_running_loop().create_future()
        self.begun.append(future)
        await future
        self.num_freed += 1
        if error is not None:
            raise error
        return "sent"


async def begin(sending: Awaitable[str]) -> asyncio.Task[str]:
    async def wait() -> str:
        return await sending

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    return task


async def test_a_send_ends_with_what_its_coroutine_returns() -> None:
    batches = Batches()
    task = await begin(send(batches.operation()))
    await asyncio.sleep(0)
    assert not task.done()
    batches.begun[0].set_result(None)
    assert await task == "sent"
    assert batches.num_freed == 1


async def test_a_send_begins_at_once_and_may_end_at_once() -> None:
    async def nothing_to_do() -> int:
        return 3

    with pytest.raises(StopIteration) as ended:
        next(send(nothing_to_do()).__await__())
    assert ended.value.value == 3


async def test_a_cancelled_send_frees_what_it_holds_once_its_batch_has_ended() -> None:
    batches = Batches()
    task = await begin(send(batches.operation()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert batches.num_freed == 0, "grpc still reads it"
    assert not batches.begun[0].cancelled()
    batches.begun[0].set_result(None)
    await asyncio.sleep(0)
    assert batches.num_freed == 1


async def test_a_task_that_is_cancelled_before_it_sends_or_just_behind_it_frees_it_too() -> None:
    batches = Batches()

    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await send(batches.operation())

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(cancel_itself())
    batches.begun[0].set_result(None)
    await asyncio.sleep(0)
    assert batches.num_freed == 1
    task = await begin(send(batches.operation()))
    batches.begun[1].set_result(None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert batches.num_freed == 2


@pytest.mark.parametrize("ends", [False, True])
async def test_a_task_that_is_cancelled_twice_in_a_turn_wakes_once(ends: bool) -> None:
    batches, complaints = Batches(), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    task = await begin(send(batches.operation()))
    task.cancel()
    task.cancel()
    if ends:
        batches.begun[0].set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        await asyncio.sleep(0)
    assert complaints == []


async def test_a_task_that_takes_its_cancellation_back_is_woken_again() -> None:
    batches = Batches()

    async def stubborn() -> str:
        try:
            return await send(batches.operation())
        except asyncio.CancelledError:
            return await send(batches.operation())

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    for batch in batches.begun:
        batch.set_result(None)
    assert (await task, len(batches.begun), batches.num_freed) == ("sent", 2, 2)


EVENTS = ("cancel", "finish", "fail", "turn")


async def outcome(sends: bool, shields: bool, events: Sequence[str]) -> tuple[str, int]:
    """How a task ends that sends twice, and after how many events; whatever the loop complains of fails."""
    batches, complaints = Batches(), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def operation() -> Awaitable[str]:
        return send(batches.operation()) if sends else batches.operation()

    async def twice_or_so() -> str:
        try:
            first = await operation()
        except asyncio.CancelledError:
            if not shields:
                raise
            first = "cancelled"
        return first + await operation()

    task = asyncio.create_task(twice_or_so())
    await asyncio.sleep(0)
    num_done = 0
    for event in (*events, *("finish", "turn", "turn") * 3):
        open_batches = [batch for batch in batches.begun if not batch.done()]
        match event:
            case "cancel":
                task.cancel()
            case "turn":
                await asyncio.sleep(0)
            case "finish" if open_batches:
                open_batches[-1].set_result(None)
            case "fail" if open_batches:
                open_batches[-1].set_exception(grpc.aio.InternalError("Failed execute_batch"))
        num_done += not task.done()
    assert task.done()
    for batch in batches.begun:
        if not batch.done():
            batch.set_result(None)
    await asyncio.sleep(0)
    assert complaints == []
    assert not sends or batches.num_freed == len(batches.begun)
    if task.cancelled():
        return "cancelled", num_done
    return (repr(error) if (error := task.exception()) else task.result()), num_done


@given(shields=st.booleans(), events=st.lists(st.sampled_from(EVENTS), max_size=8))
def test_a_task_ends_as_it_would_by_the_coroutine_alone(shields: bool, events: list[str]) -> None:
    ends = [asyncio.run(outcome(sends, shields, events)) for sends in (False, True)]
    assert ends[0] == ends[1]


async def test_a_send_takes_no_more_turns_of_the_loop_than_its_coroutine() -> None:
    batches = Batches()
    task = await begin(send(batches.operation()))
    batches.begun[0].set_result(None)
    await asyncio.sleep(0)
    assert task.done()


async def test_a_send_that_takes_too_long_is_left() -> None:
    batches = Batches()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await send(batches.operation())
    batches.begun[0].set_exception(grpc.aio.InternalError("Failed execute_batch"))
    await asyncio.sleep(0)
    assert batches.num_freed == 1


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_failed_send_frees_what_it_holds_and_fails(is_cancelled: bool) -> None:
    batches = Batches()
    task = await begin(send(batches.operation(ValueError("what comes of a success that was none"))))
    if is_cancelled:
        task.cancel()
        await asyncio.sleep(0)
    batches.begun[0].set_exception(grpc.aio.InternalError("Failed execute_batch"))
    with pytest.raises(asyncio.CancelledError if is_cancelled else grpc.aio.InternalError):
        await task
    await asyncio.sleep(0)
    assert batches.num_freed == 1


async def test_an_error_of_the_coroutine_is_raised() -> None:
    batches = Batches()
    task = await begin(send(batches.operation(grpc.aio.AbortError("Locally aborted."))))
    batches.begun[0].set_result(None)
    with pytest.raises(grpc.aio.AbortError):
        await task

    async def refuse() -> None:
        raise grpc.aio.UsageError("RPC already finished.")

    with pytest.raises(grpc.aio.UsageError):
        await send(refuse())


async def twice(batches: Batches, *, is_late: bool = False) -> str:
    """As no coroutine of grpc.aio 1.84 is: it waits for two batches, or for a turn of the loop first."""
    if is_late:
        await asyncio.sleep(0)
    return await batches.operation() + await batches.operation()


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_coroutine_that_waits_otherwise_ends_as_if_alone(is_late: bool) -> None:
    batches = Batches()
    task = await begin(send(twice(batches, is_late=is_late)))
    for place in range(2):
        await asyncio.sleep(0)
        batches.begun[place].set_result(None)
        await asyncio.sleep(0)
    assert await task == "sentsent"
    for failing in range(2):
        batches = Batches()
        task = await begin(send(twice(batches, is_late=is_late)))
        for place in range(failing):
            await asyncio.sleep(0)
            batches.begun[place].set_result(None)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        batches.begun[failing].set_exception(grpc.aio.InternalError("Failed execute_batch"))
        with pytest.raises(grpc.aio.InternalError):
            await task


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("num_done", [0, 1])
async def test_a_coroutine_that_waits_otherwise_can_be_cancelled(is_late: bool, num_done: int) -> None:
    batches = Batches()
    task = await begin(send(twice(batches, is_late=is_late)))
    for place in range(num_done):
        await asyncio.sleep(0)
        batches.begun[place].set_result(None)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for batch in batches.begun:
        if not batch.done():
            batch.set_result(None)
    await asyncio.sleep(0)
    assert task.cancelled()


async def test_what_failed_is_freed_without_the_garbage_collector() -> None:
    async def fail() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        batches = Batches()

        def end() -> None:
            batches.begun[0].set_exception(grpc.aio.InternalError("Failed execute_batch"))

        asyncio.get_running_loop().call_soon(end)
        try:
            await send(batches.operation())
        except grpc.aio.InternalError as error:
            return weakref.ref(error), weakref.ref(batches.begun[0])
        raise AssertionError("it did not fail")

    gc.collect()
    gc.disable()
    try:
        error, batch = await fail()
        await asyncio.sleep(0)
        assert error() is None
        assert batch() is None
    finally:
        gc.enable()


async def test_what_is_sent_by_a_context_of_an_acceptor_s_call_is_cancelled_with_it() -> None:
    batches = Batches()

    class Context:
        async def flush(self) -> None: ...

    for context, is_cancelled in ((Context(), True), (object(), False)):
        task = await begin(send_by(context, batches.operation()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert batches.begun[-1].cancelled() is is_cancelled


def test_a_batch_of_uvloop_can_be_sent() -> None:
    batches = Batches()

    async def run() -> str:
        task = await begin(send(batches.operation()))
        batches.begun[0].set_result(None)
        return await task

    assert uvloop.run(run()) == "sent"


@pytest.mark.skipif(heap_bytes() is None, reason="malloc does not tell what is in use")
def test_grpc_keeps_nothing_of_writes_that_are_cut_short() -> None:
    plain = cut_writes.measure(60, apart=False)
    apart = cut_writes.measure(60, apart=True)
    assert plain.num_cut == apart.num_cut > 0
    assert plain.bytes_per_write > 200, "grpc no longer loses them: this module can go"
    # The second thousand of calls grows a table or two.
    assert apart.bytes_per_write < 100


@pytest.mark.skipif(heap_bytes() is None, reason="malloc does not tell what is in use")
def test_grpc_keeps_nothing_of_a_request_that_is_read_apart_and_given_up() -> None:
    # How many of the calls leave while their request is read is a matter of chance: up to 96 bytes for each.
    plain = max(lost_requests.measure(apart=False) for _ in range(3))
    assert plain > 50, "grpc no longer loses them: acceptors can have it read"
    assert lost_requests.measure(apart=True) < 40
