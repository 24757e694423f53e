"""AsyncEngine and its streams over a real engine thread and scripted tokens."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from photon_grpc.engine.client import AsyncEngine, RequestStream, error_of
from photon_grpc.engine.messages import (
    Abort,
    EngineReady,
    EngineStats,
    EngineStopped,
    FailureKind,
    LoopMessage,
    PlainTokens,
    SequenceOutput,
    StepOutputs,
)
from photon_grpc.engine.pacing import Pace
from photon_grpc.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartingError,
    FirstTokenTimeoutError,
    InvalidRequestError,
    MaxDurationError,
    ModelLoadError,
    OperatorAbortError,
    OutOfMemoryError,
    OverloadedError,
    PhotonError,
    QueueTimeoutError,
    RequestFaultError,
    RequestNotFoundError,
)
from photon_grpc.options import KVCacheOptions, LimitOptions, SchedulerOptions
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import echo
from photon_grpc.scheduler.output import ModelOutput
from photon_grpc.types import Finish, FinishReason
from tests.support.builders import RecordingRunner, engine_request, model_info
from tests.support.engine_streams import read_all, until_idle
from tests.support.grpc_harness import until

PROMPT = tuple(range(10, 20))


class Watch:
    """What the engine told its owner, and the snapshots it kept."""

    def __init__(self) -> None:
        self.snapshots: list[EngineStats] = []
        self.stopped: list[PhotonError | None] = []


@asynccontextmanager
async def engine(
    factory: Callable[[], Runner] | None = None,
    *,
    max_num_seqs: int = 8,
    max_queued: int = 100,
    start: bool = True,
    **runner: Any,
) -> AsyncIterator[tuple[AsyncEngine, Watch]]:
    watch = Watch()
    running = AsyncEngine(
        lambda progress: factory() if factory else RecordingRunner(model_info(), **runner),
        SchedulerOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=256),
        KVCacheOptions(),
        LimitOptions(max_queued_requests=max_queued),
        on_step=watch.snapshots.append,
        on_stopped=watch.stopped.append,
    )
    if start:
        await running.start()
    try:
        yield running, watch
    finally:
        assert await running.stop()


# --- reading --------------------------------------------------------------------------------------


async def test_streams_are_told_apart() -> None:
    async with engine() as (running, watch):
        assert running.info.model == model_info()
        streams = {
            key: running.submit(f"r{key}", engine_request((key, key + 1, key + 2), 7, n=2))
            for key in (20, 30, 40)
        }
        for key, stream in streams.items():
            with stream:
                tokens = await read_all(stream, 2)
            prompt = (key, key + 1, key + 2)
            assert tokens == {i: [echo(prompt, i, p) for p in range(7)] for i in range(2)}
        await until_idle(running)
        assert running.num_live_requests == 0
    assert watch.stopped == [None]


async def test_what_a_reader_has_not_taken_is_counted_until_it_is_or_the_stream_is_closed() -> None:
    async with engine() as (running, _):
        assert running.num_unread_tokens() == 0
        with running.submit("read", engine_request((20, 21, 22), 7)) as stream:
            await until(lambda: running.num_unread_tokens() == 7)
            assert await read_all(stream) != {}
            assert running.num_unread_tokens() == 0
        with running.submit("left", engine_request((30, 31, 32), 7)):
            await until(lambda: running.num_unread_tokens() == 7)
        assert running.num_unread_tokens() == 0


async def test_the_heartbeat_ages_only_while_there_is_work() -> None:
    held = threading.Event()

    class Held(RecordingRunner):
        def collect(self) -> ModelOutput:
            held.wait(20)
            return super().collect()

    async with engine(lambda: Held(model_info())) as (running, _):
        assert running.heartbeat_age() == 0
        with running.submit("r", engine_request((20, 21, 22), 2)) as stream:
            before = running.heartbeat_age()
            await until(lambda: running.heartbeat_age() > before + 0.05)
            held.set()
            await read_all(stream)
        await until_idle(running)
        assert running.heartbeat_age() == 0


async def test_each_step_that_computes_is_told_with_its_tokens() -> None:
    steps: list[tuple[int, float]] = []
    running = AsyncEngine(
        lambda progress: RecordingRunner(model_info()),
        SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=256),
        KVCacheOptions(),
        LimitOptions(),
        on_step=lambda stats: None,
        on_stopped=lambda error: None,
        on_iteration=lambda num_tokens, seconds: steps.append((num_tokens, seconds)),
    )
    await running.start()
    with running.submit("r", engine_request((20, 21, 22), 4)) as stream:
        await read_all(stream)
    assert await running.stop()
    # The prompt, then one token a step.
    assert [num_tokens for num_tokens, _ in steps] == [3, 1, 1, 1]
    assert all(seconds > 0 for _, seconds in steps)


async def test_the_pool_is_known_before_the_first_step() -> None:
    async with engine() as (running, watch):
        assert running.stats.kv_blocks_total == running.info.num_blocks > 0
        assert running.stats.block_size == running.info.block_size
        assert watch.snapshots == [running.stats]


async def test_what_comes_while_nobody_reads_waits_in_one_piece_and_the_engine_goes_on() -> None:
    """The engine never waits for a reader: it finishes and frees the blocks."""
    async with engine() as (running, _):
        with running.submit("slow", engine_request(PROMPT, 100)) as stream:
            await until(lambda: running.stats.generation_tokens == 100)
            await until_idle(running)
            outputs = await stream.read()
            assert [t for o in outputs for t in o.token_ids] == [echo(PROMPT, 0, p) for p in range(100)]
            assert outputs[-1].is_last


async def test_one_wake_up_of_the_loop_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    original = loop.call_soon_threadsafe
    delivered: list[LoopMessage] = []

    def counting(callback: Any, *args: Any, **kwargs: Any) -> asyncio.Handle:
        if args and isinstance(args[0], StepOutputs):
            delivered.append(args[0])
        return original(callback, *args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    async with engine(step_s=0.001) as (running, watch):
        streams = [running.submit(f"r{i}", engine_request(PROMPT, 20)) for i in range(8)]
        await asyncio.gather(*(read_all(stream) for stream in streams))
        for stream in streams:
            stream.close()
        num_steps = watch.snapshots[-1].steps
        assert len([m for m in delivered if isinstance(m, StepOutputs) and m.outputs]) <= num_steps
        assert sum(len(m.outputs) for m in delivered if isinstance(m, StepOutputs)) == 160
        assert num_steps < 160


async def test_wait_returns_at_the_count_the_end_or_the_timeout() -> None:
    async with engine(step_s=0.001) as (running, _):
        with running.submit("a", engine_request(PROMPT, 30)) as stream:
            await stream.wait(10)
            tokens = [t for o in await stream.read() for t in o.token_ids]
            assert len(tokens) >= 10
            await stream.wait(float("inf"))
            outputs = await stream.read()
            assert outputs[-1].is_last
            assert len(tokens) + sum(len(o.token_ids) for o in outputs) == 30
        with running.submit("b", engine_request(PROMPT, 400)) as stream:
            await stream.wait(1)
            await stream.wait(float("inf"), 0.005)
            assert not (await stream.read())[-1].is_last


async def test_a_cancelled_reader_can_read_again() -> None:
    async with engine(step_s=0.002) as (running, _):
        with running.submit("a", engine_request(PROMPT, 12)) as stream:
            reader = asyncio.ensure_future(stream.wait(1000))
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await read_all(stream) == {0: [echo(PROMPT, 0, p) for p in range(12)]}


async def test_plain_tokens_merge_behind_what_says_more() -> None:
    """Two completions, step by step: order within each is kept, and one read makes one output of a run."""
    async with engine(start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        stream = running.submit("a", engine_request(PROMPT, 50, n=2))
        now = 0.0

        def deliver(*news: SequenceOutput, **columns: tuple[int, ...]) -> None:
            nonlocal now
            now += 0.01
            running._deliver(StepOutputs(news, EngineStats(), now, PlainTokens(**columns)))

        first = (SequenceOutput(1, 0, (10,), cached_prompt_tokens=4), SequenceOutput(1, 1, (20,)))
        deliver(*first)
        deliver(keys=(1, 7, 1), indices=(0, 0, 1), token_ids=(11, 99, 21))
        deliver(keys=(1,), indices=(1,), token_ids=(22,))
        last = SequenceOutput(1, 1, (23,), finish=Finish(FinishReason.EOS, eos_token_id=23))
        deliver(last, keys=(1,), indices=(0,), token_ids=(12,))
        deliver(keys=(1,), indices=(0,), token_ids=(13,))
        await asyncio.wait_for(stream.wait(9), 1)
        assert await stream.read() == [
            *first,
            SequenceOutput(1, 0, (11,)),
            SequenceOutput(1, 1, (21, 22)),
            last,
            SequenceOutput(1, 0, (12, 13)),
        ]
        pending = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        deliver(keys=(1,), indices=(0,), token_ids=(14,))
        assert await asyncio.wait_for(pending, 1) == [SequenceOutput(1, 0, (14,))]


# --- closing --------------------------------------------------------------------------------------


async def test_leaving_early_aborts_and_frees_the_blocks() -> None:
    async with engine(step_s=0.001) as (running, _):
        with running.submit("a", engine_request(PROMPT, 400)) as stream:
            await stream.read()
            assert running.stats.kv_blocks_used > 0
        await until_idle(running)
        assert running.stats.generation_tokens < 400


async def test_blocks_are_free_within_a_step_of_the_close() -> None:
    async with engine(step_s=0.002) as (running, watch):
        stream = running.submit("a", engine_request(PROMPT, 400))
        await stream.read()
        seen = len(watch.snapshots)
        stream.close()
        await until_idle(running)
        after = watch.snapshots[seen:]
        # One step may have been under way, and one more may have been planned before the inbox was read.
        assert next(i for i, stats in enumerate(after) if stats.kv_blocks_used == 0) <= 2


async def test_closing_is_idempotent_before_and_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[Abort] = []
    async with engine() as (running, _):
        post = running.post

        def counting(message: Abort) -> None:
            posted.append(message)
            post(message)

        monkeypatch.setattr(running, "post", counting)
        early = running.submit("early", engine_request(PROMPT, 200))
        early.close()
        early.close()
        late = running.submit("late", engine_request(PROMPT, 3))
        await read_all(late)
        late.close()
        late.close()
        # The inbox has no bound of its own: it relies on this.
        assert posted == [Abort(1)]
        await until_idle(running)
        assert running.num_live_requests == 0


async def test_late_outputs_never_reach_a_new_stream_of_the_same_id() -> None:
    """A client may retry under the same request_id while its first attempt is being torn down."""
    async with engine(step_s=0.001) as (running, _):
        for attempt in range(10):
            first = running.submit("again", engine_request((5, 6, 7), 400))
            if attempt % 2:
                await first.read()
            first.close()
            with running.submit("again", engine_request((50 + attempt, 60), 4)) as second:
                assert await read_all(second) == {0: [50 + attempt, 60, 50 + attempt, 60]}
        await until_idle(running)


async def test_one_completion_can_be_ended_alone() -> None:
    async with engine(step_s=0.001) as (running, _):
        with running.submit("a", engine_request(PROMPT, 60, n=2)) as stream:
            await stream.read()
            stream.abort_index(1)
            ends: dict[int, SequenceOutput] = {}
            while len(ends) < 2:
                ends.update({o.index: o for o in await stream.read() if o.is_last})
            assert ends[1].finish is not None
            assert ends[1].finish.reason is FinishReason.ABORTED
            assert ends[0].finish is not None
            assert ends[0].finish.reason is FinishReason.MAX_TOKENS
        await until_idle(running)


# --- admission ------------------------------------------------------------------------------------


async def test_a_live_id_is_refused_a_second_time() -> None:
    """Bug of an ancestor: ids were a hash of the time."""
    async with engine(step_s=0.001) as (running, _):
        with running.submit("a", engine_request(PROMPT, 400)):
            with pytest.raises(DuplicateRequestError):
                running.submit("a", engine_request(PROMPT))
            with pytest.raises(DuplicateRequestError):
                running.check_duplicate("", "a")
            running.check_duplicate("", "b")
            running.check_duplicate("somebody", "a")
        running.submit("a", engine_request(PROMPT)).close()


async def test_the_queue_is_bounded_by_places_and_waiting_room() -> None:
    async with engine(step_s=0.001, max_num_seqs=3, max_queued=1) as (running, _):
        # The inbox takes twice as many as may wait; how tenants share that is for admission to say.
        streams = [running.submit(f"r{i}", engine_request(PROMPT, 400)) for i in range(5)]
        with pytest.raises(OverloadedError) as refused:
            running.submit("r5", engine_request(PROMPT))
        assert refused.value.retry_after_s > 0
        with pytest.raises(OverloadedError):
            running.check_admission()
        streams[0].close()
        await until(lambda: _admits(running))
        for stream in streams:
            stream.close()
        await until_idle(running)
        # Every place is given back exactly once.
        again = [running.submit(f"s{i}", engine_request(PROMPT, 400)) for i in range(5)]
        with pytest.raises(OverloadedError):
            running.check_admission()
        for stream in again:
            stream.close()


def _admits(running: AsyncEngine) -> bool:
    try:
        running.check_admission()
    except OverloadedError:
        return False
    return True


async def test_completions_count_towards_the_bound() -> None:
    async with engine(step_s=0.001, max_num_seqs=2, max_queued=1) as (running, _):
        with running.submit("a", engine_request(PROMPT, 400, n=4)), pytest.raises(OverloadedError):
            running.check_admission()
        await until_idle(running)
        with running.submit("b", engine_request(PROMPT, 400, n=3)):
            running.check_admission()
            with pytest.raises(OverloadedError):
                running.submit("c", engine_request(PROMPT, 400, n=2))


async def test_a_draining_engine_takes_nothing_new_and_finishes_the_old() -> None:
    async with engine(step_s=0.001) as (running, _):
        with running.submit("a", engine_request(PROMPT, 20)) as stream:
            running.drain()
            with pytest.raises(EngineDrainingError):
                running.submit("b", engine_request(PROMPT))
            assert len((await read_all(stream))[0]) == 20


async def test_nothing_is_taken_before_the_engine_is_ready() -> None:
    async with engine(start=False) as (running, _):
        with pytest.raises(EngineStartingError):
            running.submit("a", engine_request(PROMPT))
        with pytest.raises(EngineStartingError):
            _ = running.info


# --- the operator ---------------------------------------------------------------------------------


async def test_an_operator_ends_one_or_all() -> None:
    async with engine(step_s=0.001) as (running, _):
        streams = {name: running.submit(name, engine_request(PROMPT, 400)) for name in "abc"}
        assert running.abort("b") == 1
        with pytest.raises(OperatorAbortError):
            await read_all(streams["b"])
        streams["b"].close()
        with pytest.raises(RequestNotFoundError):
            running.abort("b")
        assert running.abort_all() == 2
        for name in "ac":
            with pytest.raises(OperatorAbortError):
                await read_all(streams[name])
            streams[name].close()
        await until_idle(running)
        assert running.abort_all() == 0


async def test_fault_38_two_tenants_may_use_an_id_at_the_same_time() -> None:
    async with engine(step_s=0.001) as (running, _):
        streams = {
            name: running.submit("a", engine_request(PROMPT, 400, tenant=name))
            for name in ("alice", "bob", "")
        }
        with pytest.raises(DuplicateRequestError):
            running.submit("a", engine_request(PROMPT, tenant="alice"))
        streams["alice"].close()
        # What was alice's is free again, and what is bob's is not.
        running.submit("a", engine_request(PROMPT, tenant="alice")).close()
        with pytest.raises(DuplicateRequestError):
            running.submit("a", engine_request(PROMPT, tenant="bob"))
        for stream in streams.values():
            stream.close()
        await until_idle(running)
        assert running.num_live_requests == 0


async def test_an_operator_ends_one_tenant_s() -> None:
    async with engine(step_s=0.001) as (running, _):
        streams = {
            (tenant, name): running.submit(name, engine_request(PROMPT, 400, tenant=tenant))
            for tenant, name in (("alice", "a"), ("alice", "b"), ("bob", "a"), ("bob", "c"), ("bob", "d"))
        }
        with pytest.raises(RequestNotFoundError):
            running.abort("c", "alice")
        with pytest.raises(InvalidRequestError) as ambiguous:
            running.abort("a")
        assert [violation.field for violation in ambiguous.value.violations] == ["tenant"]
        assert not any(name in ambiguous.value.message for name in ("alice", "bob"))
        # An id of one tenant alone needs no name.
        assert running.abort("c") == 1
        assert running.abort("a", "alice") == 1
        assert running.abort_all("bob") == 3, "bob's are not closed yet"
        assert running.abort_all("nobody") == 0
        for name, stream in streams.items():
            if name != ("alice", "b"):
                with pytest.raises(OperatorAbortError):
                    await read_all(stream)
                stream.close()
        assert len((await read_all(streams["alice", "b"]))[0]) == 400
        streams["alice", "b"].close()
        await until_idle(running)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (FailureKind.QUEUE_TIMEOUT, QueueTimeoutError),
        (FailureKind.FIRST_TOKEN_TIMEOUT, FirstTokenTimeoutError),
        (FailureKind.MAX_DURATION, MaxDurationError),
        (FailureKind.REQUEST_FAULT, RequestFaultError),
        (FailureKind.OUT_OF_MEMORY, OutOfMemoryError),
        (FailureKind.OPERATOR_ABORT, OperatorAbortError),
        (FailureKind.DRAINING, EngineDrainingError),
        (FailureKind.ENGINE_DEAD, EngineDeadError),
    ],
)
def test_each_failure_has_its_error(failure: FailureKind, error: type[PhotonError]) -> None:
    assert type(error_of(failure)) is error


def test_no_failure_is_without_an_error() -> None:
    for failure in FailureKind:
        assert isinstance(error_of(failure), PhotonError)


# --- the end of the engine ------------------------------------------------------------------------


async def test_fault_02_when_a_step_breaks_every_stream_gets_a_status() -> None:
    async with engine(crash_at_step=3) as (running, watch):
        streams = [running.submit(f"r{i}", engine_request(PROMPT, 50, n=2)) for i in range(12)]
        results = await asyncio.gather(*(read_all(s, 2) for s in streams), return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 12
        with pytest.raises(EngineDeadError):
            running.submit("later", engine_request(PROMPT))
        for stream in streams:
            stream.close()
        assert running.num_live_requests == 0
        assert len(watch.stopped) == 1
        assert isinstance(watch.stopped[0], EngineDeadError)


async def test_a_stream_that_was_complete_when_the_engine_died_stays_complete() -> None:
    async with engine(crash_at_step=4) as (running, watch):
        done = running.submit("done", engine_request(PROMPT, 2))
        open_ = running.submit("open", engine_request(PROMPT, 50))
        await until(lambda: watch.stopped)
        assert await read_all(done) == {0: [10, 11]}
        with pytest.raises(EngineDeadError):
            await read_all(open_)
        done.close()
        open_.close()


async def test_stopping_ends_open_streams_as_draining() -> None:
    async with engine(step_s=0.001) as (running, watch):
        stream = running.submit("a", engine_request(PROMPT, 400))
        await stream.read()
        assert await running.stop()
        with pytest.raises(EngineDrainingError):
            await read_all(stream)
        stream.close()
        assert watch.stopped == [None]


async def test_an_engine_that_hangs_is_reported() -> None:
    entered, release = threading.Event(), threading.Event()

    class Hanging(RecordingRunner):
        def launch(self, output: Any) -> None:
            entered.set()
            release.wait(10)
            super().launch(output)

    async with engine(lambda: Hanging(model_info())) as (running, _):
        with running.submit("a", engine_request(PROMPT, 3)):
            await until(entered.is_set)
            assert not await running.stop(timeout_s=0.05)
            release.set()


async def test_a_failed_start_is_raised_to_the_starter() -> None:
    def broken() -> Runner:
        raise ModelLoadError("config.json: missing")

    async with engine(broken, start=False) as (running, watch):
        with pytest.raises(ModelLoadError, match=r"config\.json"):
            await running.start()
        with pytest.raises(EngineDeadError):
            running.check_admission()
        assert len(watch.stopped) == 1


async def test_stopping_what_never_started() -> None:
    async with engine(start=False) as (running, _):
        assert await running.stop()


async def test_messages_behind_the_end_are_harmless() -> None:
    async with engine() as (running, watch):
        stream = running.submit("a", engine_request(PROMPT, 3))
        await read_all(stream)
        running._deliver(EngineStopped(None))
        stream.close()
        assert watch.stopped == [None]


# --- storms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2])
async def test_random_submits_and_cancels_leave_no_block_behind(in_flight: int) -> None:
    """Bugs of an ancestor: an unlocked queue between threads, and sessions that were never cleaned up.

    Tasks submit, read a while, cancel at any point or read to the end, on a pool too small for all.
    """
    generator = random.Random(17)
    async with engine(
        num_blocks=40, block_size=4, max_num_seqs=6, max_queued=40, max_in_flight=in_flight
    ) as (running, _):
        complete = 0

        async def client(number: int) -> None:
            nonlocal complete
            for attempt in range(12):
                prompt = tuple(generator.randrange(2, 5) for _ in range(generator.randrange(1, 30)))
                max_tokens, patience = generator.randrange(1, 40), generator.random() * 0.02
                request = engine_request(prompt, max_tokens, generator.randrange(1, 3), eos_token_ids=())
                try:
                    with running.submit(f"{number}-{attempt % 3}", request) as stream:
                        if generator.random() < 0.2:
                            continue
                        async with asyncio.timeout(None if generator.random() < 0.5 else patience):
                            tokens = await read_all(stream, request.sampling.n)
                        for index, ids in tokens.items():
                            assert ids == [echo(prompt, index, p) for p in range(max_tokens)]
                        complete += 1
                except (OverloadedError, TimeoutError):
                    await asyncio.sleep(0.001)

        await asyncio.gather(*(client(number) for number in range(12)))
        await until_idle(running)
        assert complete > 30
        assert running.num_live_requests == 0
        assert running._num_live == 0


# --- the pace of writing --------------------------------------------------------------------------


@pytest.mark.parametrize("in_columns", [False, True])
async def test_with_many_streams_tokens_merge_and_first_and_last_come_at_once(in_columns: bool) -> None:
    """Steps are handed over by hand, so what each reader has after each of them is exact."""
    async with engine(max_num_seqs=300, max_queued=300, start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        streams = [running.submit(f"r{n}", engine_request(PROMPT, 50)) for n in range(300)]
        keys = list(range(1, 301))
        reads: dict[int, list[int]] = {key: [] for key in keys}
        running._pace = Pace(0.5, lambda: 60e-6 * sum(len(lengths) for lengths in reads.values()))

        async def reader(key: int, stream: RequestStream) -> None:
            while True:
                outputs = await stream.read()
                reads[key].append(sum(len(output.token_ids) for output in outputs))
                if outputs[-1].is_last:
                    return

        tasks = [asyncio.ensure_future(reader(k, s)) for k, s in zip(keys, streams, strict=True)]
        await asyncio.sleep(0)
        for step in range(30):
            finish = Finish(FinishReason.MAX_TOKENS) if step == 29 else None
            if in_columns and 0 < step < 29:
                tokens = PlainTokens(tuple(keys), (0,) * 300, (step,) * 300)
                running._deliver(StepOutputs((), EngineStats(running=300), step * 0.010, tokens))
            else:
                outputs = tuple(SequenceOutput(key, 0, (step,), finish=finish) for key in keys)
                running._deliver(StepOutputs(outputs, EngineStats(running=300), step * 0.010))
            for _ in range(2 + 300 // 16):
                await asyncio.sleep(0)
            if step == 0:
                assert all(lengths == [1] for lengths in reads.values()), "the first token waited"
        await asyncio.gather(*tasks)
        for lengths in reads.values():
            assert sum(lengths) == 30
            assert len(lengths) < 20, "tokens did not merge"


async def test_streams_that_wait_for_a_place_do_not_slow_those_that_run() -> None:
    """A turn is as long as the messages of all who may have new tokens, and no longer."""
    async with engine(max_num_seqs=300, max_queued=300, start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        for number in range(300):
            running.submit(f"r{number}", engine_request(PROMPT, 50))
        running._pace = Pace(0.5, lambda: 60e-6 * step)
        for num_running, turn_s in ((300, 0.036), (10, 0.0012)):
            for step in range(200):
                running._pace.num_messages, running._pace.num_calls = 1, 0
                running._deliver(StepOutputs((), EngineStats(running=num_running), step * 0.010))
            assert running._pace.turn_s == pytest.approx(turn_s)


async def test_a_stream_that_pauses_is_not_forgotten() -> None:
    """Its last token came when it was not its turn; others keep stepping."""
    async with engine(max_num_seqs=300, max_queued=300, start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        streams = [running.submit(f"r{n}", engine_request(PROMPT, 50)) for n in range(300)]
        paused = streams[7]
        step = 0
        running._pace = Pace(0.5, lambda: step * 0.02)

        def deliver(keys: range) -> None:
            nonlocal step
            step += 1
            outputs = tuple(SequenceOutput(key, 0, (step,)) for key in keys)
            running._deliver(StepOutputs(outputs, EngineStats(running=300), step * 0.010))

        for _ in range(50):
            deliver(range(1, 301))
        await paused.read()
        pending = asyncio.ensure_future(paused.read())
        await asyncio.sleep(0)
        assert running._pace.turn_s > 2 * 0.010
        # Right behind its turn, so that the next is far off.
        while not running._pace.due((8,)):
            deliver(range(9, 301))
        deliver(range(8, 9))
        assert not running._pace.due((8,))
        for _ in range(math.ceil(running._pace.turn_s / 0.010)):
            deliver(range(9, 301))
        assert [output.token_ids for output in await asyncio.wait_for(pending, 5)]


async def test_a_turn_of_the_loop_wakes_few_readers_and_ends_go_ahead() -> None:
    async with engine(max_num_seqs=300, max_queued=300, start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        keys = tuple(range(1, 101))
        streams = [running.submit(f"r{key}", engine_request(PROMPT, 50)) for key in keys]
        woken: list[int] = []

        async def reader(key: int, stream: RequestStream) -> None:
            while True:
                if (await stream.read())[-1].is_last:
                    return
                woken.append(key)

        tasks = [asyncio.ensure_future(reader(k, s)) for k, s in zip(keys, streams, strict=True)]
        await asyncio.sleep(0)

        async def count_turns() -> list[int]:
            counts = []
            while len(woken) < 100:
                before = len(woken)
                await asyncio.sleep(0)
                counts.append(len(woken) - before)
            woken.clear()
            return counts

        running._deliver(StepOutputs(tuple(SequenceOutput(k, 0, (5,)) for k in keys), EngineStats(), 0.01))
        assert max(await count_turns()) == 16
        running._pace = Pace(0.85, lambda: 0.0)
        running._deliver(StepOutputs((), EngineStats(), 0.02, PlainTokens(keys, (0,) * 100, (6,) * 100)))
        assert max(await count_turns()) == 16
        # Ends go ahead of tokens.
        running._deliver(
            StepOutputs(
                (SequenceOutput(90, 0, (8,), finish=Finish(FinishReason.MAX_TOKENS)),),
                EngineStats(),
                0.03,
                PlainTokens(keys[:89] + keys[90:], (0,) * 99, (7,) * 99),
            )
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert tasks[89].done()
        assert len(woken) < 99
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_reader_that_has_written_waits_for_its_turn() -> None:
    async with engine(start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        stream = running.submit("a", engine_request(PROMPT, 50))
        running._deliver(StepOutputs((SequenceOutput(1, 0, (5,)),), EngineStats(), 0.01))
        await asyncio.wait_for(stream.read(), 1)
        now = 0.01

        def deliver(token_id: int) -> None:
            nonlocal now
            now += 0.01
            running._pace.turn_s = 0.04
            running._pace.step = lambda time, num_streams: running._pace.advance(0.01)  # type: ignore[method-assign]
            running._deliver(StepOutputs((), EngineStats(), now, PlainTokens((1,), (0,), (token_id,))))

        deliver(0)
        while not running._pace.due((1,)):
            deliver(0)
        await asyncio.wait_for(stream.read(), 1)
        for token_id in (1, 2, 3):
            deliver(token_id)
            reading = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0.01)
            assert not reading.done()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        deliver(4)
        assert await asyncio.wait_for(stream.read(), 1) == [SequenceOutput(1, 0, (1, 2, 3, 4))]


async def test_rows_of_a_stream_that_was_closed_go_nowhere_and_the_others_go_on() -> None:
    async with engine(start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        closing, staying = (running.submit(name, engine_request(PROMPT, 50)) for name in "ab")
        step = 0

        def deliver(*keys: int) -> None:
            nonlocal step
            step += 1
            columns = PlainTokens(keys, (0,) * len(keys), (step,) * len(keys))
            running._deliver(StepOutputs((), EngineStats(), step * 0.01, columns))

        deliver(1, 2)
        deliver(1, 2)
        closing.close()
        # The engine has not heard of it yet, then it has.
        deliver(1, 2)
        deliver(2)
        assert closing.num_pending_tokens == 2
        assert await asyncio.wait_for(staying.read(), 1) == [SequenceOutput(2, 0, (1, 2, 3, 4))]
        assert running.num_unread_tokens() == 0


# --- tokens that are offered before the reader is woken --------------------------------------------


async def test_plain_tokens_are_offered_and_the_reader_has_the_rest() -> None:
    async with engine(start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        stream = running.submit("a", engine_request(PROMPT, 50))
        now = 0.0
        taken: list[tuple[int, ...]] = []
        takes = True

        def take(token_ids: tuple[int, ...]) -> bool:
            taken.append(token_ids)
            return takes

        def deliver(*token_ids: int, news: tuple[SequenceOutput, ...] = ()) -> None:
            nonlocal now
            now += 0.01
            plain = PlainTokens((1,) * len(token_ids), (0,) * len(token_ids), token_ids)
            running._deliver(StepOutputs(news, EngineStats(), now, plain))

        first = SequenceOutput(1, 0, (5,))
        deliver(news=(first,))
        assert await asyncio.wait_for(stream.read(), 1) == [first]
        stream.offer(take)
        deliver(6)
        assert taken == [], "nothing is offered while the reader is somewhere else"
        assert await asyncio.wait_for(stream.read(), 1) == [SequenceOutput(1, 0, (6,))]
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        deliver(7)
        deliver(8)
        assert taken == [(7,), (8,)]
        assert stream.num_pending_tokens == 0
        takes = False
        deliver(9)
        deliver(10)
        assert taken[2:] == [(9,), (9, 10)]
        assert stream.num_pending_tokens == 2
        takes = True
        stream.resume()
        assert taken[4:] == [(9, 10)]
        stream.resume()
        assert len(taken) == 5, "its turn has not come again"
        await asyncio.sleep(0.01)
        assert not reading.done()
        takes = False
        deliver(11)
        last = SequenceOutput(1, 0, (12,), finish=Finish(FinishReason.MAX_TOKENS))
        deliver(news=(last,))
        assert taken[5:] == [(11,)]
        assert await asyncio.wait_for(reading, 1) == [SequenceOutput(1, 0, (11,)), last]
        stream.close()
        stream.resume()
        assert len(taken) == 6


async def test_what_taking_raises_the_reader_is_told() -> None:
    class Panic(BaseException):
        """As of a library in Rust."""

    async with engine(start=False) as (running, _):
        running._info = EngineReady(model_info(), 1024, 16)
        broken, sound = (running.submit(name, engine_request(PROMPT, 50)) for name in "ab")
        taken: list[tuple[int, ...]] = []

        def fail(token_ids: tuple[int, ...]) -> bool:
            raise Panic

        def take(token_ids: tuple[int, ...]) -> bool:
            taken.append(token_ids)
            return True

        broken.offer(fail)
        sound.offer(take)
        readers = [asyncio.ensure_future(stream.read()) for stream in (broken, sound)]
        await asyncio.sleep(0)
        running._deliver(StepOutputs((), EngineStats(), 0.01, PlainTokens((1, 2), (0, 0), (5, 6))))
        with pytest.raises(Panic):
            await readers[0]
        assert taken == [(6,)]
        readers[1].cancel()
        # A reader that is on its way out is not gone round.
        running._deliver(StepOutputs((), EngineStats(), 0.02, PlainTokens((2,), (0,), (7,))))
        assert taken == [(6,)]
        await asyncio.gather(*readers, return_exceptions=True)
