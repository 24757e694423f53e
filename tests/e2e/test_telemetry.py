"""What a server tells about itself is never at a call's cost; `test_canaries.py` looks at what it is."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.server_process import server_process
from tests.support.tiny_model import tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def spec(max_tokens: int = 24) -> inference_pb2.GenerationSpec:
    message = inference_pb2.GenerationSpec(text="hello")
    message.stop.max_tokens = max_tokens
    message.stop.ignore_eos = True
    return message


def fill(pipe: int) -> None:
    """Write into a pipe until it takes no more."""
    os.set_blocking(pipe, False)
    try:
        while True:
            os.write(pipe, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(pipe, True)


def test_a_server_whose_log_nobody_reads_serves_and_leaves(model: Path, tmp_path: Path) -> None:
    """Standard error is full from the start, for the engine's own process too."""
    reading, writing = os.pipe()
    try:
        fill(writing)
        with (
            server_process(
                model, tmp_path / "log", stderr=writing, engine__process="own", telemetry__log_level="debug"
            ) as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(50):
                stub.Generate(inference_pb2.GenerateRequest(spec=spec(max_tokens=4)), timeout=60)
            assert server.stop() == 0
    finally:
        os.close(reading)
        os.close(writing)
