"""What the fake engine runs on; a module of its own, so that the engine's own process can import it."""

from __future__ import annotations

from dataclasses import dataclass

from photon_grpc.engine.host import Progress
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.runner_factory import quiet_collector
from photon_grpc.types import ModelInfo

__all__ = ["ScriptedFactory"]

_BLOCKS = 1 << 16


@dataclass(frozen=True, slots=True)
class ScriptedFactory:
    """Implements `engine.host.RunnerFactory`: steps of `step_s` asleep."""

    model: ModelInfo
    step_s: float

    def __call__(self, progress: Progress) -> Runner:
        # As in a process that serves; in that of the event loop it is done again once all stands.
        quiet_collector()
        return ScriptedRunner(self.model, num_blocks=_BLOCKS, step_s=self.step_s, check_cache=False)
