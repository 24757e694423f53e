"""Runner factories that another process can be given: picklable, and cheap to import there."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from photon_grpc.engine.host import Progress
from photon_grpc.errors import PhotonError
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.types import ModelInfo
from tests.support.builders import model_info


@dataclass(frozen=True)
class Scripted:
    """A ScriptedRunner; `load_s` passes first, and `progress` is told of it twice."""

    model: ModelInfo = field(default_factory=model_info)
    num_blocks: int = 1024
    step_s: float = 0.0
    crash_at_step: int | None = None
    load_s: float = 0.0

    def __call__(self, progress: Progress) -> Runner:
        progress(0, 100)
        time.sleep(self.load_s)
        progress(100, 100)
        return ScriptedRunner(
            self.model,
            num_blocks=self.num_blocks,
            step_s=self.step_s,
            crash_at_step=self.crash_at_step,
            check_cache=False,
        )


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
