"""What the fake engine runs on; a module of its own, so that the engine's own process can import it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from photon_grpc.engine.host import Progress
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.runner_factory import quiet_collector
from photon_grpc.scheduler.output import SchedulerOutput
from photon_grpc.types import ModelInfo

__all__ = ["REMOVED", "ScriptedFactory"]

REMOVED = "sequences removed"

_BLOCKS = 1 << 16
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ScriptedFactory:
    """Implements `engine.host.RunnerFactory`: steps of `step_s` asleep."""

    model: ModelInfo
    step_s: float
    log_removals: bool = False
    """Whether the moment at which sequences are found to have left goes into the log."""

    def __call__(self, progress: Progress) -> Runner:
        # As in a process that serves; in that of the event loop it is done again once all stands.
        quiet_collector()
        kind = _RemovalLog if self.log_removals else ScriptedRunner
        return kind(self.model, num_blocks=_BLOCKS, step_s=self.step_s, check_cache=False)


class _RemovalLog(ScriptedRunner):
    """Logs the monotonic moment of every step that is told of sequences which have left."""

    def launch(self, output: SchedulerOutput) -> None:
        """A step is planned right before it is launched, with the blocks of whoever left given back."""
        if output.removed:
            _log.info(REMOVED, moment=time.monotonic())
        super().launch(output)
