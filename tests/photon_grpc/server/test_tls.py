"""TLS from the client's side: real handshakes, certificates made on the fly, files that change."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

import photon_grpc.server.tls
from photon_grpc.errors import ConfigError
from photon_grpc.options import AuthOptions, ServerOptions, TlsOptions
from photon_grpc.server.server import Server, check_options
from photon_grpc.server.tls import CertificateFiles
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.certificates import Authority, Issued
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import quick_options, running_server

AUTHORITY = Authority("photon test authority")
STRANGER = Authority("another authority")
CLIENT = AUTHORITY.issue(for_client=True)
GENERATE = inference_pb2.StreamGenerateRequest(spec=inference_pb2.GenerationSpec(text="hello"))


@dataclass
class Observed:
    """What a server said about its certificates."""

    expiries: list[float] = field(default_factory=list)
    refused: int = 0

    def observe_certificate(self, expires_at: float) -> None:
        self.expiries.append(expires_at)

    def observe_certificate_refused(self) -> None:
        self.refused += 1


def files_of(folder: Path, issued: Issued, *, require_client_cert: bool = False) -> TlsOptions:
    certificate, key = issued.write(folder, "server")
    client_ca = ""
    if require_client_cert:
        (folder / "ca.crt").write_bytes(AUTHORITY.pem)
        client_ca = str(folder / "ca.crt")
    return TlsOptions(str(certificate), str(key), client_ca, require_client_cert)


def replace_pair(folder: Path, issued: Issued) -> None:
    """As a careful operator does it; each file is replaced in one step."""
    for new in issued.write(folder, "new"):
        os.replace(new, folder / new.name.replace("new", "server"))


def channel(port: int, ca: bytes = AUTHORITY.pem, shown: Issued | None = None) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(
        ca, shown.key if shown else None, shown.certificate if shown else None
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)


async def check(opened: grpc.aio.Channel) -> None:
    """One health check. Raises AioRpcError."""
    async with opened:
        response = await health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert response.status == health_pb2.HealthCheckResponse.SERVING


async def refused(opened: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(opened)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def served_serial(port: int) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    connection = writer.get_extra_info("ssl_object")
    assert connection.version() in ("TLSv1.2", "TLSv1.3")
    der = connection.getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(der).serial_number


class TestFilesAtTheStart:
    def test_a_good_pair_is_loaded_and_its_expiry_known(self, tmp_path: Path) -> None:
        issued = AUTHORITY.issue()
        observed = Observed()
        CertificateFiles(files_of(tmp_path, issued), observed)
        assert observed == Observed([issued.expires_at])

    def test_a_chain_counts_by_its_first_certificate(self, tmp_path: Path) -> None:
        issued = AUTHORITY.issue()
        observed = Observed()
        chain = replace(issued, certificate=issued.certificate + AUTHORITY.pem)
        CertificateFiles(files_of(tmp_path, chain), observed)
        assert observed.expiries == [issued.expires_at]

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda pair: AUTHORITY.issue(ends=timedelta(minutes=-1)), "server.crt: certificate has expired"),
            (
                lambda pair: AUTHORITY.issue(begins=timedelta(hours=1)),
                "server.crt: certificate is not yet valid",
            ),
            (lambda pair: replace(pair, key=AUTHORITY.issue().key), "server.key: key values mismatch"),
            (lambda pair: replace(pair, certificate=pair.certificate[:300]), "no whole PEM certificate"),
            (lambda pair: replace(pair, certificate=b""), "no whole PEM certificate"),
            (lambda pair: replace(pair, key=pair.key[:60]), "server.key: "),
            (lambda pair: AUTHORITY.issue(for_client=True), "server.crt: unsuitable certificate purpose"),
            (lambda pair: AUTHORITY.issue(password=b"secret"), "server.key: "),
        ],
    )
    def test_an_unusable_one_refuses_the_start(
        self, tmp_path: Path, spoil: Callable[[Issued], Issued], words: str
    ) -> None:
        tls = files_of(tmp_path, spoil(AUTHORITY.issue()))
        with pytest.raises(ConfigError, match=words):
            Server(FakeFrontDoor(), replace(quick_options(), tls=tls))

    @pytest.mark.parametrize("missing", ["server.crt", "server.key", "ca.crt"])
    def test_a_missing_one_is_named(self, tmp_path: Path, missing: str) -> None:
        tls = files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True)
        (tmp_path / missing).unlink()
        with pytest.raises(ConfigError, match=rf"tls: .*{missing}: No such file"):
            CertificateFiles(tls)

    def test_a_client_authority_must_hold_a_certificate(self, tmp_path: Path) -> None:
        tls = files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True)
        (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem[:200])
        with pytest.raises(ConfigError, match=r"ca\.crt"):
            CertificateFiles(tls)


class TestSettings:
    @pytest.mark.parametrize(
        ("server", "tls", "named"),
        [
            ({}, {"cert_file": "c"}, "go together"),
            ({}, {"key_file": "k"}, "go together"),
            ({}, {"client_ca_file": "a"}, "needs tls.cert_file"),
            (
                {},
                {"cert_file": "c", "key_file": "k", "require_client_cert": True},
                "needs tls.client_ca_file",
            ),
            ({}, {"cert_file": "c", "key_file": "k", "client_ca_file": "a"}, "has no effect"),
            ({"host": "0.0.0.0"}, {}, "server.host"),
            ({"admin_host": "0.0.0.0"}, {"cert_file": "c", "key_file": "k"}, "server.admin_host"),
            (
                {"admin_host": "0.0.0.0"},
                {"cert_file": "c", "key_file": "k", "client_ca_file": "a"},
                "auth.callers_file",
            ),
        ],
    )
    def test_what_would_not_protect_is_refused(
        self, server: dict[str, str], tls: dict[str, str], named: str
    ) -> None:
        with pytest.raises(ConfigError, match=named):
            check_options(ServerOptions(**server), TlsOptions(**tls), AuthOptions())  # type: ignore[arg-type]

    def test_with_tls_listeners_may_leave_loopback(self) -> None:
        check_options(ServerOptions(host="0.0.0.0"), TlsOptions("c", "k"), AuthOptions())
        check_options(ServerOptions(admin_host="0.0.0.0"), TlsOptions("c", "k", "a"), AuthOptions("f"))


class TestCalls:
    @pytest.mark.usefixtures("each_listener")
    async def test_a_client_that_knows_the_authority_streams(self, tmp_path: Path) -> None:
        options = replace(quick_options(), tls=files_of(tmp_path, AUTHORITY.issue()))
        async with (
            running_server(FakeFrontDoor(), options) as harness,
            channel(harness.ports.public) as opened,
        ):
            call = inference_pb2_grpc.InferenceServiceStub(opened).StreamGenerate(GENERATE)
            events = [response.WhichOneof("event") async for response in call]
            assert events[-1] == "summary"

    @pytest.mark.usefixtures("each_listener")
    async def test_who_does_not_know_the_authority_leaves(self, tmp_path: Path) -> None:
        options = replace(quick_options(), tls=files_of(tmp_path, AUTHORITY.issue()))
        async with running_server(FakeFrontDoor(), options) as harness:
            await refused(channel(harness.ports.public, ca=STRANGER.pem))

    @pytest.mark.usefixtures("each_listener")
    async def test_only_clients_of_the_authority_get_in_where_one_is_required(self, tmp_path: Path) -> None:
        tls = files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True)
        async with running_server(FakeFrontDoor(), replace(quick_options(), tls=tls)) as harness:
            await check(channel(harness.ports.public, shown=CLIENT))
            await refused(channel(harness.ports.public))
            await refused(channel(harness.ports.public, shown=STRANGER.issue(for_client=True)))
            expired = AUTHORITY.issue(for_client=True, ends=timedelta(minutes=-1))
            await refused(channel(harness.ports.public, shown=expired))

    async def test_the_admin_listener_on_loopback_is_the_operator_s(self, tmp_path: Path) -> None:
        tls = files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True)
        async with running_server(FakeFrontDoor(), replace(quick_options(), tls=tls)) as harness:
            await check(grpc.aio.insecure_channel(f"127.0.0.1:{harness.ports.admin}"))

    @pytest.mark.usefixtures("each_listener")
    async def test_the_admin_listener_off_loopback_wants_a_certificate(self, tmp_path: Path) -> None:
        tls = replace(
            files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True), require_client_cert=False
        )
        (tmp_path / "callers").write_text("operator control san:localhost\n")
        auth = AuthOptions(str(tmp_path / "callers"))
        options = replace(quick_options({"admin_host": "0.0.0.0"}), tls=tls, auth=auth)
        async with running_server(FakeFrontDoor(), options) as harness:
            assert harness.ports.admin is not None
            await check(channel(harness.ports.admin, shown=CLIENT))
            await refused(channel(harness.ports.admin))
            await refused(grpc.aio.insecure_channel(f"127.0.0.1:{harness.ports.admin}"))
            await check(channel(harness.ports.public))


class TestRotation:
    @pytest.mark.usefixtures("each_listener")
    async def test_new_files_are_served_and_a_stream_goes_on(self, tmp_path: Path) -> None:
        """Under load: new connections all the while, none of them refused."""
        old, new = AUTHORITY.issue(), AUTHORITY.issue(ends=timedelta(days=20))
        options = replace(quick_options(), tls=files_of(tmp_path, old))
        front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.005))
        stop = asyncio.Event()
        connections = 0

        async with running_server(front_door, options) as harness, channel(harness.ports.public) as opened:

            async def connect_again_and_again() -> None:
                nonlocal connections
                while not stop.is_set():
                    await check(channel(harness.ports.public))
                    connections += 1

            call = inference_pb2_grpc.InferenceServiceStub(opened).StreamGenerate(GENERATE)
            await call.read()
            assert await served_serial(harness.ports.public) == old.serial
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(connect_again_and_again())
                for issued in (new, old, new):
                    replace_pair(tmp_path, issued)
                    assert await served_serial(harness.ports.public) == issued.serial
                    before = connections
                    while connections < before + 6:  # noqa: ASYNC110  # they make their own
                        await asyncio.sleep(0.005)
                stop.set()
            assert (await call.read()).WhichOneof("event") == "delta"
            call.cancel()

    def test_files_that_are_gone_are_counted_once_and_noticed_when_back(self, tmp_path: Path) -> None:
        good, better = AUTHORITY.issue(), AUTHORITY.issue()
        observed = Observed()
        files = CertificateFiles(files_of(tmp_path, good), observed)
        first = files.current()
        (tmp_path / "server.crt").unlink()
        assert files.current() is first
        assert files.current() is first
        assert observed.refused == 1
        better.write(tmp_path, "server")
        assert files.current() is not first
        assert observed.expiries == [good.expires_at, better.expires_at]

    def test_refused_files_are_tried_again_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A certificate may become valid without its file changing."""
        observed = Observed()
        files = CertificateFiles(files_of(tmp_path, AUTHORITY.issue()), observed)
        AUTHORITY.issue(begins=timedelta(hours=1)).write(tmp_path, "server")
        for _ in range(2):
            files.current()
        assert observed.refused == 1
        monkeypatch.setattr(photon_grpc.server.tls, "_RETRY_S", 0.0)
        os.utime(tmp_path / "server.crt")
        for expected in (2, 3):
            files.current()
            assert observed.refused == expected

    def test_unchanged_files_are_not_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = CertificateFiles(files_of(tmp_path, AUTHORITY.issue()))
        monkeypatch.setattr(photon_grpc.server.tls, "_load", None)
        assert files.current() is files.current()

    @pytest.mark.usefixtures("each_listener")
    async def test_a_new_client_authority_counts_for_new_connections(self, tmp_path: Path) -> None:
        tls = files_of(tmp_path, AUTHORITY.issue(), require_client_cert=True)
        stranger = STRANGER.issue(for_client=True)
        async with running_server(FakeFrontDoor(), replace(quick_options(), tls=tls)) as harness:
            await refused(channel(harness.ports.public, shown=stranger))
            (tmp_path / "ca.crt").write_bytes(STRANGER.pem)
            await check(channel(harness.ports.public, shown=stranger))
            await refused(channel(harness.ports.public, shown=CLIENT))
