"""What nvidia-smi and the packages say of the GPU: the environment of a run, the clocks beside a row."""

from __future__ import annotations

import subprocess
from importlib.metadata import distributions

__all__ = ["clocks", "describe", "used_memory_bytes"]

_STANDING = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")
_MOVING = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_PACKAGES = ("torch", "cupy", "cuda-bindings", "cuda-python", "nvidia-cuda-nvrtc", "nvidia-cublas", "triton")


def _query(names: tuple[str, ...], *more: str) -> dict[str, str]:
    """Values by name of the first GPU; empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0", *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def describe() -> dict[str, object]:
    """GPU, driver, highest clocks, clocks now, and the versions of everything named after CUDA."""
    versions = {
        name: found.version
        for found in distributions()
        if (name := found.metadata["Name"] or "").lower().startswith(_PACKAGES)
    }
    return {"gpu": _query(_STANDING), "clocks": clocks(), "packages": dict(sorted(versions.items()))}


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment."""
    return _query(_MOVING)


def used_memory_bytes() -> int | None:
    """Of all processes on the first GPU together; None without one."""
    found = _query(("memory.used",), "--format=csv,noheader,nounits")
    text = found.get("memory.used", "")
    return int(text) << 20 if text.isdigit() else None
