"""Run pytest over the tests that are marked `gpu`, after making sure that they can run at all.

Only files that have such tests are collected, with settings of their own, so that an environment with
torch, CuPy, cuda-bindings, pytest and hypothesis is enough for the kernels'. Exit code 2 where the GPU
or a library is missing, else pytest's.
"""

from __future__ import annotations

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


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from photon_grpc.errors import StartupError
    from photon_grpc.kernels.launcher import require_cuda

    try:
        device = require_cuda()
    except StartupError as error:
        print(error.message, file=sys.stderr)
        return 2
    print(f"{device.name}, compiled for {device.arch}", flush=True)
    # The project's own settings name plugins that these tests do not need.
    options = ["-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-ra", "-m", "gpu"]
    options += [
        "--strict-markers",
        "-o",
        "markers=gpu: needs an NVIDIA GPU\nslow: takes more than a few seconds",
    ]
    options += ["-W", "error", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments, *targets(arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
