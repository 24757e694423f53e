"""Clients that leave, freeze, do not read, or come in thousands, at every point of a call's life.

Real processes: a scripted engine behind real listeners. A stage is seen (in GetLoad, or inside the server)
before the fault comes; afterwards the server must be as it was, see `tests/support/server_aftermath.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from photon_grpc.v1 import inference_pb2
from tests.support.call_stages import STAGES, Staged, StagedServers, StageMissedError

# A clock must leave a slow machine the time to come to the stage; the next is tried when it did not.
_CLOCKS_S = (1.0, 5.0, 25.0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedServers]:
    with ExitStack() as stack:
        servers = StagedServers(tmp_path_factory.mktemp("servers"), stack)
        yield servers
        servers.stop()


def reason_of(error: grpc.RpcError) -> str:
    """Of its ErrorInfo."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return str(info.reason)


# --- 23 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_fault_23_cancel_in_every_state(servers: StagedServers, stage: str) -> None:
    with servers.staged(stage) as at:
        at.call.cancel()
        assert at.call.code() is grpc.StatusCode.CANCELLED
    at.check("CANCELLED")


# --- 24 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_fault_24_a_deadline_in_every_state(servers: StagedServers, stage: str) -> None:
    for timeout_s in _CLOCKS_S:
        try:
            with servers.staged(stage, timeout_s=timeout_s) as at:
                assert at.call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        except StageMissedError:
            continue
        # Whose clock is first, the client's or the server's, decides what the server calls it.
        at.check("DEADLINE_EXCEEDED", "CANCELLED")
        return
    pytest.fail("no deadline was long enough")


def seconds(value: float) -> dict[str, int]:
    """A Duration."""
    return {"seconds": int(value), "nanos": round(value % 1 * 1e9)}


def end_of(at: Staged) -> str:
    """The reason with which the call ends: that of its error, or TIME_LIMIT for the end of its text."""
    try:
        messages = list(at.call)
    except grpc.RpcError as error:
        return reason_of(error)
    assert messages[-1].WhichOneof("event") == "summary"
    (finished,) = (m.finished for m in messages if m.WhichOneof("event") == "finished")
    return inference_pb2.FinishReason.Name(finished.finish.reason).removeprefix("FINISH_REASON_")


# Each clock with what comes of it at that stage: those that no longer count there must do nothing, so the
# last of several clocks is the one that ends the call.
CLOCKS = [
    ("queued", ("queue_timeout",), "QUEUE_TIMEOUT"),
    ("queued", ("first_token_budget",), "FIRST_TOKEN_TIMEOUT"),
    ("queued", ("time_limit",), "TIME_LIMIT"),
    ("prefilling", ("queue_timeout", "first_token_budget"), "FIRST_TOKEN_TIMEOUT"),
    ("prefilling", ("queue_timeout", "time_limit"), "TIME_LIMIT"),
    *(
        (stage, ("queue_timeout", "first_token_budget", "time_limit"), "TIME_LIMIT")
        for stage in ("decoding", "preempted", "writing_the_first", "writing")
    ),
]


@pytest.mark.parametrize(("stage", "clocks", "expected"), CLOCKS)
def test_fault_24_each_soft_clock_in_every_state(
    servers: StagedServers, stage: str, clocks: tuple[str, ...], expected: str
) -> None:
    for clock_s in _CLOCKS_S:
        # The last is the longest.
        asked = {name: seconds(clock_s if name == clocks[-1] else clock_s * 0.7) for name in clocks}
        stop = {"time_limit": asked.pop("time_limit")} if "time_limit" in asked else {}
        started = time.monotonic()
        try:
            with servers.staged(stage, scheduling=asked, stop=stop) as at:
                assert end_of(at) == expected
        except StageMissedError:
            continue
        assert time.monotonic() - started >= clock_s, "a clock that does not count ended it"
        at.check("OK" if expected == "TIME_LIMIT" else "DEADLINE_EXCEEDED")
        return
    pytest.fail("no clock was long enough")
