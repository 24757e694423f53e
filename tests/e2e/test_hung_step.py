"""A step that never returns, in a real server: every call gets its status, health turns, the process ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.tiny_model import tiny_model_folder

# Far above the bounds of the server itself (two steps of its budget, then 20 s), which must hold alone.
_END_S = 60.0
# Far above what a healthy step of ten milliseconds takes on a busy machine.
STEP_TIMEOUT_S = 1.5
_SERVE = """
import sys
from dataclasses import replace
from photon_grpc import app, engine_place
from photon_grpc.options import EngineOptions, ModelOptions, TelemetryOptions
from photon_grpc.telemetry.logging import configure_logging
from tests.support.engine_factories import Hanging, Losing, Scripted
from tests.support.grpc_harness import quick_options

folder, process, how, timeout_s = sys.argv[1:]
configure_logging(TelemetryOptions())
factories = {"never": Scripted(step_s=0.01), "lost": Losing(num_rows=3)}
factory = factories.get(how) or Hanging(20, holds_interpreter=how == "holds")
engine_place.RunnerFactory = lambda folder, options, own_process: factory
options = replace(
    quick_options(),
    model=ModelOptions(path=folder),
    engine=EngineOptions(process=process, step_timeout_s=float(timeout_s)),
)
sys.exit(app.run(options, ready=lambda service: print("ready", service.ports.public, flush=True)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@dataclass
class Served:
    process: subprocess.Popen[str]
    channel: grpc.Channel
    log: Path

    def stream(self) -> grpc.Call:
        spec = inference_pb2.GenerationSpec(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]))
        spec.stop.max_tokens, spec.stop.ignore_eos = 200, True
        request = inference_pb2.StreamGenerateRequest(spec=spec)
        return inference_pb2_grpc.InferenceServiceStub(self.channel).StreamGenerate(request, timeout=_END_S)

    def watch(self, service: str) -> grpc.Call:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(self.channel).Watch(request, timeout=_END_S)


@contextmanager
def served(model: Path, log: Path, process: str, how: str, timeout_s: float) -> Iterator[Served]:
    arguments = [sys.executable, "-c", _SERVE, str(model), process, how, str(timeout_s)]
    with log.open("w") as sink:
        server = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=sink, text=True)
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        port = next((match[1] for line in lines if (match := re.match(r"ready (\d+)", line))), None)
        assert port is not None, log.read_text()[-4000:]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(server, channel, log)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def reason_of(call: grpc.Call) -> str:
    """The ErrorInfo in which a stream ends."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return str(info.reason)


@pytest.mark.parametrize("process", ["shared", "own"])
def test_fault_05_a_step_that_hangs(model: Path, tmp_path: Path, process: str) -> None:
    with served(model, tmp_path / "log", process, "sleeps", STEP_TIMEOUT_S) as server:
        watches = [server.watch("photon.v1.InferenceService"), server.watch("photon.liveness")]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        calls = [server.stream() for _ in range(3)]
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert [reason_of(call) for call in calls] == ["ENGINE_DEAD"] * 3
        assert server.process.wait(_END_S) == 1
        log = server.log.read_text()
        assert "in launch" in log, "no stack of the hung step"
        assert ("step_hangs" if process == "shared" else "engine_process_died") in log


@pytest.mark.parametrize("process", ["shared", "own"])
def test_fault_05_a_step_that_keeps_every_thread_from_running(
    model: Path, tmp_path: Path, process: str
) -> None:
    with served(model, tmp_path / "log", process, "holds", STEP_TIMEOUT_S) as server:
        call = server.stream()
        if process == "own":
            assert reason_of(call) == "ENGINE_DEAD"
        else:
            # Nobody is left in the process who could say why; the connection breaks with it.
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(_END_S) == 1
        assert "in launch" in server.log.read_text()


def test_fault_07_an_engine_s_process_that_is_frozen(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path / "log", "own", "never", STEP_TIMEOUT_S) as server:
        call = server.stream()
        next(call)
        (child,) = psutil.Process(server.process.pid).children()
        child.send_signal(signal.SIGSTOP)
        assert reason_of(call) == "ENGINE_DEAD"
        assert server.process.wait(_END_S) == 1
        assert not child.is_running()
        assert "engine_silent" in server.log.read_text()


@pytest.mark.parametrize("process", ["shared", "own"])
def test_an_engine_without_work_is_no_dead_one(model: Path, tmp_path: Path, process: str) -> None:
    with served(model, tmp_path / "log", process, "never", 0.5) as server:
        list(server.stream())
        # Longer than any limit that follows from the timeout: 4 x 0.5 s and 5 s.
        time.sleep(8)
        assert server.process.poll() is None
        list(server.stream())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(_END_S) == 0
