"""The engine's process from before its settings are known: for which commands, and what it is then."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from photon_grpc import engine_ahead

# `photon-grpc` on a machine that shows a GPU, or does as if.
_ON_A_GPU = """
import sys
from photon_grpc import engine_ahead
engine_ahead.gpu_is_visible = lambda: True
{first}
from photon_grpc.__main__ import main
sys.argv = ["photon-grpc", *sys.argv[1:]]
main()
"""
# Prints what is spawned first and the modules of that moment.
_FIRST_SPAWN = """
import subprocess
def popen(arguments, **_):
    print(arguments[2])
    print(*sys.modules)
    sys.stdout.flush()
    raise SystemExit(0)
subprocess.Popen = popen
"""
_SERVE = ("serve", "--model", "demo", "--backend", "cpu", "--port", "0", "--set", "server.admin_port=-1")


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_A_GPU.format(first=""), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            yield process
    finally:
        process.kill()


def engines(process: subprocess.Popen[str]) -> list[str]:
    """The command lines of its children."""
    return [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children()]


def test_next_to_nothing_is_imported_before_it_is_begun() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _ON_A_GPU.format(first=_FIRST_SPAWN), *_SERVE],
        capture_output=True,
        text=True,
        check=True,
    )
    spawned, modules = ended.stdout.splitlines()
    assert "photon_grpc.engine_ahead" in spawned
    later = {"photon_grpc.cli", "photon_grpc.config", "typer", "rich", "pydantic", "grpc", "structlog"}
    assert set(modules.split()) & (later | {"asyncio"}) == set()


@pytest.mark.parametrize(
    ("arguments", "shows_gpu"),
    [
        (["serve", "--model", "demo"], False),
        (["serve", "--help"], True),
        (["info", "--model", "serve"], True),
        ([], True),
    ],
)
def test_it_is_begun_for_a_server_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], shows_gpu: bool
) -> None:
    monkeypatch.setattr(engine_ahead, "gpu_is_visible", lambda: shows_gpu)
    assert engine_ahead.begin(arguments) is None


def test_one_that_cannot_be_spawned_is_left_to_whoever_has_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ahead, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert engine_ahead.begin(["serve"]) is None


def test_it_becomes_the_engine_of_a_server_that_wants_one() -> None:
    with command(*_SERVE, "--set", "engine.process=own") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving demo at ")
        found = [line for line in engines(process) if "acceptor" not in line]
        assert len(found) == 1
        assert "photon_grpc.engine_ahead" in found[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_it_ends_where_the_engine_is_a_thread() -> None:
    with command(*_SERVE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving demo at ")
        assert engines(process) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_it_ends_with_a_command_that_fails(tmp_path: Path) -> None:
    with command("serve", "--model", str(tmp_path / "absent"), "--backend", "cuda") as process:
        assert process.wait(60) == 2
        assert process.stderr is not None
        assert "no such folder" in process.stderr.read()
