"""How the engine gets its runner, in a thread of the server or in a process of its own.

Imports nothing that computes until it is called: the process of the event loop makes a RunnerFactory,
and where the engine has its own process only that one calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from photon_grpc.engine.host import Progress
from photon_grpc.options import Options
from photon_grpc.processes.collector import keep_imports
from photon_grpc.runner.base import Runner
from photon_grpc.stages import Stages, process_begun
from photon_grpc.telemetry.logging import configure_logging


@dataclass(frozen=True, slots=True)
class RunnerFactory:
    """Implements `engine.host.RunnerFactory` for the model in `folder`.

    With `own_process` it also does what the server's process has done for itself: logs go where and how
    its logs go.
    """

    folder: Path
    options: Options
    own_process: bool = False

    def __call__(self, progress: Progress) -> Runner:
        """Raises StartupError."""
        stages = Stages(process_begun() if self.own_process else None)
        if self.own_process:
            configure_logging(self.options.telemetry)
            if self.options.model.backend != "cpu":
                from photon_grpc.kernels.early_context import begin_context

                begin_context()
        stages.ended("process")
        from photon_grpc.runner.factory import build_runner

        if self.own_process:
            keep_imports()
        stages.ended("imports")
        return build_runner(self.folder, self.options, progress, stages)
