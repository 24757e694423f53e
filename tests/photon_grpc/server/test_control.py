"""ControlService, on the admin listener alone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from photon_grpc.engine.messages import EngineStats
from photon_grpc.options import SchedulerOptions
from photon_grpc.v1 import control_pb2, control_pb2_grpc, model_pb2
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    Harness,
    RichError,
    quick_options,
    read_all,
    rich_error,
    running_server,
)
from tests.support.scripted_service import scripted_service

Outcome = control_pb2.AbortResponse.Outcome
State = control_pb2.WatchStateResponse.State


async def refusal(request: control_pb2.AbortRequest) -> RichError:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.Abort(request)
    return rich_error(caught.value)


async def test_abort_one_and_all() -> None:
    front_door = FakeFrontDoor()
    front_door.live_ids = {("", "a"), ("", "b"), ("", "c")}
    async with running_server(front_door) as harness:
        one = await harness.control.Abort(control_pb2.AbortRequest(request_id="a", reason="test"))
        rest = await harness.control.Abort(control_pb2.AbortRequest(all=control_pb2.AllRequests()))
        none = await harness.control.Abort(control_pb2.AbortRequest(all=control_pb2.AllRequests()))
    assert (one.outcome, one.aborted) == (Outcome.OUTCOME_ABORTED, 1)
    assert (rest.outcome, rest.aborted) == (Outcome.OUTCOME_ABORTED, 2)
    assert none.aborted == 0


async def test_abort_of_one_that_is_just_ending() -> None:
    class JustEnding(FakeFrontDoor):
        def abort(self, request_id: str, *, tenant: str = "") -> int:
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


async def test_abort_of_one_tenant_s() -> None:
    front_door = FakeFrontDoor()
    front_door.live_ids = {("alice", "a"), ("alice", "b"), ("bob", "a"), ("bob", "b")}
    async with running_server(front_door) as harness:
        one = await harness.control.Abort(control_pb2.AbortRequest(request_id="a", tenant="alice"))
        assert front_door.live_ids == {("alice", "b"), ("bob", "a"), ("bob", "b")}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.Abort(control_pb2.AbortRequest(request_id="a", tenant="alice"))
        everything = control_pb2.AllRequests()
        two = await harness.control.Abort(control_pb2.AbortRequest(all=everything, tenant="bob"))
        none = await harness.control.Abort(control_pb2.AbortRequest(all=everything, tenant="nobody"))
    assert (one.aborted, two.aborted, none.aborted) == (1, 2, 0)
    assert rich_error(caught.value).reason == "REQUEST_NOT_FOUND"
    assert front_door.live_ids == {("alice", "b")}


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


# --- load and cache, over the whole service with the scripted runner --------------------------------


def stream_request(max_tokens: int, prompt_tokens: int = 40) -> pb.StreamGenerateRequest:
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5 + i % 90 for i in range(prompt_tokens)]))
    spec.stop.max_tokens, spec.stop.ignore_eos = max_tokens, True
    return pb.StreamGenerateRequest(spec=spec)


async def test_rates_and_waits_are_those_of_the_engine(tmp_path: Path) -> None:
    options = replace(quick_options(), scheduler=SchedulerOptions(max_num_seqs=2))
    async with scripted_service(tmp_path, options, step_s=0.002) as harness:
        idle = await harness.control.GetLoad(control_pb2.GetLoadRequest())
        assert idle.output_tokens_per_second == 0
        assert idle.estimated_queue_wait.ToNanoseconds() == 0
        begin = time.monotonic()
        for _ in range(3):
            await asyncio.gather(
                *(read_all(harness.inference.StreamGenerate(stream_request(50))) for _ in range(2))
            )
        calls = [harness.inference.StreamGenerate(stream_request(4000)) for _ in range(5)]
        load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
        while (load.running, load.queued) != (2, 3) or not load.HasField("estimated_queue_wait"):
            load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
        # 300 tokens since `begin`, and what the two that run have brought.
        assert load.output_tokens_per_second > 0.9 * 300 / (time.monotonic() - begin + 5)
        wait_s = load.estimated_queue_wait.ToTimedelta().total_seconds()
        # Four prompts of 40 and their outputs, which were of 50 tokens so far, at one to a thousand a second.
        assert 4 * 90 / 1100 < wait_s < 4 * 90
        for call in calls:
            call.cancel()


async def test_flush_cache(tmp_path: Path) -> None:
    async with scripted_service(tmp_path) as harness:
        await read_all(harness.inference.StreamGenerate(stream_request(8)))
        *_, again = await read_all(harness.inference.StreamGenerate(stream_request(8)))
        assert again.summary.usage.cached_prompt_tokens == 32
        # 40 + 8 tokens, the last of which is never computed: two full blocks of 16.
        flushed = await harness.control.FlushCache(control_pb2.FlushCacheRequest())
        assert flushed.blocks_freed == 2
        assert (await harness.control.FlushCache(control_pb2.FlushCacheRequest())).blocks_freed == 0
        *_, after = await read_all(harness.inference.StreamGenerate(stream_request(8)))
        assert after.summary.usage.cached_prompt_tokens == 0


async def test_flush_cache_may_wait_until_idle(tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.02) as harness:
        call = harness.inference.StreamGenerate(stream_request(3000))
        await call.read()
        flush = harness.control.FlushCache(control_pb2.FlushCacheRequest(wait_idle=True))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.FlushCache(control_pb2.FlushCacheRequest(wait_idle=True), timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not flush.done()
        # Live blocks keep their tokens, though nobody finds them any more.
        assert (await harness.control.FlushCache(control_pb2.FlushCacheRequest())).blocks_freed == 0
        call.cancel()
        assert (await flush).blocks_freed >= 0
        load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
        assert (load.running, load.used_kv_blocks) == (0, 0)


# --- drain ------------------------------------------------------------------------------------------


async def generate(harness: Harness) -> grpc.StatusCode:
    call = harness.inference.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(text="x")))
    return await call.code()


async def drain(harness: Harness, **fields: Any) -> int:
    return (await harness.control.Drain(control_pb2.DrainRequest(**fields))).in_flight


async def health_of(harness: Harness, service: str = "") -> int:
    return (await harness.health.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_drain_refuses_after_the_propagation_and_can_be_undone() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.01))
    async with running_server(front_door, quick_options({"drain_propagation_s": 0.1})) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="x")))
        await call.read()
        assert await drain(harness) == 1
        front_door.script = Script()
        async with asyncio.timeout(30):
            while await generate(harness) is grpc.StatusCode.OK:
                pass
        refused = harness.inference.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(text="x")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused
        assert rich_error(caught.value).reason == "DRAINING"
        # The call in flight goes on: without a grace nothing is ended.
        assert (await call.read()).WhichOneof("event") == "delta"
        assert await drain(harness, undo=True) == 1
        assert await health_of(harness) == health_pb2.HealthCheckResponse.SERVING
        assert await generate(harness) is grpc.StatusCode.OK
        assert (await call.read()).WhichOneof("event") == "delta"
        call.cancel()


async def test_a_drain_accepts_calls_during_the_propagation() -> None:
    async with running_server(FakeFrontDoor(), quick_options({"drain_propagation_s": 100.0})) as harness:
        await drain(harness)
        assert await health_of(harness) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health_of(harness, "photon.liveness") == health_pb2.HealthCheckResponse.SERVING
        assert await generate(harness) is grpc.StatusCode.OK
        await drain(harness, undo=True)


async def test_undo_within_the_propagation_leaves_no_refusal_behind() -> None:
    async with running_server(FakeFrontDoor(), quick_options({"drain_propagation_s": 0.1})) as harness:
        await drain(harness)
        await drain(harness, undo=True)
        await drain(harness, undo=True)
        await asyncio.sleep(0.3)
        assert await generate(harness) is grpc.StatusCode.OK


async def test_a_grace_ends_what_is_still_in_flight() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.01))
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="x")))
        await call.read()
        await drain(harness)
        await drain(harness, grace=Duration(nanos=50_000_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert rich_error(caught.value).reason == "DRAINING"
        assert await drain(harness, undo=True) == 0


async def test_a_drain_is_not_undone_once_the_server_leaves() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.01))
    async with running_server(front_door, quick_options({"drain_propagation_s": 100.0})) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="x")))
        await call.read()
        await drain(harness)
        leaving = asyncio.create_task(harness.server.drain())
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(harness, undo=True)
        assert rich_error(caught.value).reason == "DRAINING"
        harness.server.hurry()
        await leaving
        with pytest.raises(grpc.aio.AioRpcError, match="draining"):
            await read_all(call)


async def test_a_model_that_becomes_ready_in_a_drain_is_not_announced() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        harness.server.set_not_serving()
        await drain(harness)
        harness.server.set_serving()
        assert await health_of(harness) == health_pb2.HealthCheckResponse.NOT_SERVING
        await drain(harness, undo=True)
        assert await health_of(harness) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "request_",
    [
        control_pb2.DrainRequest(grace=Duration(seconds=-1)),
        control_pb2.DrainRequest(grace=Duration(seconds=100_000)),
        control_pb2.DrainRequest(grace=Duration(seconds=1), undo=True),
    ],
)
async def test_a_drain_that_makes_no_sense(request_: control_pb2.DrainRequest) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.Drain(request_)
        assert rich_error(caught.value).fields == ["grace"]
        assert await health_of(harness) == health_pb2.HealthCheckResponse.SERVING


# --- watching ---------------------------------------------------------------------------------------


async def test_watch_state_tells_every_change_and_ends_with_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An open watch must not hold the stop for its grace.
    monkeypatch.setattr("photon_grpc.server.server._STOP_GRACE_S", 1000.0)
    async with running_server(FakeFrontDoor()) as harness:
        call = harness.control.WatchState(control_pb2.WatchStateRequest())
        first = await call.read()
        info = await harness.models.GetServerInfo(model_pb2.GetServerInfoRequest())
        assert first.instance_id == info.instance_id
        assert first.state == State.STATE_READY
        assert (first.load.running, first.load.queued) == (2, 3)
        await drain(harness)
        second = await call.read()
        await drain(harness, undo=True)
        third = await call.read()
        assert [second.state, third.state] == [State.STATE_DRAINING, State.STATE_READY]
        assert [second.revision, third.revision] == [first.revision + 1, first.revision + 2]
        assert second.detail
        # A snapshot is whole: a watcher that comes late has missed nothing.
        late = await harness.control.WatchState(control_pb2.WatchStateRequest()).read()
        assert late == third
        async with asyncio.timeout(30):
            stopping = asyncio.create_task(harness.server.drain())
            rest = await read_all(call)
            await stopping
        assert {message.state for message in rest} == {State.STATE_DRAINING}
        assert await call.code() is grpc.StatusCode.OK


async def test_watch_state_tells_of_a_start_and_of_a_death() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        harness.server.set_not_serving()
        call = harness.control.WatchState(control_pb2.WatchStateRequest())
        states = [(await call.read()).state]
        harness.server.set_serving()
        states.append((await call.read()).state)
        harness.server.set_dead()
        last = await call.read()
        assert [*states, last.state] == [State.STATE_STARTING, State.STATE_READY, State.STATE_FAILED]
        assert last.detail == "the engine has stopped"


async def test_watch_state_repeats_the_load_at_its_interval() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        request = control_pb2.WatchStateRequest(load_interval=Duration(nanos=100_000_000))
        call = harness.control.WatchState(request)
        first = await call.read()
        front_door.engine_stats = EngineStats(running=9)
        front_door.output_tokens_per_second = 12.5
        front_door.estimated_queue_wait_s = 0.25
        second = await call.read()
        assert second.revision == first.revision
        assert second.load.running == 9
        assert second.load.output_tokens_per_second == 12.5
        assert second.load.estimated_queue_wait.ToMilliseconds() == 250
        assert not first.load.HasField("estimated_queue_wait")


@pytest.mark.parametrize("interval", [Duration(), Duration(nanos=1), Duration(seconds=100_000)])
async def test_an_interval_that_makes_no_sense(interval: Duration) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(harness.control.WatchState(control_pb2.WatchStateRequest(load_interval=interval)))
        assert rich_error(caught.value).fields == ["load_interval"]
