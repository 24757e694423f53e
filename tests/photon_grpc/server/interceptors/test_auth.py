"""Who gets through, from a real client: every method of every listener, every role, no role."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc.aio import _server  # the class behind the abstract grpc.aio.Server

from photon_grpc.errors import UnauthenticatedError
from photon_grpc.options import AuthOptions, Options, TlsOptions
from photon_grpc.server.acceptors.dispatcher import Dispatcher
from photon_grpc.server.callers import Callers
from photon_grpc.server.interceptors import auth
from photon_grpc.server.interceptors.auth import AuthInterceptor, role_of
from photon_grpc.server.server import BoundPorts, Server
from photon_grpc.telemetry.pseudonyms import Pseudonyms
from photon_grpc.v1 import control_pb2, inference_pb2, inference_pb2_grpc, model_pb2
from tests.support.certificates import Authority
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import make_server, quick_options, rich_error, running_server

AUTHORITY = Authority("photon test authority")
CLIENT = AUTHORITY.issue(for_client=True)  # its subject alternative names are localhost and 127.0.0.1
TOKENS = {role: f"a-token-for-{role}-only" for role in ("infer", "inspect", "control")}
GENERATE = inference_pb2.GenerateRequest(spec=inference_pb2.GenerationSpec(text="hello"))

# What the service contract asks of each method, written down independently of the interceptor's table.
NEEDED = {
    "/photon.v1.InferenceService/StreamGenerate": "infer",
    "/photon.v1.InferenceService/Generate": "infer",
    "/photon.v1.InferenceService/BatchGenerate": "infer",
    "/photon.v1.InferenceService/Tokenize": "infer",
    "/photon.v1.InferenceService/Detokenize": "infer",
    "/photon.v1.ModelService/GetModelInfo": "inspect",
    "/photon.v1.ModelService/GetServerInfo": "inspect",
    "/photon.v1.ControlService/Abort": "control",
    "/photon.v1.ControlService/FlushCache": "control",
    "/photon.v1.ControlService/GetLoad": "inspect",
    "/photon.v1.ControlService/WatchState": "inspect",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "inspect",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "inspect",
    # The last: what comes after it may be refused for it.
    "/photon.v1.ControlService/Drain": "control",
}

Code = grpc.StatusCode
BOTH_WAYS = {method for method in NEEDED if method.endswith("/ServerReflectionInfo")}


@dataclass
class Guarded:
    """A server whose listeners all ask for credentials, and every method that was registered on it."""

    server: Server
    ports: BoundPorts
    registered: dict[str, int]  # method to port

    @asynccontextmanager
    async def call(
        self, method: str, token: str | None = None, body: bytes = b"", port: int = 0
    ) -> AsyncIterator[Any]:
        """One message to a method; on the wire a single message and a stream of one are the same."""
        credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, CLIENT.key, CLIENT.certificate)
        metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        target = f"127.0.0.1:{port or self.registered[method]}"
        async with grpc.aio.secure_channel(target, credentials) as channel:
            call = channel.stream_stream(method)(metadata=metadata, timeout=20)
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(body)
                await call.done_writing()
            yield call

    async def code(self, method: str, token: str | None = None, body: bytes = b"") -> grpc.StatusCode:
        async with self.call(method, token, body) as call:
            try:
                # These never end by themselves: an answer is what it takes to be let in.
                while await call.read() is not grpc.aio.EOF:
                    if method.endswith(("/Watch", "/WatchState")):
                        return grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                return error.code()
            code: grpc.StatusCode = await call.code()
            return code


def guarded_options(folder: Path, callers: str) -> Options:
    certificate, key = AUTHORITY.issue().write(folder, "server")
    (folder / "ca.crt").write_bytes(AUTHORITY.pem)
    (folder / "callers").write_text(callers)
    return replace(
        quick_options({"admin_host": "0.0.0.0", "reflection": "public"}),
        tls=TlsOptions(str(certificate), str(key), str(folder / "ca.crt"), require_client_cert=True),
        auth=AuthOptions(str(folder / "callers")),
    )


ONE_ROLE_EACH = "".join(f"{role}-only {role} token:{token}\n" for role, token in TOKENS.items())


@asynccontextmanager
async def guarded_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, callers: str = ONE_ROLE_EACH
) -> AsyncIterator[Guarded]:
    """A server with all its registrations overheard, whichever way they are made, and whoever takes calls."""
    by_server: dict[int, set[str]] = {}
    add_dispatched = Dispatcher.add_registered_method_handlers
    add_generic = _server.Server.add_generic_rpc_handlers
    add_registered = _server.Server.add_registered_method_handlers

    def overhear_generic(self: Any, handlers: Any) -> None:
        for handler in handlers:
            by_server.setdefault(id(self), set()).update(handler._method_handlers)
        add_generic(self, handlers)

    def overhear_registered(self: Any, service: str, handlers: Any) -> None:
        by_server.setdefault(id(self), set()).update(f"/{service}/{name}" for name in handlers)
        add_registered(self, service, handlers)

    def overhear_dispatched(self: Any, service: str, handlers: Any) -> None:
        by_server.setdefault(id(self), set()).update(f"/{service}/{name}" for name in handlers)
        add_dispatched(self, service, handlers)

    monkeypatch.setattr(Dispatcher, "add_registered_method_handlers", overhear_dispatched)
    monkeypatch.setattr(_server.Server, "add_generic_rpc_handlers", overhear_generic)
    monkeypatch.setattr(_server.Server, "add_registered_method_handlers", overhear_registered)
    server = make_server(FakeFrontDoor(), guarded_options(folder, callers))
    ports = await server.start()
    server.set_serving()
    try:
        assert ports.admin is not None
        public, admin = by_server.values()
        registered = dict.fromkeys(admin, ports.admin) | dict.fromkeys(public, ports.public)
        yield Guarded(server, ports, registered)
    finally:
        await server.stop()


@pytest.mark.usefixtures("each_listener")
async def test_no_method_but_health_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_server(tmp_path, monkeypatch) as guarded:
        health = {method for method in guarded.registered if method.startswith("/grpc.health.v1.Health/")}
        assert len(health) >= 2
        codes = {method: await guarded.code(method) for method in guarded.registered}
        for method, code in codes.items():
            expected = grpc.StatusCode.OK if method in health else grpc.StatusCode.UNAUTHENTICATED
            assert code is expected, method
        # A method of which this file does not know what it needs must be written down here.
        assert guarded.registered.keys() - health == NEEDED.keys()
        # What is not registered is not open either, nor is a method of the other listener.
        for method in (*NEEDED, "/photon.v1.InferenceService/NoSuch", "/no.such.Service/Method"):
            for port in (guarded.ports.public, guarded.ports.admin):
                assert port is not None
                async with guarded.call(method, port=port) as call:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call.read()
                    assert caught.value.code() in (Code.UNAUTHENTICATED, Code.UNIMPLEMENTED), method


def test_every_method_of_the_contract_is_written_down() -> None:
    """The walk above is over what is registered; this one over what the files in `proto` promise."""
    files = (inference_pb2, model_pb2, control_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    contract = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert contract == {method for method in NEEDED if method.startswith("/photon.v1.")}
    assert {method: role_of(method) for method in NEEDED} == NEEDED


async def test_the_probe_listener_has_health_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(
        guarded_options(tmp_path, ONE_ROLE_EACH), server=replace(quick_options().server, probe_port=0)
    )
    options = replace(options, tls=replace(options.tls, client_ca_file="", require_client_cert=False))
    server = Server(FakeFrontDoor(), options)
    ports = await server.start()
    server.set_serving()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.probe}") as channel:
            assert (
                await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20).code() is Code.OK
            )
            for method in NEEDED:
                for token in TOKENS.values():
                    metadata = (("authorization", f"Bearer {token}"),)
                    call = channel.unary_unary(method)(b"", metadata=metadata, timeout=20)
                    assert await call.code() is Code.UNIMPLEMENTED
    finally:
        await server.stop()


@pytest.mark.usefixtures("each_listener")
async def test_a_certificate_that_has_expired_identifies_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one of another authority with the same names: the handshake fails, no method is reached."""
    callers = "pod infer,inspect,control san:localhost\n"
    for shown in (
        AUTHORITY.issue(for_client=True, ends=timedelta(minutes=-1)),
        AUTHORITY.issue(for_client=True, begins=timedelta(hours=1)),
        Authority("photon test authority").issue(for_client=True),
    ):
        async with guarded_server(tmp_path, monkeypatch, callers) as guarded:
            info = "/photon.v1.ModelService/GetModelInfo"
            assert await guarded.code(info) is Code.OK
            credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, shown.key, shown.certificate)
            target = f"127.0.0.1:{guarded.registered[info]}"
            async with grpc.aio.secure_channel(target, credentials) as channel:
                refused = channel.unary_unary(info)(b"", timeout=20)
                assert await refused.code() is Code.UNAVAILABLE


@pytest.mark.usefixtures("each_listener")
async def test_every_method_lets_its_role_in_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded_server(tmp_path, monkeypatch) as guarded:
        for method, needed in NEEDED.items():
            for role, token in TOKENS.items():
                code = await guarded.code(method, token)
                if role == needed:
                    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), (method, role)
                else:
                    assert code is grpc.StatusCode.PERMISSION_DENIED, (method, role)


@pytest.mark.usefixtures("each_listener")
async def test_refusals_carry_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_server(tmp_path, monkeypatch) as guarded:
        for method in NEEDED.keys() - BOTH_WAYS:
            for token, reason in ((None, "UNAUTHENTICATED"), ("no-such-token", "UNAUTHENTICATED")):
                async with guarded.call(method, token) as call:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call.read()
                    assert rich_error(caught.value).reason == reason
        async with guarded.call("/photon.v1.InferenceService/Generate", TOKENS["inspect"]) as call:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert rich_error(caught.value).reason == "FORBIDDEN"


@pytest.mark.usefixtures("each_listener")
async def test_the_message_of_a_refused_caller_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded_server(tmp_path, monkeypatch) as guarded:
        method, garbage = "/photon.v1.InferenceService/Generate", b"\xff\xff\xff"
        assert await guarded.code(method, TOKENS["infer"], garbage) is grpc.StatusCode.INVALID_ARGUMENT
        assert await guarded.code(method, None, garbage) is grpc.StatusCode.UNAUTHENTICATED
        assert await guarded.code(method, TOKENS["control"], garbage) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.usefixtures("each_listener")
async def test_a_certificate_identifies_where_there_is_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = f"pod inspect san:localhost\nhuman infer token:{TOKENS['infer']}\n"
    async with guarded_server(tmp_path, monkeypatch, callers) as guarded:
        info, generate = "/photon.v1.ModelService/GetModelInfo", "/photon.v1.InferenceService/Generate"
        assert await guarded.code(info) is grpc.StatusCode.OK
        assert await guarded.code(generate) is grpc.StatusCode.PERMISSION_DENIED
        body = GENERATE.SerializeToString()
        assert await guarded.code(generate, TOKENS["infer"], body) is grpc.StatusCode.OK
        # A token that is wrong is not made good by a certificate.
        assert await guarded.code(info, "no-such-token-here") is grpc.StatusCode.UNAUTHENTICATED


REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


class StreamContext:
    """Of a stream from a caller without credentials; tells what happened to it, in order."""

    def __init__(self) -> None:
        self.happened: list[str] = []

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def auth_context(self) -> dict[str, Any]:
        return {}

    async def messages(self, *, first: bytes | None) -> AsyncIterator[bytes]:
        if first is None:
            await asyncio.Event().wait()
        else:
            self.happened.append("message")
            yield first
        raise AssertionError("nobody asks a refused stream for more")


async def refuse_a_stream(folder: Path, first: bytes | None) -> list[str]:
    """What happens to a refused stream that sends `first`, or nothing."""
    (folder / "callers").write_text(ONE_ROLE_EACH)

    async def behavior(messages: Any, context: Any) -> AsyncIterator[Any]:
        raise AssertionError("the caller is let in")
        yield

    async def find(details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(behavior)

    details: Any = SimpleNamespace(method=REFLECTION, invocation_metadata=())
    interceptor = AuthInterceptor(Callers(str(folder / "callers")), Pseudonyms())
    handler = await interceptor.intercept_service(find, details)
    assert handler is not None
    context = StreamContext()
    with pytest.raises(UnauthenticatedError):
        async for _ in handler.stream_stream(context.messages(first=first), context):
            pass
    context.happened.append("refused")
    return context.happened


async def test_a_refused_stream_ends_when_its_first_message_has_come(tmp_path: Path) -> None:
    """A client whose stream ends while it writes that message hears INTERNAL from its own gRPC library."""
    assert await refuse_a_stream(tmp_path, b"\xff\xff\xff") == ["message", "refused"]


async def test_a_refused_stream_that_says_nothing_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_FIRST_MESSAGE_S", 0.01)
    assert await refuse_a_stream(tmp_path, None) == ["refused"]


@pytest.mark.usefixtures("each_listener")
async def test_a_stream_is_told_why_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_server(tmp_path, monkeypatch) as guarded:
        credentials = grpc.ssl_channel_credentials(AUTHORITY.pem, CLIENT.key, CLIENT.certificate)
        target = f"127.0.0.1:{guarded.registered[REFLECTION]}"
        async with grpc.aio.secure_channel(target, credentials) as channel:
            for _ in range(50):
                call = channel.stream_stream(REFLECTION)(iter([b""]), timeout=20)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert rich_error(caught.value).reason == "UNAUTHENTICATED"


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (f"Bearer {TOKENS['infer']}", grpc.StatusCode.OK),
        (f"bearer {TOKENS['infer']}", grpc.StatusCode.OK),
        (TOKENS["infer"], grpc.StatusCode.UNAUTHENTICATED),
        ("Basic " + base64.b64encode(TOKENS["infer"].encode()).decode(), grpc.StatusCode.UNAUTHENTICATED),
        ("Bearer", grpc.StatusCode.UNAUTHENTICATED),
        ("", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
async def test_the_authorization_header(tmp_path: Path, header: str, code: grpc.StatusCode) -> None:
    (tmp_path / "callers").write_text(ONE_ROLE_EACH)
    options = replace(quick_options(), auth=AuthOptions(str(tmp_path / "callers")))
    async with running_server(FakeFrontDoor(), options) as harness:
        call = harness.inference.Generate(GENERATE, metadata=(("authorization", header),))
        assert await call.code() is code


@pytest.mark.usefixtures("each_listener")
async def test_quotas_count_against_the_caller_s_name(tmp_path: Path) -> None:
    (tmp_path / "callers").write_text(
        f"alice infer token:{TOKENS['infer']}\nbob infer token:{TOKENS['control']}\n"
    )
    options = replace(quick_options(), auth=AuthOptions(str(tmp_path / "callers")))
    front_door = FakeFrontDoor()
    async with running_server(front_door, options) as harness:
        for token in (TOKENS["infer"], TOKENS["control"]):
            metadata = (("authorization", f"Bearer {token}"),)
            await harness.inference.Generate(GENERATE, metadata=metadata)
            request = inference_pb2.StreamGenerateRequest(spec=GENERATE.spec)
            async for _ in harness.inference.StreamGenerate(request, metadata=metadata):
                pass
    assert front_door.tenants == ["alice", "alice", "bob", "bob"]


@pytest.mark.usefixtures("each_listener")
async def test_a_token_that_is_taken_away_stops_working(tmp_path: Path) -> None:
    file = tmp_path / "callers"
    file.write_text(ONE_ROLE_EACH)
    options = replace(quick_options(), auth=AuthOptions(str(file)))
    metadata = (("authorization", f"Bearer {TOKENS['infer']}"),)
    async with running_server(FakeFrontDoor(), options) as harness:
        assert await harness.inference.Generate(GENERATE, metadata=metadata).code() is grpc.StatusCode.OK
        file.write_text(f"other infer token:{TOKENS['control']}\n")
        refused = await harness.inference.Generate(GENERATE, metadata=metadata).code()
        assert refused is grpc.StatusCode.UNAUTHENTICATED


async def test_the_admin_listener_on_loopback_is_the_operator_s(tmp_path: Path) -> None:
    (tmp_path / "callers").write_text(ONE_ROLE_EACH)
    options = replace(quick_options(), auth=AuthOptions(str(tmp_path / "callers")))
    async with running_server(FakeFrontDoor(), options) as harness:
        call = harness.admin.unary_unary("/photon.v1.ControlService/GetLoad")(b"")
        assert await call.code() is grpc.StatusCode.OK
        stub = inference_pb2_grpc.InferenceServiceStub(harness.public)
        assert await stub.Generate(GENERATE).code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_method_that_nobody_wrote_down_has_no_role() -> None:
    assert role_of("/photon.v1.SomeService/Method") is None
    assert role_of("/photon.v1.InferenceServiceX/Generate") is None
    assert role_of("") is None
