"""Run pytest over the tests that are marked `gpu`, after making sure that they can run at all.

Only files that have such tests are collected, with settings of their own, so that an environment with
torch, CuPy, cuda-bindings, pytest and hypothesis is enough for the kernels'. Exit code 2 where the GPU
or a library is missing, else pytest's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "mark.gpu"


def targets(arguments: list[str]) -> list[str]:
    """The files to collect: those named, else all that have a marked test."""
    named = [argument for argument in arguments if (ROOT / argument.split("::")[0]).exists()]
    if named:
        return []
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text()
    )


def pytest_command(arguments: list[str]) -> list[str]:
    """pytest over marked tests; the project's own settings name plugins that these tests do not need."""
    options = ["-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-ra", "-m", "gpu"]
    options += [
        "--strict-markers",
        "-o",
        "markers=gpu: needs an NVIDIA GPU\nslow: takes more than a few seconds",
    ]
    options += ["-W", "error", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_asyncio") is not None:
        # Where the plugin is there, it warns until it is told.
        options += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def environment() -> dict[str, str]:
    """This process's, with the checkout before all other packages."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path}


def missing() -> str:
    """What keeps GPU tests from running here; empty when nothing does. Says what they will run on."""
    sys.path.insert(0, str(ROOT))
    from photon_grpc.errors import StartupError
    from photon_grpc.kernels.launcher import require_cuda

    try:
        device = require_cuda()
    except StartupError as error:
        return error.message
    print(f"{device.name}, compiled for {device.arch}", flush=True)
    return ""


def main(arguments: list[str]) -> int:
    problem = missing()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    command = pytest_command([*arguments, *targets(arguments)])
    return subprocess.run(command, cwd=ROOT, check=False, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
