"""What a process of ours does first, and how it leaves: it belongs to its parent, who alone ends it.

The signals that a terminal or a supervisor sends to the whole group are the parent's to act on, and when
the parent is gone, for whatever reason, so is the child and all that it holds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

from photon_grpc.processes.channel import Channel

# The signals that are the parent's to act on.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


def begin(fd: int, parent: int) -> Channel:
    """The channel on the inherited socket `fd` to the process `parent`, whose this one is from now on."""
    _leave_signals_to_the_parent()
    _die_with(parent)
    os.set_inheritable(fd, False)
    return Channel(socket.socket(fileno=fd))


def leave() -> NoReturn:
    """End at once: what the process has of memory and devices goes back with it."""
    os._exit(1)


def _leave_signals_to_the_parent() -> None:
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # They were blocked from before this process began until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, in whatever this process is just doing; only Linux has this.

    Elsewhere the end of the channel says it.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        leave()
