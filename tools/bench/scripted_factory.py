"""What the fake engine runs on; a module of its own, so that the engine's own process can import it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import structlog

from photon_grpc.engine.host import Progress
from photon_grpc.processes.collector import quiet_collector
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import ModelOutput, SchedulerOutput
from photon_grpc.types import ModelInfo

__all__ = ["REMOVED", "Pace", "ScriptedFactory"]

REMOVED = "sequences removed"

_BLOCKS = 1 << 16
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a device takes for a step, in seconds: `step_s` for any, `row_s` for each row, and where
    prompts are computed in it `prefill_s` and `prompt_token_s` for each of their tokens on top."""

    step_s: float
    row_s: float
    prefill_s: float
    prompt_token_s: float

    def seconds(self, output: SchedulerOutput) -> float:
        """Of the step `output`."""
        num_rows = len(output.rows)
        seconds = self.step_s + self.row_s * num_rows
        if output.num_tokens > num_rows:
            # A row of a prompt has its last token beside those that the count of rows leaves.
            num_prompt_rows = sum(row.num_tokens > 1 for row in output.rows)
            num_prompt_tokens = output.num_tokens - num_rows + num_prompt_rows
            seconds += self.prefill_s + self.prompt_token_s * num_prompt_tokens
        return seconds


@dataclass(frozen=True, slots=True)
class ScriptedFactory:
    """Implements `engine.host.RunnerFactory`: steps of `step_s` asleep, or a device's by `pace`."""

    model: ModelInfo
    step_s: float
    log_removals: bool = False
    """Whether the moment at which sequences are found to have left goes into the log."""
    pace: Pace | None = None

    def __call__(self, progress: Progress) -> Runner:
        # As in a process that serves; in that of the event loop it is done again once all stands.
        quiet_collector()
        if self.pace is not None:
            return _PacedRunner(self.model, self.pace)
        kind = _RemovalLog if self.log_removals else ScriptedRunner
        return kind(self.model, num_blocks=_BLOCKS, step_s=self.step_s, check_cache=False)


class _RemovalLog(ScriptedRunner):
    """Logs the monotonic moment of every step that is told of sequences which have left."""

    def launch(self, output: SchedulerOutput) -> None:
        """A step is planned right before it is launched, with the blocks of whoever left given back."""
        if output.removed:
            _log.info(REMOVED, moment=time.monotonic())
        super().launch(output)


class _PacedRunner(ScriptedRunner):
    """A device with a queue: a step begins when it is launched and the one before it has ended."""

    def __init__(self, model: ModelInfo, pace: Pace) -> None:
        super().__init__(model, num_blocks=_BLOCKS, max_in_flight=2, check_cache=False)
        self._pace = pace
        self._ends: deque[float] = deque()
        self._idle_from = 0.0

    def launch(self, output: SchedulerOutput) -> None:
        """Enqueue a step; its tokens are there once it has taken its time."""
        self._idle_from = max(self._idle_from, time.monotonic()) + self._pace.seconds(output)
        self._ends.append(self._idle_from)
        super().launch(output)

    def collect(self) -> ModelOutput:
        """Wait for the oldest step to end."""
        time.sleep(max(0.0, self._ends.popleft() - time.monotonic()))
        return super().collect()
