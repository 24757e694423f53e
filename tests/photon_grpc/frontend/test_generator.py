"""Text in, text events out: the front door over a real engine thread, a real tokenizer, scripted ids."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon_grpc.engine.client import AsyncEngine, RequestStream
from photon_grpc.engine.messages import EngineRequest
from photon_grpc.errors import (
    ContextLengthError,
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartingError,
    FirstTokenTimeoutError,
    InvalidRequestError,
    MaxDurationError,
    ModelNotFoundError,
    OperatorAbortError,
    OverloadedError,
    PhotonError,
    QueueTimeoutError,
    RequestFaultError,
    RequestNotFoundError,
)
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.detokenizer import Detokenizer
from photon_grpc.frontend.events import AdmissionOutlook, Delta, Event, Finished, Started, Summary
from photon_grpc.frontend.generator import Generator, TextStream
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import KVCacheOptions, LimitOptions, SchedulerOptions, TenantOptions
from photon_grpc.runner.scripted import logprobs_of
from photon_grpc.scheduler.output import RowFault
from photon_grpc.telemetry.metrics import Metrics
from photon_grpc.types import (
    ChatInput,
    ChatMessage,
    ChunkPolicy,
    FinishReason,
    GenerationRequest,
    OutputOptions,
    Role,
    SamplingParams,
    SchedulingOptions,
    StopParams,
)
from tests.support.builders import RecordingRunner, model_info
from tests.support.engine_streams import until_idle
from tests.support.grpc_harness import until
from tests.support.tiny_model import tiny_model_folder

EOS = 1
PROMPT = (50, 60, 70)
TEXT = "The river, END of it. Die Brücke 🙂 über 你好 — naïve café, done"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


class House:
    """A generator over an engine whose tokens `say` decides; completion `index` says `answers[index]`."""

    def __init__(self, engine: AsyncEngine, generator: Generator, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.generator = generator
        self.tokenizer = tokenizer
        self.answers: list[Sequence[int]] = []

    def say(self, *answers: str | Sequence[int]) -> list[list[int]]:
        """Script the completions; a text is followed by EOS. Returns the ids, EOS included."""
        self.answers = [
            [*self.tokenizer.encode(a, add_special_tokens=False), EOS] if isinstance(a, str) else a
            for a in answers
        ]
        return [list(answer) for answer in self.answers]

    def next_token(self, prompt: tuple[int, ...], index: int, position: int) -> int:
        answer = self.answers[index]
        return answer[position] if position < len(answer) else EOS

    async def events(self, request: GenerationRequest, **values: Any) -> list[Event]:
        with await self.generator.open(request, **values) as stream:
            return [event async for event in stream]

    async def idle(self) -> None:
        await until_idle(self.engine)


@asynccontextmanager
async def house(
    tokenizer: Tokenizer,
    *,
    max_num_seqs: int = 8,
    max_queued: int = 100,
    max_chunk_delay_s: float = 1.0,
    activate: bool = True,
    tenants: TenantOptions | None = None,
    **runner: Any,
) -> AsyncIterator[House]:
    holder: list[House] = []
    model = model_info(vocab_size=512, eos_token_ids=(EOS, 3))
    limits = LimitOptions(max_queued_requests=max_queued, max_chunk_delay_s=max_chunk_delay_s)

    def script(prompt: tuple[int, ...], index: int, position: int) -> int:
        return holder[0].next_token(prompt, index, position)

    engine = AsyncEngine(
        lambda progress: RecordingRunner(model, script=script, **runner),
        SchedulerOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=256),
        KVCacheOptions(),
        limits,
        on_step=lambda stats: None,
        on_stopped=lambda error: None,
    )
    with ThreadPoolExecutor(2) as pool:
        generator = Generator(engine, limits, pool, metrics=Metrics("test"), tenants=tenants)
        holder.append(House(engine, generator, tokenizer))
        await engine.start()
        if activate:
            generator.activate(tokenizer, ChatRenderer(tokenizer))
        try:
            yield holder[0]
        finally:
            assert await engine.stop()


def asking(prompt: Any = PROMPT, **values: Any) -> GenerationRequest:
    values.setdefault("output", OutputOptions(token_ids=True))
    return GenerationRequest(prompt=prompt, **values)


def text_of(events: Sequence[Event], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def ids_of(events: Sequence[Event], index: int = 0) -> list[int]:
    return [t for e in events if isinstance(e, Delta) and e.index == index for t in e.token_ids]


def finish_of(events: Sequence[Event], index: int = 0) -> Any:
    (finished,) = [e.finish for e in events if isinstance(e, Finished) and e.index == index]
    return finished


def summary_of(events: Sequence[Event]) -> Summary:
    assert isinstance(events[-1], Summary)
    return events[-1]


# --- what a stream tells --------------------------------------------------------------------------


async def test_started_deltas_finished_summary(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        (ids,) = it.say(TEXT)
        events = await it.events(asking())
        kinds = [type(event) for event in events]
        assert kinds[:2] == [Started, Delta]
        assert kinds[-2:] == [Finished, Summary]
        assert set(kinds[1:-2]) == {Delta}
        assert text_of(events) == TEXT == tokenizer.decode(ids)
        assert ids_of(events) == ids
        assert all(e.num_tokens == len(e.token_ids) for e in events if isinstance(e, Delta))
        started = events[0]
        assert isinstance(started, Started)
        assert started.prompt.num_tokens == 3
        assert started.effective.stop.max_tokens == 509


async def test_the_engine_hears_for_whom_it_works(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tokenizer) as it:
        heard: list[str] = []
        submit = it.engine.submit

        def listening(request_id: str, request: EngineRequest) -> RequestStream:
            heard.append(request.tenant)
            return submit(request_id, request)

        monkeypatch.setattr(it.engine, "submit", listening)
        it.say("a")
        await it.events(asking(), tenant="alice")
        await it.generator.generate(asking(), tenant="bob")
        await it.events(asking())
        assert heard == ["alice", "bob", ""]


async def test_a_request_has_the_terms_of_its_tenant(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.alice]\nweight = 2.5\nmax_priority = 3\nkv_share = 0.25\n")
    async with house(tokenizer, tenants=TenantOptions(file=str(file))) as it:
        it.say("a")
        heard: list[tuple[int, float, float]] = []
        submit = it.engine.submit

        def listening(request_id: str, request: EngineRequest) -> RequestStream:
            heard.append((request.priority, request.weight, request.kv_share))
            return submit(request_id, request)

        it.engine.submit = listening  # type: ignore[method-assign]
        for tenant in ("alice", "bob"):
            for priority in (1, 9):
                await it.events(asking(scheduling=SchedulingOptions(priority=priority)), tenant=tenant)
        assert heard == [(1, 2.5, 0.25), (3, 2.5, 0.25), (1, 1.0, 1.0), (9, 1.0, 1.0)]


async def test_no_delta_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    """Bug of two ancestors: one decode per token broke emoji and CJK."""
    async with house(tokenizer, step_s=0.001) as it:
        it.say(TEXT * 3)
        events = await it.events(asking())
        assert text_of(events) == TEXT * 3
        assert all("\ufffd" not in e.text for e in events if isinstance(e, Delta))


async def test_what_ends_in_the_middle_of_a_character_is_flushed(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        (ids,) = it.say("ok 🙂")
        cut = ids[:-2]
        events = await it.events(asking(stop=StopParams(max_tokens=len(cut))))
        assert text_of(events) == tokenizer.decode(cut)
        assert text_of(events).endswith("\ufffd")


async def test_fault_22_usage_is_the_ids_emitted(tokenizer: Tokenizer) -> None:
    """Bug of two ancestors: `tokens` echoed max_tokens, or counted characters."""
    async with house(tokenizer, block_size=16) as it:
        (ids,) = it.say(TEXT)
        prompt = tuple(range(10, 50))
        for cached in (0, 32):
            events = await it.events(asking(prompt, stop=StopParams(max_tokens=200)))
            usage = summary_of(events).usage
            assert usage.output_tokens == len(ids) == len(ids_of(events))
            assert (usage.prompt_tokens, usage.cached_prompt_tokens) == (40, cached)


async def test_text_and_ids_only_when_asked_for(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        (ids,) = it.say(TEXT)
        bare = await it.events(asking(output=OutputOptions(text=False)))
        assert text_of(bare) == ""
        assert ids_of(bare) == []
        assert sum(e.num_tokens for e in bare if isinstance(e, Delta)) == len(ids)
        assert ids_of(await it.events(asking(output=OutputOptions()))) == []


async def test_without_text_nothing_is_detokenised(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a detokenizer was made")

    monkeypatch.setattr("photon_grpc.frontend.generator.Detokenizer", refuse)
    async with house(tokenizer) as it:
        (ids,) = it.say(TEXT)
        events = await it.events(asking(output=OutputOptions(text=False, token_ids=True)))
        assert ids_of(events) == ids


async def test_special_tokens_show_when_asked_for(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say([*tokenizer.encode("a", add_special_tokens=False), 2, EOS])
        hidden = await it.events(asking())
        shown = await it.events(asking(output=OutputOptions(skip_special_tokens=False)))
        assert text_of(hidden) == "a"
        assert text_of(shown) == "a<|im_start|>"


async def test_the_prompt_comes_back_when_asked_for(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say("x")
        output = OutputOptions(echo_prompt=True, prompt_top_logprobs=2)
        started = (await it.events(asking(output=output)))[0]
        assert isinstance(started, Started)
        assert started.prompt.token_ids == PROMPT
        assert started.prompt.logprobs == (None, logprobs_of(60, 2), logprobs_of(70, 2))
        plain = (await it.events(asking()))[0]
        assert isinstance(plain, Started)
        assert (plain.prompt.token_ids, plain.prompt.logprobs) == ((), ())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("strings", [(), (" of it",)])
async def test_logprobs_stand_beside_their_tokens(
    tokenizer: Tokenizer, strings: tuple[str, ...], merged: bool
) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say(TEXT)
        output = OutputOptions(token_ids=True, top_logprobs=3)
        with await it.generator.open(asking(output=output, stop=StopParams(strings=strings))) as stream:
            if merged:
                # All tokens in one delta, those behind the match among them.
                await it.idle()
            deltas = [event async for event in stream if isinstance(event, Delta)]
        assert len(deltas) == 1 or not merged
        for delta in deltas:
            assert delta.logprobs == tuple(logprobs_of(token, 3) for token in delta.token_ids)


async def test_several_completions_finish_on_their_own(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        answers = it.say("short", TEXT, "a stop here. not this")
        events = await it.events(asking(sampling=SamplingParams(n=3), stop=StopParams(strings=("here.",))))
        assert [text_of(events, i) for i in range(3)] == ["short", TEXT, "a stop "]
        assert [finish_of(events, i).reason for i in range(3)] == [
            FinishReason.EOS,
            FinishReason.EOS,
            FinishReason.STOP,
        ]
        for index in range(3):
            own = [e for e in events if isinstance(e, Delta | Finished) and e.index == index]
            assert isinstance(own[-1], Finished), "something came after a completion's end"
        assert summary_of(events).usage.output_tokens == sum(len(ids_of(events, i)) for i in range(3))
        assert ids_of(events, 1) == answers[1]
        await it.idle()


async def test_timings_are_in_order(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.002) as it:
        it.say(TEXT)
        before = time.monotonic()
        timings = summary_of(await it.events(asking())).timings
        wall = time.monotonic() - before
        assert 0 <= timings.queue <= timings.first_token <= timings.total <= wall
        assert timings.first_token == pytest.approx(timings.queue + timings.prefill)
        assert timings.total == pytest.approx(timings.first_token + timings.decode)
        assert timings.decode > 0
        assert timings.preemptions == 0


async def test_the_total_reaches_to_the_last_completion(tokenizer: Tokenizer) -> None:
    """One ends in the engine, the other later by a stop string, which the engine does not know of."""
    async with house(tokenizer, step_s=0.001) as it:
        first, second = it.say("a", "x" * 40 + "END")
        it.say(first, second[:-1] + [200] * 400)
        request = asking(sampling=SamplingParams(n=2), stop=StopParams(strings=("END",)))
        with await it.generator.open(request) as stream:
            opened = time.monotonic()
            events: list[Event] = []
            while not (events and isinstance(events[-1], Finished)):
                events.append(await anext(stream))
            assert events[-1].index == 0
            await asyncio.sleep(0.05)
            first_was_over = time.monotonic()
            events += [event async for event in stream]
        assert summary_of(events).timings.total >= first_was_over - opened


async def test_unary_is_the_stream_in_one_piece(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say(TEXT, "other END text")
        for stop in (StopParams(), StopParams(strings=("END",)), StopParams(max_tokens=5)):
            request = asking(
                sampling=SamplingParams(n=2, seed=3),
                stop=stop,
                output=OutputOptions(token_ids=True, top_logprobs=1, echo_prompt=True),
                request_id="unary",
            )
            events = await it.events(request)
            result = await it.generator.generate(request)
            assert result.request_id == "unary"
            started = events[0]
            assert isinstance(started, Started)
            assert (result.prompt, result.effective) == (started.prompt, started.effective)
            assert result.usage == summary_of(events).usage
            for index, completion in enumerate(result.completions):
                assert completion.index == index
                assert completion.text == text_of(events, index)
                assert list(completion.token_ids) == ids_of(events, index)
                assert completion.finish == finish_of(events, index)
                assert len(completion.logprobs) == len(completion.token_ids)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_id", [EOS, 3])
async def test_eos_is_counted_and_not_shown(tokenizer: Tokenizer, token_id: int) -> None:
    async with house(tokenizer) as it:
        ids = tokenizer.encode("bye", add_special_tokens=False)
        it.say([*ids, token_id])
        for skip in (True, False):
            events = await it.events(asking(output=OutputOptions(token_ids=True, skip_special_tokens=skip)))
            assert text_of(events) == "bye"
            assert finish_of(events).eos_token_id == token_id
            assert ids_of(events) == [*ids, token_id]


async def test_a_stop_id_is_cut_unless_it_is_wanted(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        (ids,) = it.say("one two three")
        for include, text in ((False, ids[:1]), (True, ids[:2])):
            stop = StopParams(token_ids=(ids[1],), include_stop=include)
            events = await it.events(asking(stop=stop))
            assert text_of(events) == tokenizer.decode(text)
            assert (finish_of(events).reason, finish_of(events).stop_token_id) == (FinishReason.STOP, ids[1])
            assert ids_of(events) == ids[:2]


@pytest.mark.parametrize("step_s", [0.0, 0.002])
@pytest.mark.parametrize("include", [False, True])
async def test_fault_21_a_stop_string_across_tokens_and_deltas(
    tokenizer: Tokenizer, include: bool, step_s: float
) -> None:
    """Bug of an ancestor: stop strings were matched on ids, so one that is split otherwise was missed."""
    async with house(tokenizer, step_s=step_s) as it:
        (ids,) = it.say(TEXT)
        assert len(tokenizer.encode(", END of", add_special_tokens=False)) > 3
        events = await it.events(asking(stop=StopParams(strings=("never", "ND o"), include_stop=include)))
        assert text_of(events) == ("The river, END o" if include else "The river, E")
        assert (finish_of(events).reason, finish_of(events).stop_string) == (FinishReason.STOP, "ND o")
        kept = ids_of(events)
        assert kept == ids[: len(kept)]
        assert "ND o" in tokenizer.decode(kept)
        assert "ND o" not in tokenizer.decode(kept[:-1]), "tokens behind the match were kept"
        assert summary_of(events).usage.output_tokens == len(kept)
        await it.idle()


async def test_a_stop_string_ends_the_work_of_the_engine(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say("END" + "x " * 200)
        with await it.generator.open(asking(stop=StopParams(strings=("END",)))) as stream:
            events = [event async for event in stream]
            assert it.engine.num_live_requests == 0, "closed with the last event, not when the reader leaves"
        assert text_of(events) == ""
        await it.idle()
        assert it.engine.stats.generation_tokens < 200


async def test_a_stop_string_ends_its_own_completion_at_once(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        (end,) = it.say("END")
        it.say(end[:-1] + [200] * 600, [200] * 600)
        request = asking(sampling=SamplingParams(n=2), stop=StopParams(strings=("END",), max_tokens=500))
        with await it.generator.open(request) as stream:
            while not isinstance(event := await anext(stream), Finished):
                pass
            assert event.index == 0
            # Unaborted, both would reach max_tokens in the same step.
            await until(lambda: it.engine.stats.running == 1)
        await it.idle()


async def test_text_that_only_began_like_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say("go EN")
        events = await it.events(asking(stop=StopParams(strings=("END",))))
        assert text_of(events) == "go EN"
        assert finish_of(events).reason is FinishReason.EOS


async def test_stop_strings_count_only_from_min_tokens_on(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        (ids,) = it.say("END one END two")
        first = len(tokenizer.encode("END", add_special_tokens=False))
        for min_tokens, text in ((0, ""), (first, ""), (first + 1, "END one ")):
            events = await it.events(
                asking(stop=StopParams(strings=("END",), min_tokens=min_tokens, max_tokens=100))
            )
            assert text_of(events) == text
            assert len(ids_of(events)) >= min_tokens
        assert len(ids) > first + 1


async def test_stop_strings_work_without_text(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say(TEXT)
        output = OutputOptions(text=False, token_ids=True)
        events = await it.events(asking(output=output, stop=StopParams(strings=("END",))))
        assert finish_of(events).stop_string == "END"
        assert text_of(events) == ""
        assert "END" in tokenizer.decode(ids_of(events))


async def test_lengths(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say([200] * 600)
        events = await it.events(asking(stop=StopParams(max_tokens=7)))
        assert (finish_of(events).reason, len(ids_of(events))) == (FinishReason.MAX_TOKENS, 7)
        events = await it.events(asking())
        assert (finish_of(events).reason, len(ids_of(events))) == (FinishReason.CONTEXT_LIMIT, 509)


async def test_ignore_eos(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        it.say([EOS, 200, EOS, 3, 200])
        events = await it.events(asking(stop=StopParams(max_tokens=5, ignore_eos=True)))
        assert ids_of(events) == [EOS, 200, EOS, 3, 200]


async def test_a_time_limit_ends_well_with_what_there_is(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.005) as it:
        it.say([200] * 500)
        events = await it.events(asking(stop=StopParams(time_limit=0.3)))
        assert finish_of(events).reason is FinishReason.TIME_LIMIT
        assert 0 < len(ids_of(events)) < 500


words = st.sampled_from(["a", "END", "EN", "D", " of", "🙂", "é", "the ", "<", "\n"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(words, max_size=14), strings=st.lists(words, max_size=2), include=st.booleans())
def test_any_text_and_stop_strings_equal_a_plain_search(
    tokenizer: Tokenizer, parts: list[str], strings: list[str], include: bool
) -> None:
    """The text ends where the first stop string is complete; of several that end there, the longest."""
    text = "".join(parts)
    ends = [(i, s) for i in range(len(text) + 1) for s in strings if text[:i].endswith(s)]
    expected, matched = text, None
    if ends:
        end = ends[0][0]
        matched = max((s for i, s in ends if i == end), key=len)
        expected = text[: end if include else end - len(matched)]

    async def run() -> list[Event]:
        async with house(tokenizer) as it:
            it.say(text)
            return await it.events(asking(stop=StopParams(strings=tuple(strings), include_stop=include)))

    events = asyncio.run(run())
    assert text_of(events) == expected
    assert finish_of(events).stop_string == matched


# --- when deltas come -----------------------------------------------------------------------------


async def test_tokens_that_come_while_the_reader_sleeps_merge(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        (ids,) = it.say(TEXT * 4)
        with await it.generator.open(asking()) as stream:
            events = [await anext(stream), await anext(stream)]
            await until(lambda: it.engine.stats.generation_tokens == len(ids))
            await it.idle()
            events += [event async for event in stream]
        deltas = [e for e in events if isinstance(e, Delta)]
        assert len(deltas) <= 3
        assert text_of(events) == TEXT * 4


class Sink:
    """A DeltaSink that has no room every so often; what it is given stands among the events of the reader."""

    def __init__(self, stream: TextStream, events: list[Event], full_every: int) -> None:
        self.num_given = 0
        self._stream = stream
        self._events = events
        self._full_every = full_every
        self._num_asked = 0

    def has_room(self) -> bool:
        self._num_asked += 1
        if self._full_every and self._num_asked % self._full_every == 0:
            asyncio.get_running_loop().call_later(0.004, self._stream.resume)
            return False
        return True

    def write_now(self, delta: Delta) -> None:
        self.num_given += 1
        self._events.append(delta)


@pytest.mark.parametrize("full_every", [0, 2, 5])
@pytest.mark.parametrize(
    ("is_offered", "values"),
    [
        (True, {}),
        (True, {"output": OutputOptions(text=False, token_ids=True)}),
        (True, {"output": OutputOptions(text=True, token_ids=True)}),
        (True, {"output": OutputOptions(text=False)}),
        (False, {"output": OutputOptions(top_logprobs=1)}),
        (False, {"stop": StopParams(strings=("over",))}),
        (False, {"stop": StopParams(strings=("not there",))}),
        (False, {"sampling": SamplingParams(n=2)}),
        (False, {"chunk_policy": ChunkPolicy(max_tokens=3)}),
        (False, {"chunk_policy": ChunkPolicy(max_delay=0.01)}),
    ],
)
async def test_a_sink_and_the_reader_have_together_what_the_reader_has_alone(
    tokenizer: Tokenizer, full_every: int, is_offered: bool, values: dict[str, Any]
) -> None:
    def merged(events: list[Event], index: int) -> list[Any]:
        mine = [e for e in events if not isinstance(e, Summary) and getattr(e, "index", index) == index]
        deltas = [e for e in mine if isinstance(e, Delta)]
        return [
            *(type(e).__name__ for e in mine[:2] + mine[-1:]),
            "".join(e.text for e in deltas),
            [t for e in deltas for t in e.token_ids],
            [entry for e in deltas for entry in e.logprobs],
            sum(e.num_tokens for e in deltas),
            mine[-1],
        ]

    async with house(tokenizer, step_s=0.002) as it:
        it.say(TEXT, TEXT)
        request = asking(**values)
        alone = await it.events(request)
        events: list[Event] = []
        with await it.generator.open(request) as stream:
            sink = Sink(stream, events, full_every)
            stream.offer(sink)
            async for event in stream:
                events.append(event)
        assert [type(event) for event in events[:2]] == [Started, Delta]
        assert isinstance(events[-1], Summary)
        assert isinstance(alone[-1], Summary)
        assert events[-1].usage == alone[-1].usage
        for index in range(request.sampling.n or 1):
            assert merged(events, index) == merged(alone, index)
        assert (sink.num_given > 2) == is_offered
        await it.idle()


@pytest.mark.parametrize("num_events", [2, None])
async def test_a_stream_that_is_over_leaves_nothing_to_the_garbage_collector(
    tokenizer: Tokenizer, num_events: int | None
) -> None:
    """With a sink that leads back to it, whether it is read to its end or left."""
    async with house(tokenizer, step_s=0.002) as it:
        it.say(TEXT)

        async def read() -> list[weakref.ref[Any]]:
            with await it.generator.open(asking()) as stream:
                stream.offer(Sink(stream, [], 2))
                num_read = 0
                async for _ in stream:
                    num_read += 1
                    if num_read == num_events:
                        break
                return [weakref.ref(stream), weakref.ref(stream._stream)]

        gc.collect()
        gc.disable()
        try:
            found = await asyncio.create_task(read())
            await it.idle()
            await until(lambda: not any(one() for one in found))
        finally:
            gc.enable()


async def test_a_text_that_cannot_be_made_for_a_sink_is_the_reader_s_error(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tokenizer, step_s=0.002) as it:
        it.say(TEXT)
        with await it.generator.open(asking()) as stream:
            stream.offer(Sink(stream, [], 0))
            await anext(stream)
            await anext(stream)
            monkeypatch.setattr(Detokenizer, "push", lambda self, token_ids: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await anext(stream)
        assert it.engine.num_live_requests == 0
        await it.idle()


async def test_chunks_of_at_least_so_many_tokens(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say([200] * 50)
        request = asking(
            chunk_policy=ChunkPolicy(max_tokens=10), stop=StopParams(max_tokens=50, ignore_eos=True)
        )
        deltas = [e.num_tokens for e in await it.events(request) if isinstance(e, Delta)]
        assert sum(deltas) == 50
        assert all(count >= 10 for count in deltas[1:-1])
        assert len(deltas) <= 6


async def test_the_first_token_never_waits(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.02) as it:
        it.say([200] * 400)
        for policy in (ChunkPolicy(max_tokens=256), ChunkPolicy(max_delay=1.0)):
            with await it.generator.open(asking(chunk_policy=policy)) as stream:
                await anext(stream)
                first = await anext(stream)
                assert isinstance(first, Delta)
                assert first.num_tokens < 200


async def test_a_delay_bounds_the_wait_for_a_chunk(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.01) as it:
        it.say([200] * 150)
        policy = ChunkPolicy(max_tokens=256, max_delay=0.05)
        request = asking(chunk_policy=policy, stop=StopParams(max_tokens=150))
        deltas = [e.num_tokens for e in await it.events(request) if isinstance(e, Delta)]
        assert sum(deltas) == 150
        assert 2 < len(deltas) < 150, "neither each token alone nor all at the end"


async def test_a_chunk_policy_does_not_hold_back_the_end(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, max_chunk_delay_s=1000.0) as it:
        it.say("short")
        request = asking(chunk_policy=ChunkPolicy(max_tokens=256, max_delay=1000.0))
        async with asyncio.timeout(30):
            assert text_of(await it.events(request)) == "short"


# --- failures -------------------------------------------------------------------------------------


async def failing(it: House, request: GenerationRequest, **values: Any) -> type[PhotonError]:
    with pytest.raises(PhotonError) as caught:
        await it.events(request, **values)
    await it.idle()
    assert it.engine.num_live_requests == 0
    return type(caught.value)


async def test_each_clock_is_told_as_its_error(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.02, max_num_seqs=1) as it:
        it.say([200] * 500)
        with await it.generator.open(asking()) as busy:
            await anext(busy)
            for scheduling, error in (
                (SchedulingOptions(queue_timeout=0.01), QueueTimeoutError),
                (SchedulingOptions(first_token_budget=0.01), FirstTokenTimeoutError),
            ):
                with pytest.raises(error):
                    await it.events(asking(scheduling=scheduling))
            with pytest.raises(MaxDurationError):
                await it.events(asking(), deadline=time.monotonic() + 0.01)
        await it.idle()
        assert await failing(it, asking(), deadline=time.monotonic() - 1) is MaxDurationError


async def test_a_row_fault_is_the_fault_of_one_call(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, faults={(4, 2): RowFault.NON_FINITE_LOGITS}) as it:
        it.say(TEXT)
        bad, good = await asyncio.gather(
            it.events(asking((1, 2, 3, 4))), it.events(asking()), return_exceptions=True
        )
        assert isinstance(bad, RequestFaultError)
        assert isinstance(good, list)
        assert text_of(good) == TEXT


async def test_an_operator_s_abort(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say([200] * 500)
        for abort in (lambda: it.generator.abort("mine"), it.generator.abort_all):
            with await it.generator.open(asking(request_id="mine")) as stream:
                await anext(stream)
                assert abort() == 1
                with pytest.raises(OperatorAbortError):
                    async for _ in stream:
                        pass
            await it.idle()
        with pytest.raises(RequestNotFoundError):
            it.generator.abort("mine")


async def test_draining_and_death(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say([200] * 500)
        with await it.generator.open(asking()) as stream:
            await anext(stream)
            await it.engine.stop()
            with pytest.raises(EngineDrainingError):
                async for _ in stream:
                    pass
    async with house(tokenizer, crash_at_step=4) as it:
        it.say([200] * 500)
        with pytest.raises(EngineDeadError):
            await it.events(asking())
        with pytest.raises(EngineDeadError):
            await it.generator.generate(asking())


async def test_refusals_come_before_any_step(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        long_text = "word " * 2000
        for request, error in (
            (asking(model="other"), ModelNotFoundError),
            (asking(sampling=SamplingParams(temperature=float("nan"))), InvalidRequestError),
            (asking(long_text), ContextLengthError),
            (asking(()), InvalidRequestError),
            (asking(None), InvalidRequestError),
        ):
            with pytest.raises(error):
                await it.generator.open(request)
            with pytest.raises(error):
                await it.generator.generate(request, validate_only=True)
        assert it.engine.stats.steps == it.engine.stats.running == it.engine.stats.waiting == 0
        assert it.engine.num_live_requests == 0


async def test_a_full_queue_a_live_id_and_a_late_start_are_refused(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001, max_num_seqs=1, max_queued=1) as it:
        it.say([200] * 500)
        with await it.generator.open(asking(request_id="a")), pytest.raises(DuplicateRequestError):
            await it.generator.open(asking(request_id="a"))
        await it.idle()
        first, second = await it.generator.open(asking()), await it.generator.open(asking())
        with first, second, pytest.raises(OverloadedError):
            await it.generator.open(asking("never tokenised"))
    async with house(tokenizer, activate=False) as it:
        with pytest.raises(EngineStartingError):
            _ = it.generator.model
        with pytest.raises(EngineStartingError):
            await it.generator.open(asking())


async def test_leaving_early_frees_the_blocks(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say([200] * 500)
        with await it.generator.open(asking(sampling=SamplingParams(n=1))) as stream:
            await anext(stream)
        await it.idle()

        async def read_for_ever(stream: TextStream) -> None:
            with stream:
                async for _ in stream:
                    pass

        task = asyncio.ensure_future(read_for_ever(await it.generator.open(asking())))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        unary = asyncio.ensure_future(it.generator.generate(asking()))
        await asyncio.sleep(0.005)
        unary.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unary
        await it.idle()


async def test_leaving_through_an_exception_closes_too(tokenizer: Tokenizer) -> None:
    async with house(tokenizer, step_s=0.001) as it:
        it.say([200] * 500)

        async def handler() -> AsyncIterator[Event]:
            with await it.generator.open(asking()) as stream:
                async for event in stream:
                    yield event

        # What grpc.aio does to a handler that is suspended in `yield`.
        suspended = handler()
        await anext(suspended)
        await suspended.aclose()  # type: ignore[attr-defined]  # an async generator
        await it.idle()
        assert it.engine.num_live_requests == 0


# --- text only ------------------------------------------------------------------------------------


async def test_validate_only_counts_and_takes_no_step(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        request = asking("The river", request_id="check", output=OutputOptions(echo_prompt=True))
        result = await it.generator.generate(request, validate_only=True)
        ids = tuple(tokenizer.encode("The river"))
        assert (result.request_id, result.completions) == ("check", ())
        assert (result.prompt.num_tokens, result.prompt.token_ids) == (len(ids), ids)
        assert (result.usage.prompt_tokens, result.usage.output_tokens) == (len(ids), 0)
        assert result.effective.stop.max_tokens == 512 - len(ids)
        assert result.admission == AdmissionOutlook(0.0, None)
        assert it.engine.stats.steps == it.engine.stats.running == it.engine.stats.waiting == 0
        assert it.engine.num_live_requests == 0


async def test_prompts_as_text_and_chat_reach_the_engine_as_ids(tokenizer: Tokenizer) -> None:
    """Bug of an ancestor: two BOS in front of a chat."""
    conversation = ChatInput((ChatMessage(Role.USER, "Hi"),))
    rendered = "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    async with house(tokenizer) as it:
        it.say("x")
        for prompt, special, ids in (
            ("The river", None, tokenizer.encode("The river")),
            ("The river", False, tokenizer.encode("The river", add_special_tokens=False)),
            ("river " * 60 * 3, None, tokenizer.encode("river " * 60 * 3)),
            (conversation, None, tokenizer.encode(rendered, add_special_tokens=False)),
        ):
            output = OutputOptions(echo_prompt=True)
            started = (await it.events(asking(prompt, add_special_tokens=special, output=output)))[0]
            assert isinstance(started, Started)
            assert list(started.prompt.token_ids) == list(ids)
            assert list(ids).count(0) == (special is not False)
        cut = (await it.events(asking("The river", truncate_input_tokens=2, output=output)))[0]
        assert isinstance(cut, Started)
        assert list(cut.prompt.token_ids) == tokenizer.encode("The river")[-2:]


async def test_tokenize(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        generator = it.generator
        assert list((await generator.tokenize("The river")).token_ids) == tokenizer.encode("The river")
        bare = await generator.tokenize("The river", add_special_tokens=False, return_offsets=True)
        assert list(bare.token_ids) == tokenizer.encode("The river", add_special_tokens=False)
        assert bare.offsets[0][0] == 0
        assert bare.offsets[-1][1] == len("The river")
        chat = await generator.tokenize(ChatInput((ChatMessage(Role.USER, "Hi"),)))
        assert "Hi" in tokenizer.decode(chat.token_ids)
        long_text = "The river " * 500
        assert list((await generator.tokenize(long_text)).token_ids) == tokenizer.encode(long_text)
        for prompt, field in (
            ("", "text"),
            (ChatInput(()), "chat.messages"),
            (ChatInput((ChatMessage(Role.USER, "x"),), {"unknown": 1}), "chat.template_args"),
        ):
            with pytest.raises(InvalidRequestError) as caught:
                await generator.tokenize(prompt)
            assert [violation.field for violation in caught.value.violations] == [field]
        with pytest.raises(ModelNotFoundError):
            await generator.tokenize("x", model="other")


async def test_detokenize(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        ids = tokenizer.encode(TEXT)
        assert await it.generator.detokenize(ids) == TEXT
        assert await it.generator.detokenize(ids, skip_special_tokens=False) == "<|bos|>" + TEXT
        assert await it.generator.detokenize([]) == ""
        with pytest.raises(InvalidRequestError):
            await it.generator.detokenize([512])
        with pytest.raises(InvalidRequestError):
            await it.generator.detokenize([5] * 513)
        with pytest.raises(ModelNotFoundError):
            await it.generator.detokenize(ids, model="other")


async def test_the_model_is_known_once_active(tokenizer: Tokenizer) -> None:
    async with house(tokenizer) as it:
        assert it.generator.model == replace(
            model_info(vocab_size=512, eos_token_ids=(EOS, 3)), has_chat_template=True
        )
        assert it.generator.stats() == it.engine.stats
