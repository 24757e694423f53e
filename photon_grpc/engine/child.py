"""The engine's own process from inside: `main` is what `process.py` starts.

One thread, the main one, does everything: it builds the runner, takes messages from the channel between
steps and writes each step's outputs back; a second one only watches that steps return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from photon_grpc.engine.host import Progress, RunnerFactory
from photon_grpc.engine.loop import run_engine
from photon_grpc.engine.messages import EngineMessage, LoopMessage
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.processes.channel import Channel
from photon_grpc.processes.child import begin, leave
from photon_grpc.processes.collector import quiet_collector
from photon_grpc.runner.base import Runner


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """The first message to the process: what to build."""

    runner_factory: RunnerFactory
    scheduler_options: SchedulerOptions
    cache_options: KVCacheOptions
    step_timeout_s: float = 0.0


def main(fd: int, parent: int) -> None:
    """Run the engine that the first message on the socket `fd` describes, for the process `parent`."""
    inbox = _ChannelInbox(begin(fd, parent))
    setup = inbox.take_setup()

    def build_runner(progress: Progress) -> Runner:
        runner = setup.runner_factory(progress)
        quiet_collector()
        return runner

    run_engine(
        build_runner,
        setup.scheduler_options,
        setup.cache_options,
        inbox,
        inbox.deliver,
        step_timeout_s=setup.step_timeout_s,
        # The channel belongs to the thread that hangs; the parent learns of the end by its closing.
        exit_process=leave,
    )
    inbox.close()


class _ChannelInbox:
    """Implements `engine.loop.Inbox`, and the way out."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._early: list[EngineMessage] = []

    def take_setup(self) -> EngineSetup:
        """Wait for the first message."""
        setup, *self._early = self._receive(wait=True)
        assert isinstance(setup, EngineSetup)
        return setup

    def take(self, *, wait: bool) -> Sequence[EngineMessage]:
        if self._early:
            early, self._early = self._early, []
            return early
        return self._receive(wait=wait)

    def deliver(self, message: LoopMessage) -> None:
        """Send a message on its way; what the socket does not take now goes with a later look at it."""
        try:
            self._channel.send((message,))
        except OSError:
            leave()

    def close(self) -> None:
        """Return once everything is sent."""
        try:
            self._channel.flush_all()
        except OSError:
            leave()
        self._channel.close()

    def _receive(self, *, wait: bool) -> list[Any]:
        try:
            self._channel.flush()
            messages = self._channel.receive()
            while wait and not messages:
                self._channel.wait()
                messages = self._channel.receive()
        except (OSError, EOFError):
            leave()
        return messages
