"""What `processes.parent.ChildProcess` can run in tests.

The first message says what the child does; it answers `begun` when it is about to.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from typing import Any

from photon_grpc.processes.channel import Channel
from photon_grpc.processes.child import begin


def main(fd: int, parent: int) -> None:
    """Begin as a child does, then behave as the first message says."""
    channel = begin(fd, parent)
    kind, *values = _next(channel)
    channel.send([("begun", os.getpid(), os.getppid() == parent)])
    channel.flush_all()
    match kind:
        case "echo":
            while True:
                channel.send([_next(channel)])
                channel.flush_all()
        case "collector":
            channel.send([gc.isenabled()])
            channel.flush_all()
        case "exit":
            sys.exit(values[0])
        case "die":
            os.kill(os.getpid(), signal.Signals(values[0]))
        case "close_and_stay":
            channel.close()
            time.sleep(600)
        case "garble":
            os.write(channel.fileno(), (3).to_bytes(8, sys.byteorder) + b"\xff\xff\xff")
            time.sleep(600)


def _next(channel: Channel) -> Any:
    """The next message; its frame is one of several pieces where it is large."""
    messages: list[Any] = []
    while not messages:
        channel.wait()
        messages = channel.receive()
    (message,) = messages
    return message
