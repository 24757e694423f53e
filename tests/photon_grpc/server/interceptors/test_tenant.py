"""Who may say for whom a call is made, from a real client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from photon_grpc.errors import ConfigError
from photon_grpc.options import AuthOptions, Options, TlsOptions
from photon_grpc.server.server import Server
from photon_grpc.v1 import control_pb2, inference_pb2, model_pb2
from tests.support.certificates import Authority
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import Harness, RichError, quick_options, rich_error, running_server

TOKENS = {name: f"the-token-of-{name}-alone" for name in ("gateway", "alice")}
SPEC = inference_pb2.GenerationSpec(text="hello", scheduling=inference_pb2.SchedulingOptions(priority=3))
GENERATE = inference_pb2.GenerateRequest(spec=SPEC)
STREAM = inference_pb2.StreamGenerateRequest(spec=SPEC)

Metadata = Sequence[tuple[str, str]]


def named_callers(folder: Path, trusted_hops: str = "gateway") -> Options:
    file = folder / "callers"
    file.write_text("".join(f"{name} infer,inspect token:{token}\n" for name, token in TOKENS.items()))
    return replace(quick_options(), auth=AuthOptions(str(file), trusted_hops))


def of(name: str, *stated: tuple[str, str]) -> Metadata:
    return (("authorization", f"Bearer {TOKENS[name]}"), *stated)


@asynccontextmanager
async def running(
    folder: Path, trusted_hops: str = "gateway"
) -> AsyncIterator[tuple[Harness, FakeFrontDoor]]:
    front_door = FakeFrontDoor()
    async with running_server(front_door, named_callers(folder, trusted_hops)) as harness:
        yield harness, front_door


async def refusal(call: Any) -> RichError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rich_error(caught.value)


@pytest.mark.usefixtures("each_listener")
async def test_a_trusted_hop_states_tenant_and_priority(tmp_path: Path) -> None:
    async with running(tmp_path, " gateway , alice") as (harness, front_door):
        for stated in (
            (),
            (("photon-tenant", "bob"),),
            (("photon-priority", "9"),),
            (("photon-priority", "0"), ("photon-tenant", "spiffe://example.org/ns/a_b-c@1")),
        ):
            await harness.inference.Generate(GENERATE, metadata=of("gateway", *stated))
            async for _ in harness.inference.StreamGenerate(STREAM, metadata=of("gateway", *stated)):
                pass
        await harness.inference.Generate(GENERATE, metadata=of("alice", ("photon-tenant", "carol")))
    unary, streamed = front_door.tenants[0:8:2], front_door.tenants[1:8:2]
    assert unary == streamed == ["gateway", "bob", "gateway", "spiffe://example.org/ns/a_b-c@1"]
    assert front_door.tenants[8:] == ["carol"]
    priorities = [request.scheduling.priority for request in front_door.requests]
    assert priorities == [3, 3, 3, 3, 9, 9, 0, 0, 3]


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize("stated", [("photon-tenant", "bob"), ("photon-priority", "1")])
async def test_fault_38_nobody_else_states_anything(tmp_path: Path, stated: tuple[str, str]) -> None:
    """A caller that is no trusted hop, and everybody where callers are not told apart."""
    async with running(tmp_path) as (harness, front_door):
        for call in (
            harness.inference.Generate(GENERATE, metadata=of("alice", stated)),
            harness.inference.StreamGenerate(STREAM, metadata=of("alice", stated)).read(),
            harness.models.GetModelInfo(model_pb2.GetModelInfoRequest(), metadata=of("alice", stated)),
        ):
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")
            assert stated[0] in refused.message
        unknown = await refusal(harness.inference.Generate(GENERATE, metadata=(stated,)))
        assert unknown.reason == "UNAUTHENTICATED", "who it is comes first"
        assert front_door.requests == []
    async with running_server(front_door) as harness:
        assert (await refusal(harness.inference.Generate(GENERATE, metadata=(stated,)))).reason == "FORBIDDEN"
        assert front_door.requests == []


async def test_no_tenant_is_stated_to_an_operator_s_method(tmp_path: Path) -> None:
    """It would be ignored there, and an abort that was meant for one tenant would meet all."""
    async with running(tmp_path) as (harness, front_door):
        front_door.live_ids = {("bob", "a"), ("carol", "a")}
        request = control_pb2.AbortRequest(all=control_pb2.AllRequests())
        refused = await refusal(
            harness.control.Abort(request, metadata=of("gateway", ("photon-tenant", "bob")))
        )
        assert refused.reason == "FORBIDDEN"
        assert len(front_door.live_ids) == 2


BAD: list[tuple[tuple[str, str], ...]] = [
    *((("photon-tenant", value),) for value in ("", " ", "a b", "a,b", "x" * 129, "a;b", "{}")),
    *((("photon-priority", value),) for value in ("", "-1", "10", "1.0", "+1", "high", "1,1", "9" * 40)),
    (("photon-tenant", "bob"), ("photon-tenant", "bob")),
    (("photon-tenant", "bob"), ("photon-tenant", "carol")),
    (("photon-priority", "1"), ("photon-tenant", "bob"), ("photon-priority", "1")),
]


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize("stated", BAD)
async def test_what_a_trusted_hop_states_wrongly_is_refused(
    tmp_path: Path, stated: tuple[tuple[str, str], ...]
) -> None:
    async with running(tmp_path) as (harness, front_door):
        refused = await refusal(harness.inference.Generate(GENERATE, metadata=of("gateway", *stated)))
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [stated[0][0]])
        assert not any(len(value) > 3 and value in refused.message for _, value in stated)
        assert front_door.requests == []


@pytest.mark.usefixtures("each_listener")
async def test_a_hop_may_be_known_by_its_certificate(tmp_path: Path) -> None:
    authority = Authority("photon test authority")
    client = authority.issue(for_client=True)  # its subject alternative names are localhost and 127.0.0.1
    certificate, key = authority.issue().write(tmp_path, "server")
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    (tmp_path / "callers").write_text("mesh infer san:localhost\n")
    options = replace(
        quick_options(),
        tls=TlsOptions(str(certificate), str(key), str(tmp_path / "ca.crt"), require_client_cert=True),
        auth=AuthOptions(str(tmp_path / "callers"), "mesh"),
    )
    front_door = FakeFrontDoor()
    async with running_server(front_door, options) as harness:
        credentials = grpc.ssl_channel_credentials(authority.pem, client.key, client.certificate)
        async with grpc.aio.secure_channel(harness.target, credentials) as channel:
            call = channel.unary_unary("/photon.v1.InferenceService/Generate")
            await call(GENERATE.SerializeToString(), metadata=(("photon-tenant", "bob"),), timeout=20)
    assert front_door.tenants == ["bob"]


@pytest.mark.parametrize("hops", ["nobody", "gateway,nobody", "gateway alice"])
def test_a_hop_that_is_no_caller_refuses_the_start(tmp_path: Path, hops: str) -> None:
    with pytest.raises(ConfigError, match=r"auth\.trusted_hops: '.*' is no caller"):
        Server(FakeFrontDoor(), named_callers(tmp_path, hops))
    with pytest.raises(ConfigError, match=r"auth\.trusted_hops"):
        Server(FakeFrontDoor(), replace(quick_options(), auth=AuthOptions("", hops)))


@pytest.mark.usefixtures("each_listener")
async def test_a_call_s_line_tells_tenants_apart_and_names_none(tmp_path: Path) -> None:
    with capture_logs() as records:
        async with running(tmp_path) as (harness, _):
            for metadata in (
                of("alice"),
                of("gateway", ("photon-tenant", "bob-the-tenant")),
                of("gateway", ("photon-tenant", "alice")),
                of("alice", ("photon-tenant", "bob-the-tenant")),
                of("gateway", ("photon-tenant", "not a name")),
            ):
                await harness.inference.Generate(GENERATE, metadata=metadata).code()
            await harness.control.GetLoad(control_pb2.GetLoadRequest())
    lines = [record for record in records if record["event"] == "call finished"]
    assert [line["code"] for line in lines] == [
        *("OK", "OK", "OK", "PERMISSION_DENIED", "INVALID_ARGUMENT", "OK")
    ]
    alice, bob, alice_by_the_gateway = (line["tenant"] for line in lines[:3])
    assert alice == alice_by_the_gateway != bob
    # Whose a refused statement is was not made out; an operator is nobody's tenant.
    assert not any("tenant" in line for line in lines[3:])
    assert not any(name in repr(records) for name in ("alice", "bob-the", "gateway", "not a name"))
