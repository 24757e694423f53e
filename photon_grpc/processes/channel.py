"""Messages over a connected socket, both ways: frames of pickled lists, and nothing ever blocks but `wait`.

The other end is a process of ours that inherited its end of an anonymous socket pair: the same program,
the same user, no name to connect to. Between these two pickle is safe, and it is the fastest there is
for the plain values that cross here. Used by one thread at a time.
"""

from __future__ import annotations

import mmap
import pickle
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

_PROTOCOL = 5
_LENGTH = struct.Struct("=Q")
_READ_BYTES = 1 << 18


class Channel:
    """One end. Takes the socket over."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._unsent = bytearray()
        self._received = bytearray()
        # Kept: bytes of that size for each read would be mapped and unmapped, which takes 12 us of 14.
        self._read_into = memoryview(mmap.mmap(-1, _READ_BYTES))
        self._ended = False

    def fileno(self) -> int:
        """The descriptor, for whoever waits for several."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """True while the other end has not taken everything; `flush` when the descriptor is writable."""
        return bool(self._unsent)

    def send(self, messages: Sequence[Any]) -> None:
        """Send as one frame what the socket takes now, and keep the rest. Raises OSError without a reader."""
        body = pickle.dumps(messages, _PROTOCOL)
        self._unsent += _LENGTH.pack(len(body))
        self._unsent += body
        self.flush()

    def flush(self) -> None:
        """Send on what was kept. Raises OSError when the other end has closed."""
        while self._unsent:
            try:
                num_sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:num_sent]

    def receive(self) -> list[Any]:
        """The messages of every whole frame that has come, in order; often none.

        Raises EOFError once the other end has closed and all it had sent is returned; half a frame of a
        writer that died is dropped.
        """
        self._read()
        messages: list[Any] = []
        start, end = 0, len(self._received)
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            body = start + _LENGTH.size
            if end - body < length:
                break
            with memoryview(self._received) as view:
                messages += pickle.loads(view[body : body + length])
            start = body + length
        del self._received[:start]
        if self._ended and not messages:
            raise EOFError
        return messages

    def _read(self) -> None:
        while not self._ended:
            try:
                num_read = self._socket.recv_into(self._read_into)
            except BlockingIOError:
                return
            except ConnectionError:
                # The other end died with something of ours unread.
                num_read = 0
            self._ended = not num_read
            self._received += self._read_into[:num_read]
            if num_read < _READ_BYTES:
                # Nearly always all there is; if not, the descriptor stays readable.
                return

    def wait(self) -> None:
        """Return when something can be read; meanwhile send on what was kept. Raises OSError as `flush`."""
        poll = select.poll()
        while True:
            poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            ((_, events),) = poll.poll()
            if events & ~select.POLLOUT:
                return
            self.flush()

    def flush_all(self) -> None:
        """Return when everything is sent. Raises OSError when the other end has closed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while self._unsent:
            poll.poll()
            self.flush()

    def close(self) -> None:
        """Close this end; the other reads what was sent, then the end."""
        self._socket.close()
