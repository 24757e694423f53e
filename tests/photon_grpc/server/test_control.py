"""ControlService, on the admin listener alone."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from photon_grpc.v1 import control_pb2, control_pb2_grpc
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import RichError, rich_error, running_server

Outcome = control_pb2.AbortResponse.Outcome


async def refusal(request: control_pb2.AbortRequest) -> RichError:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.Abort(request)
    return rich_error(caught.value)


async def test_abort_one_and_all() -> None:
    front_door = FakeFrontDoor()
    front_door.live_ids = {"a", "b", "c"}
    async with running_server(front_door) as harness:
        one = await harness.control.Abort(control_pb2.AbortRequest(request_id="a", reason="test"))
        rest = await harness.control.Abort(control_pb2.AbortRequest(all=control_pb2.AllRequests()))
        none = await harness.control.Abort(control_pb2.AbortRequest(all=control_pb2.AllRequests()))
    assert (one.outcome, one.aborted) == (Outcome.OUTCOME_ABORTED, 1)
    assert (rest.outcome, rest.aborted) == (Outcome.OUTCOME_ABORTED, 2)
    assert none.aborted == 0


async def test_abort_of_one_that_is_just_ending() -> None:
    class JustEnding(FakeFrontDoor):
        def abort(self, request_id: str) -> int:
            return 0

    async with running_server(JustEnding()) as harness:
        response = await harness.control.Abort(control_pb2.AbortRequest(request_id="a"))
    assert (response.outcome, response.aborted) == (Outcome.OUTCOME_ALREADY_FINISHED, 0)


async def test_abort_of_an_unknown_request() -> None:
    rich = await refusal(control_pb2.AbortRequest(request_id="nobody"))
    assert (rich.code, rich.reason) == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    assert rich.details[error_details_pb2.ResourceInfo].resource_name == "nobody"


async def test_abort_without_a_target() -> None:
    assert (await refusal(control_pb2.AbortRequest())).fields == ["target"]
    assert (await refusal(control_pb2.AbortRequest(request_id=""))).fields == ["request_id"]


async def test_abort_by_tenant_is_unsupported() -> None:
    rich = await refusal(control_pb2.AbortRequest(request_id="a", tenant="t"))
    assert (rich.reason, rich.fields) == ("UNSUPPORTED_FEATURE", ["tenant"])


async def test_load() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
    assert (load.running, load.queued, load.queued_uncached_tokens) == (2, 3, 40)
    assert (load.used_kv_blocks, load.total_kv_blocks) == (25, 100)
    assert (load.kv_utilization, load.prefix_hit_rate) == (0.25, 0.25)


async def test_the_public_listener_has_no_control() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        stub = control_pb2_grpc.ControlServiceStub(harness.public)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetLoad(control_pb2.GetLoadRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_admin_listener_has_no_inference() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        call = harness.admin.unary_unary("/photon.v1.InferenceService/Generate")(b"")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
