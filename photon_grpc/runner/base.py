"""The seam between the engine, which knows requests, and whatever computes tokens."""

from __future__ import annotations

from typing import Protocol

from photon_grpc.scheduler.output import ModelOutput, SchedulerOutput
from photon_grpc.types import ModelInfo


class StepOutOfMemoryError(Exception):
    """There was no memory for a step; the device is fine. Never leaves the engine.

    From `launch`: that step brings nothing, and those launched before it can still be collected. From
    `collect`: none of the steps under way can. Either way the runner knows no sequence any more, as though
    all had been removed, and what a lost step wrote into the cache is anything.
    """


class Runner(Protocol):
    """Computes steps. Built, called and closed on the engine thread only.

    `launch` and `collect` are two calls so that a device runner can have step n+1 under way while the
    tokens of step n travel back: at most `max_in_flight` launched steps may be uncollected, and they
    are collected in the order of their launch.
    """

    model: ModelInfo
    num_blocks: int
    block_size: int
    max_in_flight: int

    def launch(self, output: SchedulerOutput) -> None:
        """Start one step. Raises only for faults that no single row can be blamed for.

        After StepOutOfMemoryError other steps may be launched; after any other nothing may.
        """

    def collect(self) -> ModelOutput:
        """Wait for the oldest launched step and return its tokens. Raises as `launch` does."""

    def close(self) -> None:
        """Give back device memory and threads. May be called twice."""
