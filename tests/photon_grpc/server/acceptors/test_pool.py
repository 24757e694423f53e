"""Acceptors as real processes: who takes a connection, and what becomes of calls when one of them ends.

What calls themselves do over acceptors is tested with the services, by `each_listener`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from photon_grpc.errors import ListenError
from photon_grpc.server import server as server_module
from photon_grpc.server.acceptors import pool
from photon_grpc.server.acceptors.dispatcher import DispatchedCall, Dispatcher
from photon_grpc.server.acceptors.messages import Left, Opened
from photon_grpc.server.server import Server
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.photon_grpc.server.test_tls import AUTHORITY, Observed, channel, check, files_of, replace_pair
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    Harness,
    make_server,
    open_channel,
    quick_options,
    read_all,
    rich_error,
    running_server,
    until,
)

SPEC = pb.GenerationSpec(text="hello")
STREAM = pb.StreamGenerateRequest(spec=SPEC)
ENDLESS = Script(num_deltas=None, interval_s=0.005)
# Whoever has so many connections has had each acceptor's chance often enough.
_MANY = 200


def sockets_of(process_id: int, port: int, status: str) -> int:
    """How many of a process are of this port."""
    found = psutil.Process(process_id).net_connections("tcp")
    return sum(one.status == status and one.laddr.port == port for one in found)


def connections_of(process_id: int, port: int) -> int:
    return sockets_of(process_id, port, psutil.CONN_ESTABLISHED)


def is_gone(process_id: int) -> bool:
    """Ended and reaped."""
    return not psutil.pid_exists(process_id)


async def connect(opened: grpc.aio.Channel) -> grpc.aio.Channel:
    """Have it connect."""
    await health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return opened


@asynccontextmanager
async def channels_to_each(harness: Harness) -> AsyncIterator[dict[int, grpc.aio.Channel]]:
    """A channel to every acceptor, by its process."""
    async with AsyncExitStack() as stack:
        found: dict[int, grpc.aio.Channel] = {}
        wanted = harness.server.acceptor_process_ids
        for _ in range(_MANY):
            if len(found) == len(wanted):
                break
            before = {number: connections_of(number, harness.ports.public) for number in wanted}
            opened = await connect(await stack.enter_async_context(open_channel(harness.ports.public)))
            (owner,) = [
                number for number in wanted if connections_of(number, harness.ports.public) > before[number]
            ]
            found.setdefault(owner, opened)
        assert len(found) == len(wanted), "the kernel spreads connections"
        yield found


def stream_on(opened: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(opened).StreamGenerate(STREAM)


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return caught.value


def live_dispatched() -> int:
    gc.collect()
    return sum(type(item) is DispatchedCall for item in gc.get_objects())


async def test_a_call_that_is_over_before_it_began_leaves_nothing_to_the_garbage_collector() -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return request

    dispatcher = Dispatcher(())
    handler = grpc.unary_unary_rpc_method_handler(answer)
    dispatcher.add_registered_method_handlers("test.Service", {"Answer": handler})
    await dispatcher.start()
    acceptor = pool.AcceptorProcess(dispatcher, None, lambda ended: None)
    before = live_dispatched()
    gc.disable()
    try:
        acceptor._receive([Opened(1, 0, (), "", {}, None, b"hi"), Left(1)])
        await until(lambda: not acceptor._calls)
        assert sum(type(item) is DispatchedCall for item in gc.get_objects()) == before
    finally:
        gc.enable()


# --- listening ------------------------------------------------------------------------------------


async def test_all_listen_on_one_port_and_each_takes_connections() -> None:
    front_door = FakeFrontDoor(ENDLESS)
    async with running_server(front_door, num_acceptors=3) as harness:
        numbers = harness.server.acceptor_process_ids
        assert len(set(numbers)) == 3
        for number in numbers:
            assert sockets_of(number, harness.ports.public, psutil.CONN_LISTEN) >= 1
        assert sockets_of(os.getpid(), harness.ports.public, psutil.CONN_LISTEN) == 0
        async with channels_to_each(harness) as channels:
            calls = [stream_on(opened) for opened in channels.values()]
            for call in calls:
                assert (await call.read()).WhichOneof("event") == "started"
            assert harness.server.num_live_calls == 3
            for call in calls:
                call.cancel()
            await until(lambda: harness.server.num_live_calls == 0)
    assert all(map(is_gone, numbers))


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 0), (0, 2)])
async def test_another_server_does_not_get_the_port(first: int, second: int) -> None:
    async with running_server(FakeFrontDoor(), num_acceptors=first) as harness:
        port = harness.ports.public
        other = make_server(FakeFrontDoor(), quick_options({"port": port}), num_acceptors=second)
        with pytest.raises(ListenError, match=f"public listener cannot bind 127.0.0.1:{port}"):
            await other.start()
        assert other.acceptor_process_ids == []
        for _ in range(5):
            async with open_channel(port) as opened:
                await connect(opened)


async def test_the_port_is_free_again_after_a_stop() -> None:
    async with running_server(FakeFrontDoor(), num_acceptors=2) as harness:
        port = harness.ports.public
        await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))
    options = quick_options({"port": port})
    async with running_server(FakeFrontDoor(), options, num_acceptors=2) as harness:
        assert harness.ports.public == port
        await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))


async def test_an_address_that_is_not_ours_is_a_listen_error_and_leaves_no_process() -> None:
    # A network for documentation: nobody has it.
    options = quick_options({"host": "192.0.2.1", "allow_plaintext": True})
    server = make_server(FakeFrontDoor(), options, num_acceptors=2)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0"):
        await server.start()
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_connections_are_limited_for_all_together() -> None:
    options = quick_options({"max_connections": 4})
    async with running_server(FakeFrontDoor(), options, num_acceptors=2) as harness:
        await harness.public.close()
        port = harness.ports.public
        writers = []
        for _ in range(40):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            writers.append(writer)

        def counts() -> list[int]:
            return [connections_of(number, port) for number in harness.server.acceptor_process_ids]

        await until(lambda: counts() == [2, 2])
        for writer in writers:
            writer.transport.abort()
        await until(lambda: counts() == [0, 0])
        async with open_channel(port) as opened:
            await connect(opened)


# --- an acceptor that ends ------------------------------------------------------------------------


async def test_one_that_is_killed_ends_its_own_calls_alone_and_another_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_RESTART_S", 0.01)
    front_door = FakeFrontDoor(ENDLESS)
    with capture_logs() as records:
        async with running_server(front_door, num_acceptors=2) as harness, channels_to_each(harness) as own:
            killed, spared = own
            calls = {}
            for number, opened in own.items():
                calls[number] = stream_on(opened)
                await calls[number].read()
            os.kill(killed, signal.SIGKILL)
            assert (await error_of(calls[killed])).code() is grpc.StatusCode.UNAVAILABLE
            await until(lambda: harness.server.num_live_calls == 1)
            assert [stream.exits for stream in front_door.streams] == [1, 0]
            for _ in range(20):
                assert (await calls[spared].read()).WhichOneof("event") in ("started", "delta")

            await until(lambda: len(harness.server.acceptor_process_ids) == 2)
            (new,) = set(harness.server.acceptor_process_ids) - {spared}
            assert new != killed
            assert is_gone(killed)
            await until(lambda: sockets_of(new, harness.ports.public, psutil.CONN_LISTEN) >= 1)
            async with channels_to_each(harness) as again:
                call = stream_on(again[new])
                await call.read()
                call.cancel()
            calls[spared].cancel()
            await until(lambda: harness.server.num_live_calls == 0)
            await until(lambda: live_dispatched() == 0)
    events = [record["event"] for record in records if record["event"].startswith("acceptor")]
    assert sorted(events) == ["acceptor_process_died", "acceptor_process_ended", "acceptor_replaced"]


async def test_each_death_is_told_and_no_other_end_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_RESTART_S", 0.01)
    deaths: list[int] = []
    server = Server(
        FakeFrontDoor(), quick_options(), num_acceptors=1, on_acceptor_death=lambda: deaths.append(1)
    )
    ports = await server.start()

    def listeners() -> list[int]:
        """Those that have told so: one that dies between has not come to listen, which is another end."""
        (listener,) = [one for one in server._listeners if isinstance(one, pool.AcceptorPool)]
        told = [one.process_id for one in listener._acceptors if one._port.done()]
        return [
            number
            for number in told
            if number is not None and sockets_of(number, ports.public, psutil.CONN_LISTEN)
        ]

    try:
        for count in (1, 2):
            await until(listeners)
            os.kill(listeners()[0], signal.SIGKILL)
            await until(lambda: len(deaths) == count)  # noqa: B023
        await until(listeners)
    finally:
        await server.stop()
    assert len(deaths) == 2


async def test_a_stop_while_one_is_being_replaced_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the replacement is just then."""
    monkeypatch.setattr(pool, "_RESTART_S", 0.0)
    loop = asyncio.get_running_loop()
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    for wait_s in (0.0, 0.02, 0.2):
        before = {child.pid for child in psutil.Process().children()}
        async with running_server(FakeFrontDoor(), num_acceptors=1) as harness:
            (number,) = harness.server.acceptor_process_ids
            os.kill(number, signal.SIGKILL)
            await until(lambda: harness.server.acceptor_process_ids != [number])  # noqa: B023
            await asyncio.sleep(wait_s)
        assert {child.pid for child in psutil.Process().children()} <= before
    assert not faults, faults


async def test_one_that_hangs_does_not_hold_the_stop_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_STOP_GRACE_S", 0.1)
    monkeypatch.setattr(pool, "_LEAVE_S", 0.3)
    front_door = FakeFrontDoor(ENDLESS)
    async with running_server(front_door, num_acceptors=2) as harness:
        async with channels_to_each(harness) as channels:
            hung, well = channels
            calls = {number: stream_on(opened) for number, opened in channels.items()}
            for call in calls.values():
                await call.read()
            os.kill(hung, signal.SIGSTOP)
            async with asyncio.timeout(30):
                await harness.server.stop()
            assert rich_error(await error_of(calls[well])).reason == "DRAINING"
            assert (await error_of(calls[hung])).code() is grpc.StatusCode.UNAVAILABLE
        assert harness.server.num_live_calls == 0
    assert is_gone(hung)
    assert is_gone(well)


async def test_a_stop_gives_every_live_call_its_status() -> None:
    front_door = FakeFrontDoor(ENDLESS)
    async with running_server(front_door, num_acceptors=2) as harness:
        async with channels_to_each(harness) as channels:
            calls = [stream_on(opened) for opened in channels.values() for _ in range(20)]
            for call in calls:
                await call.read()
            await harness.server.stop()
            for call in calls:
                assert rich_error(await error_of(call)).reason == "DRAINING"
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", harness.ports.public)
    assert [stream.exits for stream in front_door.streams] == [1] * 40


async def test_signals_to_the_whole_group_are_the_server_s_to_act_on() -> None:
    async with running_server(FakeFrontDoor(ENDLESS), num_acceptors=2) as harness:
        call = stream_on(harness.public)
        await call.read()
        numbers = harness.server.acceptor_process_ids
        for number in numbers:
            for one in (signal.SIGINT, signal.SIGTERM):
                os.kill(number, one)
        for _ in range(20):
            assert (await call.read()).WhichOneof("event") in ("started", "delta")
        assert harness.server.acceptor_process_ids == numbers
        call.cancel()


# --- what crosses ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_listener")
async def test_responses_of_megabytes_and_those_above_the_limit() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=1, text="x" * (3 << 20)))
    async with (
        running_server(front_door) as harness,
        open_channel(harness.ports.public, max_receive_message_length=64 << 20) as opened,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(opened)
        response = await stub.Generate(pb.GenerateRequest(spec=SPEC))
        assert len(response.completions[0].text) == 3 << 20
        messages = await read_all(stub.StreamGenerate(STREAM))
        assert sum(len(message.delta.text) for message in messages) == 3 << 20

        front_door.script = Script(num_deltas=1, text="x" * (5 << 20))
        for call in (stub.Generate(pb.GenerateRequest(spec=SPEC)), stub.StreamGenerate(STREAM)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if isinstance(call, grpc.aio.UnaryUnaryCall) else read_all(call))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: harness.server.num_live_calls == 0)
        front_door.script = Script()
        assert len(await read_all(stub.StreamGenerate(STREAM))) == 6


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_requests_may_be_compressed_and_carry_binary_metadata(compression: grpc.Compression) -> None:
    front_door = FakeFrontDoor()
    text = "hello " * 1000
    metadata = (("x-request-id", "mine"), ("x-bytes-bin", bytes(range(256))), ("x-bytes-bin", b""))
    async with running_server(front_door) as harness:
        request = pb.GenerateRequest(spec=pb.GenerationSpec(text=text))
        call = harness.inference.Generate(request, metadata=metadata, compression=compression)
        assert (await call).request_id == "mine"
    assert front_door.requests[0].prompt == text


async def test_what_becomes_of_certificate_files_is_told(tmp_path: Path) -> None:
    old, new = AUTHORITY.issue(), AUTHORITY.issue()
    options = replace(quick_options(), tls=files_of(tmp_path, old))
    observed = Observed()
    server = Server(FakeFrontDoor(), options, certificate_observer=observed, num_acceptors=1)
    ports = await server.start()
    server.set_serving()
    try:
        await until(lambda: observed.expiries == [old.expires_at] * 2)
        replace_pair(tmp_path, new)
        await check(channel(ports.public))
        await until(lambda: observed.expiries[2:] == [new.expires_at])
        (tmp_path / "server.crt").unlink()
        await check(channel(ports.public))
        await until(lambda: observed.refused == 1)
    finally:
        await server.stop()


async def test_one_that_dies_while_the_certificate_is_bad_is_replaced_once_it_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process has no last good files; the other ones go on with theirs."""
    monkeypatch.setattr(pool, "_RESTART_S", 0.05)
    good = AUTHORITY.issue()
    options = replace(quick_options(), tls=files_of(tmp_path, good))
    with capture_logs() as records:
        async with running_server(FakeFrontDoor(), options, num_acceptors=2) as harness:
            port = harness.ports.public
            killed, spared = harness.server.acceptor_process_ids
            (tmp_path / "server.crt").write_bytes(b"")
            os.kill(killed, signal.SIGKILL)
            await until(lambda: "acceptor_not_replaced" in [record["event"] for record in records])
            await check(channel(port))
            good.write(tmp_path, "server")
            await until(lambda: "acceptor_replaced" in [record["event"] for record in records])
            (new,) = set(harness.server.acceptor_process_ids) - {spared}
            assert sockets_of(new, port, psutil.CONN_LISTEN) >= 1
            await check(channel(port))
