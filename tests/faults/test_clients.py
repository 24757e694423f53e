"""Clients that leave, freeze, do not read, or come in thousands, at every point of a call's life.

Real processes: a scripted engine behind real listeners. A stage is seen (in GetLoad, or inside the server)
before the fault comes; afterwards the server must be as it was, see `tests/support/server_aftermath.py`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.call_stages import (
    NO_WINDOW,
    STAGES,
    Ask,
    Staged,
    StagedServers,
    StageMissedError,
    open_channel,
    reason_of,
    scripted_runner,
    scripted_server,
)
from tests.support.fault_proxy import fault_proxy
from tests.support.server_aftermath import STORM_BYTES, Aftermath
from tests.support.server_process import ClientProcess

# A clock must leave a slow machine the time to come to the stage; the next is tried when it did not.
_CLOCKS_S = (1.0, 5.0, 25.0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedServers]:
    with ExitStack() as stack:
        servers = StagedServers(tmp_path_factory.mktemp("servers"), stack)
        yield servers
        servers.stop()


@pytest.fixture(scope="module")
def servers_with_acceptors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedServers]:
    with ExitStack() as stack:
        servers = StagedServers(tmp_path_factory.mktemp("acceptors"), stack, server__acceptors=2)
        yield servers
        servers.stop()


@pytest.fixture(params=["servers", "servers_with_acceptors"], ids=["loop", "acceptors"])
def each_servers(request: pytest.FixtureRequest) -> StagedServers:
    """Those whose connections the event loop takes, and those that have acceptors."""
    found: StagedServers = request.getfixturevalue(request.param)
    return found


# Settings of a server that is the test's own.
each_listener = pytest.mark.parametrize("acceptors", [-1, 2], ids=["loop", "acceptors"])


# --- 23 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_fault_23_cancel_in_every_state(each_servers: StagedServers, stage: str) -> None:
    with each_servers.staged(stage) as at:
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


# --- 25 -------------------------------------------------------------------------------------------

_first_tokens = itertools.count(200)
# (what the client asks for, running and waiting completions once it is there)
CLIENTS: dict[str, tuple[dict[str, int], tuple[int, int]]] = {
    "decoding_and_queued": ({"count": 4, "max_tokens": 3000, "read": False}, (2, 2)),
    "prefilling": ({"max_tokens": 50, "prompt_tokens": 4000, "read": False}, (1, 0)),
}


@pytest.mark.parametrize("stage", CLIENTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGSTOP])
def test_fault_25_a_client_killed_or_frozen(
    servers: StagedServers, stage: str, number: signal.Signals
) -> None:
    """SIGSTOP leaves the connection open; only the server's keepalive can tell."""
    server, aftermath = servers.get()
    asked, (running, queued) = CLIENTS[stage]
    client = ClientProcess(server.address, first_token=next(_first_tokens), **asked)
    try:
        server.wait_for(stage, lambda load: (load.running, load.queued) == (running, queued))
        assert server.load().used_kv_blocks > 0
        client.send(number)
        server.wait_until_idle()
        aftermath.check()
    finally:
        client.close()


@pytest.mark.parametrize("stage", ["prefilling", "decoding", "writing"])
def test_fault_25_half_open_connection(each_servers: StagedServers, stage: str) -> None:
    server, _ = each_servers.get()
    window = () if STAGES[stage].has_window else NO_WINDOW
    with (
        fault_proxy(server.address) as proxy,
        open_channel(proxy.address, *window) as channel,
        each_servers.staged(stage, channel=channel) as at,
    ):
        proxy.mute()
        server.wait_until_idle()
        # Both ends of the connection are still open.
        at.check("CANCELLED")
        proxy.reset()
        with pytest.raises(grpc.RpcError) as caught:
            list(at.call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- 26 -------------------------------------------------------------------------------------------


@each_listener
def test_fault_26_many_clients_that_do_not_read(tmp_path: Path, acceptors: int) -> None:
    """The engine goes on and the readers are served; the others are ended, and told so once they read."""
    settings = {
        "limits__slow_consumer_timeout_s": 1,
        "scheduler__max_num_seqs": 64,
        "server__acceptors": acceptors,
    }
    with scripted_server(tmp_path, scripted_runner(step_s=0.002), **settings) as server:
        aftermath = Aftermath(server)
        requests = [Ask(max_tokens=40).request() for _ in range(100)]
        with ExitStack() as clients:
            channels = [clients.enter_context(open_channel(server.address, *NO_WINDOW)) for _ in range(4)]
            stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
            calls = [stub.StreamGenerate(request) for stub, request in zip(itertools.cycle(stubs), requests)]
            reader = inference_pb2_grpc.InferenceServiceStub(
                clients.enter_context(open_channel(server.address))
            )
            for _ in range(20):
                spec = Ask(max_tokens=10).request().spec
                response = reader.Generate(inference_pb2.GenerateRequest(spec=spec), timeout=60)
                assert response.usage.output_tokens == 10
            server.wait_until_idle()
            codes = dict.fromkeys((request.request_id for request in requests), "ABORTED")
            aftermath.check_codes(codes)
            for call in calls:
                assert_told(call)
        aftermath.check(codes)
        assert server.stop() == 0


def assert_told(call: grpc.Call) -> None:
    """What was written before the end comes in order, and then the reason of it."""
    seqs: list[int] = []
    with pytest.raises(grpc.RpcError) as caught:
        seqs.extend(message.seq for message in call)
    assert seqs == list(range(1, len(seqs) + 1))
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert reason_of(caught.value) == "CLIENT_STALLED"


# --- 27 -------------------------------------------------------------------------------------------


async def storm(address: str, count: int, chance: random.Random) -> None:
    """`count` calls over six connections, left at once, a moment later, or behind the first message."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(6)
    ]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def once() -> None:
        call = chance.choice(stubs).StreamGenerate(Ask(prompt_tokens=chance.randint(2, 40)).request())
        how = chance.randrange(3)
        if how == 1:
            await asyncio.sleep(chance.random() * 0.05)
        elif how == 2:
            with suppress(grpc.aio.AioRpcError):
                await call.read()
        call.cancel()
        assert await call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)

    for _ in range(count // 250):
        await asyncio.gather(*(once() for _ in range(250)))
    for channel in channels:
        await channel.close()


@each_listener
def test_fault_27_calls_that_are_opened_and_cancelled_by_the_thousand(tmp_path: Path, acceptors: int) -> None:
    settings = {
        "scheduler__max_num_seqs": 16,
        "limits__max_queued_requests": 64,
        "server__acceptors": acceptors,
    }
    with scripted_server(tmp_path, scripted_runner(step_s=0.002), **settings) as server:
        aftermath = Aftermath(server)
        chance = random.Random(27)
        for _ in range(2):
            asyncio.run(storm(server.address, 3000, chance))
            gc.collect()  # the client's connections end with its calls, which stand in cycles
            aftermath.check(spare_bytes=STORM_BYTES)
        ended = [call["request_id"] for call in aftermath.finished_calls()]
        assert len(ended) == len(set(ended)), "a call ended twice"
        assert server.stop() == 0
