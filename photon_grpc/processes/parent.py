"""A process of ours as the event loop sees it: spawn, send, receive, reap.

The child is spawned, never forked, and runs a `main(fd, parent)` that begins with `child.begin`. Everything
here happens on the event loop but `join`. A child that ends without having said so is noticed at once: the
kernel closes its end of the channel whatever it died of.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import structlog

from photon_grpc.processes.loop_channel import MOST_POSTED, Ended, LoopChannel, Receive
from photon_grpc.processes.spawn import SpawnedChild, spawn

_log = structlog.get_logger(__name__)

# A killed process can stay for as long as a driver holds on to it; it needs nobody to wait for that.
_KILLED_S = 2.0


class ChildProcess:
    """One child that runs `main` of `module`. `name` is what the log calls it; for `most_posted` see
    `LoopChannel`."""

    def __init__(
        self, name: str, module: str, receive: Receive, ended: Ended, *, most_posted: int = MOST_POSTED
    ) -> None:
        self._most_posted = most_posted
        self._name = name
        self._module = module
        self._receive = receive
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: LoopChannel | None = None
        self._was_killed = False

    @property
    def process_id(self) -> int | None:
        """The child's; None before `start`, and once it is reaped, when the number may be another's."""
        if self._process is None or self._process.returncode is not None:
            return None
        return self._process.pid

    def start(self, messages: Sequence[Any]) -> None:
        """Spawn the child, with `messages` as its first. Raises OSError."""
        self.adopt(spawn(self._module, messages))

    def adopt(self, child: SpawnedChild) -> None:
        """Serve a child that was spawned before there was an event loop, instead of `start`."""
        child.adopted()
        self._process = child.process
        self._channel = LoopChannel(child.channel, self._receive, self._ended, most_posted=self._most_posted)

    def post(self, message: Any) -> None:
        """Send a message, together with whatever else this turn of the loop posts. Harmless after the end."""
        if self._channel is not None:
            self._channel.post(message)

    def kill(self) -> None:
        """End it at once; `join` takes that for an end by itself."""
        assert self._process is not None
        self._was_killed = True
        self._process.kill()

    def join(self, timeout_s: float) -> bool:
        """Wait for the child's end; False for one that had not ended after `timeout_s` and was killed.

        Blocks.
        """
        if self._process is None:
            return True
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.error(
                f"{self._name}_process_killed", pid=self._process.pid, reason="it did not end by itself"
            )
            self._process.kill()
            try:
                self._process.wait(_KILLED_S)
            except subprocess.TimeoutExpired:
                _log.error(f"{self._name}_process_not_reaped", pid=self._process.pid)
            return False
        if code and not self._was_killed:
            # Negative: minus the number of the signal that killed it.
            _log.error(f"{self._name}_process_ended", pid=self._process.pid, code=code)
        return True
