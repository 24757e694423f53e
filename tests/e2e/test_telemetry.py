"""What a server tells about itself while it works: never what was said in it, and never at a call's cost."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import grpc
import pytest

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.server_process import server_process
from tests.support.tiny_model import tiny_model_folder

CANARY = "canary-5d1e"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def spec(text: str = CANARY, max_tokens: int = 24) -> inference_pb2.GenerationSpec:
    message = inference_pb2.GenerationSpec(text=text)
    message.stop.max_tokens = max_tokens
    message.stop.ignore_eos = True
    return message


def errors_of(channel: grpc.Channel) -> list[str]:
    """All that the client of each kind of refused call gets to see."""
    constrained = spec()
    constrained.constraint.regex = CANARY
    too_long = spec(CANARY * 2000)
    bodies = [
        inference_pb2.GenerateRequest(spec=spec()).SerializeToString()[:-1],
        *(inference_pb2.GenerateRequest(spec=bad).SerializeToString() for bad in (constrained, too_long)),
    ]
    seen = []
    for body in bodies:
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/photon.v1.InferenceService/Generate")(body, timeout=30)
        seen.append(f"{raised.value.details()} {raised.value.trailing_metadata()}")
    return seen


@pytest.mark.parametrize("process", ["shared", "own"])
def test_no_log_no_metric_and_no_error_repeats_a_text(model: Path, tmp_path: Path, process: str) -> None:
    """At the most talkative level, and with a call that the client leaves half-way."""
    with (
        server_process(
            model,
            tmp_path / "log",
            engine__process=process,
            telemetry__log_level="debug",
            server__metrics_port=0,
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = stub.Generate(inference_pb2.GenerateRequest(spec=spec()), timeout=60)
        completion = answer.completions[0].text
        assert len(completion) > 20
        left = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec(max_tokens=150)))
        next(left)
        left.cancel()
        stub.Tokenize(inference_pb2.TokenizeRequest(text=CANARY), timeout=30)
        errors = errors_of(channel)
        server.wait_until_idle()
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
            metrics = page.read().decode()
        assert server.stop() == 0
    log = server.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    methods = [line["method"] for line in lines if line["event"] == "call finished"]
    assert sum(method.startswith("photon.v1.InferenceService/") for method in methods) == 6
    assert "photon_rpc_seconds" in metrics
    for text in (CANARY, completion, json.dumps(completion)[1:-1]):
        assert text not in log
        assert text not in metrics
        assert not any(text in error for error in errors)
