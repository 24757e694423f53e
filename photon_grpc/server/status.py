"""The one map from errors to gRPC status, with google.rpc details and retry pushback.

One table, keyed by error class and looked up along the MRO, so that a new subclass inherits its
parent's row until it has its own. Texts are those of `errors.py`, which hold no prompt; anything that
is not a PhotonError becomes INTERNAL with fixed text. Pure functions, any thread.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from photon_grpc import errors

DOMAIN = "photon.v1"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
REQUEST_ID_KEY = "photon-request-id"

# Clients accept 8 KiB of metadata by default and the details travel as base64, so what echoes the
# caller's own input is cut to these bounds.
_MAX_MESSAGE_BYTES = 512
_MAX_NAME_BYTES = 128
_MAX_DESCRIPTION_BYTES = 200
_MAX_VIOLATION_BYTES = 2048

_MIN_RETRY_MS = 50
_MAX_RETRY_MS = 5000
_RETRY_SPREAD = 0.25

Details = Callable[[errors.PhotonError], Iterator[Message]]


def _cut(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def _no_details(error: errors.PhotonError) -> Iterator[Message]:
    yield from ()


def _bad_request(error: errors.PhotonError) -> Iterator[Message]:
    assert isinstance(error, errors.RequestError)
    message = error_details_pb2.BadRequest()
    size = 0
    for violation in error.violations:
        field = _cut(violation.field, _MAX_NAME_BYTES)
        description = _cut(violation.description, _MAX_DESCRIPTION_BYTES)
        size += len(field.encode()) + len(description.encode())
        if size > _MAX_VIOLATION_BYTES:
            break
        message.field_violations.add(field=field, description=description)
    yield message


def _resource(error: errors.PhotonError) -> Iterator[Message]:
    name = getattr(error, "name", "")
    yield error_details_pb2.ResourceInfo(
        resource_type=getattr(error, "resource_type", ""), resource_name=_cut(name, _MAX_NAME_BYTES)
    )


def _quota(error: errors.PhotonError) -> Iterator[Message]:
    assert isinstance(error, errors.QuotaExceededError)
    message = error_details_pb2.QuotaFailure()
    message.violations.add(subject="tenant", description=error.message)
    yield message


def _no_metadata(error: errors.PhotonError) -> dict[str, str]:
    return {}


def _context_length(error: errors.PhotonError) -> dict[str, str]:
    assert isinstance(error, errors.ContextLengthError)
    return {"tokens": str(error.num_tokens), "limit": str(error.limit)}


def _wait(error: errors.PhotonError) -> dict[str, str]:
    assert isinstance(error, errors.DeadlineUnreachableError)
    return {"wait_ms": str(round(error.retry_after_s * 1000))}


def _estimate(error: errors.PhotonError) -> dict[str, str]:
    assert isinstance(error, errors.DeadlineTooShortError)
    return {"estimate_ms": str(round(error.estimate_s * 1000))}


def _never(error: errors.PhotonError) -> int | None:
    return None


def _after(milliseconds: int) -> Callable[[errors.PhotonError], int]:
    return lambda error: milliseconds


def _until_refill(error: errors.PhotonError) -> int:
    """The time until the tenant's bucket holds enough again; -1 if it never will."""
    assert isinstance(error, errors.QuotaExceededError)
    return -1 if math.isinf(error.retry_after_s) else max(1, math.ceil(error.retry_after_s * 1000))


def _when_there_is_room(error: errors.PhotonError) -> int:
    """The estimated wait, spread by a quarter so that the refused do not all come back at once.

    Cut before it is spread, or a long queue would send all of them back in the same moment.
    """
    assert isinstance(error, errors.CapacityError)
    wait = min(error.retry_after_s * 1000, _MAX_RETRY_MS / (1 + _RETRY_SPREAD))
    return max(round(wait * random.uniform(1 - _RETRY_SPREAD, 1 + _RETRY_SPREAD)), _MIN_RETRY_MS)


@dataclass(frozen=True, slots=True)
class Row:
    """How one error class looks on the wire.

    `pushback` gives the milliseconds a client should wait (also sent as RetryInfo), -1 for "never
    retry", None to say nothing.
    """

    code: grpc.StatusCode
    reason: str
    details: Details = _no_details
    metadata: Callable[[errors.PhotonError], dict[str, str]] = _no_metadata
    pushback: Callable[[errors.PhotonError], int | None] = _never


_Code = grpc.StatusCode

TABLE: dict[type[errors.PhotonError], Row] = {
    errors.MalformedMessageError: Row(_Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    errors.InvalidRequestError: Row(_Code.INVALID_ARGUMENT, "INVALID_FIELD", _bad_request),
    errors.ContextLengthError: Row(
        _Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", _bad_request, _context_length
    ),
    errors.UnsupportedFeatureError: Row(_Code.UNIMPLEMENTED, "UNSUPPORTED_FEATURE", _bad_request),
    errors.ModelNotFoundError: Row(_Code.NOT_FOUND, "MODEL_NOT_FOUND", _resource),
    errors.RequestNotFoundError: Row(_Code.NOT_FOUND, "REQUEST_NOT_FOUND", _resource),
    errors.DuplicateRequestError: Row(_Code.ALREADY_EXISTS, "DUPLICATE_REQUEST", _resource),
    errors.UnauthenticatedError: Row(_Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.ForbiddenError: Row(_Code.PERMISSION_DENIED, "FORBIDDEN"),
    errors.OverloadedError: Row(_Code.UNAVAILABLE, "OVERLOADED", pushback=_when_there_is_room),
    errors.DeadlineUnreachableError: Row(
        _Code.UNAVAILABLE, "DEADLINE_UNREACHABLE", metadata=_wait, pushback=_after(_MIN_RETRY_MS)
    ),
    errors.QuotaExceededError: Row(
        _Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", _quota, pushback=_until_refill
    ),
    errors.OutOfMemoryError: Row(_Code.UNAVAILABLE, "OUT_OF_MEMORY", pushback=_after(1000)),
    errors.EngineStartingError: Row(_Code.UNAVAILABLE, "STARTING", pushback=_after(1000)),
    errors.EngineDrainingError: Row(_Code.UNAVAILABLE, "DRAINING", pushback=_after(100)),
    errors.EngineDeadError: Row(_Code.UNAVAILABLE, "ENGINE_DEAD", pushback=_after(100)),
    errors.QueueTimeoutError: Row(_Code.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT"),
    errors.FirstTokenTimeoutError: Row(_Code.DEADLINE_EXCEEDED, "FIRST_TOKEN_TIMEOUT"),
    errors.MaxDurationError: Row(_Code.DEADLINE_EXCEEDED, "MAX_DURATION"),
    errors.DeadlineTooShortError: Row(
        _Code.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT", metadata=_estimate, pushback=_after(-1)
    ),
    errors.SlowConsumerError: Row(_Code.ABORTED, "CLIENT_STALLED"),
    errors.OperatorAbortError: Row(_Code.ABORTED, "ABORTED_BY_OPERATOR"),
    errors.RequestFaultError: Row(_Code.INTERNAL, "REQUEST_FAULT", pushback=_after(-1)),
    errors.InternalError: Row(_Code.INTERNAL, "INTERNAL", pushback=_after(-1)),
}

_UNFORESEEN = errors.InternalError()


def find_row(error_class: type[BaseException]) -> Row | None:
    """The row of the nearest mapped ancestor of `error_class`; None when there is none."""
    for ancestor in error_class.__mro__:
        row = TABLE.get(ancestor)
        if row is not None:
            return row
    return None


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What `ServicerContext.abort_with_status` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def is_foreseen(error: BaseException) -> bool:
    """Whether the table has a row that says more of `error` than "internal error"."""
    row = find_row(type(error))
    return row is not None and row is not TABLE[errors.InternalError]


def reason_of(error: BaseException) -> str:
    """The reason that `to_status` tells of `error`."""
    return (find_row(type(error)) or TABLE[errors.InternalError]).reason


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code that `to_status` gives `error`."""
    return (find_row(type(error)) or TABLE[errors.InternalError]).code


def to_status(error: BaseException, request_id: str) -> RpcStatus:
    """The status and trailers that `error` ends its call with.

    Always ErrorInfo and RequestInfo; the rest by the table. An error without a row is INTERNAL with
    fixed text, whatever it says itself.
    """
    code, status, pushback = _tell(error, request_id)
    trailers: list[tuple[str, str | bytes]] = [
        (REQUEST_ID_KEY, request_id),
        (DETAILS_KEY, status.SerializeToString()),
    ]
    if pushback is not None:
        trailers.append((PUSHBACK_KEY, str(pushback)))
    return RpcStatus(code, status.message, tuple(trailers))


def to_message(error: BaseException, request_id: str) -> status_pb2.Status:
    """The same status for the inside of a response; `request_id` is that of the request it is about."""
    return _tell(error, request_id)[1]


def _tell(error: BaseException, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status, int | None]:
    """`(code, status with its details, pushback)`."""
    row = find_row(type(error))
    if row is None or not isinstance(error, errors.PhotonError):
        row, error = TABLE[errors.InternalError], _UNFORESEEN
    elif not is_foreseen(error):
        error = _UNFORESEEN
    text = _cut(error.message, _MAX_MESSAGE_BYTES)
    pushback = row.pushback(error)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=row.metadata(error)),
        error_details_pb2.RequestInfo(request_id=request_id),
        *row.details(error),
    ]
    if pushback is not None and pushback >= 0:
        seconds, milliseconds = divmod(pushback, 1000)
        delay = Duration(seconds=seconds, nanos=milliseconds * 1_000_000)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=row.code.value[0], message=text)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return row.code, status, pushback
