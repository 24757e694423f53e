"""The process as an operator sees it: signals, exit codes, start-up errors, ports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_idle_ends_with_zero(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with server_process(model, tmp_path / "log") as server:
        assert server.stop(number) == 0


def test_drain_lets_a_running_call_finish_and_refuses_new_ones(model: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        running = stub.StreamGenerate(request(1500))
        next(running)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = None
        while refused is None:
            try:
                list(stub.StreamGenerate(request(1)))
            except grpc.RpcError as error:
                refused = error
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        last = list(running)[-1]
        assert last.summary.usage.output_tokens == 1500
        assert server.process.wait(20) == 0


def test_second_signal_cuts_the_drain_short(model: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        running = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request(8000))
        next(running)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as raised:
            list(running)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in raised.value.details()
        assert server.process.wait(20) == 0


def test_signal_while_loading_ends_with_zero(model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "photon_grpc", "serve", "--model", str(model), "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*arguments, "--set", "server.admin_port=-1", "--set", "server.drain_propagation_s=0"],
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while "listening" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_health_is_quick_while_the_engine_decodes(model: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.StreamGenerate(request(2000)) for _ in range(4)]
        for call in calls:
            next(call)
        answers: list[int] = []
        done = threading.Event()

        def probe() -> None:
            health = health_pb2_grpc.HealthStub(channel)
            while not done.is_set():
                answers.append(health.Check(health_pb2.HealthCheckRequest(), timeout=5).status)

        prober = threading.Thread(target=probe)
        prober.start()
        for call in calls:
            list(call)
        done.set()
        prober.join()
        assert len(answers) > 10
        assert set(answers) == {health_pb2.HealthCheckResponse.SERVING}
        server.wait_until_idle()


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "photon_grpc", "serve", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
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


def test_port_in_use_ends_with_two(model: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "log") as server:
        port = server.address.rpartition(":")[2]
        result = start("--model", str(model), "--port", port, "--set", "server.admin_port=-1")
        assert result.returncode == 2
        assert "cannot bind" in result.stderr


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
        server_process(model, tmp_path / "log", engine__process="own") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        parent = psutil.Process(server.process.pid)
        child = engine_process(parent)
        assert "libtorch" in libraries(child)
        assert "libtorch" not in libraries(parent), "the front end has no use for torch"
        running = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request(1500))
        next(running)
        # A terminal's Ctrl-C and a supervisor's stop go to every process of the group.
        child.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert list(running)[-1].summary.usage.output_tokens == 1500
        assert server.process.wait(20) == 0
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
        assert server.process.wait(20) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the engine ends after its step")
def test_a_killed_server_takes_its_engine_with_it(model: Path, tmp_path: Path) -> None:
    with (
        server_process(model, tmp_path / "log", engine__process="own") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        running = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request(8000))
        next(running)
        child = engine_process(psutil.Process(server.process.pid))
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 10
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
