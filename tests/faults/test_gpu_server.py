"""A real server whose GPU a kernel of its own has broken, in the engine's process: what callers see of it."""

from __future__ import annotations

from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.test_hung_step import reason_of
from tests.support.engine_factories import IllegalAccess
from tests.support.server_process import ServerProcess, server_process
from tests.support.tiny_model import tiny_model_folder

pytestmark = pytest.mark.gpu

_END_S = 90.0
_NUM_TOKENS = 400
_BROKEN_STEP = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(
        tmp_path_factory.mktemp("model"), hidden_size=192, head_dim=32, max_position_embeddings=1024
    )


def stream(channel: grpc.Channel) -> grpc.Call:
    spec = inference_pb2.GenerationSpec(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]))
    spec.stop.max_tokens, spec.stop.ignore_eos = _NUM_TOKENS, True
    spec.output.token_ids = True
    request = inference_pb2.StreamGenerateRequest(spec=spec)
    return inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=_END_S)


def watch(channel: grpc.Channel, service: str) -> grpc.Call:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Watch(request, timeout=_END_S)


def tokens_of(server: ServerProcess) -> list[int]:
    with grpc.insecure_channel(server.address) as channel:
        return [token_id for answer in stream(channel) for token_id in answer.delta.token_ids]


def test_fault_48_an_illegal_access_ends_every_call_and_the_server_and_the_next_one_serves(
    folder: Path, tmp_path: Path
) -> None:
    broken = IllegalAccess(str(folder), _BROKEN_STEP)
    with server_process(folder, tmp_path / "broken", runner=broken, engine__process="own") as server:
        children = psutil.Process(server.process.pid).children()
        assert children, "the engine has a process of its own"
        processes = [server.process.pid, *(child.pid for child in children)]
        with grpc.insecure_channel(server.address) as channel:
            watches = [watch(channel, name) for name in ("photon.v1.InferenceService", "photon.liveness")]
            assert [next(one).status for one in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
            calls = [stream(channel) for _ in range(3)]
            assert [reason_of(call) for call in calls] == ["ENGINE_DEAD"] * 3
            assert [next(one).status for one in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
        assert server.process.wait(_END_S) == 1
        assert not any(psutil.pid_exists(pid) for pid in processes), "a process is left, or its body"
        assert "illegal memory access" in server.log.read_text().lower()
    with server_process(
        folder, tmp_path / "whole", runner=IllegalAccess(str(folder)), engine__process="own"
    ) as server:
        assert len(tokens_of(server)) == _NUM_TOKENS
        assert server.stop() == 0
