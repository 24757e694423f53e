"""A call that is made again under its id: beside its first attempt, after it, and by a client's policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc import errors
from photon_grpc.server import calls
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import Harness, rich_error, running_server, until
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.usefixtures("each_listener")

METHODS = ["Generate", "StreamGenerate", "BatchGenerate"]


def spec(max_tokens: int = 3) -> pb.GenerationSpec:
    made = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5, 6, 7]))
    made.stop.max_tokens, made.stop.ignore_eos = max_tokens, True
    made.sampling.seed, made.sampling.temperature, made.output.token_ids = 11, 1.0, True
    return made


async def tokens_of(stub: Any, method: str, asked: pb.GenerationSpec) -> list[int]:
    """Make the call under the one id of these tests, to its end."""
    if method == "Generate":
        response = await stub.Generate(pb.GenerateRequest(request_id="mine", spec=asked))
        return list(response.completions[0].token_ids)
    if method == "StreamGenerate":
        call = stub.StreamGenerate(pb.StreamGenerateRequest(request_id="mine", spec=asked))
        return [token async for message in call for token in message.delta.token_ids]
    call = stub.BatchGenerate(pb.BatchGenerateRequest(request_id="mine", specs=[asked]))
    (item,) = [item async for item in call]
    return list(item.response.completions[0].token_ids)


class Held(FakeFrontDoor):
    """Every generation waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = asyncio.Event()

    async def open(self, *arguments: Any, **values: Any) -> Any:
        stream = await super().open(*arguments, **values)
        await self.may_go_on.wait()
        return stream

    async def generate(self, *arguments: Any, **values: Any) -> Any:
        result = await super().generate(*arguments, **values)
        if not values.get("validate_only"):
            await self.may_go_on.wait()
        return result


async def both_live(harness: Harness) -> None:
    await until(lambda: harness.server.num_live_calls == 2, 30)


@pytest.mark.parametrize("method", METHODS)
async def test_fault_28_beside_an_attempt_that_goes_on_it_is_refused_and_harms_nobody(method: str) -> None:
    front_door = Held()
    async with running_server(front_door) as harness:
        first = asyncio.ensure_future(tokens_of(harness.inference, method, spec()))
        await until(lambda: front_door.requests, 30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tokens_of(harness.inference, method, spec())
        rich = rich_error(caught.value)
        assert (rich.code, rich.reason) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST")
        assert not first.done()
        front_door.may_go_on.set()
        assert await first == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
async def test_fault_28_beside_an_attempt_that_ends_in_time_it_takes_its_turn(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer was on its way when the client gave up on it."""
    monkeypatch.setattr(calls, "_CANCELLATION_S", 30.0)
    front_door = Held()
    async with running_server(front_door) as harness:
        first = asyncio.ensure_future(tokens_of(harness.inference, method, spec()))
        await until(lambda: front_door.requests, 30)
        second = asyncio.ensure_future(tokens_of(harness.inference, method, spec()))
        await both_live(harness)
        front_door.may_go_on.set()
        assert await first == await second == [0, 1, 2]
        await until(lambda: harness.server.num_live_calls == 0, 30)


@pytest.mark.parametrize("method", METHODS)
async def test_fault_28_after_the_answer_it_is_computed_again(tmp_path: Path, method: str) -> None:
    """Nothing of an answer is kept: the id is free, and the seed gives the same tokens."""
    async with scripted_service(tmp_path) as harness:
        first = await tokens_of(harness.inference, method, spec(5))
        for again in (method, *METHODS):
            assert await tokens_of(harness.inference, again, spec(5)) == first
        assert len(first) == 5
        # The id names no content: another request may have it next.
        assert len(await tokens_of(harness.inference, method, spec(4))) == 4


@pytest.mark.parametrize("method", METHODS)
async def test_a_client_s_own_retry_goes_under_the_same_id(method: str) -> None:
    class OnceDraining(FakeFrontDoor):
        """The first attempt is refused before its first token."""

        async def open(self, request: Any, **values: Any) -> Any:
            self.script = (
                Script() if self.requests else Script(error=errors.EngineDrainingError(), error_at=1)
            )
            return await super().open(request, **values)

        async def generate(self, request: Any, **values: Any) -> Any:
            self.script = Script() if self.requests else Script(error=errors.EngineDrainingError())
            return await super().generate(request, **values)

    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s",'
        '"maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )
    front_door = OnceDraining()
    async with (
        running_server(front_door) as harness,
        grpc.aio.insecure_channel(harness.target, [("grpc.service_config", policy)]) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert await tokens_of(stub, method, spec()) == [0, 1, 2]
        await until(lambda: harness.server.num_live_calls == 0, 30)
    own = "mine.0" if method == "BatchGenerate" else "mine"
    assert len(front_door.requests) >= 2
    assert {request.request_id for request in front_door.requests} == {own}
