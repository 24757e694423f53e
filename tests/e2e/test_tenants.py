"""Two tenants of one server: what each can learn of the other, and take from it, by calls of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc.options import AuthOptions, Options, TenantOptions
from photon_grpc.v1 import control_pb2
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.grpc_harness import Harness, quick_options, rich_error, until
from tests.support.scripted_service import scripted_service

TOKENS = {name: f"the-token-of-{name}" for name in ("alice", "bob")}
PREFIX = tuple(range(5, 69))  # 64 tokens, four blocks


@dataclass
class Tenant:
    """One caller of the service, or a tenant that it states."""

    harness: Harness
    name: str
    stated: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        stated = (("photon-tenant", self.stated),) if self.stated else ()
        return (("authorization", f"Bearer {TOKENS[self.name]}"), *stated)

    async def generate(self, prompt: Sequence[int] = PREFIX, *, request_id: str = "", salt: str = "") -> Any:
        request = pb.GenerateRequest(request_id=request_id, spec=spec(prompt, 2, salt))
        return await self.harness.inference.Generate(request, metadata=self.metadata)

    async def begin(self, request_id: str, max_tokens: int = 3000) -> Any:
        """A stream that has its first token."""
        request = pb.StreamGenerateRequest(request_id=request_id, spec=spec(PREFIX, max_tokens))
        call = self.harness.inference.StreamGenerate(request, metadata=self.metadata)
        assert (await call.read()).WhichOneof("event") == "started"
        return call


def spec(prompt: Sequence[int], max_tokens: int, salt: str = "") -> pb.GenerationSpec:
    message = pb.GenerationSpec(token_ids=pb.TokenIds(ids=prompt), cache=pb.CacheOptions(cache_salt=salt))
    message.stop.max_tokens, message.stop.ignore_eos = max_tokens, True
    return message


@asynccontextmanager
async def two_tenants(
    folder: Path, options: Options | None = None, *, step_s: float = 0.0, trusted_hops: str = ""
) -> AsyncIterator[tuple[Tenant, Tenant, Harness]]:
    file = folder / "callers"
    file.write_text("".join(f"{name} infer token:{token}\n" for name, token in TOKENS.items()))
    options = replace(options or quick_options(), auth=AuthOptions(str(file), trusted_hops))
    async with scripted_service(folder, options, step_s=step_s) as harness:
        yield Tenant(harness, "alice"), Tenant(harness, "bob"), harness


async def status_of(call: Any) -> tuple[grpc.StatusCode, int]:
    """How a stream ends, and how many tokens it brought from here on."""
    num_tokens = 0
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            num_tokens += message.delta.num_tokens
    except grpc.aio.AioRpcError as error:
        return error.code(), num_tokens
    return grpc.StatusCode.OK, num_tokens


# --- the prefix cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("salt", ["", "s"])
async def test_fault_38_nobody_can_tell_what_another_tenant_has_asked(tmp_path: Path, salt: str) -> None:
    """What bob is told of his cache is the same whether or not alice has just sent the very prompt."""
    told: dict[bool, list[int]] = {}
    for alice_was_there in (False, True):
        folder = tmp_path / str(alice_was_there)
        folder.mkdir()
        async with two_tenants(folder) as (alice, bob, _):
            if alice_was_there:
                for alices_salt in ("", "s"):
                    await alice.generate((*PREFIX, 100), salt=alices_salt)
                mine = await alice.generate((*PREFIX, 101), salt=salt)
                assert mine.usage.cached_prompt_tokens == len(PREFIX), "the cache is at work"
            told[alice_was_there] = [
                (await bob.generate((*PREFIX, last), salt=salt)).usage.cached_prompt_tokens
                for last in (200, 201)
            ]
    assert told[True] == told[False] == [0, len(PREFIX)]


async def test_fault_38_names_and_salts_that_read_alike_together_do_not_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "ab"):
        monkeypatch.setitem(TOKENS, name, f"the-token-of-{name}-alone")
    async with two_tenants(tmp_path) as (_, _, harness):
        one, other = Tenant(harness, "a"), Tenant(harness, "ab")
        await one.generate((*PREFIX, 100), salt="bc")
        assert (await other.generate((*PREFIX, 101), salt="c")).usage.cached_prompt_tokens == 0
        assert (await one.generate((*PREFIX, 101), salt="bc")).usage.cached_prompt_tokens == len(PREFIX)


# --- request ids ----------------------------------------------------------------------------------


async def test_fault_38_one_id_of_two_tenants_is_two_requests(tmp_path: Path) -> None:
    async with two_tenants(tmp_path, step_s=0.001) as (alice, bob, harness):
        hers = await alice.begin("r-1")
        # No collision, no waiting for the other's call, and no taking its place.
        answer = await bob.generate(request_id="r-1")
        assert answer.request_id == "r-1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await alice.generate(request_id="r-1")
        assert rich_error(caught.value).reason == "DUPLICATE_REQUEST"
        his = await bob.begin("r-1")
        his.cancel()
        await until(lambda: harness.server.num_live_calls == 1, 30)
        assert (await hers.read()).delta.num_tokens, "her stream goes on"
        hers.cancel()
        await until(lambda: harness.server.num_live_calls == 0, 30)
        assert (await alice.generate(request_id="r-1")).request_id == "r-1"


async def test_fault_38_an_abort_meets_the_tenant_that_it_names(tmp_path: Path) -> None:
    async with two_tenants(tmp_path, step_s=0.001) as (alice, bob, harness):
        hers, his = await alice.begin("r-1"), await bob.begin("r-1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.control.Abort(control_pb2.AbortRequest(request_id="r-1"))
        refused = rich_error(caught.value)
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["tenant"])
        assert not any(name in repr(caught.value) for name in TOKENS)
        ended = await harness.control.Abort(control_pb2.AbortRequest(request_id="r-1", tenant="bob"))
        assert ended.aborted == 1
        assert (await status_of(his))[0] is grpc.StatusCode.ABORTED
        assert (await hers.read()).delta.num_tokens, "her stream goes on"
        # With the other one gone the id is one request's again.
        await until(lambda: harness.server.num_live_calls == 1, 30)
        assert (await harness.control.Abort(control_pb2.AbortRequest(request_id="r-1"))).aborted == 1
        assert (await status_of(hers))[0] is grpc.StatusCode.ABORTED


async def test_an_abort_of_all_of_one_tenant(tmp_path: Path) -> None:
    async with two_tenants(tmp_path, step_s=0.001) as (alice, bob, harness):
        hers = [await alice.begin(f"r-{number}") for number in range(3)]
        his = [await bob.begin(f"r-{number}", max_tokens=500) for number in range(2)]
        everything = control_pb2.AllRequests()
        ended = await harness.control.Abort(control_pb2.AbortRequest(all=everything, tenant="alice"))
        assert ended.aborted == 3
        assert {(await status_of(call))[0] for call in hers} == {grpc.StatusCode.ABORTED}
        assert [await status_of(call) for call in his] == [(grpc.StatusCode.OK, 500)] * 2


# --- behind a gateway -----------------------------------------------------------------------------


async def test_quotas_count_against_the_tenant_that_a_gateway_states(tmp_path: Path) -> None:
    """And ids and prefixes are that tenant's, whichever way its calls come."""
    options = replace(quick_options(), tenants=TenantOptions(max_concurrent_requests=1))
    async with two_tenants(tmp_path, options, step_s=0.001, trusted_hops="bob") as (alice, gateway, harness):

        def for_tenant(name: str) -> Tenant:
            return Tenant(harness, gateway.name, stated=name)

        hers = await for_tenant("alice").begin("r-1")
        for same in (for_tenant("alice"), alice):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await same.generate(request_id="r-2")
            assert rich_error(caught.value).reason == "QUOTA_EXCEEDED"
        # Nobody else has used anything, the gateway itself included.
        for other in (for_tenant("carol"), for_tenant("dave"), gateway):
            assert (await other.generate(request_id="r-1")).usage.cached_prompt_tokens == 0
        hers.cancel()
        await until(lambda: harness.server.num_live_calls == 0, 30)
        answer = await alice.generate((*PREFIX, 100), request_id="r-1")
        assert answer.usage.cached_prompt_tokens == len(PREFIX)
