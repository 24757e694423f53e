"""The engine's process from before its settings are known: it begins with what it needs whatever they say.

The first thing that `photon-grpc serve` does on a machine that shows a GPU, where the engine most likely gets
a process of its own. Reading the settings takes as long as a good part of torch's import. `engine_place.py`
gives it its settings, or ends it where they say otherwise. Imports next to nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from photon_grpc.processes.spawn import SpawnedChild, spawn

__all__ = ["begin", "gpu_is_visible", "main"]

# What a driver of NVIDIA's shows to a process that may use a GPU; the second is that of WSL.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_HELP = {"--help", "-h"}


def gpu_is_visible() -> bool:
    """Whether an NVIDIA driver offers this process a device. Found out without torch."""
    return any(path.exists() for path in _GPU_DEVICES)


def begin(arguments: Sequence[str]) -> SpawnedChild | None:
    """The process, where a command line of these arguments will most likely want one."""
    if arguments[:1] != ["serve"] or _HELP & set(arguments) or not gpu_is_visible():
        return None
    # Whoever finds that it cannot be spawned with settings says so.
    with suppress(OSError):
        return spawn(__name__, ())
    return None


def main(fd: int, parent: int) -> None:
    """Be the engine's process, which imports while it waits for its settings."""
    # On a thread, so that the settings find somebody, who begins the device's context beside the import.
    threading.Thread(target=_import_runner, name="photon-imports", daemon=True).start()
    from photon_grpc.engine.child import main as run

    run(fd, parent)


def _import_runner() -> None:
    # What is missing is missed again by whoever uses it, and said there.
    with suppress(ImportError):
        import photon_grpc.runner.factory  # noqa: F401
