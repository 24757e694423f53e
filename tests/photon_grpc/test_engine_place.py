"""The engine's process is begun as soon as the settings are known, and never left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from photon_grpc.engine_place import early_engine, engine_setup, has_own_process, model_folder
from photon_grpc.errors import ConfigError, ModelLoadError, StartupError
from photon_grpc.options import EngineOptions, ModelOptions, Options

# Runs `photon-grpc serve` up to the moment at which it spawns its first process, and prints what that is and
# which modules are there.
_UNTIL_SPAWN = """
import subprocess, sys
def popen(arguments, **_):
    print(arguments[2])
    print(*sys.modules)
    sys.stdout.flush()
    raise SystemExit(0)
subprocess.Popen = popen
from photon_grpc.cli import main
main(["serve", "--model", "demo", "--set", "engine.process=own"])
"""
# Prints which modules there are once a server serves with its engine as a thread.
_UNTIL_SERVING = """
import os, sys
from photon_grpc.app import run
from photon_grpc.options import EngineOptions, ModelOptions, Options, ServerOptions
def ready(_):
    print(*sys.modules)
    sys.stdout.flush()
    os._exit(0)
model, server = ModelOptions(path="demo", backend="cpu"), ServerOptions(port=0, admin_port=-1)
run(Options(model=model, server=server, engine=EngineOptions(process="shared")), ready=ready)
"""
# What the server needs and the engine's process does not wait for.
_LATER = {
    *(
        "photon_grpc.app",
        "photon_grpc.frontend",
        "photon_grpc.server.server",
        "photon_grpc.telemetry.metrics",
    ),
    *("uvloop", "tokenizers", "jinja2", "transformers", "torch", "numpy", "prometheus_client"),
    "opentelemetry",
}


def options(process: str = "own", **model: str) -> Options:
    return Options(model=replace(ModelOptions(path="demo"), **model), engine=EngineOptions(process=process))


def test_nothing_that_it_does_not_need_is_imported_before_it_is_begun() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _UNTIL_SPAWN], capture_output=True, text=True, timeout=120, check=True
    )
    command, modules = ended.stdout.splitlines()
    assert "photon_grpc.engine.child" in command
    found = set(modules.split())
    assert "photon_grpc.engine_place" in found
    assert found & _LATER == set()


def test_the_modules_of_that_test_exist() -> None:
    """A name that nothing imports would never be missed."""
    source = "import photon_grpc.app, photon_grpc.runner.factory, transformers, sys"
    source += "; import photon_grpc.telemetry.otlp; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) >= _LATER


def test_a_server_on_the_cpu_imports_torch_for_its_engine_alone() -> None:
    """transformers would bring compilers and what is distributed, for models that are never made with it."""
    ended = subprocess.run([sys.executable, "-c", _UNTIL_SERVING], capture_output=True, text=True, check=True)
    found = set(ended.stdout.split())
    assert {"torch", "transformers", "photon_grpc.models.llama"} <= found
    assert (
        found & {"torch._dynamo", "sympy", "torch.distributed.tensor", "transformers.modeling_utils"} == set()
    )
    assert found & {"photon_grpc.telemetry.otlp", "opentelemetry.sdk"} == set()


def test_one_that_nobody_takes_over_ends() -> None:
    with early_engine(options()) as child:
        assert child is not None
        assert psutil.Process(child.process.pid).is_running()
    assert not psutil.pid_exists(child.process.pid)


def test_a_thread_needs_no_process() -> None:
    before = psutil.Process().children()
    with early_engine(options("shared")) as child:
        assert child is None
        assert psutil.Process().children() == before


def test_one_that_cannot_be_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StartupError, match="cannot start: No such file"), early_engine(options()):
        pass


def test_a_model_that_is_not_there_needs_no_process(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelLoadError, match="no such folder"),
        early_engine(options(path=str(tmp_path / "m"))),
    ):
        pass
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        model_folder(ModelOptions())


@pytest.mark.parametrize(
    ("process", "backend", "expected"),
    [("own", "cpu", True), ("shared", "cuda", False), ("auto", "cuda", True), ("auto", "cpu", False)],
)
def test_where_it_lives(process: str, backend: str, expected: bool) -> None:
    given = options(process, backend=backend)
    assert has_own_process(given) == expected
    assert engine_setup(given).runner_factory.own_process == expected  # type: ignore[attr-defined]  # ours
