"""Handlers that read their only request: the call is the same, and a client that leaves ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from photon_grpc.server.interceptors.requests import RequestInterceptor


class Context:
    """What `read` of a call's context brings."""

    def __init__(self, read: Any) -> None:
        self._read = read

    async def read(self) -> Any:
        if isinstance(self._read, Exception):
            raise self._read
        return self._read

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.AbortError(code, details)


async def answer(request: bytes, context: Any) -> bytes:
    return b"to " + request


async def intercepted(handler: grpc.RpcMethodHandler | None) -> grpc.RpcMethodHandler | None:
    async def find(details: Any) -> grpc.RpcMethodHandler | None:
        return handler

    return await RequestInterceptor().intercept_service(find, None)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_single_request_reaches_its_handler(streams: bool) -> None:
    if streams:
        found = await intercepted(grpc.unary_stream_rpc_method_handler(answer))
        behavior = found.stream_stream
    else:
        found = await intercepted(grpc.unary_unary_rpc_method_handler(answer))
        behavior = found.stream_unary
    assert (found.request_streaming, found.response_streaming) == (True, streams)
    assert (found.unary_unary, found.unary_stream) == (None, None)
    assert await behavior(None, Context(b"x")) == b"to x"
    assert await behavior(None, Context(b"")) == b"to "


@pytest.mark.parametrize(
    ("read", "error"),
    [(grpc.aio.EOF, grpc.aio.AbortError), (grpc.aio.InternalError("execute_batch"), asyncio.CancelledError)],
)
async def test_without_a_request_the_call_is_over(read: Any, error: type[BaseException]) -> None:
    found = await intercepted(grpc.unary_unary_rpc_method_handler(answer))
    assert found is not None
    with pytest.raises(error):
        await found.stream_unary(None, Context(read))


async def test_what_takes_many_requests_or_is_not_there_stays() -> None:
    both_ways = grpc.stream_stream_rpc_method_handler(answer)
    assert await intercepted(both_ways) is both_ways
    assert await intercepted(None) is None
