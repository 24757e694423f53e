"""The status table: complete over the error tree, and as the service contract says row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from photon_grpc import errors
from photon_grpc.errors import FieldViolation, PhotonError, StartupError
from photon_grpc.server.status import (
    DETAILS_KEY,
    PUSHBACK_KEY,
    REQUEST_ID_KEY,
    find_row,
    is_foreseen,
    to_status,
)


def unpack(error: BaseException) -> tuple[status_pb2.Status, dict[str, Message]]:
    packed = dict(to_status(error, "id").trailing_metadata)[DETAILS_KEY]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    details: dict[str, Message] = {}
    for item in status.details:
        name = item.type_url.removeprefix("type.googleapis.com/google.rpc.")
        detail = getattr(details_pb2, name)()
        assert item.Unpack(detail)
        details[name] = detail
    return status, details


def leaf_classes(parent: type[PhotonError]) -> Iterator[type[PhotonError]]:
    children = parent.__subclasses__()
    if not children:
        yield parent
    for child in children:
        yield from leaf_classes(child)


VIOLATION = [FieldViolation("spec.sampling.top_p", "must be above 0")]

# error, status, reason, further details, pushback
ROWS = [
    (errors.MalformedMessageError("bad"), "INVALID_ARGUMENT", "MALFORMED_MESSAGE", set(), None),
    (errors.InvalidRequestError(VIOLATION), "INVALID_ARGUMENT", "INVALID_FIELD", {"BadRequest"}, None),
    (
        errors.ContextLengthError("spec.text", 9, 8),
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        {"BadRequest"},
        None,
    ),
    (
        errors.UnsupportedFeatureError("spec.adapter", "no"),
        "UNIMPLEMENTED",
        "UNSUPPORTED_FEATURE",
        {"BadRequest"},
        None,
    ),
    (errors.ModelNotFoundError("m"), "NOT_FOUND", "MODEL_NOT_FOUND", {"ResourceInfo"}, None),
    (errors.RequestNotFoundError("r"), "NOT_FOUND", "REQUEST_NOT_FOUND", {"ResourceInfo"}, None),
    (errors.DuplicateRequestError("r"), "ALREADY_EXISTS", "DUPLICATE_REQUEST", {"ResourceInfo"}, None),
    (errors.DeadlineUnreachableError(3.5), "UNAVAILABLE", "DEADLINE_UNREACHABLE", {"RetryInfo"}, "50"),
    (errors.DeadlineTooShortError(0.25), "DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT", set(), "-1"),
    (
        errors.QuotaExceededError("requests per second", 7.25),
        "RESOURCE_EXHAUSTED",
        "QUOTA_EXCEEDED",
        {"QuotaFailure", "RetryInfo"},
        "7250",
    ),
    (
        errors.QuotaExceededError("tokens per second", math.inf),
        "RESOURCE_EXHAUSTED",
        "QUOTA_EXCEEDED",
        {"QuotaFailure"},
        "-1",
    ),
    (errors.OutOfMemoryError(), "UNAVAILABLE", "OUT_OF_MEMORY", {"RetryInfo"}, "1000"),
    (errors.UnauthenticatedError(), "UNAUTHENTICATED", "UNAUTHENTICATED", set(), None),
    (errors.ForbiddenError(), "PERMISSION_DENIED", "FORBIDDEN", set(), None),
    (errors.EngineStartingError(), "UNAVAILABLE", "STARTING", {"RetryInfo"}, "1000"),
    (errors.EngineDrainingError(), "UNAVAILABLE", "DRAINING", {"RetryInfo"}, "100"),
    (errors.EngineDeadError(), "UNAVAILABLE", "ENGINE_DEAD", {"RetryInfo"}, "100"),
    (errors.OutOfMemoryError(), "UNAVAILABLE", "OUT_OF_MEMORY", {"RetryInfo"}, "1000"),
    (errors.QueueTimeoutError(), "DEADLINE_EXCEEDED", "QUEUE_TIMEOUT", set(), None),
    (errors.FirstTokenTimeoutError(), "DEADLINE_EXCEEDED", "FIRST_TOKEN_TIMEOUT", set(), None),
    (errors.MaxDurationError(), "DEADLINE_EXCEEDED", "MAX_DURATION", set(), None),
    (errors.SlowConsumerError(), "ABORTED", "CLIENT_STALLED", set(), None),
    (errors.OperatorAbortError(), "ABORTED", "ABORTED_BY_OPERATOR", set(), None),
    (errors.RequestFaultError(), "INTERNAL", "REQUEST_FAULT", set(), "-1"),
    (errors.InternalError("some detail"), "INTERNAL", "INTERNAL", set(), "-1"),
]
OVERLOADED = errors.OverloadedError("the queue is full", 1.0)


@pytest.mark.parametrize(("error", "code", "reason", "extra", "pushback"), ROWS, ids=[row[2] for row in ROWS])
def test_row(error: PhotonError, code: str, reason: str, extra: set[str], pushback: str | None) -> None:
    result = to_status(error, "id")
    status, details = unpack(error)
    assert result.code is grpc.StatusCode[code]
    assert status.code == result.code.value[0]
    assert status.message == result.details
    assert details.keys() == {"ErrorInfo", "RequestInfo", *extra}
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (reason, "photon.v1")
    assert details["RequestInfo"].request_id == "id"
    trailers = dict(result.trailing_metadata)
    assert trailers[REQUEST_ID_KEY] == "id"
    assert trailers.get(PUSHBACK_KEY) == pushback
    if "RetryInfo" in extra:
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == int(pushback or 0)


def test_every_error_that_can_reach_a_call_has_its_own_test_row() -> None:
    reachable = {leaf for leaf in leaf_classes(PhotonError) if not issubclass(leaf, StartupError)}
    # Test modules define errors of their own; only the project's tree counts.
    reachable = {leaf for leaf in reachable if leaf.__module__ == errors.__name__}
    assert {type(row[0]) for row in ROWS} >= reachable - {errors.OverloadedError}


def test_every_leaf_is_mapped_to_a_row_of_its_own() -> None:
    leaves = [leaf for leaf in leaf_classes(PhotonError) if leaf.__module__ == errors.__name__]
    rows = {leaf: find_row(leaf) for leaf in leaves if not issubclass(leaf, StartupError)}
    assert not [leaf for leaf, row in rows.items() if row is None]
    reasons = [row.reason for row in rows.values() if row is not None]
    assert len(set(reasons)) == len(reasons)


def test_startup_errors_are_no_answer_to_a_client() -> None:
    assert not is_foreseen(errors.ModelLoadError("/etc/secret"))
    assert to_status(errors.ModelLoadError("/etc/secret"), "id").details == "internal error"


def test_a_subclass_inherits_its_parents_row() -> None:
    class NewQueueTimeout(errors.QueueTimeoutError):
        pass

    assert unpack(NewQueueTimeout())[1]["ErrorInfo"].reason == "QUEUE_TIMEOUT"


def test_a_deadline_that_cannot_be_met_comes_with_the_estimate() -> None:
    unreachable, too_short = errors.DeadlineUnreachableError(3.5), errors.DeadlineTooShortError(0.25)
    assert dict(unpack(unreachable)[1]["ErrorInfo"].metadata) == {"wait_ms": "3500"}
    assert dict(unpack(too_short)[1]["ErrorInfo"].metadata) == {"estimate_ms": "250"}


def test_overload_tells_when_to_come_back_spread_and_bounded() -> None:
    delays = set()
    for _ in range(50):
        status = to_status(OVERLOADED, "id")
        pushback = int(str(dict(status.trailing_metadata)[PUSHBACK_KEY]))
        assert 750 <= pushback <= 1250
        delays.add(pushback)
    assert len(delays) > 1
    for wait, least, most in ((0.0, 50, 50), (3600.0, 3000, 5000), (math.inf, 3000, 5000)):
        error = errors.OverloadedError("full", wait)
        found = {int(str(dict(to_status(error, "id").trailing_metadata)[PUSHBACK_KEY])) for _ in range(50)}
        assert least <= min(found) <= max(found) <= most
        # Those who are refused by a long queue must not come back together either.
        assert len(found) > 1 or least == most
        assert least <= unpack(error)[1]["RetryInfo"].retry_delay.ToMilliseconds() <= most
    assert unpack(OVERLOADED)[0].code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert unpack(OVERLOADED)[1]["ErrorInfo"].reason == "OVERLOADED"


def test_details_name_fields_resources_and_lengths() -> None:
    bad_request = unpack(errors.InvalidRequestError(VIOLATION))[1]["BadRequest"]
    assert [(v.field, v.description) for v in bad_request.field_violations] == [
        ("spec.sampling.top_p", "must be above 0")
    ]
    resource = unpack(errors.ModelNotFoundError("m"))[1]["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("model", "m")
    info = unpack(errors.ContextLengthError("spec.text", 9, 8))[1]["ErrorInfo"]
    assert dict(info.metadata) == {"tokens": "9", "limit": "8"}


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("secret"), errors.InternalError("secret"), PhotonError("secret")]
)
def test_the_unforeseen_says_nothing(error: Exception) -> None:
    status = to_status(error, "id")
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details == "internal error"
    assert b"secret" not in bytes(dict(status.trailing_metadata)[DETAILS_KEY])
    assert not is_foreseen(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError([FieldViolation("f" * 5000, "d" * 5000)] * 3000),
        errors.InvalidRequestError(
            [FieldViolation(f"spec.sampling.logit_bias[{i}]", "日" * 60) for i in range(3000)]
        ),
        errors.ModelNotFoundError("m" * 1_000_000),
        errors.DuplicateRequestError("日" * 1000),
    ],
    ids=["long", "many", "name", "wide"],
)
def test_trailers_fit_in_what_clients_accept(error: PhotonError) -> None:
    status = to_status(error, "i" * 128)
    packed = dict(status.trailing_metadata)[DETAILS_KEY]
    assert len(packed) * 4 / 3 + 3 * len(status.details.encode()) < 8 * 1024 - 512
