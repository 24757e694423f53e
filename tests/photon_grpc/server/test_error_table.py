"""The table of errors as the service promises it, written out, against what a client reads over a channel.

Every leaf of the error tree that a call can end in has to be here, and is sent through every way in which a
generation answers: the status of a call, and the status of one item of a batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2

from photon_grpc import errors
from photon_grpc.errors import FieldViolation, PhotonError, StartupError
from photon_grpc.server.status import PUSHBACK_KEY, REQUEST_ID_KEY
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import Harness, RichError, rich_error, rich_item_error, running_server

CANARY = "canary-5b1e"
SPEC = pb.GenerationSpec(text="x")


@dataclass(frozen=True)
class Row:
    """What `error` looks like to a client. `details` are those beside ErrorInfo and RequestInfo, as JSON;
    `pushback` the milliseconds of the trailer, at least and at most."""

    error: PhotonError
    code: str
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    pushback: tuple[int, int] | None = None


def bad(*paths: str) -> dict[str, Any]:
    return {"BadRequest": {"fieldViolations": [{"field": path, "description": "is wrong"} for path in paths]}}


def resource(kind: str) -> dict[str, Any]:
    return {"ResourceInfo": {"resourceType": kind, "resourceName": "it"}}


WRONG = [FieldViolation("spec.text", "is wrong"), FieldViolation("spec.stop.max_tokens", "is wrong")]
TOO_LONG = "the prompt has 9 tokens, at most 8 fit"
QUOTA = {
    "QuotaFailure": {
        "violations": [
            {"subject": "tenant", "description": "the tenant's quota of tokens per second is used up"}
        ]
    }
}
RETRY = {"RetryInfo": ...}
TABLE = [
    Row(errors.MalformedMessageError("the request is no message"), "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
    Row(
        errors.InvalidRequestError(WRONG),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        bad("spec.text", "spec.stop.max_tokens"),
    ),
    Row(
        errors.ContextLengthError("spec.text", 9, 8),
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        {"BadRequest": {"fieldViolations": [{"field": "spec.text", "description": TOO_LONG}]}},
        {"tokens": "9", "limit": "8"},
    ),
    Row(
        errors.UnsupportedFeatureError("spec.adapter", "is wrong"),
        "UNIMPLEMENTED",
        "UNSUPPORTED_FEATURE",
        bad("spec.adapter"),
    ),
    Row(errors.UnauthenticatedError(), "UNAUTHENTICATED", "UNAUTHENTICATED"),
    Row(errors.ForbiddenError(), "PERMISSION_DENIED", "FORBIDDEN"),
    Row(errors.ModelNotFoundError("it"), "NOT_FOUND", "MODEL_NOT_FOUND", resource("model")),
    Row(errors.RequestNotFoundError("it"), "NOT_FOUND", "REQUEST_NOT_FOUND", resource("request")),
    Row(errors.DuplicateRequestError("it"), "ALREADY_EXISTS", "DUPLICATE_REQUEST", resource("request")),
    Row(
        errors.QuotaExceededError("tokens per second", 7.25),
        "RESOURCE_EXHAUSTED",
        "QUOTA_EXCEEDED",
        QUOTA | RETRY,
        pushback=(7250, 7250),
    ),
    Row(
        errors.QuotaExceededError("tokens per second", math.inf),
        "RESOURCE_EXHAUSTED",
        "QUOTA_EXCEEDED",
        QUOTA,
        pushback=(-1, -1),
    ),
    Row(errors.OverloadedError("full", 1.0), "UNAVAILABLE", "OVERLOADED", RETRY, pushback=(750, 1250)),
    Row(
        errors.DeadlineUnreachableError(3.5),
        "UNAVAILABLE",
        "DEADLINE_UNREACHABLE",
        RETRY,
        {"wait_ms": "3500"},
        (50, 50),
    ),
    Row(
        errors.DeadlineTooShortError(0.25),
        "DEADLINE_EXCEEDED",
        "DEADLINE_TOO_SHORT",
        metadata={"estimate_ms": "250"},
        pushback=(-1, -1),
    ),
    Row(errors.EngineStartingError(), "UNAVAILABLE", "STARTING", RETRY, pushback=(1000, 1000)),
    Row(errors.EngineDrainingError(), "UNAVAILABLE", "DRAINING", RETRY, pushback=(100, 100)),
    Row(errors.EngineDeadError(), "UNAVAILABLE", "ENGINE_DEAD", RETRY, pushback=(100, 100)),
    Row(errors.OutOfMemoryError(), "UNAVAILABLE", "OUT_OF_MEMORY", RETRY, pushback=(1000, 1000)),
    Row(errors.QueueTimeoutError(), "DEADLINE_EXCEEDED", "QUEUE_TIMEOUT"),
    Row(errors.FirstTokenTimeoutError(), "DEADLINE_EXCEEDED", "FIRST_TOKEN_TIMEOUT"),
    Row(errors.MaxDurationError(), "DEADLINE_EXCEEDED", "MAX_DURATION"),
    Row(errors.SlowConsumerError(), "ABORTED", "CLIENT_STALLED"),
    Row(errors.OperatorAbortError(), "ABORTED", "ABORTED_BY_OPERATOR"),
    Row(errors.RequestFaultError(), "INTERNAL", "REQUEST_FAULT", pushback=(-1, -1)),
]
INTERNAL = Row(errors.InternalError(CANARY), "INTERNAL", "INTERNAL", pushback=(-1, -1))
# In the design, without anything that could raise them: constraints, adapters, resumed streams.
PLANNED = {"CONSTRAINT_INVALID", "ADAPTER_NOT_FOUND", "REPLAY_EVICTED"}


def leaves(parent: type[PhotonError] = PhotonError) -> Iterator[type[PhotonError]]:
    # Test modules define errors of their own; only the project's tree counts.
    children = [child for child in parent.__subclasses__() if child.__module__ == errors.__name__]
    if not children:
        yield parent
    for child in children:
        yield from leaves(child)


async def end_of(harness: Harness, method: str) -> RichError:
    """How a call of the method ends, or its one item."""
    stubs = harness.inference
    try:
        if method == "Generate":
            await stubs.Generate(pb.GenerateRequest(request_id="mine", spec=SPEC))
        elif method == "StreamGenerate":
            async for _ in stubs.StreamGenerate(pb.StreamGenerateRequest(request_id="mine", spec=SPEC)):
                pass
        else:
            request = pb.BatchGenerateRequest(request_id="mine", specs=[SPEC])
            (item,) = [item async for item in stubs.BatchGenerate(request)]
            assert item.HasField("error")
            return rich_item_error(item.error)
    except grpc.aio.AioRpcError as error:
        return rich_error(error)
    raise AssertionError("it ended well")


METHODS = ["Generate", "StreamGenerate", "BatchGenerate"]


def test_every_leaf_has_its_row() -> None:
    reachable = {leaf for leaf in leaves() if not issubclass(leaf, StartupError)}
    assert {type(row.error) for row in TABLE} == reachable


@pytest.mark.parametrize("method", METHODS)
async def test_every_row_is_what_a_client_reads(method: str) -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        for row in [*TABLE, INTERNAL]:
            front_door.script = Script(error=row.error)
            rich = await end_of(harness, method)
            assert (rich.code.name, rich.reason) == (row.code, row.reason)
            assert rich.info.domain == "photon.v1"
            assert dict(rich.info.metadata) == row.metadata, row.reason
            request_id = rich.details.pop(error_details_pb2.RequestInfo).request_id
            rich.details.pop(error_details_pb2.ErrorInfo)
            told = {kind.DESCRIPTOR.name: MessageToDict(detail) for kind, detail in rich.details.items()}
            assert told.keys() == row.details.keys(), row.reason
            assert {k: v for k, v in told.items() if k != "RetryInfo"} == {
                k: v for k, v in row.details.items() if k != "RetryInfo"
            }
            if "RetryInfo" in told:
                assert row.pushback is not None
                delay = rich.details[error_details_pb2.RetryInfo].retry_delay.ToMilliseconds()
                assert row.pushback[0] <= delay <= row.pushback[1], row.reason
            if not rich.trailers:
                # An item's status is inside a call that has no such trailers.
                assert request_id == "mine.0"
                continue
            assert request_id == rich.trailers[REQUEST_ID_KEY] == "mine"
            if row.pushback is None:
                assert PUSHBACK_KEY not in rich.trailers, row.reason
            else:
                pushback = int(str(rich.trailers[PUSHBACK_KEY]))
                assert row.pushback[0] <= pushback <= row.pushback[1], row.reason
                assert "RetryInfo" not in told or pushback == delay


def hidden() -> Iterator[BaseException]:
    """Errors that hold what is not for a client: as their text, or behind a text that is."""
    yield from (ValueError(CANARY), KeyError(CANARY), OSError(2, CANARY, CANARY), PhotonError(CANARY))
    yield from (errors.InternalError(CANARY), errors.ModelLoadError(CANARY), errors.ConfigError(CANARY))
    yield errors.KernelCompileError(CANARY, CANARY, {CANARY: 1}, CANARY)
    for row in TABLE:
        error = type(row.error).__new__(type(row.error), *row.error.args)
        error.__dict__.update(row.error.__dict__)
        error.__cause__ = ValueError(CANARY)
        error.add_note(CANARY)
        error.inner = CANARY  # type: ignore[attr-defined]
        yield error


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_inside_stays_inside(method: str) -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        for error in hidden():
            assert isinstance(error, Exception)
            front_door.script = Script(error=error)
            rich = await end_of(harness, method)
            assert CANARY not in repr(rich), repr(error)
            assert not re.search(r"Traceback|Error\(|\.py\b|photon_grpc", repr((rich.message, rich.trailers)))
            if isinstance(error, StartupError) or not isinstance(error, PhotonError):
                assert (rich.code.name, rich.reason, rich.message) == (
                    "INTERNAL",
                    "INTERNAL",
                    "internal error",
                )


def test_the_contract_s_readme_has_the_table() -> None:
    text = (Path(__file__).resolve().parents[3] / "proto" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Errors")[2].partition("\n## ")[0]
    documented: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"[A-Z_, ]+", cells[0]):
            for reason in cells[0].split(","):
                documented[reason.strip()] = cells[1]
    assert documented == {row.reason: row.code for row in [*TABLE, INTERNAL]}
    assert not PLANNED & documented.keys()
