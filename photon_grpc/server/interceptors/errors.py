"""Turns every error of a call into its status, and gives every call its request id.

The id (the caller's `x-request-id` where that is usable, else a fresh one) goes into the call's
trailing metadata at once; that is its one home, where the servicer may replace it by the id in the
body. Knows no message type. Event loop only.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NoReturn

import grpc
import structlog

from photon_grpc.server.deserialize import Behavior
from photon_grpc.server.sends import send_by
from photon_grpc.server.status import REQUEST_ID_KEY, RpcStatus, is_foreseen, reason_of, to_status
from photon_grpc.telemetry.call_record import current_call
from photon_grpc.telemetry.tracebacks import without_words

# How long a handler waits for its client to take a status.
_STATUS_S = 2.0
_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = structlog.get_logger(__name__)


def is_usable_id(request_id: str) -> bool:
    """Whether `request_id` may stand in metadata and logs as it is."""
    return _USABLE_ID.fullmatch(request_id) is not None


# The caller leaves, a generator is closed, the process is to end. Other errors that are no Exception, as the
# panic of a library in Rust, are errors of a call like any other.
_NOT_OURS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


def request_id_of(context: Any) -> str:
    """The id of the call behind `context`."""
    for key, value in context.trailing_metadata():
        if key == REQUEST_ID_KEY:
            assert isinstance(value, str)
            return value
    raise LookupError("the error interceptor is not installed")


def set_request_id(context: Any, request_id: str) -> None:
    """Make `request_id`, which must be usable, the id of the call behind `context`."""
    context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))


def _initial_id(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and is_usable_id(value):
            return value
    return uuid.uuid4().hex


def metadata_bytes(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """The size of metadata as SETTINGS_MAX_HEADER_LIST_SIZE counts it, RFC 9113 section 6.5.2."""
    return sum(len(key) + len(value) + 32 for key, value in metadata)


async def _require_small_metadata(context: Any, max_metadata_bytes: int) -> None:
    if metadata_bytes(context.invocation_metadata() or ()) > max_metadata_bytes:
        # As grpc's own refusal, which has no details either.
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the metadata is too large")


def _guard(behavior: Behavior, method: str, max_metadata_bytes: int) -> Behavior:
    async def guarded(request: Any, context: Any) -> Any:
        set_request_id(context, _initial_id(context))
        await _require_small_metadata(context, max_metadata_bytes)
        try:
            return await behavior(request, context)
        except (grpc.aio.AbortError, *_NOT_OURS):
            raise  # a status that is already sent, or no error of the call
        except BaseException as error:  # noqa: BLE001  # grpc would leave a call without a status for some
            status = _status_of(error, context, method)
        # Outside of the handler: grpc keeps the exception of an abort for a while, and with the error as its
        # context it would keep all that the call had.
        return await _end(context, status)

    return guarded


def _guard_both_ways(
    behavior: Callable[[Any, Any], AsyncIterator[Any]], method: str, max_metadata_bytes: int
) -> Any:
    async def guarded(requests: Any, context: Any) -> AsyncIterator[Any]:
        set_request_id(context, _initial_id(context))
        await _require_small_metadata(context, max_metadata_bytes)
        try:
            async for response in behavior(requests, context):
                yield response
            return
        except (grpc.aio.AbortError, *_NOT_OURS):
            raise
        except BaseException as error:  # noqa: BLE001  # as above
            status = _status_of(error, context, method)
        await _end(context, status)

    return guarded


def _status_of(error: BaseException, context: Any, method: str) -> RpcStatus:
    """What the client is told of `error`; the log and the call's record hear of it here."""
    request_id = request_id_of(context)
    record = current_call.get()
    if record is not None:
        record.reason = reason_of(error)
    if not is_foreseen(error):
        where = without_words(error)
        _log.error("call failed", method=method, request_id=request_id, traceback=where)
    return to_status(error, request_id)


async def _end(context: Any, status: RpcStatus) -> NoReturn:
    """Send `status` and raise grpc's AbortError; CancelledError where the client does not take it.

    The status waits behind a response that a client does not read, and grpc goes on holding it until the
    client reads or leaves. The call is over here long before.
    """
    record = current_call.get()
    if record is not None:
        record.code = str(status.code.name)
    try:
        async with asyncio.timeout(_STATUS_S):
            await send_by(context, context.abort_with_status(status))
    except (TimeoutError, grpc.aio.InternalError):
        raise asyncio.CancelledError from None
    raise AssertionError("grpc's abort came back")


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Wraps every handler; of those that take a stream of requests there are only bidirectional ones.

    Calls with more than `max_metadata_bytes` of metadata go no further. Clients of grpc are told that limit
    and keep to it; of others grpc takes a megabyte in several frames in spite of it.
    """

    def __init__(self, max_metadata_bytes: int) -> None:
        self._max_metadata_bytes = max_metadata_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if handler.request_streaming:
            guarded = _guard_both_ways(handler.stream_stream, method, self._max_metadata_bytes)
            return handler._replace(stream_stream=guarded)
        if handler.response_streaming:
            return handler._replace(unary_stream=self._guarded(handler.unary_stream, method))
        return handler._replace(unary_unary=self._guarded(handler.unary_unary, method))

    def _guarded(self, behavior: Behavior, method: str) -> Behavior:
        return _guard(behavior, method, self._max_metadata_bytes)
