"""What a call with validate_only is told of its admission, against what the same call then meets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from photon_grpc.errors import OverloadedError
from photon_grpc.frontend.events import AdmissionOutlook
from photon_grpc.options import SchedulerOptions, TenantOptions
from photon_grpc.v1 import control_pb2
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import (
    Harness,
    quick_options,
    rich_error,
    rich_item_error,
    running_server,
)
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.usefixtures("each_listener")


def request(max_tokens: int = 7, **values: Any) -> pb.GenerateRequest:
    made = pb.GenerateRequest(request_id="mine", **values)
    made.spec.token_ids.ids.extend([5, 6, 7])
    made.spec.stop.max_tokens, made.spec.stop.ignore_eos = max_tokens, True
    return made


async def outlook(harness: Harness, asked: pb.GenerateRequest) -> pb.Admission:
    validated = pb.GenerateRequest()
    validated.CopyFrom(asked)
    validated.request_id, validated.validate_only = "checked", True
    response = await harness.inference.Generate(validated)
    assert not response.completions
    assert response.HasField("admission")
    return response.admission


async def refusal(harness: Harness, asked: pb.GenerateRequest) -> str:
    """The reason that the call itself ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await harness.inference.Generate(asked)
    return rich_error(caught.value).reason


def steps_of(harness: Harness) -> int:
    return harness.server._inference._front_door.stats().steps


async def test_an_idle_server_would_take_it_at_once_and_makes_no_step(tmp_path: Path) -> None:
    async with scripted_service(tmp_path) as harness:
        for _ in range(3):
            admission = await outlook(harness, request())
            assert admission.HasField("estimated_wait")
            assert admission.estimated_wait.ToNanoseconds() == 0
            assert not admission.HasField("refusal")
        load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
        assert (load.running, load.queued, load.used_kv_blocks) == (0, 0, 0)
        assert steps_of(harness) == 0
        # The counter counts.
        response = await harness.inference.Generate(request())
        assert not response.HasField("admission")
        assert steps_of(harness) >= 7


async def test_a_quota_is_told_and_not_touched(tmp_path: Path) -> None:
    tenants = TenantOptions(
        max_concurrent_requests=1, requests_per_s=0.001, request_burst=2, tokens_per_s=0.001, token_burst=30
    )
    async with scripted_service(tmp_path, replace(quick_options(), tenants=tenants)) as harness:
        for _ in range(10):
            assert not (await outlook(harness, request())).HasField("refusal")
        never = rich_item_error((await outlook(harness, request(28))).refusal)
        assert (never.code, never.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert error_details_pb2.RetryInfo not in never.details
        await harness.inference.Generate(request(17))
        told = rich_item_error((await outlook(harness, request(17))).refusal)
        assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert "tokens" in told.message
        assert told.details[error_details_pb2.RetryInfo].retry_delay.ToNanoseconds() > 0
        assert told.details[error_details_pb2.RequestInfo].request_id == "checked"
        # The second and last request of the burst is still there.
        await harness.inference.Generate(request(5))
        assert "requests per second" in (await outlook(harness, request(1))).refusal.message
        assert await refusal(harness, request(1)) == "QUOTA_EXCEEDED"


@asynccontextmanager
async def busy(harness: Harness, number: int) -> AsyncIterator[None]:
    """As many streams under way or waiting."""
    calls = []
    for index in range(number):
        asked = pb.StreamGenerateRequest(request_id=f"busy-{index}", spec=request(4000).spec)
        calls.append(harness.inference.StreamGenerate(asked))
    await until_live(harness, number)
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        await until_live(harness, 0)


async def until_live(harness: Harness, number: int) -> None:
    async with asyncio.timeout(30):
        while True:
            load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
            if load.running + load.queued == harness.server.num_live_calls == number:
                return


async def test_a_full_queue_is_told(tmp_path: Path) -> None:
    options = replace(
        quick_options(limits={"max_queued_requests": 1}), scheduler=SchedulerOptions(max_num_seqs=1)
    )
    async with scripted_service(tmp_path, options, step_s=0.01) as harness:
        async with busy(harness, 1):
            assert not (await outlook(harness, request())).HasField("refusal")
        async with busy(harness, 2):
            told = rich_item_error((await outlook(harness, request())).refusal)
            assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
            assert error_details_pb2.RetryInfo in told.details
            assert await refusal(harness, request()) == "OVERLOADED"


async def test_a_deadline_that_the_queue_does_not_allow_is_told(tmp_path: Path) -> None:
    options = replace(quick_options(), scheduler=SchedulerOptions(max_num_seqs=1))
    hurried = request()
    hurried.spec.scheduling.queue_timeout.FromMilliseconds(20)
    async with scripted_service(tmp_path, options, step_s=0.005) as harness, busy(harness, 8):
        # Until the busy engine's pace has been measured nothing is known.
        async with asyncio.timeout(30):
            admission = await outlook(harness, request())
            while not admission.HasField("estimated_wait"):
                admission = await outlook(harness, request())
        assert admission.estimated_wait.ToNanoseconds() > 0
        assert not admission.HasField("refusal")
        told = rich_item_error((await outlook(harness, hurried)).refusal)
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "DEADLINE_UNREACHABLE")
        assert int(told.info.metadata["wait_ms"]) > 20
        assert await refusal(harness, hurried) == "DEADLINE_UNREACHABLE"


async def test_what_is_not_known_is_absent() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        admission = await outlook(harness, request())
        assert admission.estimated_wait.ToMilliseconds() == 500
        front_door.outlook = AdmissionOutlook(None, OverloadedError("the queue is full", 2.0))
        admission = await outlook(harness, request())
    assert not admission.HasField("estimated_wait")
    assert rich_item_error(admission.refusal).reason == "OVERLOADED"
