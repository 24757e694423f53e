"""The seam between the engine, which knows requests, and whatever computes tokens."""

from __future__ import annotations

from typing import Protocol

from photon_grpc.scheduler.output import ModelOutput, SchedulerOutput
from photon_grpc.types import ModelInfo


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
        """Start one step. Raises only for faults that no single row can be blamed for."""

    def collect(self) -> ModelOutput:
        """Wait for the oldest launched step and return its tokens."""

    def close(self) -> None:
        """Give back device memory and threads. May be called twice."""
