"""The engine's own process from inside: `main` is what `process.py` starts.

One thread, the main one, does everything: it builds the runner, takes messages from the channel between
steps and writes each step's outputs back; a second one only watches that steps return. The process belongs
to its parent, who alone decides when it ends: the signals that a terminal or a supervisor sends to the
whole group are the parent's to act on, and when the parent is gone, for whatever reason, so is this process
and all that it holds of a device.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from photon_grpc.engine.channel import Channel
from photon_grpc.engine.host import RunnerFactory
from photon_grpc.engine.loop import run_engine
from photon_grpc.engine.messages import EngineMessage, LoopMessage
from photon_grpc.options import KVCacheOptions, SchedulerOptions

# The signals that are the parent's to act on.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """The first message to the process: what to build."""

    runner_factory: RunnerFactory
    scheduler_options: SchedulerOptions
    cache_options: KVCacheOptions
    step_timeout_s: float = 0.0


def main(fd: int, parent: int) -> None:
    """Run the engine that the first message on the socket `fd` describes, for the process `parent`."""
    _leave_signals_to_the_parent()
    _die_with(parent)
    os.set_inheritable(fd, False)
    inbox = _ChannelInbox(Channel(socket.socket(fileno=fd)))
    setup = inbox.take_setup()
    run_engine(
        setup.runner_factory,
        setup.scheduler_options,
        setup.cache_options,
        inbox,
        inbox.deliver,
        step_timeout_s=setup.step_timeout_s,
        # The channel belongs to the thread that hangs; the parent learns of the end by its closing.
        exit_process=_leave,
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
            _leave()

    def close(self) -> None:
        """Return once everything is sent."""
        try:
            self._channel.flush_all()
        except OSError:
            _leave()
        self._channel.close()

    def _receive(self, *, wait: bool) -> list[Any]:
        try:
            self._channel.flush()
            messages = self._channel.receive()
            while wait and not messages:
                self._channel.wait()
                messages = self._channel.receive()
        except (OSError, EOFError):
            _leave()
        return messages


def _leave_signals_to_the_parent() -> None:
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # They were blocked from before this process began until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, in whatever this process is just doing; only Linux has this.

    Elsewhere the end of the channel says it, which is noticed between steps.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        _leave()


def _leave() -> NoReturn:
    """End at once, when the parent has gone or the step hangs: memory and device go back with the process."""
    os._exit(1)
