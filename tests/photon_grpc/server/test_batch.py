"""BatchGenerate over real sockets: items that run, items that fail, and the ways the whole call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from structlog.testing import capture_logs

from photon_grpc import errors
from photon_grpc.options import SchedulerOptions, TenantOptions
from photon_grpc.scheduler.output import RowFault
from photon_grpc.server.status import REQUEST_ID_KEY
from photon_grpc.telemetry.call_record import CallRecord
from photon_grpc.v1 import control_pb2
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import (
    Harness,
    RichError,
    quick_options,
    rich_error,
    rich_item_error,
    running_server,
    until,
)
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.usefixtures("each_listener")

METHOD = "/photon.v1.InferenceService/BatchGenerate"


def spec(max_tokens: int = 3, prompt: tuple[int, ...] = (5, 6, 7)) -> pb.GenerationSpec:
    made = pb.GenerationSpec(token_ids=pb.TokenIds(ids=prompt))
    made.stop.max_tokens, made.stop.ignore_eos = max_tokens, True
    made.output.token_ids = True
    return made


def batch(*specs: pb.GenerationSpec, request_id: str = "b") -> pb.BatchGenerateRequest:
    return pb.BatchGenerateRequest(request_id=request_id, specs=specs)


async def read_all(call: Any) -> list[Any]:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def failure(call: Any) -> RichError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_all(call)
    return rich_error(caught.value)


async def run(harness: Harness, request: pb.BatchGenerateRequest) -> dict[int, pb.BatchGenerateResponse]:
    """Every message by its item, each of which must come once."""
    messages = await read_all(harness.inference.BatchGenerate(request))
    by_item = {message.item: message for message in messages}
    assert sorted(by_item) == list(range(len(request.specs)))
    assert len(messages) == len(by_item)
    return by_item


async def idle(harness: Harness) -> bool:
    load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
    return (load.running, load.queued, load.used_kv_blocks) == (0, 0, 0)


async def until_idle(harness: Harness) -> None:
    await until(lambda: harness.server.num_live_calls == 0, 30)
    async with asyncio.timeout(30):
        while not await idle(harness):
            pass


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with scripted_service(tmp_path, step_s=0.002) as harness:
        yield harness


# Items that run.


async def test_items_come_in_the_order_in_which_they_end(harness: Harness) -> None:
    call = harness.inference.BatchGenerate(batch(spec(90), spec(10), spec(50)))
    messages = await read_all(call)
    assert [message.item for message in messages] == [1, 2, 0]
    assert [message.response.usage.output_tokens for message in messages] == [10, 50, 90]


async def test_an_item_is_answered_as_a_call_of_its_own_would_be(harness: Harness) -> None:
    asked = spec(7)
    asked.sampling.temperature, asked.sampling.seed = 0.5, 11
    alone = await harness.inference.Generate(pb.GenerateRequest(request_id="alone", spec=asked))
    (message,) = (await run(harness, batch(asked, request_id="mine"))).values()
    item = message.response
    assert item.request_id == "mine.0"
    assert item.completions == alone.completions
    assert item.effective == alone.effective
    assert (item.effective.sampling.seed, item.effective.stop.max_tokens) == (11, 7)
    assert item.usage.output_tokens == 7
    assert item.usage.prompt_tokens == 3
    assert item.timings.total.ToTimedelta() >= item.timings.first_token.ToTimedelta()
    assert item.timings.first_token.ToNanoseconds() > 0


async def test_ids_derive_from_the_call_s() -> None:
    front_door = FakeFrontDoor()
    cases = [("body", "meta", "body"), ("", "meta", "meta"), ("", None, None)]
    async with running_server(front_door) as harness:
        for body, header, expected in cases:
            front_door.requests.clear()
            metadata = () if header is None else (("x-request-id", header),)
            call = harness.inference.BatchGenerate(batch(spec(), spec(), request_id=body), metadata=metadata)
            messages = await read_all(call)
            used = dict(list(await call.trailing_metadata()))[REQUEST_ID_KEY]
            assert used == expected or (expected is None and len(used) == 32)
            assert {m.response.request_id for m in messages} == {f"{used}.0", f"{used}.1"}
            assert {r.request_id for r in front_door.requests} == {f"{used}.0", f"{used}.1"}


async def test_no_more_run_at_a_time_than_the_limit() -> None:
    class Counting(FakeFrontDoor):
        num_running = most = 0

        async def generate(self, request: Any, *, validate_only: bool = False, **arguments: Any) -> Any:
            if not validate_only:
                self.num_running += 1
                self.most = max(self.most, self.num_running)
                for _ in range(5):
                    await asyncio.sleep(0)
                self.num_running -= 1
            return await super().generate(request, validate_only=validate_only, **arguments)

    front_door = Counting()
    options = quick_options(limits={"max_batch_concurrency": 3})
    async with running_server(front_door, options) as harness:
        await run(harness, batch(*[spec()] * 10))
        assert front_door.most == 3
        front_door.most = 0
        await run(harness, batch(spec(), spec()))
    assert front_door.most == 2


async def test_trailers_tell_of_all_items(harness: Harness) -> None:
    wrong = spec()
    wrong.sampling.temperature = -1.0
    stopped = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5, 6]))
    stopped.stop.token_ids.append(6)
    stopped.stop.max_tokens = 100
    call = harness.inference.BatchGenerate(batch(spec(20), wrong, stopped, spec(5), request_id="mine"))
    messages = await read_all(call)
    trailers = dict(list(await call.trailing_metadata()))
    figures = {key: float(trailers.pop(f"photon-{key}-ms")) for key in ("queue", "ttft", "total")}
    assert trailers == {
        REQUEST_ID_KEY: "mine",
        "photon-finish-reason": "STOP,MAX_TOKENS",
        "photon-prompt-tokens": "8",
        "photon-output-tokens": "27",
        "photon-items": "4",
        "photon-failed-items": "1",
    }
    assert sum(m.response.usage.output_tokens for m in messages) == 27
    assert figures["queue"] <= figures["ttft"] <= figures["total"]
    # Twenty steps of two milliseconds at the least.
    assert figures["total"] >= 38


# Items that fail.


def negative_temperature() -> pb.GenerationSpec:
    made = spec()
    made.sampling.temperature = -1.0
    return made


def too_many_stop_ids() -> pb.GenerationSpec:
    made = spec()
    made.stop.token_ids.extend([1] * 65)
    return made


def unknown_key() -> pb.GenerationSpec:
    made = spec()
    made.experimental["x"] = 1
    return made


def other_model() -> pb.GenerationSpec:
    made = spec()
    made.model = "other"
    return made


WRONG: dict[str, tuple[Callable[[], pb.GenerationSpec], str, str, list[str]]] = {
    "value": (negative_temperature, "INVALID_ARGUMENT", "INVALID_FIELD", ["sampling.temperature"]),
    "count": (too_many_stop_ids, "INVALID_ARGUMENT", "INVALID_FIELD", ["stop.token_ids"]),
    "missing": (pb.GenerationSpec, "INVALID_ARGUMENT", "INVALID_FIELD", ["input"]),
    "experimental": (unknown_key, "INVALID_ARGUMENT", "INVALID_FIELD", ["experimental"]),
    "too long": (
        lambda: spec(1, tuple([5] * 4096)),
        "INVALID_ARGUMENT",
        "CONTEXT_LENGTH_EXCEEDED",
        ["token_ids.ids"],
    ),
    "fit to the prompt": (lambda: spec(4095), "INVALID_ARGUMENT", "INVALID_FIELD", ["stop.max_tokens"]),
    "chat": (
        lambda: pb.GenerationSpec(chat=pb.ChatInput(messages=[pb.ChatMessage(content="x")])),
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
        ["chat.messages[0].role"],
    ),
    "unsupported": (
        lambda: pb.GenerationSpec(text="x", adapter="lora"),
        "UNIMPLEMENTED",
        "UNSUPPORTED_FEATURE",
        ["adapter"],
    ),
    "model": (other_model, "NOT_FOUND", "MODEL_NOT_FOUND", []),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_item_is_told_by_its_path_and_harms_nobody(harness: Harness, name: str) -> None:
    make, code, reason, fields = WRONG[name]
    items = await run(harness, batch(spec(4), make(), spec(5)))
    rich = rich_item_error(items[1].error)
    assert (rich.code.name, rich.reason) == (code, reason)
    assert rich.fields == [f"specs[1].{field}" for field in fields]
    assert rich.details[error_details_pb2.RequestInfo].request_id == "b.1"
    assert "spec." not in rich.message
    assert [items[i].response.usage.output_tokens for i in (0, 2)] == [4, 5]


async def test_a_fault_of_one_row_is_that_item_s(tmp_path: Path) -> None:
    async with scripted_service(tmp_path, faults={(2, 3): RowFault.NON_FINITE_LOGITS}) as harness:
        items = await run(harness, batch(spec(9), spec(9, (5, 6)), spec(8)))
        rich = rich_item_error(items[1].error)
        assert (rich.code, rich.reason) == (grpc.StatusCode.INTERNAL, "REQUEST_FAULT")
        assert [items[i].response.usage.output_tokens for i in (0, 2)] == [9, 8]
        await until_idle(harness)


async def test_every_item_counts_against_the_tenant_s_quota(tmp_path: Path) -> None:
    options = replace(quick_options(), tenants=TenantOptions(tokens_per_s=0.001, token_burst=20))
    async with scripted_service(tmp_path, options) as harness:
        # Each takes ten tokens, and the bucket holds two of them.
        items = await run(harness, batch(*[spec(7)] * 4))
        refused = [rich_item_error(m.error) for m in items.values() if m.HasField("error")]
        assert len(refused) == 2
        for rich in refused:
            assert (rich.code, rich.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert rich.details[error_details_pb2.RetryInfo].retry_delay.ToNanoseconds() > 0
            assert error_details_pb2.QuotaFailure in rich.details


async def test_every_item_has_to_find_room_in_the_queue(tmp_path: Path) -> None:
    options = replace(
        quick_options(limits={"max_queued_requests": 2}), scheduler=SchedulerOptions(max_num_seqs=1)
    )
    async with scripted_service(tmp_path, options, step_s=0.002) as harness:
        items = await run(harness, batch(*[spec(20)] * 6))
        served = [i for i, m in items.items() if m.HasField("response")]
        refused = [rich_item_error(m.error) for m in items.values() if m.HasField("error")]
        # One runs and two wait; the fourth and later come before the first can have ended.
        assert served == [0, 1, 2]
        assert [(r.code, r.reason) for r in refused] == [(grpc.StatusCode.UNAVAILABLE, "OVERLOADED")] * 3
        assert all(error_details_pb2.RetryInfo in rich.details for rich in refused)


async def test_an_unforeseen_error_of_an_item_tells_the_client_nothing() -> None:
    secret = "-".join(["canary", "6c1d"])  # not spelt here: a traceback shows source lines

    class Failing(FakeFrontDoor):
        async def generate(self, request: Any, *, validate_only: bool = False, **arguments: Any) -> Any:
            if request.request_id == "b.1" and not validate_only:
                raise ValueError(secret)
            return await super().generate(request, validate_only=validate_only, **arguments)

    with capture_logs() as records:
        async with running_server(Failing()) as harness:
            items = await run(harness, batch(spec(), spec(), spec()))
    rich = rich_item_error(items[1].error)
    assert (rich.code, rich.reason, rich.message) == (
        grpc.StatusCode.INTERNAL,
        "INTERNAL",
        "internal error",
    )
    assert secret.encode() not in items[1].SerializeToString()
    assert items[0].HasField("response")
    assert items[2].HasField("response")
    (logged,) = [record for record in records if record["event"] == "item failed"]
    assert logged["request_id"] == "b.1"
    assert "builtins.ValueError" in logged["traceback"]
    assert secret not in repr(records), "it may quote a prompt"


# What is wrong with the whole call.


async def test_limits_of_the_call(tmp_path: Path) -> None:
    options = quick_options(limits={"max_batch_items": 4, "max_batch_tokens": 40})
    async with scripted_service(tmp_path, options) as harness:

        async def refused(request: pb.BatchGenerateRequest) -> list[str]:
            rich = await failure(harness.inference.BatchGenerate(request))
            assert (rich.code, rich.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
            return rich.fields

        await run(harness, batch(*[spec(7)] * 4))
        assert await refused(batch(*[spec(1)] * 5)) == ["specs"]
        assert await refused(batch()) == ["specs"]
        assert await refused(batch(*[spec(7)] * 3, spec(8))) == ["specs"]
        # A completion of an item counts each; an item that is refused counts nothing.
        twice = spec(10)
        twice.sampling.n = 2
        await run(harness, batch(twice, spec(14), negative_temperature()))
        assert await refused(batch(twice, spec(15))) == ["specs"]
        assert await refused(batch(spec(1), request_id="x" * 127)) == ["request_id"]
        assert await refused(batch(spec(1), request_id="a b")) == ["request_id"]
        await run(harness, batch(spec(1), request_id="x" * 126))


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x12\x04\x12\x02\xc3\x28"])
async def test_malformed_bytes(data: bytes) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        rich = await failure(harness.public.unary_stream(METHOD)(data))
    assert (rich.code, rich.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("when", ["checked", "run"])
async def test_what_ails_the_server_ends_the_call(when: str) -> None:
    class Dying(FakeFrontDoor):
        async def generate(self, request: Any, *, validate_only: bool = False, **arguments: Any) -> Any:
            if validate_only == (when == "checked") and request.request_id == "b.1":
                raise errors.EngineDeadError
            return await super().generate(request, validate_only=validate_only, **arguments)

    async with running_server(Dying()) as harness:
        rich = await failure(harness.inference.BatchGenerate(batch(spec(), spec(), spec())))
        assert (rich.code, rich.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
        assert harness.server.num_live_calls == 0


async def test_cancelling_the_call_ends_every_item(tmp_path: Path) -> None:
    records: list[CallRecord] = []
    options = quick_options(limits={"max_batch_concurrency": 4})
    async with scripted_service(tmp_path, options, step_s=0.002, call_observers=(records.append,)) as harness:
        call = harness.inference.BatchGenerate(batch(spec(1), *[spec(4000)] * 8))
        first = await call.read()
        assert first.item == 0
        call.cancel()
        await until_idle(harness)
        await until(lambda: records)
    (record,) = [r for r in records if r.method.endswith("BatchGenerate")]
    codes = [item.code for item in record.items]
    # Four ran at a time: with the one that ended five were begun, and the last three never.
    assert codes == ["OK", *["CANCELLED"] * 4]
    assert all(item.seconds > 0 for item in record.items)


async def test_the_deadline_ends_every_item(tmp_path: Path) -> None:
    options = quick_options(limits={"max_deadline_s": 1.0, "default_deadline_s": 1.0})
    async with scripted_service(tmp_path, options, step_s=0.002) as harness:
        call = harness.inference.BatchGenerate(batch(spec(1), *[spec(4000)] * 3))
        assert (await call.read()).item == 0
        rich = await failure(call)
        assert (rich.code, rich.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "MAX_DURATION")
        await until_idle(harness)


async def test_time_that_an_item_gave_itself_ends_that_item(harness: Harness) -> None:
    hurried = spec(4000)
    hurried.stop.time_limit.FromMilliseconds(100)
    items = await run(harness, batch(hurried, spec(3)))
    assert items[0].response.completions[0].finish.reason == pb.FINISH_REASON_TIME_LIMIT
    assert items[1].response.usage.output_tokens == 3


# Ids, operators, and repeated calls.


async def until_running(harness: Harness, number: int) -> None:
    async with asyncio.timeout(30):
        while (await harness.control.GetLoad(control_pb2.GetLoadRequest())).running < number:
            pass


async def test_an_operator_ends_one_item_or_the_call(harness: Harness) -> None:
    async def abort(request_id: str) -> None:
        await harness.control.Abort(control_pb2.AbortRequest(request_id=request_id))

    call = harness.inference.BatchGenerate(batch(spec(4000), spec(4000), request_id="mine"))
    await until_running(harness, 2)
    await abort("mine.1")
    message = await call.read()
    assert message.item == 1
    rich = rich_item_error(message.error)
    assert (rich.code, rich.reason) == (grpc.StatusCode.ABORTED, "ABORTED_BY_OPERATOR")
    await abort("mine")
    assert (await failure(call)).reason == "ABORTED_BY_OPERATOR"
    await until_idle(harness)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await abort("mine")
    assert rich_error(caught.value).reason == "REQUEST_NOT_FOUND"


async def test_an_operator_who_ends_everything_ends_waiting_items_too(tmp_path: Path) -> None:
    options = quick_options(limits={"max_batch_concurrency": 2})
    async with scripted_service(tmp_path, options, step_s=0.002) as harness:
        call = harness.inference.BatchGenerate(batch(*[spec(4000)] * 5))
        await until_running(harness, 2)
        response = await harness.control.Abort(control_pb2.AbortRequest(all=control_pb2.AllRequests()))
        assert response.aborted == 2
        assert (await failure(call)).reason == "ABORTED_BY_OPERATOR"
        await until_idle(harness)


async def test_a_live_batch_s_id_is_taken(harness: Harness) -> None:
    call = harness.inference.BatchGenerate(batch(spec(4000), request_id="mine"))
    await until_running(harness, 1)
    assert (await failure(harness.inference.BatchGenerate(batch(spec(), request_id="mine")))).code is (
        grpc.StatusCode.ALREADY_EXISTS
    )
    for request_id in ("mine", "mine.0"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.inference.Generate(pb.GenerateRequest(request_id=request_id, spec=spec()))
        assert rich_error(caught.value).reason == "DUPLICATE_REQUEST"
    call.cancel()
    # Right behind the cancellation: the retry takes the place of what is ending, items and all.
    items = await run(harness, batch(spec(), spec(), request_id="mine"))
    assert all(message.HasField("response") for message in items.values())
    await until_idle(harness)


async def test_a_reader_that_stalls_is_ended() -> None:
    front_door = FakeFrontDoor(Script(num_deltas=20_000, text="x" * 50))
    options = quick_options(limits={"slow_consumer_timeout_s": 0.4})
    async with running_server(front_door, options) as harness:
        call = harness.inference.BatchGenerate(batch(*[spec()] * 60))
        await call.read()
        await until(lambda: harness.server.num_live_calls == 0, 30)
        assert (await failure(call)).reason == "CLIENT_STALLED"


async def test_a_client_that_retries_gets_a_batch_that_was_refused_before_it_began() -> None:
    """Refusals of the whole call come as trailers alone, as those of a stream do."""
    front_door = FakeFrontDoor()
    front_door.starting = True
    async with running_server(front_door) as harness:
        call = harness.inference.BatchGenerate(batch(spec()))
        assert (await failure(call)).reason == "STARTING"
        assert not list(await call.initial_metadata())
