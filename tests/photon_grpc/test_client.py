"""The client calls of the command line, against the real server over a scripted front door."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from photon_grpc.bench import percentile
from photon_grpc.client import Answer, CallError, Client, Ending, Request, measure, open_channel
from photon_grpc.errors import FieldViolation, InvalidRequestError, OverloadedError
from photon_grpc.frontend.events import GenerationResult
from photon_grpc.types import ChatInput, GenerationRequest, Role
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import running_server, until


def collect(address: str, request: Request) -> list[str | Ending]:
    with Client(address) as client:
        return list(client.stream(request))


@pytest.fixture
def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


async def test_text_comes_in_pieces_and_the_ending_last() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        items = await asyncio.to_thread(collect, harness.target, Request(text="hi"))
    assert items[:-1] == [" tok", " tok", " tok"]
    assert items[-1] == Ending(
        finish_reason="STOP 'stop'",
        prompt_tokens=4,
        cached_prompt_tokens=1,
        output_tokens=3,
        first_token_s=0.5,
        decode_s=1.0,
        total_s=1.5,
    )


async def test_what_is_asked_for_arrives_and_what_is_not_stays_unset() -> None:
    door = FakeFrontDoor()
    asked = Request(
        text="hi",
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        seed=11,
        stop=("a", "b"),
        ignore_eos=True,
    )
    async with running_server(door) as harness:
        await asyncio.to_thread(collect, harness.target, asked)
        await asyncio.to_thread(collect, harness.target, Request(text="hi"))
    full, bare = door.requests
    assert (full.prompt, full.stop.max_tokens, full.stop.strings) == ("hi", 9, ("a", "b"))
    assert (full.sampling.temperature, full.sampling.top_p, full.sampling.top_k) == (0.0, 0.5, 3)
    assert (full.sampling.seed, full.stop.ignore_eos) == (11, True)
    assert bare.sampling.temperature is bare.sampling.seed is bare.stop.max_tokens is None
    assert bare.stop.ignore_eos is None


async def test_a_conversation_keeps_its_roles() -> None:
    door = FakeFrontDoor()
    messages = (("system", "s"), ("user", "u"), ("assistant", "a"), ("tool", "t"))
    async with running_server(door) as harness:
        await asyncio.to_thread(collect, harness.target, Request(messages=messages))
    prompt = door.requests[0].prompt
    assert isinstance(prompt, ChatInput)
    assert [(m.role, m.content) for m in prompt.messages] == [(Role(r), c) for r, c in messages]


async def test_an_error_keeps_reason_and_fields() -> None:
    violations = [FieldViolation("spec.sampling.top_p", "must be above 0"), FieldViolation("spec.stop", "no")]
    door = FakeFrontDoor(Script(error=InvalidRequestError(violations)))
    async with running_server(door) as harness:
        with pytest.raises(CallError) as caught:
            await asyncio.to_thread(collect, harness.target, Request(text="hi"))
    error = caught.value
    assert (error.status, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.violations == (("spec.sampling.top_p", "must be above 0"), ("spec.stop", "no"))
    assert error.retry_after_s is None


async def test_an_overloaded_server_says_when_to_come_back() -> None:
    door = FakeFrontDoor(Script(error=OverloadedError("the queue is full", retry_after_s=2.0)))
    async with running_server(door) as harness:
        with pytest.raises(CallError) as caught:
            await asyncio.to_thread(collect, harness.target, Request(text="hi"))
    assert (caught.value.status, caught.value.reason) == ("UNAVAILABLE", "OVERLOADED")
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


async def test_an_error_in_the_middle_comes_after_the_text_before_it() -> None:
    door = FakeFrontDoor(Script(error=InvalidRequestError.of("f", "d"), error_at=3))
    pieces: list[str | Ending] = []

    def read(address: str) -> None:
        with Client(address) as client:
            pieces.extend(client.stream(Request(text="hi")))

    async with running_server(door) as harness:
        with pytest.raises(CallError):
            await asyncio.to_thread(read, harness.target)
    assert pieces == [" tok"]


async def test_closing_the_iterator_cancels_the_call() -> None:
    door = FakeFrontDoor(Script(num_deltas=None, interval_s=0.001))

    def read_two(address: str) -> None:
        with Client(address) as client:
            stream = client.stream(Request(text="hi"))
            next(stream)
            next(stream)
            stream.close()

    async with running_server(door) as harness:
        await asyncio.to_thread(read_two, harness.target)
        await until(lambda: door.streams and door.streams[0].exits)


class OneIsTooMuch(FakeFrontDoor):
    """Has no room for a request whose prompt is `later`."""

    async def generate(
        self, request: GenerationRequest, *, validate_only: bool = False, **arguments: Any
    ) -> GenerationResult:
        if request.prompt == "later" and not validate_only:
            raise OverloadedError("the queue is full", retry_after_s=2.0)
        return await super().generate(request, validate_only=validate_only, **arguments)


async def test_a_batch_has_an_answer_for_each_request() -> None:
    door = OneIsTooMuch()
    requests = [
        Request(text="hi", seed=11, max_tokens=9),
        Request(text="later"),
        Request(messages=(("user", "u"),)),
    ]

    def run(address: str) -> list[Answer]:
        with Client(address) as client:
            return list(client.batch(requests, request_id="mine", timeout_s=30))

    async with running_server(door) as harness:
        answers = {answer.item: answer for answer in await asyncio.to_thread(run, harness.target)}
    assert sorted(answers) == [0, 1, 2]
    for item in (0, 2):
        ending = answers[item].ending
        assert (answers[item].text, answers[item].error) == (" tok tok tok", None)
        assert ending is not None
        assert (ending.finish_reason, ending.output_tokens) == ("STOP 'stop'", 3)
    error = answers[1].error
    assert error is not None
    assert (error.status, error.reason, answers[1].ending) == ("UNAVAILABLE", "OVERLOADED", None)
    assert error.retry_after_s is not None
    sent = {request.request_id: request for request in door.requests}
    assert sent.keys() >= {"mine.0", "mine.2"}
    assert (sent["mine.0"].sampling.seed, sent["mine.0"].stop.max_tokens) == (11, 9)


async def test_a_refused_batch_is_an_error() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with Client(harness.target) as client, pytest.raises(CallError) as caught:
            await asyncio.to_thread(lambda: list(client.batch([])))
    assert (caught.value.reason, caught.value.violations) == (
        "INVALID_FIELD",
        (("specs", "must not be empty"),),
    )


async def test_closing_a_batch_cancels_the_call() -> None:
    def read_one(address: str) -> None:
        with Client(address) as client:
            answers = client.batch([Request(text="hi"), Request(text="hang")])
            next(answers)
            answers.close()

    class Hanging(FakeFrontDoor):
        async def generate(
            self, request: GenerationRequest, *, validate_only: bool = False, **arguments: Any
        ) -> GenerationResult:
            if request.prompt == "hang" and not validate_only:
                await asyncio.Event().wait()
            return await super().generate(request, validate_only=validate_only, **arguments)

    door = Hanging()
    async with running_server(door) as harness:
        await asyncio.to_thread(read_one, harness.target)
        await until(lambda: harness.server.num_live_calls == 0, 30)


async def test_tokens_come_with_their_places() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with Client(harness.target) as client:
            tokens = await asyncio.to_thread(client.tokenize, "héllo")
    assert (tokens.ids, tokens.offsets) == ((1, 2), ((0, 3), (3, 5)))


async def test_a_server_names_its_model() -> None:
    async with running_server(FakeFrontDoor()) as harness:
        with Client(harness.target) as client:
            served = await asyncio.to_thread(client.served_model)
    assert (served.model, served.max_context_tokens) == ("fake", 256)


async def test_waiting_ends_when_the_server_serves(free_address: str) -> None:
    with Client(free_address) as client:
        assert not await asyncio.to_thread(client.wait_until_serving, 0.0)
    async with running_server(FakeFrontDoor()) as harness:
        with Client(harness.target) as client:
            assert await asyncio.to_thread(client.wait_until_serving, 30.0)


async def test_nobody_there_is_unavailable(free_address: str) -> None:
    with pytest.raises(CallError) as caught:
        await asyncio.to_thread(collect, free_address, Request(text="hi"))
    assert (caught.value.status, caught.value.reason) == ("UNAVAILABLE", "")


async def test_a_measured_call_counts_every_token() -> None:
    async with (
        running_server(FakeFrontDoor(Script(num_deltas=5))) as harness,
        open_channel(harness.target) as channel,
    ):
        measured = await measure(channel, Request(text="hi"))
    assert measured.output_tokens == 5
    assert len(measured.gaps_s) == 4
    assert 0 < measured.first_token_s <= measured.total_s
    assert measured.first_token_s + sum(measured.gaps_s) == pytest.approx(measured.total_s)


def test_percentiles_are_nearest_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.5) == 7.0
    assert percentile([], 0.5) != percentile([], 0.5)
