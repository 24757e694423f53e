"""The process as an operator sees it: signals, exit codes, start-up errors, ports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.server_process import server_process
from tests.support.tiny_model import tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


def request(max_tokens: int) -> inference_pb2.StreamGenerateRequest:
    spec = inference_pb2.GenerationSpec(text="once")
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    return inference_pb2.StreamGenerateRequest(spec=spec)


def test_health_is_quick_while_the_engine_decodes(model: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.StreamGenerate(request(8000)) for _ in range(4)]
        for call in calls:
            next(call)
        health = health_pb2_grpc.HealthStub(channel)
        answers = [health.Check(health_pb2.HealthCheckRequest(), timeout=30).status for _ in range(12)]
        assert set(answers) == {health_pb2.HealthCheckResponse.SERVING}
        # A loop that waits for the engine answers at the end, when nothing is decoded any more.
        assert server.load().running == 4
        for call in calls:
            call.cancel()
        server.wait_until_idle()


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "photon_grpc", "serve", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_unknown_architecture_ends_with_two_and_lists_the_known(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    result = start("--model", str(other), "--set", "server.admin_port=-1")
    assert result.returncode == 2
    assert "GPT2LMHeadModel" in result.stderr
    for known in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert known in result.stderr


def test_cuda_without_its_kernels_is_refused_by_name(model: Path) -> None:
    result = start("--model", str(model), "--backend", "cuda", "--set", "server.admin_port=-1")
    assert result.returncode == 2
    assert "cuda" in result.stderr


# --- the engine in a process of its own -----------------------------------------------------------


def engine_process(server: psutil.Process) -> psutil.Process:
    (child,) = server.children()
    return child


def libraries(process: psutil.Process) -> str:
    return "\n".join(entry.path for entry in process.memory_maps())


def test_an_engine_of_its_own_serves_and_drains_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with (
        server_process(model, tmp_path / "log", engine__process="own", server__metrics_port=0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        parent = psutil.Process(server.process.pid)
        child = engine_process(parent)
        assert "libtorch" in libraries(child)
        assert "libtorch" not in libraries(parent), "the front end has no use for torch"
        assert server.metrics is not None
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
            scraped = page.read().decode()
        measured = {
            line.split()[0]: float(line.split()[1]) for line in scraped.splitlines() if line[0] != "#"
        }
        # torch is most of what either of them holds.
        engine_bytes = measured["photon_engine_process_resident_memory_bytes"]
        assert engine_bytes > measured["process_resident_memory_bytes"] > 0
        assert measured["photon_engine_process_start_time_seconds"] > measured["process_start_time_seconds"]
        running = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request(1500))
        next(running)
        # A terminal's Ctrl-C and a supervisor's stop go to every process of the group.
        child.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert list(running)[-1].summary.usage.output_tokens == 1500
        assert server.process.wait(60) == 0
        assert not child.is_running()
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert "model ready" in {line["event"] for line in log}, "the engine's records have the same form"
    assert not {line["level"] for line in log} - {"info"}


def test_fault_07_a_killed_engine_is_told_to_callers_and_ends_the_server(model: Path, tmp_path: Path) -> None:
    with (
        server_process(model, tmp_path / "log", engine__process="own") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        running = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request(8000))
        next(running)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        engine_process(psutil.Process(server.process.pid)).kill()
        with pytest.raises(grpc.RpcError) as raised:
            list(running)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "engine has stopped" in raised.value.details()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(60) == 1
