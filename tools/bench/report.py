"""Where and on what a benchmark ran, and the files it leaves: `<name>.json` and `<name>.png`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure

__all__ = ["RESULTS", "environment", "write", "write_json", "write_plot"]

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("torch", "transformers", "tokenizers", "grpcio", "protobuf", "uvloop", "numpy")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: what the platform says has to do
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Hardware, versions, commit, command and date. `load_1m` tells of a machine that was not quiet."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tools.bench", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": _gpus(),
            "load_1m": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
            **{package: _version(package) for package in _PACKAGES},
        },
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def write(folder: Path, name: str, result: dict[str, Any], draw: Callable[[Figure], None]) -> Path:
    """Write the result with its environment, and what `draw` puts on a figure; the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, {"benchmark": name, "environment": environment(), **result})
    write_plot(folder / f"{name}.png", draw)
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file; dataclasses are written as objects. One that was there stays whole until then."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    part.replace(path)


def write_plot(path: Path, draw: Callable[[Figure], None]) -> None:
    """Save what `draw` puts on a figure."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
