"""grpc.health.v1 with its stock client, over real sockets."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    make_server,
    open_channel,
    quick_options,
    rich_error,
    running_server,
    until,
)

pytestmark = pytest.mark.usefixtures("each_listener")

Status = health_pb2.HealthCheckResponse.ServingStatus
READY = ["", "photon.v1.InferenceService", "photon.v1.ModelService"]
LIVE = ["photon.liveness", "photon.v1.ControlService"]


def ask(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def states(health: health_pb2_grpc.HealthStub) -> dict[str, int]:
    return {name: (await health.Check(ask(name))).status for name in (*READY, *LIVE)}


async def test_ready_and_live_follow_the_server() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        assert set((await states(harness.health)).values()) == {Status.SERVING}
        harness.server.set_not_serving()
        expected = dict.fromkeys(READY, Status.NOT_SERVING) | dict.fromkeys(LIVE, Status.SERVING)
        assert await states(harness.health) == expected
        harness.server.set_dead()
        assert set((await states(harness.health)).values()) == {Status.NOT_SERVING}


async def test_a_started_server_is_alive_and_not_ready() -> None:
    server = make_server(FakeFrontDoor(), quick_options())
    ports = await server.start()
    async with open_channel(ports.public) as channel:
        expected = dict.fromkeys(READY, Status.NOT_SERVING) | dict.fromkeys(LIVE, Status.SERVING)
        assert await states(health_pb2_grpc.HealthStub(channel)) == expected
    await server.stop()


async def test_unknown_services() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.health.Check(ask("nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = harness.health.Watch(ask("nobody"))
        assert (await watch.read()).status == Status.SERVICE_UNKNOWN
        watch.cancel()


async def test_malformed_probe() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.public.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff")
        assert rich_error(caught.value).reason == "MALFORMED_MESSAGE"


async def test_watch_sends_now_and_on_each_change_only() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        watches = [harness.health.Watch(ask(name)) for name in ("", "photon.v1.InferenceService")]
        live = harness.health.Watch(ask("photon.liveness"))
        for watch in (*watches, live):
            assert (await watch.read()).status == Status.SERVING
        harness.server.set_serving()
        harness.server.set_not_serving()
        for watch in watches:
            assert (await watch.read()).status == Status.NOT_SERVING
        harness.server.set_serving()
        for watch in watches:
            assert (await watch.read()).status == Status.SERVING
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await live.read()
        for watch in (*watches, live):
            watch.cancel()


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        before = len(asyncio.all_tasks())
        for _ in range(20):
            watch = harness.health.Watch(ask(""))
            await watch.read()
            watch.cancel()
        await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_an_open_watch_does_not_hold_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    # The stock servicer holds it for the whole grace.
    monkeypatch.setattr("photon_grpc.server.server._STOP_GRACE_S", 1000.0)
    server = make_server(FakeFrontDoor(), quick_options())
    ports = await server.start()
    server.set_serving()
    async with open_channel(ports.public) as public, open_channel(ports.admin or 0) as admin:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(ask("")) for channel in (public, admin)]
        for watch in watches:
            assert (await watch.read()).status == Status.SERVING
        async with asyncio.timeout(30):
            await server.drain()
        for watch in watches:
            assert (await watch.read()).status == Status.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            assert await watch.code() is grpc.StatusCode.OK


async def test_probes_do_no_work_and_are_answered_under_load() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None))
    async with running_server(front_door) as harness:
        request = pb.StreamGenerateRequest(spec=pb.GenerationSpec(text="x"))
        calls = [harness.inference.StreamGenerate(request) for _ in range(8)]
        for call in calls:
            await call.read()
        for _ in range(20):
            assert (await harness.health.Check(ask(""), timeout=30)).status == Status.SERVING
        assert len(front_door.requests) == 8
        for call in calls:
            call.cancel()
        await until(lambda: harness.server.num_live_calls == 0)
