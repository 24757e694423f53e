"""The error interceptor's own decisions; what it sends is tested with the services it guards."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from photon_grpc.errors import SlowConsumerError
from photon_grpc.server.interceptors import errors
from photon_grpc.server.interceptors.errors import ErrorInterceptor, is_usable_id, request_id_of
from photon_grpc.server.status import RpcStatus
from photon_grpc.telemetry.call_record import CallRecord, current_call


class Context:
    """Records what a servicer context is told."""

    def __init__(self) -> None:
        self.trailers: tuple[Any, ...] = ()
        self.aborted: RpcStatus | None = None

    def invocation_metadata(self) -> Any:
        return None

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self.trailers

    def set_trailing_metadata(self, trailers: tuple[Any, ...]) -> None:
        self.trailers = trailers

    async def abort_with_status(self, status: RpcStatus) -> None:
        self.aborted = status
        raise grpc.aio.AbortError


class Details:
    method = "/photon.v1.X/Y"


async def guard(behavior: Any) -> Any:
    async def continuation(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(behavior)

    handler = await ErrorInterceptor(16 << 10).intercept_service(continuation, Details())
    assert handler is not None
    return handler.unary_unary


@pytest.mark.parametrize(
    "passed", [asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError, KeyboardInterrupt]
)
async def test_what_is_no_error_passes(passed: type[BaseException]) -> None:
    async def behavior(request: Any, context: Any) -> None:
        raise passed

    context = Context()
    coroutine = (await guard(behavior))(b"", context)
    # Driven by hand: an event loop would act on some of these itself.
    with pytest.raises(passed):
        coroutine.send(None)
    assert context.aborted is None


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("error", [ValueError(), Panic()])
async def test_an_error_is_awaited_into_an_abort(error: BaseException) -> None:
    async def behavior(request: Any, context: Any) -> None:
        raise error

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await (await guard(behavior))(b"", context)
    assert context.aborted is not None
    assert context.aborted.code is grpc.StatusCode.INTERNAL


async def test_an_error_of_a_bidirectional_method_is_an_abort_too() -> None:
    async def behavior(requests: Any, context: Any) -> Any:
        yield b"first"
        raise ValueError

    async def continuation(_: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(behavior)

    handler = await ErrorInterceptor(16 << 10).intercept_service(continuation, Details())
    assert handler is not None
    context = Context()
    responses = handler.stream_stream(None, context)
    assert await anext(responses) == b"first"
    with pytest.raises(grpc.aio.AbortError):
        await anext(responses)
    assert context.aborted is not None
    assert context.aborted.code is grpc.StatusCode.INTERNAL


async def fail(request: Any, context: Any) -> None:
    raise SlowConsumerError


class Unread(Context):
    """Of a client that takes nothing, and leaves with `client_left`."""

    def __init__(self) -> None:
        super().__init__()
        self.client_left = asyncio.Event()

    async def abort_with_status(self, status: RpcStatus) -> None:
        self.aborted = status
        await self.client_left.wait()
        raise grpc.aio.InternalError("the batch failed")


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_status_that_is_not_taken_is_recorded_and_given_up(
    leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "_STATUS_S", 30.0 if leaves else 0.01)
    context, record = Unread(), CallRecord("photon.v1.X/Y", 0.0)
    if leaves:
        context.client_left.set()
    token = current_call.set(record)
    try:
        with pytest.raises(asyncio.CancelledError):
            await (await guard(fail))(b"", context)
    finally:
        current_call.reset(token)
    assert (record.code, record.reason) == ("ABORTED", "CLIENT_STALLED")


class Laden(Context):
    """Of a call with one field of metadata that counts `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> Any:
        return (("x", "y" * (self._size - 33)),)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise grpc.aio.AbortError


async def test_metadata_over_the_limit_goes_no_further() -> None:
    handled: list[Any] = []

    async def behavior(request: Any, context: Any) -> None:
        handled.append(context)

    fitting, laden = Laden(16 << 10), Laden((16 << 10) + 1)
    await (await guard(behavior))(b"", fitting)
    with pytest.raises(grpc.aio.AbortError):
        await (await guard(behavior))(b"", laden)
    assert laden.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert handled == [fitting]


async def test_unknown_methods_are_left_alone() -> None:
    async def none(_: Any) -> None:
        return None

    assert await ErrorInterceptor(16 << 10).intercept_service(none, Details()) is None


@pytest.mark.parametrize(
    ("request_id", "usable"),
    [
        ("a", True),
        ("A-z.0_9:", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\n", False),
        ("é", False),
    ],
)
def test_usable_ids(request_id: str, usable: bool) -> None:
    assert is_usable_id(request_id) is usable


def test_a_call_without_the_interceptor_has_no_id() -> None:
    with pytest.raises(LookupError):
        request_id_of(Context())
