"""Runner factories that another process can be given: picklable, and cheap to import there."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from photon_grpc.engine.host import Progress
from photon_grpc.errors import PhotonError
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import SchedulerOutput
from photon_grpc.types import ModelInfo
from tests.support.builders import model_info


@dataclass(frozen=True)
class Scripted:
    """A ScriptedRunner; `load_s` passes first, and `progress` is told of it twice.

    One that takes time to load says `loading` on standard output when it begins.
    """

    model: ModelInfo = field(default_factory=model_info)
    num_blocks: int = 1024
    step_s: float = 0.0
    crash_at_step: int | None = None
    load_s: float = 0.0

    def __call__(self, progress: Progress) -> Runner:
        progress(0, 100)
        if self.load_s:
            os.write(1, b"loading\n")
        time.sleep(self.load_s)
        progress(100, 100)
        return ScriptedRunner(
            self.model,
            num_blocks=self.num_blocks,
            step_s=self.step_s,
            crash_at_step=self.crash_at_step,
            check_cache=False,
        )


class HangingRunner(ScriptedRunner):
    """Never comes back from step `hang_at_step`, as a device that hangs.

    With `holds_interpreter` no other thread of the process runs any more either.
    """

    def __init__(self, model: ModelInfo, *, hang_at_step: int, holds_interpreter: bool = False) -> None:
        super().__init__(model, check_cache=False)
        self._hang_at_step = hang_at_step
        self._holds_interpreter = holds_interpreter

    def launch(self, output: SchedulerOutput) -> None:
        if output.step >= self._hang_at_step:
            if self._holds_interpreter:
                # A PyDLL, unlike a CDLL, keeps the lock while it is called.
                ctypes.PyDLL(None).sleep(3600)
            threading.Event().wait()
        super().launch(output)


@dataclass(frozen=True)
class Hanging:
    """A HangingRunner."""

    hang_at_step: int
    holds_interpreter: bool = False

    def __call__(self, progress: Progress) -> Runner:
        return HangingRunner(
            model_info(), hang_at_step=self.hang_at_step, holds_interpreter=self.holds_interpreter
        )


class _Held:
    """Memory of a device that is lost: letting go of it ends the process as C++ does, with SIGABRT."""

    def __del__(self) -> None:
        os.abort()


class LosingRunner(ScriptedRunner):
    """Its device is lost with the first step of `num_rows` rows, for good: to close it fails as well."""

    def __init__(self, model: ModelInfo, *, num_rows: int) -> None:
        super().__init__(model, step_s=0.01, check_cache=False)
        self._num_rows = num_rows
        self._is_lost = False

    def launch(self, output: SchedulerOutput) -> None:
        if len(output.rows) >= self._num_rows:
            self._is_lost = True
            # Held by the interpreter until its very end.
            sys.modules["_held"] = _Held()  # type: ignore[assignment]  # anything may stand there
            raise RuntimeError("CUDA error: device-side assert triggered")
        super().launch(output)

    def close(self) -> None:
        if self._is_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        super().close()


@dataclass(frozen=True)
class Losing:
    """A LosingRunner."""

    num_rows: int

    def __call__(self, progress: Progress) -> Runner:
        return LosingRunner(model_info(), num_rows=self.num_rows)


@dataclass(frozen=True)
class IllegalAccess:
    """The runner of the model in `folder` on a GPU. Behind step `at_step` a kernel writes to no memory."""

    folder: str
    at_step: int | None = None
    backend: str = "cuda"

    def __call__(self, progress: Progress) -> Runner:
        from photon_grpc.options import KVCacheOptions, ModelOptions, Options
        from photon_grpc.runner.factory import build_runner

        options = Options(
            model=ModelOptions(backend=self.backend), cache=KVCacheOptions(kv_cache_memory_bytes=64 << 20)
        )
        runner = build_runner(Path(self.folder), options, progress)
        launch = runner.launch

        def launch_and_write(output: SchedulerOutput) -> None:
            launch(output)
            if output.step == self.at_step:
                _write_to_no_memory()

        runner.launch = launch_and_write  # type: ignore[method-assign]  # the fault
        return runner


def _write_to_no_memory() -> None:
    import cupy

    source = 'extern "C" __global__ void stray(int *nowhere) { *nowhere = 1; }'
    # An address that no allocation has, aligned.
    cupy.RawKernel(source, "stray")((1,), (1,), (cupy.uint64(4096),))


@dataclass(frozen=True)
class Refused:
    """Raises `error`."""

    error: PhotonError

    def __call__(self, progress: Progress) -> Runner:
        raise self.error


def broken(progress: Progress) -> Runner:
    """Raises what no factory may."""
    raise KeyError("an unexpected fault")


def vanishing(progress: Progress) -> Runner:
    """The process is gone before it has said anything."""
    os._exit(7)
