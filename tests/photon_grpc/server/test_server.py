"""Listeners, options and drain."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.errors import ConfigError, ListenError, StartupError
from photon_grpc.options import AuthOptions, LimitOptions, ServerOptions, TlsOptions
from photon_grpc.server.server import channel_options, check_options, is_loopback
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    make_server,
    open_channel,
    quick_options,
    read_all,
    rich_error,
    running_server,
    until,
    until_not_serving,
)

SPEC = pb.GenerationSpec(text="hello")


def test_channel_options() -> None:
    options = channel_options(ServerOptions(), LimitOptions(), max_admitted=100)
    assert len(dict(options)) == len(options)
    assert dict(options) == {
        "grpc.keepalive_time_ms": 20_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.max_connection_age_ms": 1_800_000,
        "grpc.max_connection_age_grace_ms": 930_000,
        "grpc.max_concurrent_streams": 1024,
        "grpc.max_receive_message_length": 1 << 20,
        "grpc.max_send_message_length": 4 << 20,
        "grpc.max_metadata_size": 8 << 10,
        "grpc.absolute_max_metadata_size": 16 << 10,
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.max_allowed_incoming_connections": 4096,
        "grpc.so_reuseport": 0,
    }


def test_the_cap_on_streams_is_far_above_what_is_admitted_and_never_small() -> None:
    caps = [
        dict(channel_options(ServerOptions(), LimitOptions(), max_admitted))["grpc.max_concurrent_streams"]
        for max_admitted in (1, 256, 257, 1280)
    ]
    assert caps == [1024, 1024, 1028, 5120]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "0.0.0.0"}, "server.host"),
        ({"admin_host": "0.0.0.0"}, "server.admin_host"),
        ({"admin_host": "0.0.0.0", "allow_plaintext": True}, "server.admin_host"),
        ({"reflection": "everywhere"}, "server.reflection"),
    ],
)
def test_exposing_options_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_options(ServerOptions(**settings), TlsOptions(), AuthOptions())


def test_a_mesh_may_ask_for_plaintext() -> None:
    check_options(ServerOptions(host="0.0.0.0", allow_plaintext=True), TlsOptions(), AuthOptions())
    check_options(ServerOptions(admin_host="0.0.0.0", admin_port=-1), TlsOptions(), AuthOptions())


@pytest.mark.usefixtures("each_listener")
async def test_two_servers_do_not_share_a_port() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        second = make_server(FakeFrontDoor(), quick_options({"port": harness.ports.public}))
        with pytest.raises(
            ListenError, match=f"public listener cannot bind 127.0.0.1:{harness.ports.public}"
        ):
            await second.start()
        assert issubclass(ListenError, StartupError)
        await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))


@pytest.mark.usefixtures("each_listener")
async def test_a_failed_admin_bind_leaves_nothing_listening() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        free = make_server(FakeFrontDoor(), quick_options())
        port = (await free.start()).public
        await free.stop()
        clash = make_server(
            FakeFrontDoor(), quick_options({"port": port, "admin_port": harness.ports.public})
        )
        with pytest.raises(ListenError, match="admin"):
            await clash.start()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_the_probe_listener_has_health_and_nothing_else() -> None:
    options = quick_options({"probe_host": "127.0.0.1", "probe_port": 0, "admin_port": -1})
    async with running_server(FakeFrontDoor(), options) as harness:
        assert harness.ports.admin is None
        assert harness.ports.probe is not None
        async with open_channel(harness.ports.probe) as channel:
            response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert response.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/photon.v1.InferenceService/Generate")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.usefixtures("each_listener")
async def test_drain_lets_calls_in_flight_finish_and_refuses_new_ones() -> None:
    resume = asyncio.Event()
    front_door = FakeFrontDoor(Script(num_deltas=20, resume=resume))
    async with running_server(front_door, quick_options({"drain_max_s": 60.0})) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await call.read()
        draining = asyncio.create_task(harness.server.drain())
        await until_not_serving(harness)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))
        rich = rich_error(refused.value)
        assert (rich.code, rich.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        resume.set()
        assert len(await read_all(call)) == 22
        await draining
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", harness.ports.public)
    assert len(front_door.requests) == 1


@pytest.mark.usefixtures("each_listener")
async def test_drain_accepts_calls_while_load_balancers_notice() -> None:
    async with running_server(FakeFrontDoor(), quick_options({"drain_propagation_s": 100.0})) as harness:
        draining = asyncio.create_task(harness.server.drain())
        await until_not_serving(harness)
        assert (await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))).completions
        harness.server.hurry()
        async with asyncio.timeout(30):
            await draining


@pytest.mark.usefixtures("each_listener")
async def test_what_outlives_the_drain_ends_as_draining() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.01))
    async with running_server(front_door, quick_options({"drain_max_s": 0.2})) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await call.read()
        front_door.script = Script(hang=True)
        waiting = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await until(lambda: len(front_door.streams) == 2)
        await harness.server.drain()
        for ended in (call, waiting):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_all(ended)
            rich = rich_error(caught.value)
            assert (rich.code, rich.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert [stream.exits for stream in front_door.streams] == [1, 1]


@pytest.mark.usefixtures("each_listener")
async def test_hurry_cuts_the_wait_for_calls_short() -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    async with running_server(front_door, quick_options({"drain_max_s": 100.0})) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await until(lambda: front_door.streams)
        draining = asyncio.create_task(harness.server.drain())
        await until_not_serving(harness)
        assert not draining.done()
        harness.server.hurry()
        async with asyncio.timeout(30):
            await draining
        assert (await call.code()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.usefixtures("each_listener")
async def test_a_stalled_reader_does_not_hold_the_drain() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, text="x" * 100_000))
    options = quick_options({"drain_max_s": 0.1}, {"slow_consumer_timeout_s": 1000.0})
    async with running_server(front_door, options) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await call.read()
        # Long enough for the transport's buffers to fill and the write to hang, as a rule.
        await asyncio.sleep(0.2)
        async with asyncio.timeout(60):
            await harness.server.drain()
        assert front_door.streams[0].exits == 1
        call.cancel()


@pytest.mark.usefixtures("each_listener")
async def test_what_is_live_when_the_engine_dies_hears_of_it() -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await until(lambda: front_door.streams)
        harness.server.set_dead()
        await harness.server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        rich = rich_error(caught.value)
        assert (rich.code, rich.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")


@pytest.mark.usefixtures("each_listener")
async def test_stop_twice_is_harmless() -> None:
    server = make_server(FakeFrontDoor(), quick_options())
    await server.start()
    await server.stop()
    await server.stop()
