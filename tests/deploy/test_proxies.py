"""The shipped nginx and Envoy configurations in front of a real server: what goes through, and what not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc import errors
from photon_grpc.frontend.events import Delta, Event
from photon_grpc.server.status import PUSHBACK_KEY, REQUEST_ID_KEY
from photon_grpc.types import GenerationRequest
from photon_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc, model_pb2, model_pb2_grpc
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, FakeStream, Script
from tests.support.grpc_harness import Harness, open_channel, quick_options, rich_error, running_server, until
from tests.support.proxies import Upstream, free_port, running_proxy
from tests.support.scripted_service import scripted_service

PROXIES = ["nginx", "envoy"]
SPEC = pb.GenerationSpec(text="hello")


def upstream(harness: Harness) -> Upstream:
    return Upstream(harness.ports.public, harness.ports.probe or harness.ports.public)


@asynccontextmanager
async def behind(name: str, folder: Path, *harnesses: Harness) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the named proxy, which passes calls on and has seen a server that serves."""
    async with running_proxy(name, folder, [upstream(one) for one in harnesses]) as port:
        channel = open_channel(port)
        try:
            await until_passed(channel)
            yield channel
        finally:
            await channel.close()


async def until_passed(channel: grpc.aio.Channel) -> None:
    """Envoy holds its first calls until a health check has come back."""
    models = model_pb2_grpc.ModelServiceStub(channel)
    async with asyncio.timeout(20):
        while True:
            try:
                await models.GetServerInfo(model_pb2.GetServerInfoRequest(), timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)
            else:
                return


def generation(max_tokens: int) -> pb.GenerationSpec:
    spec = pb.GenerationSpec(text="def fib(n):")
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    return spec


async def iter_messages(call: Any) -> AsyncIterator[Any]:
    """The rest of a call that was begun with `read`."""
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


async def load(harness: Harness) -> control_pb2.GetLoadResponse:
    answer: control_pb2.GetLoadResponse = await harness.control.GetLoad(control_pb2.GetLoadRequest())
    return answer


async def until_idle(harness: Harness, within_s: float = 10.0) -> None:
    """No request lives and no block is held."""
    async with asyncio.timeout(within_s):
        while True:
            now = await load(harness)
            if now.running == now.queued == now.used_kv_blocks == 0:
                return
            await asyncio.sleep(0.01)


async def read_all(call: Any) -> list[Any]:
    return [message async for message in call]


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else read_all(call))
    return caught.value


class LockStep(FakeFrontDoor):
    """Every stream waits for leave before each delta but the first, which goes with Started."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = asyncio.Semaphore(1)

    async def open(
        self, request: GenerationRequest, *, deadline: float | None = None, tenant: str = ""
    ) -> FakeStream:
        self._record(request, deadline, tenant)
        return LockStepStream(request, self.script, self.leave)


class LockStepStream(FakeStream):
    def __init__(self, request: GenerationRequest, script: Script, leave: asyncio.Semaphore) -> None:
        super().__init__(request, script)
        self._leave = leave

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._events():
            if isinstance(event, Delta):
                await self._leave.acquire()
            yield event


@pytest.mark.parametrize("name", PROXIES)
async def test_no_message_waits_for_the_next_one(name: str, tmp_path: Path) -> None:
    """Each delta is made after the client has read the one before: a proxy that buffers would hang here."""
    front_door = LockStep()
    async with running_server(front_door) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        events = []
        async for message in call:
            events.append(message.WhichOneof("event"))
            if message.HasField("delta"):
                front_door.leave.release()
    assert events == ["started", *["delta"] * 3, "finished", "summary"]


@pytest.mark.parametrize("name", PROXIES)
async def test_a_whole_stream_and_its_trailers_go_through(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.01) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(request_id="through", spec=generation(100)))
        messages = await read_all(call)
        trailers = dict(list(await call.trailing_metadata()))
        await until_idle(harness)
    assert [m.seq for m in messages] == list(range(1, len(messages) + 1))
    assert sum(m.delta.num_tokens for m in messages) == 100
    assert messages[-1].summary.usage.output_tokens == 100
    assert trailers[REQUEST_ID_KEY] == "through"
    assert trailers["photon-finish-reason"] == "MAX_TOKENS"
    assert trailers["photon-output-tokens"] == "100"


@pytest.mark.parametrize("name", PROXIES)
async def test_cancelling_frees_the_blocks(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.02) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=generation(4000)))
        await call.read()
        other = stub.StreamGenerate(pb.StreamGenerateRequest(spec=generation(100)))
        first = await other.read()
        assert (await load(harness)).used_kv_blocks > 0
        call.cancel()
        await until(lambda: harness.server.num_live_calls == 1)
        # A proxy that shares an upstream connection must not end the neighbour with it.
        messages = [first, *[message async for message in iter_messages(other)]]
        assert sum(message.delta.num_tokens for message in messages) == 100
        await until_idle(harness)


@pytest.mark.parametrize("name", PROXIES)
async def test_a_client_that_vanishes_frees_the_blocks(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.02) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=generation(4000)))
        await call.read()
        await channel.close()
        await until_idle(harness)


@pytest.mark.parametrize("name", PROXIES)
async def test_the_deadline_reaches_the_server(name: str, tmp_path: Path) -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    async with running_server(front_door) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC), timeout=60)
        await until(lambda: front_door.streams)
        (deadline,) = front_door.deadlines
        assert deadline is not None
        # Without the client's deadline the server would have set its own default of 300 s.
        assert deadline - asyncio.get_running_loop().time() < 100
        call.cancel()
        await asyncio.wait_for(front_door.streams[0].left.wait(), 10)


@pytest.mark.parametrize("name", PROXIES)
async def test_a_deadline_that_passes_frees_the_blocks(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path, step_s=0.02) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(spec=generation(4000)), timeout=1)
        assert (await failure_of(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_idle(harness)


@pytest.mark.parametrize("name", PROXIES)
async def test_a_rich_error_goes_through(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        bad = generation(5)
        bad.sampling.top_p = 7
        request = pb.StreamGenerateRequest(request_id="bad", spec=bad)
        error = rich_error(await failure_of(stub.StreamGenerate(request)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_FIELD"
    assert error.fields == ["spec.sampling.top_p"]
    assert error.trailers[REQUEST_ID_KEY] == "bad"


@pytest.mark.parametrize("name", PROXIES)
async def test_an_error_after_the_first_token_goes_through(name: str, tmp_path: Path) -> None:
    front_door = FakeFrontDoor(Script(error=errors.RequestFaultError(), error_at=3))
    async with running_server(front_door) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        error = rich_error(await failure_of(stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))))
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.reason == "REQUEST_FAULT"
    assert error.trailers[PUSHBACK_KEY] == "-1"
    assert len(front_door.streams) == 1


@pytest.mark.parametrize("name", PROXIES)
async def test_a_refusal_comes_with_its_pushback_and_is_not_retried_by_the_proxy(
    name: str, tmp_path: Path
) -> None:
    front_door = FakeFrontDoor(Script(error=errors.OverloadedError("queue full", retry_after_s=2.0)))
    async with running_server(front_door) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        error = rich_error(await failure_of(stub.Generate(pb.GenerateRequest(spec=SPEC))))
    assert error.reason == "OVERLOADED"
    assert 1500 <= int(error.trailers[PUSHBACK_KEY]) <= 2500
    assert len(front_door.requests) == 1


@pytest.mark.parametrize("name", PROXIES)
async def test_health_is_watched_through_it(name: str, tmp_path: Path) -> None:
    async with running_server(FakeFrontDoor()) as harness, behind(name, tmp_path, harness) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="photon.v1.InferenceService")
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        harness.server.set_not_serving()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


@pytest.mark.parametrize("name", PROXIES)
async def test_what_is_not_for_the_public_is_unimplemented(name: str, tmp_path: Path) -> None:
    async with running_server(FakeFrontDoor()) as harness, behind(name, tmp_path, harness) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        error = await failure_of(control.GetLoad(control_pb2.GetLoadRequest(), timeout=10))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", PROXIES)
async def test_a_dead_server_is_unavailable(name: str, tmp_path: Path) -> None:
    nobody = free_port()
    async with running_proxy(name, tmp_path, [Upstream(nobody, nobody)]) as port:
        channel = open_channel(port)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        error = await failure_of(stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=10))
        await channel.close()
    assert error.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", PROXIES)
async def test_the_access_log_tells_the_end_of_a_call_and_no_prompt(name: str, tmp_path: Path) -> None:
    async with scripted_service(tmp_path) as harness, behind(name, tmp_path, harness) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        spec = generation(5)
        spec.text = "canary"
        await stub.Generate(pb.GenerateRequest(request_id="logged", spec=spec))
    # Both write the last lines when they leave.
    text = (tmp_path / "calls.log").read_text()
    (line,) = [entry for entry in map(json.loads, text.splitlines()) if "Generate" in entry["method"]]
    assert line["request_id"] == "logged"
    assert line["finish_reason"] == "MAX_TOKENS"
    assert line["output_tokens"] == "5"
    assert line["grpc_status"] in ("0", "OK")
    assert "canary" not in text


async def test_envoy_takes_a_call_that_a_draining_server_refused_to_another(tmp_path: Path) -> None:
    leaving = FakeFrontDoor(Script(error=errors.EngineDrainingError()))
    staying = FakeFrontDoor()
    options = quick_options(server={"probe_port": 0, "probe_host": "127.0.0.1"})
    async with (
        running_server(leaving, options) as first,
        running_server(staying, options) as second,
        behind("envoy", tmp_path, first, second) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async with asyncio.timeout(20):
            while len(leaving.requests) < 3:
                answer = await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
                assert answer.usage.output_tokens == 3
    assert len(staying.requests) >= len(leaving.requests)


async def test_envoy_sends_nothing_to_a_server_that_is_not_serving(tmp_path: Path) -> None:
    quiet, serving = FakeFrontDoor(), FakeFrontDoor()
    options = quick_options(server={"probe_port": 0, "probe_host": "127.0.0.1"})
    async with running_server(quiet, options) as first, running_server(serving, options) as second:
        first.server.set_not_serving()
        async with behind("envoy", tmp_path, first, second) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await asyncio.gather(*(stub.Generate(pb.GenerateRequest(spec=SPEC)) for _ in range(8)))
    assert len(quiet.requests) == 0
    assert len(serving.requests) == 8
