"""A process of ours is spawned: what can be done before there is an event loop, and before much is imported.

`parent.py` serves it from then on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from photon_grpc.processes.channel import Channel
from photon_grpc.processes.child import PARENTS_SIGNALS
from photon_grpc.processes.heap import without_thread_caches

# Without the collector until `collector.quiet_collector`: nothing that is loaded becomes garbage, and looking
# for it takes a fifth of torch's import.
_CHILD = "import gc, sys; gc.disable(); from {module} import main; main(int(sys.argv[1]), int(sys.argv[2]))"


class SpawnedChild:
    """A child that no event loop serves yet, its first messages on their way: for `ChildProcess.adopt`."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.process = process
        self.channel = channel
        self._is_ours = True

    def send(self, messages: Sequence[Any]) -> None:
        """More of its first messages. Raises OSError for one that has ended."""
        self.channel.send(messages)

    def adopted(self) -> None:
        """Whoever serves it ends it."""
        self._is_ours = False

    def discard(self) -> None:
        """End it at once, unless it has been adopted."""
        if self._is_ours:
            self._is_ours = False
            self.process.kill()
            self.process.wait()
            self.channel.close()


def spawn(module: str, messages: Sequence[Any]) -> SpawnedChild:
    """Start `main` of `module` in a child, `messages` its first, without an event loop. Raises OSError."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        # The socket has room for the first messages before anybody reads them.
        channel.send(messages)
        try:
            return SpawnedChild(_spawn(module, theirs.fileno()), channel)
        except OSError:
            channel.close()
            raise


def _spawn(module: str, fd: int) -> subprocess.Popen[bytes]:
    """Start `main` of `module` on the inherited socket `fd`."""
    # What can be imported here can be imported there, also where a program has changed the path.
    environment = without_thread_caches({**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    arguments = [sys.executable, "-c", _CHILD.format(module=module), str(fd), str(os.getpid())]
    # Blocked until the child ignores them: a Ctrl-C meanwhile is the parent's to act on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=(fd,), env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
