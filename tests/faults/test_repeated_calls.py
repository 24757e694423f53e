"""Calls that come twice: an id that lives already, and a retry on the heels of its first attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc import errors
from photon_grpc.v1 import control_pb2, inference_pb2_grpc
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.call_stages import Ask, open_channel, reason_of, scripted_runner, scripted_server
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.fault_proxy import fault_proxy
from tests.support.grpc_harness import Harness, acceptors_by_default, rich_error, running_server, until
from tests.support.scripted_service import scripted_service
from tests.support.server_aftermath import Aftermath

SPEC = pb.GenerationSpec(text="hello")
RETRIES = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.02s",
                    "maxBackoff": "0.1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    settings = {"scheduler__max_num_seqs": 2, "scheduler__max_num_batched_tokens": 8}
    with scripted_server(tmp_path_factory.mktemp("server"), scripted_runner(), **settings) as server:
        yield Aftermath(server)
        assert server.stop() == 0


def codes_of(aftermath: Aftermath, request_id: str) -> list[str]:
    """In the order in which the calls of that id ended."""
    return [call["code"] for call in aftermath.finished_calls() if call["request_id"] == request_id]


def test_fault_28_an_id_that_lives_is_refused_and_its_call_goes_on(aftermath: Aftermath) -> None:
    address = aftermath.server.address
    with open_channel(address) as channel, open_channel(address) as other:
        request = Ask(max_tokens=60).request()
        call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request)
        next(call)
        twin = inference_pb2_grpc.InferenceServiceStub(other).StreamGenerate(request)
        with pytest.raises(grpc.RpcError) as caught:
            list(twin)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert reason_of(caught.value) == "DUPLICATE_REQUEST"
        assert list(call)[-1].summary.usage.output_tokens == 60
    aftermath.check()
    assert codes_of(aftermath, request.request_id) == ["ALREADY_EXISTS", "OK"]


def test_fault_28_a_retry_after_a_broken_connection_races_its_first_attempt(aftermath: Aftermath) -> None:
    """grpc's own retry: the same id on a new connection, while the server may not know of the break yet."""
    server = aftermath.server
    requests: list[str] = []
    with fault_proxy(server.address) as proxy:
        for _ in range(10):
            options = [("grpc.service_config", RETRIES), ("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(proxy.address, options=options) as channel:
                request = Ask(prompt_tokens=400, max_tokens=3).request()
                call = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=60)
                server.wait_for("prefilling", lambda load: load.running == 1)
                proxy.reset()
                assert list(call)[-1].summary.usage.output_tokens == 3
            requests.append(request.request_id)
    aftermath.check()
    assert all(codes_of(aftermath, name) == ["CANCELLED", "OK"] for name in requests)


# Seen from inside.


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


class SlowToLeave(FakeFrontDoor):
    """Refuses a live id as the engine does, and gives one back only a while after its call was cancelled."""

    def __init__(self) -> None:
        super().__init__(Script(hang=True))
        self.leave = asyncio.Event()
        self.ending = asyncio.Event()

    async def generate(self, request: Any, **arguments: Any) -> Any:
        name = (arguments["tenant"], request.request_id)
        if name in self.live_ids:
            raise errors.DuplicateRequestError(request.request_id)
        self.live_ids.add(name)
        try:
            return await super().generate(request, **arguments)
        except asyncio.CancelledError:
            self.ending.set()
            await self.leave.wait()
            raise
        finally:
            self.live_ids.remove(name)


async def test_fault_28_a_retry_takes_the_place_of_an_attempt_that_is_ending() -> None:
    front_door = SlowToLeave()
    request = pb.GenerateRequest(request_id="r-1", spec=SPEC)
    async with running_server(front_door) as harness:
        first = harness.inference.Generate(request)
        await until(lambda: front_door.requests)
        rich = rich_error(await failure(harness.inference.Generate(request)))
        assert rich.reason == "DUPLICATE_REQUEST", "the first attempt lives"
        first.cancel()
        await front_door.ending.wait()
        front_door.script = Script()
        retries = [harness.inference.Generate(request) for _ in range(2)]
        await until(lambda: harness.server.num_live_calls == 3)
        assert not any(retry.done() for retry in retries)
        other = await harness.inference.Generate(pb.GenerateRequest(request_id="r-2", spec=SPEC))
        assert other.completions
        # One whose own deadline passes while it waits gets that status, and leaves nothing behind.
        late = await failure(harness.inference.Generate(request, timeout=0.1))
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        front_door.leave.set()
        codes = sorted([(await retry.code()).name for retry in retries])
        assert codes in (["OK", "OK"], ["ALREADY_EXISTS", "OK"])
        assert (await harness.inference.Generate(request)).request_id == "r-1"
        await until(lambda: harness.server.num_live_calls == 0)
    assert not front_door.live_ids


@pytest.mark.parametrize("acceptors", [0, 2])
async def test_fault_28_a_retry_right_behind_a_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptors: int
) -> None:
    # However slow the machine is in handing on the cancellation.
    monkeypatch.setattr("photon_grpc.server.calls._CANCELLATION_S", 30.0)
    with acceptors_by_default(acceptors):
        async with scripted_service(tmp_path, step_s=0.001) as harness:
            await cancel_and_retry(harness)


async def cancel_and_retry(harness: Harness) -> None:
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5, 6, 7]))
    spec.stop.max_tokens, spec.stop.ignore_eos = 4000, True
    short = pb.GenerationSpec()
    short.CopyFrom(spec)
    short.stop.max_tokens = 2
    for number in range(50):
        name = f"r-{number}"
        first = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id=name, spec=spec))
        await first.read()
        first.cancel()
        response = await harness.inference.Generate(pb.GenerateRequest(request_id=name, spec=short))
        assert response.usage.output_tokens == 2
    await until(lambda: harness.server.num_live_calls == 0)
    load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
    assert (load.running, load.queued, load.used_kv_blocks) == (0, 0, 0)
