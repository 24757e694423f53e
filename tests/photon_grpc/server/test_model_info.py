"""ModelService: what it says is what the server does."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2

from photon_grpc import __version__
from photon_grpc.engine.messages import EngineStats
from photon_grpc.v1 import model_pb2
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import quick_options, rich_error, running_server


@pytest.mark.parametrize("model", ["", "fake"])
async def test_the_served_model(model: str) -> None:
    options = quick_options(limits={"max_n": 5, "max_stop_strings": 6, "max_top_logprobs": 7})
    async with running_server(FakeFrontDoor(), options) as harness:
        info = await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest(model=model))
    assert (info.model, info.fingerprint) == ("fake", "ffffffff")
    assert (info.max_context_tokens, info.max_output_tokens) == (256, 255)
    capabilities = info.capabilities
    assert (capabilities.max_n, capabilities.max_stop_strings, capabilities.max_top_logprobs) == (5, 6, 7)
    # "Not stated" is for clients of older servers: this one states everything.
    for field in capabilities.DESCRIPTOR.fields:
        assert field.is_repeated or capabilities.HasField(field.name), field.name


@pytest.mark.parametrize("has_template", [True, False])
async def test_chat_input_depends_on_the_models_template(has_template: bool) -> None:
    front_door = FakeFrontDoor()
    front_door.model_info = replace(front_door.model_info, has_chat_template=has_template)
    async with running_server(front_door) as harness:
        info = await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest())
    assert info.capabilities.chat_input is has_template


async def test_another_model_is_not_found() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest(model="gpt"))
    rich = rich_error(caught.value)
    assert (rich.code, rich.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert rich.details[error_details_pb2.ResourceInfo].resource_name == "gpt"


async def test_no_model_before_it_is_loaded() -> None:
    front_door = FakeFrontDoor()
    front_door.starting = True
    front_door.engine_stats = EngineStats()
    async with running_server(front_door) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest())
        assert rich_error(caught.value).reason == "STARTING"
        info = await harness.models.GetServerInfo(model_pb2.GetServerInfoRequest())
    assert not info.HasField("total_kv_blocks")
    assert not info.HasField("kv_block_tokens")


async def test_server_info() -> None:
    options = quick_options()
    ids = set()
    for _ in range(2):
        async with running_server(FakeFrontDoor(), options) as harness:
            first, second = [
                await harness.models.GetServerInfo(model_pb2.GetServerInfoRequest()) for _ in range(2)
            ]
        assert first == second
        ids.add(first.instance_id)
    assert len(ids) == 2
    assert first.version == __version__
    assert (first.schema_revision, first.minimum_client_revision) == (3, 1)
    assert (first.kv_block_tokens, first.total_kv_blocks) == (16, 100)
    assert options.scheduler.max_num_seqs == 0
    assert first.max_running_requests == FakeFrontDoor().model_info.max_num_seqs
    assert first.max_queued_requests == options.limits.max_queued_requests
    assert first.start_time.seconds > 1_700_000_000
