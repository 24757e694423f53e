"""Clients that are cancelled, killed or frozen at each stage of a request leave no block behind.

A real server process over a random-weight model; a stage is seen in GetLoad before the client goes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from photon_grpc.v1 import control_pb2, inference_pb2, inference_pb2_grpc
from tests.support.server_process import ClientProcess, ServerProcess, server_process
from tests.support.tiny_model import tiny_model_folder

CONTEXT = 8192
LONG = 6000
KEEPALIVE_TIMEOUT_S = 3

Load = control_pb2.GetLoadResponse


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    model = tiny_model_folder(folder, max_position_embeddings=CONTEXT)
    with server_process(
        model,
        folder / "log",
        scheduler__max_num_seqs=2,
        scheduler__max_num_batched_tokens=16,
        server__keepalive_time_s=1,
        # Well above what a busy machine may keep a client that is alive from answering.
        server__keepalive_timeout_s=KEEPALIVE_TIMEOUT_S,
    ) as running:
        yield running
        assert running.stop() == 0


def decoding(load: Load) -> bool:
    return load.running == 2 and load.queued == 0


def queued(load: Load) -> bool:
    return load.running == 2 and load.queued >= 2


def prefilling(load: Load) -> bool:
    return load.running >= 1


# (what is asked for, the load that shows the stage)
STAGES: dict[str, tuple[dict[str, int], Callable[[Load], bool]]] = {
    "decoding": ({"count": 2, "max_tokens": LONG}, decoding),
    "queued": ({"count": 4, "max_tokens": LONG, "read": 0}, queued),
    "mid_prefill": ({"count": 1, "max_tokens": 10, "prompt_tokens": CONTEXT - 100, "read": 0}, prefilling),
}


@pytest.fixture(params=STAGES)
def client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[ClientProcess]:
    server.wait_until_idle()
    asked, reached = STAGES[request.param]
    client = ClientProcess(
        server.address,
        count=asked["count"],
        max_tokens=asked["max_tokens"],
        prompt_tokens=asked.get("prompt_tokens", 4),
        read=bool(asked.get("read", 1)),
    )
    try:
        server.wait_for(request.param, reached)
        assert server.load().used_kv_blocks > 0
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_client(server: ServerProcess, client: ClientProcess, number: signal.Signals) -> None:
    client.send(number)
    server.wait_until_idle()


def test_frozen_client(server: ServerProcess, client: ClientProcess) -> None:
    """SIGSTOP leaves the connection open; only the server's keepalive can tell."""
    client.send(signal.SIGSTOP)
    server.wait_until_idle()


def stream(
    stub: inference_pb2_grpc.InferenceServiceStub, max_tokens: int, prompt_tokens: int = 4
) -> grpc.Call:
    spec = inference_pb2.GenerationSpec()
    spec.token_ids.ids.extend([5 + i % 90 for i in range(prompt_tokens)])
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    return stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec))


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_call(server: ServerProcess, stage: str) -> None:
    server.wait_until_idle()
    asked, reached = STAGES[stage]
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [
            stream(stub, asked["max_tokens"], asked.get("prompt_tokens", 4)) for _ in range(asked["count"])
        ]
        server.wait_for(stage, reached)
        for call in calls:
            call.cancel()
        server.wait_until_idle()
        for call in calls:
            assert call.code() is grpc.StatusCode.CANCELLED


def test_deadline(server: ServerProcess) -> None:
    server.wait_until_idle()
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        spec = inference_pb2.GenerationSpec(text="abc")
        spec.stop.max_tokens = LONG
        spec.stop.ignore_eos = True
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(inference_pb2.GenerateRequest(spec=spec), timeout=0.5)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_until_idle()


def test_storm_of_calls_that_are_opened_and_cancelled(server: ServerProcess) -> None:
    server.wait_until_idle()

    def storm() -> None:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(200):
                stream(stub, LONG).cancel()

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_until_idle()


def test_reader_that_stops_reading_does_not_hold_the_engine(server: ServerProcess) -> None:
    """A client that reads nothing more: its sequence runs to its end and frees its blocks."""
    server.wait_until_idle()
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stream(stub, 400)
        next(call)
        server.wait_until_idle()
        messages = list(call)
    assert messages[-1].WhichOneof("event") == "summary"
    assert sum(message.delta.num_tokens for message in messages) == 400


def test_preempted_requests_that_are_cancelled(tmp_path: Path) -> None:
    """A pool for about one and a half of the requests, so that one of two is always preempted."""
    model = tiny_model_folder(tmp_path, max_position_embeddings=1024)
    kv_bytes = 1100 * kv_bytes_per_token(model)
    with server_process(
        model,
        tmp_path / "log",
        scheduler__max_num_seqs=2,
        cache__kv_cache_memory_bytes=kv_bytes,
    ) as server:
        client = ClientProcess(server.address, count=2, max_tokens=1000)
        server.wait_for("preempted", lambda load: load.running == 1 and load.queued == 1)
        client.close()
        server.wait_until_idle()
        assert server.stop() == 0


def kv_bytes_per_token(model: Path) -> int:
    from photon_grpc.models.registry import load_config

    config = load_config(model)
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
