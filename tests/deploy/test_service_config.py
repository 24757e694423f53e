"""The published service config, in the hands of a real client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc import errors
from photon_grpc.server.health import READY_SERVICES
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.support.fake_front_door import FakeFrontDoor, FakeStream, Script
from tests.support.grpc_harness import Harness, running_server

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "service_config.json").read_text()
SPEC = pb.GenerationSpec(text="hello")


class Reluctant(FakeFrontDoor):
    """Refuses the first calls with an error, then serves."""

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__()
        self._error, self._times, self.attempts = error, times, 0

    def _refuse(self) -> None:
        self.attempts += 1
        if self.attempts <= self._times:
            raise self._error

    async def open(self, *args: Any, **kwargs: Any) -> FakeStream:
        self._refuse()
        return await super().open(*args, **kwargs)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse()
        return await super().generate(*args, **kwargs)


@asynccontextmanager
async def client_of(*harnesses: Harness) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    """A stub over a name with all their addresses, with the config as it is published."""
    addresses = ",".join(f"127.0.0.1:{one.ports.public}" for one in harnesses)
    options = [("grpc.service_config", TEXT), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"ipv4:{addresses}", options=options) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def test_it_names_services_and_a_health_name_that_exist() -> None:
    config = json.loads(TEXT)
    names = {name["service"] for method in config["methodConfig"] for name in method["name"]}
    assert names <= set(READY_SERVICES)
    assert "photon.v1.InferenceService" in names
    assert config["healthCheckConfig"]["serviceName"] in READY_SERVICES


def test_it_is_what_the_contract_says() -> None:
    config = json.loads(TEXT)
    (method,) = config["methodConfig"]
    assert method["retryPolicy"] == {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    assert config["retryThrottling"] == {"maxTokens": 10, "tokenRatio": 0.1}
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]


def test_a_client_refuses_a_config_that_is_wrong() -> None:
    """So that the tests below show that the published one is accepted."""
    broken = TEXT.replace('"maxAttempts": 4', '"maxAttempts": "many"')
    with grpc.insecure_channel("127.0.0.1:1", options=[("grpc.service_config", broken)]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=5)
    assert "maxAttempts" in raised.value.details()


async def test_unavailable_is_retried_for_unary_calls_and_streams() -> None:
    front_door = Reluctant(errors.EngineDrainingError(), times=2)
    async with running_server(front_door) as harness, client_of(harness) as stub:
        answer = await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
        assert answer.usage.output_tokens == 3
        assert front_door.attempts == 3
        front_door.attempts = 0
        messages = [m async for m in stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC), timeout=20)]
    assert [m.seq for m in messages] == [1, 2, 3, 4, 5, 6]
    assert front_door.attempts == 3


async def test_at_most_four_attempts() -> None:
    front_door = Reluctant(errors.EngineDrainingError(), times=99)
    async with running_server(front_door) as harness, client_of(harness) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert front_door.attempts == 4


@pytest.mark.parametrize(
    "error", [errors.InternalError(), errors.QueueTimeoutError(), errors.DuplicateRequestError("x")]
)
async def test_nothing_else_is_retried(error: errors.PhotonError) -> None:
    front_door = Reluctant(error, times=1)
    async with running_server(front_door) as harness, client_of(harness) as stub:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
    assert front_door.attempts == 1


async def test_nothing_is_retried_after_the_first_message() -> None:
    front_door = FakeFrontDoor(Script(error=errors.EngineDeadError(), error_at=3))
    async with running_server(front_door) as harness, client_of(harness) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC), timeout=20):
                pass
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(front_door.streams) == 1


async def test_calls_go_round_the_servers() -> None:
    one, other = FakeFrontDoor(), FakeFrontDoor()
    async with (
        running_server(one) as first,
        running_server(other) as second,
        client_of(first, second) as stub,
    ):
        for _ in range(100):
            await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
            if one.requests and other.requests:
                break
    assert one.requests
    assert other.requests


async def test_a_server_that_is_not_serving_is_left_out() -> None:
    quiet, serving = FakeFrontDoor(), FakeFrontDoor()
    async with running_server(quiet) as first, running_server(serving) as second:
        first.server.set_not_serving()
        async with client_of(first, second) as stub:
            for _ in range(20):
                await stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=20)
    assert not quiet.requests
    assert len(serving.requests) == 20
