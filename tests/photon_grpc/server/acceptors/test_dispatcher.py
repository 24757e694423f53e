"""Calls that an acceptor hands on, with the acceptor played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from photon_grpc.server.acceptors.dispatcher import CallContext, DispatchedCall, Dispatcher
from photon_grpc.server.acceptors.messages import End, Headers, Metadata, Method, Next, Opened
from photon_grpc.server.status import RpcStatus

OK = grpc.StatusCode.OK.value[0]
Behavior = Callable[[Any, Any], Any]


class Recorder(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Writes down what it is asked and when what it wraps begins."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        self._log.append(f"{self._name} asked for {handler_call_details.method}")
        handler = await continuation(handler_call_details)

        async def wrapped(request: Any, context: Any) -> Any:
            self._log.append(f"{self._name} begins")
            return await handler.unary_unary(request, context)

        return handler._replace(unary_unary=wrapped)


class Acceptor:
    """A dispatcher of one method, and all that it posts."""

    def __init__(self, handler: grpc.RpcMethodHandler) -> None:
        self.posted: list[Any] = []
        self._dispatcher = Dispatcher(())
        self._dispatcher.add_registered_method_handlers("s", {"M": handler})

    async def open(
        self, request: bytes = b"", *, metadata: Metadata = (), deadline: float | None = None
    ) -> DispatchedCall:
        await self._dispatcher.start()
        opened = Opened(7, 0, metadata, "ipv4:127.0.0.1:9", {"key": (b"value",)}, deadline, request)
        return self._dispatcher.open(opened, self.posted.append)


def unary(behavior: Behavior) -> Acceptor:
    return Acceptor(grpc.unary_unary_rpc_method_handler(behavior, response_serializer=str.encode))


def streaming(behavior: Behavior) -> Acceptor:
    return Acceptor(grpc.unary_stream_rpc_method_handler(behavior, response_serializer=str.encode))


def both_ways(behavior: Behavior) -> Acceptor:
    return Acceptor(grpc.stream_stream_rpc_method_handler(behavior, response_serializer=str.encode))


async def some_turns() -> None:
    """Long enough for whatever needs no more from outside."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- methods and interceptors ---------------------------------------------------------------------


async def test_interceptors_are_asked_once_for_each_method_and_run_the_outermost_first() -> None:
    log: list[str] = []

    async def echo(request: bytes, context: Any) -> str:
        log.append("handler begins")
        return request.decode()

    handler = grpc.unary_unary_rpc_method_handler(echo, response_serializer=str.encode)
    dispatcher = Dispatcher([Recorder("outer", log), Recorder("inner", log)])
    dispatcher.add_registered_method_handlers("s", {"A": handler, "B": handler})
    await dispatcher.start()
    asked = ["outer asked for /s/A", "inner asked for /s/A", "outer asked for /s/B", "inner asked for /s/B"]
    assert log == asked
    posted: list[Any] = []
    for number in (1, 2):
        await dispatcher.open(Opened(number, 1, (), "", {}, None, b"hi"), posted.append).task
    assert log == asked + ["outer begins", "inner begins", "handler begins"] * 2
    assert posted == [End(1, OK, "", (), b"hi"), End(2, OK, "", (), b"hi")]


def test_methods_are_numbered_in_the_order_in_which_they_came() -> None:
    async def behavior(request: Any, context: Any) -> None: ...

    dispatcher = Dispatcher(())
    dispatcher.add_registered_method_handlers("b.S", {"One": grpc.unary_unary_rpc_method_handler(behavior)})
    dispatcher.add_registered_method_handlers(
        "a.S",
        {
            "Two": grpc.unary_stream_rpc_method_handler(behavior),
            "Both": grpc.stream_stream_rpc_method_handler(behavior),
        },
    )
    assert dispatcher.methods() == (
        Method("/b.S/One", False, False),
        Method("/a.S/Two", False, True),
        Method("/a.S/Both", True, True),
    )


def test_a_method_that_streams_requests_alone_is_not_served() -> None:
    dispatcher = Dispatcher(())
    with pytest.raises(AssertionError):
        dispatcher.add_registered_method_handlers(
            "s", {"M": grpc.stream_unary_rpc_method_handler(lambda requests, context: None)}
        )


# --- what a handler sees and does -----------------------------------------------------------------


async def test_a_handler_sees_what_the_call_brought() -> None:
    seen: dict[str, Any] = {}

    async def behavior(request: bytes, context: CallContext) -> str:
        seen.update(
            request=request,
            metadata=context.invocation_metadata(),
            peer=context.peer(),
            auth=context.auth_context(),
            remaining=context.time_remaining(),
            code=context.code(),
        )
        return "done"

    acceptor = unary(behavior)
    metadata = (("a", "b"), ("c-bin", b"\x00\xff"))
    await (await acceptor.open(b"\x00", metadata=metadata)).task
    assert seen == {
        "request": b"\x00",
        "metadata": metadata,
        "peer": "ipv4:127.0.0.1:9",
        "auth": {"key": (b"value",)},
        "remaining": None,
        "code": 0,
    }


async def test_the_time_that_remains_is_that_to_the_deadline_and_never_less_than_none() -> None:
    async def behavior(request: bytes, context: CallContext) -> str:
        return str(context.time_remaining())

    acceptor = unary(behavior)
    for seconds in (1000.0, -5.0):
        await (await acceptor.open(deadline=time.monotonic() + seconds)).task
    soon, passed = (float(end.response) for end in acceptor.posted)
    assert 900 < soon <= 1000
    assert passed == 0.0


async def test_a_stream_is_sent_in_order_and_ends_with_its_trailers() -> None:
    async def behavior(request: bytes, context: CallContext) -> None:
        await context.send_initial_metadata((("h", "1"),))
        await context.write("one")
        await context.write("two")
        context.set_trailing_metadata((("t", "x"), ("t-bin", b"\x01")))
        assert context.trailing_metadata() == (("t", "x"), ("t-bin", b"\x01"))

    acceptor = streaming(behavior)
    call = await acceptor.open()
    await call.task
    trailers = (("t", "x"), ("t-bin", b"\x01"))
    assert acceptor.posted == [
        Headers(7, (("h", "1"),)),
        (7, b"one"),
        (7, b"two"),
        End(7, OK, "", trailers, None),
    ]
    assert call.context.code() is grpc.StatusCode.OK


async def test_requests_of_both_ways_are_asked_for_one_by_one() -> None:
    async def behavior(requests: AsyncIterator[bytes], context: CallContext) -> AsyncIterator[str]:
        async for request in requests:
            yield request.decode().upper()

    acceptor = both_ways(behavior)
    call = await acceptor.open()
    for request in (b"a", b"b"):
        await some_turns()
        assert acceptor.posted.pop() == Next(7)
        assert not acceptor.posted
        call.context.took(request)
        await some_turns()
        assert acceptor.posted.pop(0) == (7, request.upper())
        call.context.written()
    call.context.took(None)
    await call.task
    assert acceptor.posted == [Next(7), End(7, OK, "", (), None)]


# --- the ends -------------------------------------------------------------------------------------


async def test_an_abort_sends_its_status_once_with_the_trailers_that_were_set() -> None:
    async def behavior(request: bytes, context: CallContext) -> str:
        context.set_trailing_metadata((("id", "1"),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "nobody")

    acceptor = unary(behavior)
    call = await acceptor.open()
    await call.task
    assert acceptor.posted == [End(7, grpc.StatusCode.NOT_FOUND.value[0], "nobody", (("id", "1"),), None)]
    assert (call.context.code(), call.context.details()) == (grpc.StatusCode.NOT_FOUND, "nobody")


async def test_an_abort_with_a_status_brings_trailers_of_its_own() -> None:
    async def behavior(request: bytes, context: CallContext) -> None:
        await context.write("one")
        context.set_trailing_metadata((("id", "1"),))
        details = (("grpc-status-details-bin", b"\x08\x05"),)
        await context.abort_with_status(RpcStatus(grpc.StatusCode.ABORTED, "enough", details))

    acceptor = streaming(behavior)
    await (await acceptor.open()).task
    assert acceptor.posted == [
        (7, b"one"),
        End(
            7,
            grpc.StatusCode.ABORTED.value[0],
            "enough",
            (("grpc-status-details-bin", b"\x08\x05"),),
            None,
        ),
    ]


@pytest.mark.parametrize("make", [unary, streaming])
async def test_a_handler_that_raises_ends_the_call_and_tells_nothing(
    make: Callable[[Behavior], Acceptor],
) -> None:
    async def behavior(request: bytes, context: CallContext) -> str:
        raise ValueError("the secret")

    acceptor = make(behavior)
    await (await acceptor.open()).task
    assert acceptor.posted == [End(7, grpc.StatusCode.INTERNAL.value[0], "internal error", (), None)]


@pytest.mark.parametrize("make", [unary, streaming])
async def test_a_response_that_cannot_be_serialized_ends_the_call(
    make: Callable[[Behavior], Acceptor],
) -> None:
    async def behavior(request: bytes, context: CallContext) -> Any:
        if make is streaming:
            await context.write(5)
        return 5

    acceptor = make(behavior)
    await (await acceptor.open()).task
    assert acceptor.posted == [End(7, grpc.StatusCode.INTERNAL.value[0], "internal error", (), None)]


async def test_a_call_whose_client_has_left_is_cancelled_in_its_handler() -> None:
    cleaned = asyncio.Event()

    async def behavior(request: bytes, context: CallContext) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        return ""

    acceptor = unary(behavior)
    call = await acceptor.open()
    await some_turns()
    call.task.cancel()
    await call.task
    assert cleaned.is_set()
    # Finds nobody at the acceptor, or a client that is told so.
    assert acceptor.posted == [End(7, grpc.StatusCode.CANCELLED.value[0], "", (), None)]


# --- responses on their way -----------------------------------------------------------------------


async def test_only_so_many_responses_are_on_their_way_and_a_flush_waits_for_all() -> None:
    reached: list[str] = []

    async def behavior(request: bytes, context: CallContext) -> None:
        for name in ("one", "two", "three", "four"):
            await context.write(name)
            reached.append(name)
        await context.flush()
        reached.append("flushed")

    acceptor = streaming(behavior)
    call = await acceptor.open()
    await some_turns()
    # The third is sent, and its writer waits.
    assert (reached, len(acceptor.posted)) == (["one", "two"], 3)
    call.context.written()
    await some_turns()
    assert (reached, len(acceptor.posted)) == (["one", "two", "three"], 4)
    call.context.written()
    await some_turns()
    assert reached == ["one", "two", "three", "four"]
    call.context.written()
    await some_turns()
    assert not call.task.done()
    call.context.written()
    await call.task
    assert reached[-1] == "flushed"
    assert acceptor.posted == [
        *((7, name) for name in (b"one", b"two", b"three", b"four")),
        End(7, OK, "", (), None),
    ]


async def test_there_is_room_for_three_responses_and_who_asked_hears_when_there_is_again() -> None:
    asked: list[str] = []
    is_asked = asyncio.Event()
    rooms: list[bool] = []

    def on_room() -> None:
        asked.append("room")
        is_asked.set()

    async def behavior(request: bytes, context: CallContext) -> None:
        for name in ("one", "two", "three"):
            rooms.append(context.has_room(lambda: asked.append("early")))
            context.write_now(name)
        rooms.append(context.has_room(on_room))
        await is_asked.wait()
        rooms.append(context.has_room(lambda: asked.append("late")))
        # One that waits in a write takes the room himself.
        context.write_now("four")
        rooms.append(context.has_room(lambda: asked.append("late")))
        await context.flush()

    acceptor = streaming(behavior)
    call = await acceptor.open()
    await some_turns()
    assert rooms == [True, True, True, False]
    assert asked == []
    call.context.written()
    assert asked == ["room"]
    await some_turns()
    assert rooms[4:] == [True, False]
    for _ in range(3):
        call.context.written()
        await some_turns()
    await call.task
    assert asked == ["room"]
    assert acceptor.posted == [
        *((7, name) for name in (b"one", b"two", b"three", b"four")),
        End(7, OK, "", (), None),
    ]


async def test_who_waits_for_room_is_forgotten_with_the_call() -> None:
    asked: list[str] = []

    async def behavior(request: bytes, context: CallContext) -> None:
        while context.has_room(lambda: asked.append("room")):
            context.write_now("one")
        raise asyncio.CancelledError

    call = await streaming(behavior).open()
    await call.task
    for _ in range(3):
        call.context.written()
    assert asked == []


async def test_several_that_are_taken_in_one_turn_wake_the_writer_once() -> None:
    async def behavior(request: bytes, context: CallContext) -> None:
        for _ in range(3):
            await context.write("x")
        await context.flush()

    acceptor = streaming(behavior)
    call = await acceptor.open()
    await some_turns()
    for _ in range(3):
        call.context.written()
    await call.task
    assert acceptor.posted[-1] == End(7, OK, "", (), None)


async def test_a_write_that_waits_can_be_cancelled_and_the_call_ended_behind_it() -> None:
    """As the server ends a call whose client does not read."""

    async def behavior(request: bytes, context: CallContext) -> None:
        try:
            while True:
                await context.write("x")
        except asyncio.CancelledError:
            await context.abort(grpc.StatusCode.ABORTED, "stalled")

    acceptor = streaming(behavior)
    call = await acceptor.open()
    await some_turns()
    call.task.cancel()
    await call.task
    assert acceptor.posted == [
        *[(7, b"x")] * 3,
        End(7, grpc.StatusCode.ABORTED.value[0], "stalled", (), None),
    ]
    # What was on its way is told of all the same.
    call.context.written()


async def test_a_request_that_comes_when_nobody_waits_for_it_is_dropped() -> None:
    async def behavior(requests: AsyncIterator[bytes], context: CallContext) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0):
                await anext(requests)
        except TimeoutError:
            pass
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who")
        yield ""

    acceptor = both_ways(behavior)
    call = await acceptor.open()
    await call.task
    call.context.took(b"late")
    assert acceptor.posted == [Next(7), End(7, grpc.StatusCode.UNAUTHENTICATED.value[0], "who", (), None)]
