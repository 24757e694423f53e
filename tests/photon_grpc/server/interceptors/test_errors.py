"""The error interceptor's own decisions; what it sends is tested with the services it guards."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from photon_grpc.server.interceptors.errors import ErrorInterceptor, is_usable_id, request_id_of
from photon_grpc.server.status import RpcStatus


class Context:
    """Records what a servicer context is told."""

    def __init__(self) -> None:
        self.trailers: tuple[Any, ...] = ()
        self.aborted: RpcStatus | None = None

    def invocation_metadata(self) -> None:
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

    handler = await ErrorInterceptor().intercept_service(continuation, Details())
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


async def test_unknown_methods_and_bidirectional_ones_are_left_alone() -> None:
    async def none(_: Any) -> None:
        return None

    assert await ErrorInterceptor().intercept_service(none, Details()) is None
    handler = grpc.stream_stream_rpc_method_handler(lambda *_: None)

    async def bidirectional(_: Any) -> Any:
        return handler

    assert await ErrorInterceptor().intercept_service(bidirectional, Details()) is handler


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
