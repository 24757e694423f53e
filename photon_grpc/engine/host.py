"""Where an engine may live: what the event loop needs of it, and what it is made from.

`thread.py` keeps it in the process of the event loop, `process.py` in one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from photon_grpc.engine.messages import EngineMessage, LoopMessage
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner

Progress = Callable[[int, int], None]
"""`(bytes done, bytes in all)` while weights load."""

RunnerFactory = Callable[[Progress], Runner]
"""Builds the runner where the engine runs. Raises StartupError. Picklable, to be used by another process."""

Deliver = Callable[[LoopMessage], None]


class EngineHost(Protocol):
    """An engine somewhere. Used on the event loop, but for `join`."""

    writing_share: float
    """How much of the time between steps the event loop may spend on writing what they brought."""

    @property
    def process_id(self) -> int | None:
        """The process that the engine has to itself; None where it shares ours, and while there is none."""

    def start(self) -> None:
        """Begin to build the runner; EngineReady or EngineStopped is delivered when that is done."""

    def post(self, message: EngineMessage) -> None:
        """Send a message; it acts before the next step is planned. Harmless after the end."""

    def join(self, timeout_s: float) -> bool:
        """Wait for the end, which Shutdown brings; False if it has not come within `timeout_s`. Blocks."""


class HostFactory(Protocol):
    """Makes a host, not yet started. It may call `deliver` on any thread; EngineStopped is the last call."""

    def __call__(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
    ) -> EngineHost: ...
