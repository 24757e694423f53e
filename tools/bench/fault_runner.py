"""A runner that fails now and then: rows without a usable token, and steps that take long.

A module of its own, so that the engine's own process can import it. Each injected fault is a line of the
server's log, by which whoever reads it can tell what of the calls' ends was called for.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import structlog

from photon_grpc.engine.host import Progress, RunnerFactory
from photon_grpc.runner.base import Runner
from photon_grpc.scheduler.output import ModelOutput, RowFault, SchedulerOutput

__all__ = ["INJECTED", "FaultPlan", "FaultyFactory", "FaultyRunner"]

INJECTED = "fault injected"
_SLOW_STEP_S = (0.05, 0.5)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """How likely each step is to have a row that fails, and to be slow. The faults are fixed by the seed and
    the steps' numbers, but whose row it is depends on who is in the batch."""

    row_fault_rate: float
    slow_step_rate: float
    seed: int


class FaultyRunner:
    """Implements `runner.base.Runner` around another one."""

    def __init__(self, inner: Runner, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._pick = random.Random(plan.seed)
        self.model = inner.model
        self.num_blocks = inner.num_blocks
        self.block_size = inner.block_size
        self.max_in_flight = inner.max_in_flight

    def launch(self, output: SchedulerOutput) -> None:
        """As the inner runner's."""
        self._inner.launch(output)

    def collect(self) -> ModelOutput:
        """What the inner runner computed, perhaps late, perhaps with a fault of one of its rows."""
        output = self._inner.collect()
        if self._pick.random() < self._plan.slow_step_rate:
            seconds = self._pick.uniform(*_SLOW_STEP_S)
            _log.info(INJECTED, kind="slow step", step=output.step, seconds=round(seconds, 3))
            time.sleep(seconds)
        if output.seq_ids and self._pick.random() < self._plan.row_fault_rate:
            seq_id = self._pick.choice(output.seq_ids)
            _log.info(INJECTED, kind="row", step=output.step)
            output = replace(output, faults={**output.faults, seq_id: RowFault.NON_FINITE_LOGITS})
        return output

    def close(self) -> None:
        """As the inner runner's."""
        self._inner.close()


@dataclass(frozen=True, slots=True)
class FaultyFactory:
    """Implements `engine.host.RunnerFactory`."""

    inner: RunnerFactory
    plan: FaultPlan

    def __call__(self, progress: Progress) -> Runner:
        return FaultyRunner(self.inner(progress), self.plan)
