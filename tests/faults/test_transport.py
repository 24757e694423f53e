"""What comes in below gRPC: certificates that break in rotation, the wrong protocol, floods of frames."""

from __future__ import annotations

import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from photon_grpc.v1 import inference_pb2_grpc
from tests.support.call_stages import Ask, open_channel, scripted_runner, scripted_server
from tests.support.certificates import Authority, Issued
from tests.support.raw_http2 import (
    CANCEL,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    Connection,
    Frame,
    Kind,
    call_headers,
    connect,
    frame,
    header_block,
    http2,
)
from tests.support.server_aftermath import STORM_BYTES, Aftermath

AUTHORITY = Authority("authority")
METHOD = "/photon.v1.InferenceService/StreamGenerate"
# Above the hard limit of metadata, 16 KiB.
HUGE = "x" * 20_000


@dataclass
class TlsServer:
    """A server whose certificate files are `folder/server.crt` and `.key`; a stream goes on all the while."""

    aftermath: Aftermath
    folder: Path

    def channel(self) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.pem)
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.secure_channel(self.aftermath.server.address, credentials, options=options)

    def serial(self) -> int:
        """Of the certificate that a new connection is shown, which it must believe."""
        context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
        context.set_alpn_protocols(["h2"])
        with connect(self.aftermath.server.address, context) as opened:
            assert isinstance(opened, ssl.SSLSocket)
            certificate = opened.getpeercert(binary_form=True)
        assert certificate is not None
        return x509.load_der_x509_certificate(certificate).serial_number

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://{self.aftermath.server.metrics}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = AUTHORITY.issue().write(folder, "server")
    settings = {"tls__cert_file": certificate, "tls__key_file": key, "server__metrics_port": 0}
    with scripted_server(folder, scripted_runner(step_s=0.002), **settings) as server:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.pem)
        yield TlsServer(Aftermath(server, grpc.secure_channel(server.address, credentials)), folder)
        assert server.stop() == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """A server without TLS; connections that answer no pings are closed after two seconds."""
    with scripted_server(tmp_path_factory.mktemp("plain"), scripted_runner(step_s=0.002)) as server:
        yield Aftermath(server)
        assert server.stop() == 0


@pytest.fixture(scope="module")
def plain_with_acceptors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    folder = tmp_path_factory.mktemp("acceptors")
    with scripted_server(folder, scripted_runner(step_s=0.002), server__acceptors=2) as server:
        yield Aftermath(server)
        assert server.stop() == 0


@pytest.fixture(params=["plain", "plain_with_acceptors"], ids=["loop", "acceptors"])
def each_plain(request: pytest.FixtureRequest) -> Aftermath:
    """The one whose connections the event loop takes, and the one that has acceptors."""
    found: Aftermath = request.getfixturevalue(request.param)
    return found


@contextmanager
def decent_client(channel: grpc.Channel) -> Iterator[None]:
    """A stream that must go through to its end beside whatever happens, and another behind it."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    with channel:
        call = stub.StreamGenerate(Ask(max_tokens=500).request(), timeout=120)
        next(call)
        yield
        assert list(call)[-1].summary.usage.output_tokens == 500
        last = list(stub.StreamGenerate(Ask(max_tokens=3).request(), timeout=120))[-1]
        assert last.summary.usage.output_tokens == 3


# --- 36 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pair: replace(pair, certificate=pair.certificate[: len(pair.certificate) // 2]),
        lambda pair: replace(pair, certificate=b"", key=b""),
        lambda pair: replace(pair, key=AUTHORITY.issue().key),
        lambda pair: AUTHORITY.issue(ends=timedelta(minutes=-1)),
    ],
    ids=["half_written", "empty", "mismatched", "expired"],
)
def test_fault_36_a_certificate_that_breaks_in_rotation(
    tls: TlsServer, spoil: Callable[[Issued], Issued]
) -> None:
    """The last good pair is served until a better one comes; streams and new connections go on."""
    served, better = tls.serial(), AUTHORITY.issue()
    refused, expiry = "photon_tls_cert_refused_total", "photon_tls_cert_expiry_timestamp_seconds"
    before, expires_at = tls.metric(refused), tls.metric(expiry)
    with decent_client(tls.channel()):
        spoil(better).write(tls.folder, "server")
        for _ in range(3):
            assert tls.serial() == served
        assert tls.metric(refused) == before + 1
        assert tls.metric(expiry) == expires_at
        with decent_client(tls.channel()):
            better.write(tls.folder, "server")
            assert tls.serial() == better.serial
        assert tls.metric(expiry) == better.expires_at
    tls.aftermath.check()


# --- 37 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(Kind.SETTINGS),
        b"\x00" * 4096,
    ],
    ids=["http1", "plaintext_http2", "zeros"],
)
def test_fault_37_plaintext_to_the_tls_port(tls: TlsServer, said: bytes) -> None:
    address = tls.aftermath.server.address
    with decent_client(tls.channel()):
        opened = [connect(address) for _ in range(50)]
        for each in opened:
            each.sendall(said)
        for each in opened:
            # Not a word in plaintext, whether the end comes as EOF or as a reset.
            assert b"HTTP" not in all_of(each)
    tls.aftermath.check()


def test_fault_37_http1_over_tls(tls: TlsServer) -> None:
    """A browser that offers nothing but HTTP/1.1, and one that speaks it all the same."""
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    for protocols in (["http/1.1"], ["h2"]):
        context.set_alpn_protocols(protocols)
        for _ in range(10):
            with suppress(ssl.SSLError, ConnectionError):
                opened = connect(tls.aftermath.server.address, context)
                opened.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"200 OK" not in all_of(opened)
    with decent_client(tls.channel()):
        pass
    tls.aftermath.check()


def all_of(opened: socket.socket) -> bytes:
    """What comes until the server closes."""
    read = bytearray()
    with opened, suppress(ConnectionError, ssl.SSLError):
        while data := opened.recv(1 << 16):
            read += data
    return bytes(read)


def until_closed(connection: Connection) -> list[Frame]:
    """All that the server still sends before it closes the connection."""
    return list(connection.frames())


@pytest.mark.parametrize("headers", [[("x-huge", HUGE)], [(f"x-{i}", HUGE[:5000]) for i in range(100)]])
def test_fault_37_huge_headers(each_plain: Aftermath, headers: list[tuple[str, str]]) -> None:
    """From a client that does not keep to the limit that the server tells it."""
    request = Ask(max_tokens=2).request()
    address = each_plain.server.address
    with decent_client(open_channel(address)), http2(address) as connection:
        connection.call(METHOD, request.SerializeToString(), *headers)
        answer = next(found for found in connection.frames() if found.kind == Kind.HEADERS)
        # RESOURCE_EXHAUSTED, in trailers only.
        assert b"grpc-status\x018" in answer.payload
        assert answer.flags & END_STREAM
    each_plain.check()
    assert request.request_id not in {call["request_id"] for call in each_plain.finished_calls()}


@pytest.mark.parametrize("name", ["Generate", "StreamGenerate", "Tokenize"])
def test_a_call_that_ends_without_its_request_is_told_so(each_plain: Aftermath, name: str) -> None:
    """A request cardinality violation; with grpc's own handlers for one request nobody would hear of it."""
    method = f"/photon.v1.InferenceService/{name}"
    address = each_plain.server.address
    with decent_client(open_channel(address)), open_channel(address) as channel:
        none: Iterator[bytes] = iter(())
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(method)(none, timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "without" in caught.value.details()
    each_plain.check()


def test_fault_37_headers_without_an_end(plain: Aftermath) -> None:
    """Hundreds of CONTINUATION frames of one header block: 8 MB that are nobody's."""
    more = frame(Kind.CONTINUATION, header_block([("x-huge", HUGE[:16000])]), stream=1)
    with decent_client(open_channel(plain.server.address)), http2(plain.server.address) as connection:
        connection.send(frame(Kind.HEADERS, call_headers(METHOD), stream=1))
        for _ in range(500):
            if not connection.send(more):
                break
        until_closed(connection)
    plain.check()


def test_fault_37_ping_flood(plain: Aftermath) -> None:
    pings = frame(Kind.PING, b"12345678") * 100
    address = plain.server.address
    with decent_client(open_channel(address)), http2(address) as connection:
        for _ in range(1000):
            if not connection.send(pings):
                break
        (goodbye,) = (found for found in until_closed(connection) if found.kind == Kind.GOAWAY)
        assert int.from_bytes(goodbye.payload[4:8], "big") == ENHANCE_YOUR_CALM
        assert goodbye.payload.endswith(b"too_many_pings")
    plain.check()


@pytest.mark.parametrize("reads", [True, False])
def test_fault_37_settings_flood(plain: Aftermath, reads: bool) -> None:
    """Each frame wants an answer; who does not read them must not make the server keep them all."""
    settings = frame(Kind.SETTINGS, b"\x00\x04\x00\x01\x00\x00") * 100
    with decent_client(open_channel(plain.server.address)), http2(plain.server.address) as connection:
        reader = threading.Thread(target=until_closed, args=[connection])
        if reads:
            reader.start()
        else:
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.socket.settimeout(5)
        for _ in range(2000):
            if not connection.send(settings):
                break
        if reads:
            reader.join()
    plain.check()


def test_fault_37_calls_that_are_reset_at_once(each_plain: Aftermath) -> None:
    """CVE-2023-44487: streams that are opened and reset faster than anybody can handle them."""
    reset = CANCEL.to_bytes(4, "big")
    address = each_plain.server.address
    with decent_client(open_channel(address)), http2(address) as connection:
        data = Ask().request().SerializeToString()
        for stream in range(1, 10_001, 2):
            if not connection.call(METHOD, data, stream=stream) or not connection.send(
                frame(Kind.RST_STREAM, reset, stream=stream)
            ):
                break
        until_closed(connection)
    # On a busy machine most of the 5,000 are live at once.
    each_plain.check(spare_bytes=STORM_BYTES)
