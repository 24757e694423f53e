"""Faults of engine and text (service faults 1 to 10) as callers see them, over a scripted runner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2

from photon_grpc.engine.client import AsyncEngine
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.detokenizer import Detokenizer
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.scheduler.output import RowFault, SchedulerOutput
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import model_pb2
from tests.photon_grpc.frontend.test_text_pool import kill
from tests.support.aftermath import engine_clean, nothing_left_running
from tests.support.grpc_harness import Harness, rich_error
from tests.support.scripted_service import scripted_service

NUM_TOKENS = 24
LONG = 10_000


class PanicException(BaseException):
    """What a panic of a library in Rust is to Python; no subclass of Exception."""


@asynccontextmanager
async def service(folder: Path, **runner: Any) -> AsyncIterator[Harness]:
    """A service that is clean when it is left, alive or not."""
    async with nothing_left_running(), scripted_service(folder, step_s=0.001, **runner) as harness:
        yield harness
        await engine_clean(engine_of(harness))


def engine_of(harness: Harness) -> AsyncEngine:
    engine = harness.server._inference._front_door._engine  # type: ignore[attr-defined]  # a Generator
    assert isinstance(engine, AsyncEngine)
    return engine


def spec(prompt: Sequence[int] | str, max_tokens: int = NUM_TOKENS) -> pb.GenerationSpec:
    if isinstance(prompt, str):
        asked = pb.GenerationSpec(text=prompt)
    else:
        asked = pb.GenerationSpec(token_ids=pb.TokenIds(ids=prompt))
    asked.stop.max_tokens, asked.stop.ignore_eos = max_tokens, True
    asked.output.token_ids = True
    return asked


async def tokens_of(harness: Harness, prompt: Sequence[int]) -> list[int]:
    """All of a stream's tokens; raises the error it ends in. Its messages are numbered and end once."""
    call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=spec(prompt)), timeout=60)
    tokens: list[int] = []
    ends = 0
    async for number, message in _numbered(call):
        assert message.seq == number
        assert not ends or message.WhichOneof("event") == "summary"
        tokens += message.delta.token_ids
        ends += message.WhichOneof("event") == "finished"
    assert ends == 1
    return tokens


async def _numbered(call: Any) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for message in call:
        number += 1
        yield number, message


def echoed(prompt: Sequence[int]) -> list[int]:
    return [prompt[position % len(prompt)] for position in range(NUM_TOKENS)]


PROMPTS = [tuple(range(10 * n, 10 * n + n + 3)) for n in range(1, 9)]


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_fault_01_a_faulty_row_is_the_end_of_its_call_alone(tmp_path: Path, in_flight: int) -> None:
    faults = {(len(PROMPTS[3]), 7): RowFault.NON_FINITE_LOGITS}
    async with service(tmp_path, max_in_flight=in_flight, faults=faults) as harness:
        results = await asyncio.gather(*(tokens_of(harness, p) for p in PROMPTS), return_exceptions=True)
        error = results.pop(3)
        assert isinstance(error, grpc.aio.AioRpcError)
        assert (error.code(), rich_error(error).reason) == (grpc.StatusCode.INTERNAL, "REQUEST_FAULT")
        assert results == [echoed(prompt) for prompt in PROMPTS if prompt != PROMPTS[3]]
        await engine_clean(engine_of(harness))
        stats = engine_of(harness).stats
        assert stats.faults == 1
        assert stats.generation_tokens == 7 + NUM_TOKENS * len(results)


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_fault_03_callers_do_not_notice_steps_without_memory(tmp_path: Path, in_flight: int) -> None:
    def lacks(output: SchedulerOutput) -> bool:
        return output.step % 9 == 4 and len(output.rows) > 1

    async with service(tmp_path, max_in_flight=in_flight, out_of_memory=lacks) as harness:
        assert await asyncio.gather(*(tokens_of(harness, p) for p in PROMPTS)) == [echoed(p) for p in PROMPTS]
        await engine_clean(engine_of(harness))
        stats = engine_of(harness).stats
        assert stats.lost_steps > 0
        assert stats.generation_tokens == NUM_TOKENS * len(PROMPTS)


async def test_fault_03_a_call_too_large_for_the_memory_hears_so(tmp_path: Path) -> None:
    def lacks(output: SchedulerOutput) -> bool:
        return any(row.num_tokens >= 100 for row in output.rows)

    async with service(tmp_path, out_of_memory=lacks) as harness:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tokens_of(harness, range(100, 220))
            error = rich_error(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "OUT_OF_MEMORY")
            assert error.details[error_details_pb2.RetryInfo].retry_delay.seconds == 1
            assert error.trailers["grpc-retry-pushback-ms"] == "1000"
            assert await tokens_of(harness, PROMPTS[0]) == echoed(PROMPTS[0])


def raising(
    patch: pytest.MonkeyPatch, owner: type[Any], method: str, error: BaseException, *, at: int = 1
) -> None:
    """Let call number `at` of a method raise, and no other."""
    original = getattr(owner, method)
    calls = 0

    def raise_once(self: Any, *arguments: Any, **values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return original(self, *arguments, **values)

    patch.setattr(owner, method, raise_once)


CHAT = pb.ChatInput(messages=[pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="hello")])


def text_calls(harness: Harness) -> dict[str, Callable[[], Any]]:
    """Each way into tokenizer and template, with text that is handled on the loop and text that is not."""
    inference = harness.inference
    chat = pb.GenerationSpec(chat=CHAT)
    chat.stop.max_tokens = 3
    return {
        "generate": lambda: inference.Generate(pb.GenerateRequest(spec=spec("hello", 3)), timeout=60),
        "long": lambda: inference.Generate(pb.GenerateRequest(spec=spec("a " * 1000, 3)), timeout=60),
        "chat": lambda: inference.Generate(pb.GenerateRequest(spec=chat), timeout=60),
        "tokenize": lambda: inference.Tokenize(pb.TokenizeRequest(text="hello"), timeout=60),
        "offsets": lambda: inference.Tokenize(
            pb.TokenizeRequest(text="a " * LONG, return_offsets=True), timeout=60
        ),
        "detokenize": lambda: inference.Detokenize(pb.DetokenizeRequest(token_ids=[5, 6]), timeout=60),
    }


RAISED = {
    "generate": (Tokenizer, "encode"),
    "long": (Tokenizer, "encode"),
    "chat": (ChatRenderer, "encode"),
    "tokenize": (Tokenizer, "encode"),
    "offsets": (Tokenizer, "encode_with_offsets"),
    "detokenize": (Tokenizer, "decode"),
}
ERRORS = [ValueError("secret"), MemoryError("secret"), PanicException("secret")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", RAISED)
async def test_fault_09_a_tokenizer_that_raises(
    tmp_path: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, method = RAISED[call]
    async with service(tmp_path) as harness:
        make = text_calls(harness)[call]
        await make()
        raising(monkeypatch, owner, method, error)
        with structlog.testing.capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await make()
        told = rich_error(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in told.message
        assert "call failed" in {entry["event"] for entry in logs}
        await make()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("unary", [False, True])
async def test_fault_09_a_detokenizer_that_raises_in_the_middle(
    tmp_path: Path, unary: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, Detokenizer, "push", error, at=1 if unary else 5)
    async with service(tmp_path) as harness:
        asked = spec(PROMPTS[0], 2000)

        async def stream() -> None:
            request = pb.StreamGenerateRequest(spec=asked)
            async for _ in harness.inference.StreamGenerate(request, timeout=60):
                pass

        call = harness.inference.Generate(pb.GenerateRequest(spec=asked), timeout=60) if unary else stream()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        told = rich_error(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        await engine_clean(engine_of(harness))
        assert engine_of(harness).stats.generation_tokens < 2000, "the engine went on for nobody"
        assert await tokens_of(harness, PROMPTS[1]) == echoed(PROMPTS[1])


@pytest.mark.parametrize("ids", [[512], [5, 4_000_000_000], [511, 512, 1]])
async def test_fault_09_ids_out_of_range(tmp_path: Path, ids: list[int]) -> None:
    async with service(tmp_path) as harness:
        for call in (
            harness.inference.Generate(pb.GenerateRequest(spec=spec(ids)), timeout=60),
            harness.inference.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=60),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            told = rich_error(caught.value)
            assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert engine_of(harness).stats.steps == 0


CONSTRAINTS = {
    "json_schema": pb.Constraint(json_schema='{"type": "object"}'),
    "regex": pb.Constraint(regex="(a+)+b"),
    "grammar": pb.Constraint(grammar='root ::= "a"'),
    "choice": pb.Constraint(choice=pb.Choices(values=["yes", "no"])),
    "json_object": pb.Constraint(json_object=pb.JsonObject()),
    "nothing": pb.Constraint(),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
async def test_fault_10_a_constraint_is_refused_before_anything_is_compiled(
    tmp_path: Path, kind: str
) -> None:
    """This release has none, so none can be slow, fail at a mask or reject a token."""
    async with service(tmp_path) as harness:
        asked = spec(PROMPTS[0])
        asked.constraint.CopyFrom(CONSTRAINTS[kind])
        stream = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=asked), timeout=60)
        for call in (harness.inference.Generate(pb.GenerateRequest(spec=asked), timeout=60), stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            told = rich_error(caught.value)
            assert (told.code, told.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_FEATURE")
            assert told.fields == ["spec.constraint"]
        info = await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest())
        assert list(info.capabilities.constraint_kinds) == []
        assert engine_of(harness).stats.steps == 0


async def test_fault_08_calls_go_on_when_all_text_threads_have_died(tmp_path: Path) -> None:
    async with service(tmp_path) as harness:
        calls = text_calls(harness)
        for thread in threading.enumerate():
            if thread.name == "photon-text":
                kill(thread)
        # Those that sleep die with what comes first, and each of these is for them.
        await asyncio.gather(
            *(calls[name]() for name in ("long", "offsets", "detokenize") for _ in range(10))
        )
        assert await tokens_of(harness, PROMPTS[0]) == echoed(PROMPTS[0])
