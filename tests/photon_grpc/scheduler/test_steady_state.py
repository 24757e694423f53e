"""What a decoding batch costs no closer look must come out as if every sequence were looked at closely."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import Abort, AbortReason, Deadlines, EngineStats, SequenceOutput, Submit
from photon_grpc.scheduler.output import (
    ModelOutput,
    PlainTokens,
    RowFault,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.scheduler.request import Request
from photon_grpc.scheduler.scheduler import Scheduler
from tests.support.builders import (
    FakeClock,
    RecordingRunner,
    engine_request,
    live_requests,
    run_to_end,
    scripted_core,
)


class CloselyLooking(Scheduler):
    """Takes no short cut: every sequence counts as one that may need a block or have something to tell."""

    def schedule(self, now: float) -> SchedulerOutput:
        for request in self._live.values():
            request.steady_until = 0
        return super().schedule(now)

    def update(self, output: ModelOutput, now: float) -> tuple[list[SequenceOutput], PlainTokens]:
        for request in self._live.values():
            request.plain_until = 0
        news, tokens = super().update(output, now)
        assert tokens == PlainTokens()
        return news, tokens


@dataclass(frozen=True)
class Step:
    """All that can be seen of one step."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    block_ids: dict[int, list[int]]


def small_core(generator: random.Random) -> EngineCore:
    """Sizes at which sequences wait, are preempted and share blocks."""
    block_size = generator.choice([1, 3, 4, 16])
    max_num_seqs = generator.randrange(1, 12)
    return scripted_core(
        num_blocks=generator.randrange(160 // block_size + 4, 700 // block_size + 8),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=generator.randrange(max_num_seqs, max_num_seqs + 60),
        max_in_flight=generator.choice([1, 2, 3]),
        prefix_caching=generator.random() < 0.5,
        clock=FakeClock(),
        faults={
            (generator.randrange(1, 30), generator.randrange(20)): RowFault.NON_FINITE_LOGITS
            for _ in range(3)
        },
    )


def random_submit(generator: random.Random, key: int, now: float) -> Submit:
    prompt = (generator.randrange(2, 5),) * generator.randrange(40)
    prompt += tuple(generator.randrange(2, 9) for _ in range(generator.randrange(1, 10)))
    moments = [now + 30 * generator.random() if generator.random() < 0.3 else None for _ in range(4)]
    return Submit(
        key,
        engine_request(
            prompt,
            generator.randrange(1, 90),
            generator.randrange(1, 3),
            arrival_time=now,
            priority=generator.randrange(10),
            eos_token_ids=(8,),
            stop_token_ids=(7,),
            min_tokens=generator.choice([0, 3]),
            deadlines=Deadlines(*moments),
            top_logprobs=generator.choice([None, None, 1]),
            prompt_top_logprobs=generator.choice([None, None, 1]),
        ),
    )


def live(seed: int, num_steps: int, scheduler: type[Scheduler]) -> tuple[list[Step], list[SchedulerOutput]]:
    """One random history of arrivals, aborts, faults and clocks, to its end."""
    generator = random.Random(seed)
    core = small_core(generator)
    core.scheduler.__class__ = scheduler
    steps: list[Step] = []
    key = 0
    clock = core._clock
    assert isinstance(clock, FakeClock)
    for number in range(5000):
        if number < num_steps:
            if generator.random() < 0.3:
                key += 1
                core.submit(random_submit(generator, key, clock()))
            if key and generator.random() < 0.05:
                reason = generator.choice(list(AbortReason))
                core.abort(Abort(generator.randrange(1, key + 1), generator.choice([None, 0]), reason))
            clock.advance(generator.random())
        elif not core.has_work:
            break
        told = core.step()
        core.scheduler.check_invariants()
        outputs = sorted(told.outputs, key=lambda output: (output.key, output.index))
        tables = {seq_id: list(request.block_ids) for seq_id, request in live_requests(core).items()}
        steps.append(Step(outputs, told.stats, tables))
    assert not core.has_work
    assert isinstance(core.runner, RecordingRunner)
    return steps, core.runner.plans


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), num_steps=st.integers(1, 120))
def test_short_cuts_change_nothing(seed: int, num_steps: int) -> None:
    assert live(seed, num_steps, Scheduler) == live(seed, num_steps, CloselyLooking)


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=30, deadline=None)
def test_same_rows_says_that_the_rows_are_those_of_the_step_before(seed: int) -> None:
    _, plans = live(seed, 60, Scheduler)
    for before, plan in zip([None, *plans], plans, strict=False):
        unchanged = before is not None and (plan.rows, plan.new, plan.removed) == (before.rows, (), ())
        assert plan.same_rows == unchanged
        if before is not None and plan.same_rows:
            assert plan.rows is before.rows


def decoding(num_rows: int = 4, **core: Any) -> EngineCore:
    """A core whose rows all decode, each at another place in its block."""
    it = scripted_core(num_blocks=200, block_size=16, **core)
    for key in range(1, num_rows + 1):
        it.submit(Submit(key, engine_request(tuple(range(2, 2 + 5 * key)), 60, eos_token_ids=())))
    for _ in range(3):
        it.step()
    return it


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_decoding_batch_is_one_tuple_of_rows_whatever_blocks_it_gets(in_flight: int) -> None:
    core = decoding(max_in_flight=in_flight)
    assert isinstance(core.runner, RecordingRunner)
    for _ in range(40):
        core.step()
    plans = core.runner.plans[-40:]
    assert len({id(plan.rows) for plan in plans}) == 1
    assert all(plan.same_rows for plan in plans)
    assert plans[0].rows == tuple(ScheduledSequence(seq_id, 1, True) for seq_id in (1, 2, 3, 4))
    given = [seq_id for plan in plans for seq_id in plan.new_block_ids]
    assert {given.count(seq_id) for seq_id in (1, 2, 3, 4)} <= {2, 3}


def test_a_decoding_batch_is_told_in_columns_and_its_end_is_not() -> None:
    core = decoding()
    step = core.step()
    assert step.news == ()
    assert (step.tokens.keys, step.tokens.indices) == ((1, 2, 3, 4), (0, 0, 0, 0))
    news: list[SequenceOutput] = []
    while core.has_work:
        news.extend(core.step().news)
    assert [(output.key, len(output.token_ids), output.is_last) for output in news] == [
        (key, 1, True) for key in (1, 2, 3, 4)
    ]


def test_what_asks_for_more_than_tokens_is_never_told_in_columns() -> None:
    core = scripted_core()
    core.submit(Submit(1, engine_request((5, 6, 7), 6, top_logprobs=0)))
    core.submit(Submit(2, engine_request((5, 6), 6)))
    columns: set[int] = set()
    while core.has_work:
        columns.update(core.step().tokens.keys)
    assert columns == {2}


def test_an_eos_that_min_tokens_holds_back_does_not_end_the_short_cut() -> None:
    """A real sampler never draws it so early; one that did would change nothing but this token's way."""
    core = scripted_core()
    core.submit(Submit(1, engine_request((12, 13, 14), 20, eos_token_ids=(12,), min_tokens=5)))
    assert [t for output in run_to_end(core) for t in output.token_ids] == [12, 13, 14, 12, 13, 14, 12]


def test_several_tokens_in_a_decoding_step_are_counted_anew() -> None:
    """A later runner drafts: the row was planned for one token, and three came."""
    core = decoding(1)
    scheduler = core.scheduler
    step = scheduler.schedule(0.0)
    (output,), tokens = scheduler.update(ModelOutput(step.step, (1,), ((7, 8, 9),)), 0.0)
    assert (output.token_ids, tokens) == ((7, 8, 9), PlainTokens())
    scheduler.check_invariants()
    (row,) = scheduler.schedule(0.0).rows
    assert (row.num_tokens, row.sample) == (3, True)


def request_of(core: EngineCore, seq_id: int = 1) -> Request:
    return live_requests(core)[seq_id]


@pytest.mark.parametrize("break_it", ["steady", "plain", "row"])
def test_a_short_cut_that_is_no_longer_true_is_found(break_it: str) -> None:
    core = decoding()
    core.scheduler.check_invariants()
    request = request_of(core)
    match break_it:
        case "steady":
            request.steady_until = 1000
            request.num_pending_tokens += 1
        case "plain":
            request.has_news = True
        case _:
            request.decode_row = replace(request.decode_row, seq_id=9)
    with pytest.raises(AssertionError):
        core.scheduler.check_invariants()
