"""HTTP/2 by hand, for what no decent client sends: RFC 9113 frames over a plain or a TLS socket."""

from __future__ import annotations

import contextlib
import enum
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
ENHANCE_YOUR_CALM = 0xB
CANCEL = 0x8
_READ_S = 30.0
# The largest frame that every server must take.
_FRAME_BYTES = 16_384


class Kind(enum.IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


@dataclass(frozen=True)
class Frame:
    """One frame as it came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: Kind, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """A frame as it is sent."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: Sequence[tuple[str, str]]) -> bytes:
    """HPACK without a table and without Huffman: each field a literal with a new name."""
    block = bytearray()
    for name, value in headers:
        block += b"\x00" + _string(name.encode()) + _string(value.encode())
    return bytes(block)


def _string(data: bytes) -> bytes:
    if len(data) < 127:
        return bytes([len(data)]) + data
    prefix, rest = bytearray([127]), len(data) - 127
    while rest >= 128:
        prefix.append(rest % 128 + 128)
        rest //= 128
    return bytes(prefix) + bytes([rest]) + data


def call_headers(method: str, *more: tuple[str, str]) -> bytes:
    """The header block of a gRPC call of `/service/method`."""
    return header_block(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *more,
        ]
    )


def message(data: bytes) -> bytes:
    """A gRPC message, not compressed."""
    return struct.pack(">BI", 0, len(data)) + data


class Connection:
    """A connection that has sent its preface. What it reads may end at any moment: see `frames`."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, settings: bytes = b"") -> None:
        self.socket = connect(address, tls)
        self.socket.sendall(PREFACE + frame(Kind.SETTINGS, settings))
        self._read = b""

    def send(self, data: bytes) -> bool:
        """Send frames; False once the server has closed."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def call(self, method: str, data: bytes, *headers: tuple[str, str], stream: int = 1) -> bool:
        """Begin a call with its one message."""
        block = call_headers(method, *headers)
        first, rest = block[:_FRAME_BYTES], block[_FRAME_BYTES:]
        frames = frame(Kind.HEADERS, first, flags=0 if rest else END_HEADERS, stream=stream)
        while rest:
            part, rest = rest[:_FRAME_BYTES], rest[_FRAME_BYTES:]
            frames += frame(Kind.CONTINUATION, part, flags=0 if rest else END_HEADERS, stream=stream)
        return self.send(frames + frame(Kind.DATA, message(data), flags=END_STREAM, stream=stream))

    def frames(self) -> Iterator[Frame]:
        """What the server sends, until it closes. Raises TimeoutError when it is silent for long."""
        while True:
            while len(self._read) < 9 or len(self._read) < 9 + int.from_bytes(self._read[:3], "big"):
                try:
                    data = self.socket.recv(1 << 16)
                except ConnectionError:
                    return
                if not data:
                    return
                self._read += data
            length = int.from_bytes(self._read[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", self._read[3:9])
            payload, self._read = self._read[9 : 9 + length], self._read[9 + length :]
            yield Frame(kind, flags, stream & 0x7FFFFFFF, payload)

    def close(self) -> None:
        """Leave without a word."""
        self.socket.close()


def connect(address: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A socket to `host:port` that waits 30 s for an answer at most."""
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=_READ_S)
    return plain if tls is None else tls.wrap_socket(plain, server_hostname=host)


@contextlib.contextmanager
def http2(address: str, tls: ssl.SSLContext | None = None, settings: bytes = b"") -> Iterator[Connection]:
    """A connection that is closed at the end."""
    connection = Connection(address, tls, settings)
    try:
        yield connection
    finally:
        connection.close()
