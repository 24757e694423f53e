"""The server's certificate: read, tried out, and read again when its files change.

Whatever the files hold, a running server goes on with the last set that worked: one that is cut short,
expired or does not fit together is refused, logged and counted, and looked at again later. At the start
the same faults are errors. Knows files and handshakes, no listener.

grpc asks for the certificate at each handshake, on a thread of its own choosing, so all state is one
immutable value that is replaced as a whole.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import structlog

from photon_grpc.errors import ConfigError
from photon_grpc.options import TlsOptions

__all__ = ["CertificateFiles", "CertificateObserver", "check_tls"]

# Files that were refused may become good without changing: a certificate whose time begins later.
_RETRY_S = 60.0
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# More than any handshake takes; the rehearsal is in memory and each round moves both sides.
_MAX_ROUNDS = 16

_log = structlog.get_logger(__name__)


class CertificateObserver(Protocol):
    """Who counts what became of the files; `telemetry.metrics.Metrics` does. Called on any thread."""

    def observe_certificate(self, expires_at: float) -> None:
        """Files were accepted; their certificate expires at `expires_at`, in seconds since 1970."""

    def observe_certificate_refused(self) -> None:
        """Changed files were refused, and the last good ones kept."""


def check_tls(tls: TlsOptions) -> str:
    """What is wrong with a combination of settings, without a look at the files; empty if nothing is."""
    if bool(tls.cert_file) != bool(tls.key_file):
        return "tls.cert_file and tls.key_file go together"
    if tls.client_ca_file and not tls.cert_file:
        return "tls.client_ca_file needs tls.cert_file: without TLS no client shows a certificate"
    if tls.require_client_cert and not tls.client_ca_file:
        return "tls.require_client_cert needs tls.client_ca_file"
    return ""


class _UnusableError(Exception):
    """Why a set of files cannot be served."""


_Result = TypeVar("_Result")
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _State:
    """`configuration` is the last good one; `stamp` is of the files last looked at, good or not.

    `retry_at` is on the monotonic clock; None where the files looked at are those being served.
    """

    configuration: Any
    stamp: _Stamp
    retry_at: float | None


class CertificateFiles:
    """The files of `tls`, as grpc credentials that follow them."""

    def __init__(self, tls: TlsOptions, observer: CertificateObserver | None = None) -> None:
        """Raises ConfigError for settings or files that cannot be served."""
        problem = check_tls(tls)
        if problem:
            raise ConfigError(problem)
        self._tls = tls
        self._observer = observer
        try:
            stamp = _stamp(tls)
            configuration, expires_at = _load(tls)
        except (OSError, _UnusableError) as error:
            raise ConfigError(f"tls: {_describe(error)}") from None
        self._state = _State(configuration, stamp, None)
        if observer is not None:
            observer.observe_certificate(expires_at)

    def credentials(self, *, require_client_cert: bool) -> grpc.ServerCredentials:
        """For one listener. Connections that are open keep the certificate they began with."""
        handed_out = self._state.configuration

        def fetch() -> Any:
            nonlocal handed_out
            current = self.current()
            if current is handed_out:
                return None  # grpc goes on with what it has
            handed_out = current
            return current

        return grpc.dynamic_ssl_server_credentials(handed_out, fetch, require_client_cert)

    def current(self) -> Any:
        """The last good files as a grpc certificate configuration. Never raises for what files hold."""
        state = self._state
        try:
            stamp = _stamp(self._tls)
        except OSError as error:
            # Gone or unreadable: a stamp that no file has, so that their return is noticed.
            return self._refuse(state, (), error)
        if stamp == state.stamp and (state.retry_at is None or time.monotonic() < state.retry_at):
            return state.configuration
        try:
            configuration, expires_at = _load(self._tls)
        except (OSError, _UnusableError) as error:
            return self._refuse(state, stamp, error)
        self._state = _State(configuration, stamp, None)
        _log.info("certificate loaded", expires_in_s=round(expires_at - time.time()))
        if self._observer is not None:
            self._observer.observe_certificate(expires_at)
        return configuration

    def _refuse(self, state: _State, stamp: _Stamp, error: Exception) -> Any:
        now = time.monotonic()
        if stamp == state.stamp and state.retry_at is not None and now < state.retry_at:
            return state.configuration
        self._state = _State(state.configuration, stamp, now + _RETRY_S)
        _log.warning("certificate refused, the last good one stays", reason=_describe(error))
        if self._observer is not None:
            self._observer.observe_certificate_refused()
        return state.configuration


def _paths(tls: TlsOptions) -> list[str]:
    return [path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path]


def _stamp(tls: TlsOptions) -> _Stamp:
    """What changes when a file is written or replaced. Follows links, which is how Kubernetes swaps."""
    found = (os.stat(path) for path in _paths(tls))
    return tuple((entry.st_mtime_ns, entry.st_size, entry.st_ino) for entry in found)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _load(tls: TlsOptions) -> tuple[Any, float]:
    """A configuration for grpc and the moment its certificate expires. Raises OSError or _UnusableError."""
    contents = [_read(path) for path in _paths(tls)]
    expires_at = _rehearse(tls, contents[0])
    # ssl takes a pair by path only, so what was tried out must be what was read.
    if [_read(path) for path in _paths(tls)] != contents:
        raise _UnusableError("the files changed while they were read")
    certificate, key, *client_ca = contents
    configuration = grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=client_ca[0] if client_ca else None
    )
    return configuration, expires_at


def _rehearse(tls: TlsOptions, certificate: bytes) -> float:
    """Shake hands with ourselves, in memory; the expiry of the certificate that the client saw.

    The client trusts exactly the first certificate of the file, so that the pair, its validity now and
    its fitness for a server are judged, and who issued it is not. Raises OSError or _UnusableError.
    """
    leaf = _CERTIFICATE.search(certificate)
    if leaf is None:
        raise _UnusableError(f"{tls.cert_file} holds no whole PEM certificate")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _tried(f"{tls.cert_file} with {tls.key_file}", lambda: _use_pair(server, tls))
    if tls.client_ca_file:
        _tried(tls.client_ca_file, lambda: server.load_verify_locations(tls.client_ca_file))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _tried(
        tls.cert_file, lambda: client.load_verify_locations(cadata=leaf.group().decode("ascii", "replace"))
    )
    seen = _tried(tls.cert_file, lambda: _shake_hands(server, client))
    return float(ssl.cert_time_to_seconds(str(seen["notAfter"])))


def _use_pair(server: ssl.SSLContext, tls: TlsOptions) -> None:
    # Without a password of ours, OpenSSL would ask for one at the terminal.
    server.load_cert_chain(tls.cert_file, tls.key_file, password=lambda: "")


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """The server's certificate as the client sees it after a whole handshake."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    for _ in range(_MAX_ROUNDS):
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
        if not waiting:
            return near.getpeercert() or {}
    raise _UnusableError("the handshake does not end")


def _tried(what: str, attempt: Callable[[], _Result]) -> _Result:
    """The result of `attempt`; what OpenSSL has against it, with the files named. Raises _UnusableError."""
    try:
        return attempt()
    except ssl.SSLCertVerificationError as error:
        raise _UnusableError(f"{what}: {error.verify_message}") from None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise _UnusableError(f"{what}: {reason}") from None


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
