"""A device that is lost for good, in a real server: a status for every call, exit code 1, nothing left."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from grpc_health.v1 import health_pb2

from tests.e2e.test_hung_step import reason_of, served
from tests.support.tiny_model import tiny_model_folder

_END_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("process", ["shared", "own"])
def test_fault_04_a_device_that_is_lost_for_good(model: Path, tmp_path: Path, process: str) -> None:
    with served(model, tmp_path / "log", process, "lost", 0.5) as server:
        watch = server.watch("photon.v1.InferenceService")
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        processes = [server.process.pid, *(c.pid for c in psutil.Process(server.process.pid).children())]
        assert len(processes) == (1 if process == "shared" else 2)
        calls = [server.stream() for _ in range(3)]
        assert [reason_of(call) for call in calls] == ["ENGINE_DEAD"] * 3
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(_END_S) == 1
        assert not any(psutil.pid_exists(pid) for pid in processes), "a process is left, or its body"
        if process == "shared":
            # The other's log is not configured by this factory.
            log = server.log.read_text()
            assert "device-side assert triggered" in log
            assert "engine_died" in log
            assert "runner_not_closed" in log
