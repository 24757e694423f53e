"""What crosses between the event loop and an acceptor.

Numbers, strings, bytes and tuples of them; request and response messages stay the bytes that they are on
the wire. A call is named by a number that its acceptor never uses twice. Moments are of the monotonic clock,
which the processes of one machine share.
"""

from __future__ import annotations

from typing import NamedTuple

from photon_grpc.options import TelemetryOptions, TlsOptions

Metadata = tuple[tuple[str, str | bytes], ...]


class Method(NamedTuple):
    """`/service/method`, and what it streams: its responses, or both ways."""

    name: str
    request_streaming: bool
    response_streaming: bool


class Setup(NamedTuple):
    """The first message to an acceptor: where to listen, as what, and for whom."""

    address: str
    channel_options: tuple[tuple[str, int], ...]
    methods: tuple[Method, ...]
    tls: TlsOptions
    telemetry: TelemetryOptions


# --- from the acceptor --------------------------------------------------------------------------


class Bound(NamedTuple):
    """It listens on this port."""

    port: int


class BindFailed(NamedTuple):
    """It cannot listen, and is leaving."""


class Opened(NamedTuple):
    """A call has come. `deadline` is its client's; None for one that brought none."""

    call: int
    method: int
    """Its index in `Setup.methods`."""
    metadata: Metadata
    peer: str
    auth_context: dict[str, tuple[bytes, ...]]
    deadline: float | None
    request: bytes
    """Empty where requests are streamed."""


class Request(NamedTuple):
    """The answer to Next; None where there is none left."""

    call: int
    request: bytes | None


class Written(NamedTuple):
    """The transport has taken a response of each of these calls; one that is named twice, two."""

    calls: list[int]


class Left(NamedTuple):
    """A call is over before it was ended: its client has left, or its deadline has passed."""

    call: int


class Pong(NamedTuple):
    """The answer to Ping."""


class CertificateAccepted(NamedTuple):
    """The certificate files were read, at the start or again; seconds since 1970."""

    expires_at: float


class CertificateRefused(NamedTuple):
    """Changed files were refused, and the last good ones kept."""


# --- to the acceptor ----------------------------------------------------------------------------


class Headers(NamedTuple):
    """Send the initial metadata of a call; nothing answers that."""

    call: int
    metadata: Metadata


Write = tuple[int, bytes]
"""Send a response of a call. Answered by Written or Left. Nearly all that crosses is one of these, and so it
is the one message without a name: to pickle a NamedTuple takes ten times as long."""


class Next(NamedTuple):
    """Read the next request of a call that streams them. Answered by Request or Left."""

    call: int


class End(NamedTuple):
    """End a call with a status, behind everything that was written; one that is OK and does not stream has a
    response. `code` is the number of a grpc.StatusCode."""

    call: int
    code: int
    details: str
    trailing_metadata: Metadata
    response: bytes | None


class Ping(NamedTuple):
    """Say that the loop goes round. Answered by Pong."""


class Stop(NamedTuple):
    """Take no more connections, give calls `grace_s` to end, and leave."""

    grace_s: float
