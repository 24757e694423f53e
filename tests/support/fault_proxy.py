"""A TCP relay in front of a server that can break connections in the ways that networks do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

_CHUNK_BYTES = 1 << 16
# SO_LINGER of zero seconds: close sends a reset.
_RESET = struct.pack("ii", 1, 0)


class FaultProxy:
    """Relays every connection to `target`, `host:port`, until it is told otherwise.

    `mute` makes half-open connections: both ends stay open and not a byte comes through any more. `reset`
    breaks every connection at once, at both ends. New connections are relayed either way.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: list[_Relay] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def mute(self) -> None:
        """Let the connections that are open go silent."""
        for relay in self._relays():
            relay.is_mute.set()

    def reset(self) -> None:
        """Break the connections that are open."""
        for relay in self._relays():
            relay.reset()

    def close(self) -> None:
        """Break everything, and take no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        self.reset()

    def _relays(self) -> list[_Relay]:
        with self._lock:
            return list(self._open)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            relay = _Relay(near, socket.create_connection(self._target))
            with self._lock:
                self._open.append(relay)


class _Relay:
    """One connection: two sockets, and a thread for each direction."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.is_mute = threading.Event()
        self._sockets = (near, far)
        for pair in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK_BYTES):
                if not self.is_mute.is_set():
                    sink.sendall(data)
            if not self.is_mute.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One end is gone; so is the other, unless nothing may come through.
            if not self.is_mute.is_set():
                self.reset()

    def reset(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RD)
            end.close()


@contextlib.contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """Closed at the end, with everything that goes through it."""
    proxy = FaultProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
