"""InferenceService over real sockets and a scripted front door."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from photon_grpc import errors
from photon_grpc.server.status import REQUEST_ID_KEY
from photon_grpc.types import ChatInput, ChatMessage, Finish, FinishReason, Role
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.photon_grpc.server.test_status import ROWS
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    open_channel,
    quick_options,
    read_all,
    rich_error,
    running_server,
    until,
)

pytestmark = pytest.mark.usefixtures("each_listener")

SPEC = pb.GenerationSpec(text="hello")
STREAM = "/photon.v1.InferenceService/StreamGenerate"
UNARY = "/photon.v1.InferenceService/Generate"


async def trailers_of(call: Any) -> dict[str, Any]:
    return dict(list(await call.trailing_metadata()))


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else read_all(call))
    return caught.value


async def test_a_stream_from_start_to_summary() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="r-1", spec=SPEC))
        messages = await read_all(call)
        trailers = await trailers_of(call)
    assert [m.WhichOneof("event") for m in messages] == ["started", *["delta"] * 3, "finished", "summary"]
    assert [m.seq for m in messages] == [1, 2, 3, 4, 5, 6]
    assert {m.request_id for m in messages} == {"r-1"}
    assert "".join(m.delta.text for m in messages) == " tok tok tok"
    assert messages[4].finished.finish.stop_string == "stop"
    assert messages[5].summary.usage.output_tokens == 3
    assert trailers == {
        REQUEST_ID_KEY: "r-1",
        "photon-finish-reason": "STOP",
        "photon-prompt-tokens": "4",
        "photon-output-tokens": "3",
        "photon-queue-ms": "1.0",
        "photon-ttft-ms": "500.0",
        "photon-total-ms": "1500.0",
    }
    assert front_door.streams[0].exits == 1


def test_a_synchronous_client_streams() -> None:
    """The blocking client of another thread, as most Python callers have it."""

    async def serve() -> list[Any]:
        async with running_server(FakeFrontDoor()) as harness:

            def consume() -> list[Any]:
                with grpc.insecure_channel(harness.target) as channel:
                    stub = inference_pb2_grpc.InferenceServiceStub(channel)
                    unary = stub.Generate(pb.GenerateRequest(spec=SPEC), timeout=10)
                    stream = list(stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC), timeout=10))
                    return [unary, stream]

            return await asyncio.to_thread(consume)

    unary, stream = asyncio.run(serve())
    assert unary.completions[0].text == " tok tok tok"
    assert len(stream) == 6


async def test_unary() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(request_id="r-1", spec=SPEC))
        response = await call
        trailers = await trailers_of(call)
    assert response.request_id == "r-1"
    assert response.completions[0].finish.reason == pb.FINISH_REASON_STOP
    assert response.effective.sampling.seed == 7
    assert trailers["photon-finish-reason"] == "STOP"
    assert trailers[REQUEST_ID_KEY] == "r-1"
    assert front_door.calls == [("generate", False)]


async def test_validate_only_reaches_the_front_door() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        response = await harness.inference.Generate(pb.GenerateRequest(spec=SPEC, validate_only=True))
    assert front_door.calls == [("generate", True)]
    assert not response.completions
    assert response.prompt.num_tokens == 4


async def test_several_completions_name_all_their_reasons() -> None:
    class TwoCompletions(FakeFrontDoor):
        async def generate(self, request: Any, **arguments: Any) -> Any:
            result = await super().generate(request, **arguments)
            second = replace(result.completions[0], index=1, finish=Finish(FinishReason.MAX_TOKENS))
            return replace(result, completions=(result.completions[0], second))

    async with running_server(TwoCompletions()) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(spec=SPEC))
        assert len((await call).completions) == 2
        assert (await trailers_of(call))["photon-finish-reason"] == "STOP,MAX_TOKENS"


async def test_tokenize_and_detokenize() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        tokenized = await harness.inference.Tokenize(
            pb.TokenizeRequest(text="héllo", model="m", add_special_tokens=False, return_offsets=True)
        )
        chat = pb.ChatInput(messages=[pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="x")])
        await harness.inference.Tokenize(pb.TokenizeRequest(chat=chat))
        text = (await harness.inference.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2], model="m"))).text
        await harness.inference.Detokenize(pb.DetokenizeRequest(skip_special_tokens=False))
        too_many = await failure(harness.inference.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 257)))
    assert list(tokenized.token_ids) == [1, 2]
    assert list(tokenized.offsets) == [0, 3, 3, 5]
    assert tokenized.max_context_tokens == 256
    assert text == "héllo"
    assert rich_error(too_many).fields == ["token_ids"]
    assert front_door.calls == [
        ("tokenize", ("héllo", "m", False, True)),
        ("tokenize", (ChatInput((ChatMessage(Role.USER, "x"),)), "", None, False)),
        ("detokenize", ((1, 2), "m", True)),
        ("detokenize", ((), "", False)),
    ]


# Request ids.


async def test_the_id_comes_from_body_metadata_or_server() -> None:
    front_door = FakeFrontDoor()
    cases = [("body", "meta", "body"), ("", "meta", "meta"), ("", "bad id!", None), ("", None, None)]
    async with running_server(front_door) as harness:
        for body, header, expected in cases:
            metadata = () if header is None else (("x-request-id", header),)
            call = harness.inference.StreamGenerate(
                pb.StreamGenerateRequest(request_id=body, spec=SPEC), metadata=metadata
            )
            messages = await read_all(call)
            used = front_door.requests[-1].request_id
            assert {m.request_id for m in messages} == {used}
            assert (await trailers_of(call))[REQUEST_ID_KEY] == used
            assert used == expected or (expected is None and len(used) == 32)


async def test_an_id_unfit_for_metadata_is_left_to_validation() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(request_id="line\nbreak", spec=SPEC))
        await call
        assert len((await trailers_of(call))[REQUEST_ID_KEY]) == 32
    assert front_door.requests[0].request_id == "line\nbreak"


# Errors, each before the first event, as the first event and after some events.


@pytest.mark.parametrize("error_at", [0, 1, 3])
@pytest.mark.parametrize("row", ROWS, ids=[row[2] for row in ROWS])
async def test_every_error_of_a_stream_is_rich(row: Any, error_at: int) -> None:
    error, code, reason, _, pushback = row
    front_door = FakeFrontDoor(Script(error=error, error_at=error_at))
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="r-1", spec=SPEC))
        rich = rich_error(await failure(call))
    assert rich.code is grpc.StatusCode[code]
    assert rich.reason == reason
    assert rich.trailers[REQUEST_ID_KEY] == "r-1"
    assert rich.trailers.get("grpc-retry-pushback-ms") == pushback
    assert [stream.exits for stream in front_door.streams] == [1] * (error_at > 0)


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
async def test_unary_errors_are_rich(method: str) -> None:
    class Failing(FakeFrontDoor):
        async def generate(self, *_: Any, **__: Any) -> Any:
            raise errors.ModelNotFoundError("gpt")

        tokenize = detokenize = generate

    requests = {
        "Generate": pb.GenerateRequest(spec=SPEC),
        "Tokenize": pb.TokenizeRequest(text="x"),
        "Detokenize": pb.DetokenizeRequest(),
    }
    async with running_server(Failing()) as harness:
        rich = rich_error(await failure(getattr(harness.inference, method)(requests[method])))
    assert (rich.code, rich.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_a_failure_before_the_first_token_sends_no_headers() -> None:
    """Trailers alone: that is what lets a client or a mesh retry."""
    front_door = FakeFrontDoor(Script(error=errors.OverloadedError("full", 1.0), error_at=1))
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await failure(call)
        assert not list(await call.initial_metadata())


async def test_a_client_with_a_retry_policy_retries_what_fails_before_the_first_token() -> None:
    class OnceOverloaded(FakeFrontDoor):
        async def open(self, request: Any, **arguments: Any) -> Any:
            failed_before = bool(self.requests)
            self.script = (
                Script() if failed_before else Script(error=errors.EngineDrainingError(), error_at=1)
            )
            return await super().open(request, **arguments)

    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s",'
        '"maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}'
    )
    front_door = OnceOverloaded()
    async with (
        running_server(front_door) as harness,
        grpc.aio.insecure_channel(harness.target, [("grpc.service_config", policy)]) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        messages = await read_all(stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC)))
    assert len(messages) == 6
    assert len(front_door.requests) == 2


@pytest.mark.parametrize("error_at", [0, 2])
async def test_an_unforeseen_error_tells_the_client_nothing_and_the_log_its_place(
    error_at: int, capsys: Any
) -> None:
    front_door = FakeFrontDoor(Script(error=ValueError("the secret"), error_at=error_at))
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="r-77", spec=SPEC))
        rich = rich_error(await failure(call))
    assert (rich.code, rich.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert rich.message == "internal error"
    assert b"secret" not in b"".join(str(v).encode() for v in rich.trailers.values())
    logged = capsys.readouterr().out
    assert "the secret" not in logged, "it may quote a prompt"
    assert "builtins.ValueError" in logged
    assert "fake_front_door.py" in logged
    assert "r-77" in logged


async def test_a_stream_without_summary_is_an_internal_error() -> None:
    class NoSummary(FakeFrontDoor):
        async def open(self, request: Any, **arguments: Any) -> Any:
            stream = await super().open(request, **arguments)
            events = list(stream._events())[:-1]
            stream._events = lambda: iter(events)
            return stream

    async with running_server(NoSummary()) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        assert rich_error(await failure(call)).reason == "INTERNAL"


# Bad input.


BAD_BYTES = {
    "garbage": b"\xff" * 64,
    "truncated": pb.GenerateRequest(request_id="abc").SerializeToString()[:-1],
    "bad utf-8": b"\x12\x04\x12\x02\xc3\x28",
}


@pytest.mark.parametrize("method", [STREAM, UNARY])
@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES.keys())
async def test_malformed_bytes_are_the_callers_fault(method: str, data: bytes) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        kind = harness.public.unary_stream if method == STREAM else harness.public.unary_unary
        rich = rich_error(await failure(kind(method)(data, metadata=(("x-request-id", "meta"),))))
        assert (rich.code, rich.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
        assert rich.trailers[REQUEST_ID_KEY] == "meta"
        await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))


async def test_a_message_over_the_limit_is_refused_and_under_it_is_not() -> None:
    front_door = FakeFrontDoor()
    limit = quick_options().limits.max_message_bytes
    async with running_server(front_door) as harness:
        fits = pb.GenerateRequest(spec=pb.GenerationSpec(text="x" * (limit - 100)))
        await harness.inference.Generate(fits)
        too_big = pb.GenerateRequest(spec=pb.GenerationSpec(text="x" * (limit + 1)))
        error = await failure(harness.inference.Generate(too_big))
        # grpc's own refusal, told apart from a quota by the missing ErrorInfo.
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" not in dict(list(error.trailing_metadata() or ()))
        await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))
    assert len(front_door.requests) == 2


UNSUPPORTED = {
    "spec.constraint": pb.GenerationSpec(text="x", constraint=pb.Constraint(regex="a*")),
    "spec.adapter": pb.GenerationSpec(text="x", adapter="lora"),
}


@pytest.mark.parametrize("path", UNSUPPORTED)
async def test_unsupported_fields_are_refused_by_path(path: str) -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        for call in (
            harness.inference.Generate(pb.GenerateRequest(spec=UNSUPPORTED[path])),
            harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=UNSUPPORTED[path])),
        ):
            rich = rich_error(await failure(call))
            assert (rich.code, rich.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_FEATURE")
            assert rich.fields == [path]
    assert not front_door.requests


async def test_an_unknown_enum_value_is_an_invalid_field() -> None:
    chat = pb.ChatInput(messages=[pb.ChatMessage(role=42, content="x")])
    async with running_server(FakeFrontDoor()) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(chat=chat)))
        rich = rich_error(await failure(call))
    assert rich.reason == "INVALID_FIELD"
    assert rich.fields == ["spec.chat.messages[0].role"]


async def test_an_unknown_method_is_unimplemented() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        error = await failure(harness.public.unary_unary("/photon.v1.InferenceService/ResumeGenerate")(b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_huge_metadata_does_not_reach_the_handler() -> None:
    front_door = FakeFrontDoor()
    async with running_server(front_door) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(spec=SPEC), metadata=(("x-big", "x" * 20_000),))
        assert (await failure(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not front_door.requests


# The ways a call ends early.


@pytest.mark.parametrize("state", ["before the first token", "between tokens", "during writes"])
async def test_cancel_closes_the_stream(state: str) -> None:
    scripts = {
        "before the first token": Script(hang=True),
        "between tokens": Script(num_deltas=None, interval_s=0.01),
        "during writes": Script(num_deltas=None, text="x" * 50_000),
    }
    front_door = FakeFrontDoor(scripts[state])
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        if state == "before the first token":
            await until(lambda: front_door.streams)
        else:
            await call.read()
        call.cancel()
        await until(lambda: front_door.streams[0].exits)
        await until(lambda: harness.server.num_live_calls == 0)
    assert front_door.streams[0].exits == 1


async def test_a_closed_channel_closes_the_stream() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.005))
    async with running_server(front_door) as harness:
        channel = open_channel(harness.ports.public)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await call.read()
        await channel.close()
        await until(lambda: front_door.streams[0].exits)
        await until(lambda: harness.server.num_live_calls == 0)


async def test_cancelling_a_unary_call_ends_it() -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    async with running_server(front_door) as harness:
        call = harness.inference.Generate(pb.GenerateRequest(spec=SPEC))
        await until(lambda: front_door.requests)
        assert harness.server.num_live_calls == 1
        call.cancel()
        await until(lambda: harness.server.num_live_calls == 0)


async def test_the_clients_deadline_is_handed_on_and_closes_the_stream() -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    async with running_server(front_door) as harness:
        start = time.monotonic()
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC), timeout=0.3)
        error = await failure(call)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: front_door.streams[0].exits)
        assert front_door.deadlines[0] is not None
        # Its own, and not the one of a client that says nothing (five minutes).
        assert front_door.deadlines[0] < start + 100.0


async def test_without_a_deadline_the_default_one_holds() -> None:
    front_door = FakeFrontDoor()
    limits = {"default_deadline_s": 100.0, "max_deadline_s": 200.0}
    async with running_server(front_door, quick_options(limits=limits)) as harness:
        for timeout in (None, 50.0, 5000.0):
            await harness.inference.Generate(pb.GenerateRequest(spec=SPEC), timeout=timeout)
        now = time.monotonic()
    given = [deadline - now for deadline in front_door.deadlines if deadline is not None]
    assert given == pytest.approx([100.0, 50.0, 200.0], abs=5.0)


@pytest.mark.parametrize("method", ["StreamGenerate", "Generate"])
async def test_the_maximum_duration_ends_a_call_whatever_the_front_door_does(method: str) -> None:
    front_door = FakeFrontDoor(Script(hang=True))
    request = pb.GenerateRequest if method == "Generate" else pb.StreamGenerateRequest
    async with running_server(front_door, quick_options(limits={"max_deadline_s": 0.2})) as harness:
        rich = rich_error(await failure(getattr(harness.inference, method)(request(spec=SPEC))))
        assert (rich.code, rich.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "MAX_DURATION")
        assert harness.server.num_live_calls == 0
    assert all(stream.exits == 1 for stream in front_door.streams)


async def test_a_reader_that_stalls_is_ended_and_one_that_is_slow_is_not() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, text="x" * 10_000))
    options = quick_options(limits={"slow_consumer_timeout_s": 0.4})
    async with running_server(front_door, options) as harness:
        stalled = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        await stalled.read()
        await until(lambda: front_door.streams[0].exits)
        assert harness.server.num_live_calls == 0
        rich = rich_error(await failure(stalled))
        assert (rich.code, rich.reason) == (grpc.StatusCode.ABORTED, "CLIENT_STALLED")

        front_door.script = Script(num_deltas=8, interval_s=0.2)
        slow = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        assert len(await read_all(slow)) == 11


async def test_a_stalled_reader_holds_up_nobody() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, text="x" * 50_000))
    async with running_server(front_door) as harness:
        channel = open_channel(harness.ports.public)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stalled = [stub.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC)) for _ in range(4)]
        for call in stalled:
            await call.read()
        front_door.script = Script()
        for _ in range(20):
            call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
            assert len(await read_all(call)) == 6
        for call in stalled:
            call.cancel()
        await until(lambda: harness.server.num_live_calls == 0)
        await channel.close()


async def test_starting_is_said_until_the_model_is_known() -> None:
    front_door = FakeFrontDoor()
    front_door.starting = True
    async with running_server(front_door) as harness:
        call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
        assert rich_error(await failure(call)).reason == "STARTING"


async def test_open_and_cancel_storm_leaves_nothing() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.001))
    async with running_server(front_door) as harness:

        async def once(number: int) -> None:
            call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(spec=SPEC))
            if number % 3:
                await call.read()
            call.cancel()

        for _ in range(5):
            await asyncio.gather(*(once(number) for number in range(60)))
        await until(lambda: harness.server.num_live_calls == 0)
        assert all(stream.exits == 1 for stream in front_door.streams)
        front_door.script = Script()
        assert (await harness.inference.Generate(pb.GenerateRequest(spec=SPEC))).completions
