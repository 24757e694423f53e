"""Service fault 30: mutated wire bytes, fuzzed messages, every limit from both sides."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon_grpc.errors import InvalidRequestError
from photon_grpc.options import LimitOptions, describe
from photon_grpc.server import convert
from photon_grpc.v1 import inference_pb2 as pb
from tests.fuzzing.bounds import NOT_OF_A_REQUEST, Bound
from tests.fuzzing.fuzzer import (
    ALLOWED,
    BOUNDS,
    LIMITS,
    METHODS,
    Case,
    Fuzzer,
    fuzzed_service,
    make_case,
    padded,
)
from tests.support.grpc_harness import acceptors_by_default, rich_error

GENERATE = "/photon.v1.InferenceService/Generate"
STREAM = "/photon.v1.InferenceService/StreamGenerate"
# In about five seconds; tools/fuzz sends any number.
NUM_MESSAGES = 1500


@pytest.fixture
async def fuzzer(tmp_path: Path) -> AsyncIterator[Fuzzer]:
    async with fuzzed_service(tmp_path) as fuzzer:
        yield fuzzer


def test_every_limit_has_its_bounds() -> None:
    known = {bound.limit for bound in BOUNDS} | NOT_OF_A_REQUEST
    assert {name for name, _, _ in describe(LimitOptions)} - known == set()


async def ask(fuzzer: Fuzzer, request: pb.StreamGenerateRequest, *, stream: bool) -> None:
    """The request by either method; what only a stream can say is left out of the other."""
    stub = fuzzer.harness.inference
    if stream:
        async for _ in stub.StreamGenerate(request, timeout=60):
            pass
    else:
        await stub.Generate(pb.GenerateRequest(request_id=request.request_id, spec=request.spec), timeout=60)


@pytest.mark.parametrize("stream", [False, True])
async def test_fault_30_every_limit_is_kept_to_the_last_value_and_no_further(
    fuzzer: Fuzzer, stream: bool
) -> None:
    wrong: list[str] = []
    for bound in BOUNDS:
        if bound.field.startswith("chunk_policy") and not stream:
            continue
        for request in bound.good:
            try:
                await ask(fuzzer, request, stream=stream)
            except grpc.aio.AioRpcError as error:
                wrong.append(f"{bound.limit}: {bound.field} refused: {error.details()}: {str(request)[:200]}")
        for request in bound.bad:
            try:
                await ask(fuzzer, request, stream=stream)
            except grpc.aio.AioRpcError as error:
                wrong += problems_of(bound, error)
            else:
                wrong.append(f"{bound.limit}: {bound.field} accepted: {str(request)[:200]}")
    assert not wrong, "\n".join(wrong)
    await fuzzer.check_rest()


def problems_of(bound: Bound, error: grpc.aio.AioRpcError) -> list[str]:
    rich = rich_error(error)
    if rich.code is grpc.StatusCode.INVALID_ARGUMENT and any(
        name == bound.field or name.startswith(f"{bound.field}[") for name in rich.fields
    ):
        return []
    return [f"{bound.limit}: {rich.code.name} {rich.fields} in place of {bound.field}"]


@pytest.mark.parametrize("path", METHODS)
async def test_fault_30_a_message_may_be_as_large_as_its_limit(fuzzer: Fuzzer, path: str) -> None:
    """Padded with a field that nobody knows, and that is kept: the sum decides."""
    limit = LIMITS["max_message_bytes"]
    refused = []
    for size in (limit - 1, limit, limit + 1):
        await fuzzer.send([Case(METHODS[path], str(size), padded(b"", size))])
        refused += [kind for kind, status in fuzzer.ends if status == "RESOURCE_EXHAUSTED"]
    assert refused == [str(limit + 1)]
    assert not fuzzer.findings


def cases() -> st.SearchStrategy[Case]:
    return st.builds(make_case, st.randoms(use_true_random=False), st.sampled_from(list(METHODS)))


@pytest.mark.parametrize("acceptors", [0, 2])
def test_fault_30_whatever_is_sent_has_a_status_of_the_allowed_set(tmp_path: Path, acceptors: int) -> None:
    """Several at a time, and shrunk to the fewest and simplest that still do it."""
    with asyncio.Runner() as runner, acceptors_by_default(acceptors):
        stack = AsyncExitStack()
        fuzzer = runner.run(stack.enter_async_context(fuzzed_service(tmp_path)))
        try:

            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            @given(st.lists(cases(), min_size=1, max_size=8))
            def check(messages: list[Case]) -> None:
                fuzzer.findings.clear()
                runner.run(fuzzer.send(messages))
                assert not fuzzer.findings, "\n".join(fuzzer.findings)
                runner.run(fuzzer.check_rest())

            check()
        finally:
            runner.run(stack.aclose())


@pytest.mark.parametrize("acceptors", [0, 2])
async def test_fault_30_messages_of_every_kind_to_every_method(tmp_path: Path, acceptors: int) -> None:
    with acceptors_by_default(acceptors):
        async with fuzzed_service(tmp_path) as fuzzer:
            await every_kind(fuzzer)


async def every_kind(fuzzer: Fuzzer) -> None:
    await fuzzer.run(30, range(NUM_MESSAGES))
    assert not fuzzer.findings, "\n".join(fuzzer.findings[:5])
    await fuzzer.check_rest()
    # A fuzzer whose messages all stop at the parser, or that has none for a method, would find little.
    assert {"OK", "INVALID_ARGUMENT"} <= {status for kind, status in fuzzer.ends if kind == "merged"}
    assert {status for _, status in fuzzer.ends} >= {"NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}
    assert {status for _, status in fuzzer.ends} <= {code.name for code in ALLOWED}
    sent = {make_case(random.Random(f"30/{number}")).method.path for number in range(NUM_MESSAGES)}
    assert sent == set(METHODS)


def test_a_message_is_a_function_of_seed_and_number() -> None:
    first, again, other = (make_case(random.Random(name)) for name in ("7/3", "7/3", "7/4"))
    assert first == again != other


async def test_the_fuzzer_finds_what_escapes_as_an_internal_error(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = convert.decode_stream_generate

    def careless(message: Any, *arguments: Any) -> Any:
        if message.spec.stop.max_tokens > 1 << 31:
            raise OverflowError
        return decode(message, *arguments)

    monkeypatch.setattr(convert, "decode_stream_generate", careless)
    await fuzzer.run(1, range(NUM_MESSAGES))
    assert fuzzer.findings
    assert all("--seed 1 --only" in finding and "INTERNAL" in finding for finding in fuzzer.findings)


async def test_the_fuzzer_finds_a_refusal_that_tells_of_the_inside(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(*arguments: Any) -> Any:
        raise InvalidRequestError.of("spec", "KeyError: 'x'")

    monkeypatch.setattr(convert, "decode_generate", chatty)
    await fuzzer.send([Case(METHODS[GENERATE], "valid", b"")])
    assert "tells of the inside" in fuzzer.findings[0]
