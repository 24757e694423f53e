"""Who is computed when: two phases, chunks, preemption, order, clocks, endings, figures.

Most tests run the whole engine core over a scripted runner, which refuses a step whose block tables do
not lead to the sequence's own tokens.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from typing import Any

import pytest

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import Abort, AbortReason, Deadlines, FailureKind, SequenceOutput, Submit
from photon_grpc.options import KVCacheOptions
from photon_grpc.runner.scripted import echo, logprobs_of
from photon_grpc.scheduler.kv_cache_manager import KVCacheManager
from photon_grpc.scheduler.output import ModelOutput, PlainTokens, RowFault, SamplerSpec
from photon_grpc.scheduler.request import RequestStatus
from photon_grpc.scheduler.scheduler import Scheduler
from photon_grpc.types import FinishReason
from tests.photon_grpc.scheduler.test_kv_cache_manager import sequence
from tests.support.aftermath import assert_core_clean, assert_told_once
from tests.support.builders import (
    FakeClock,
    RecordingRunner,
    engine_request,
    generate,
    live_requests,
    run_to_end,
    sampling,
    scripted_core,
)

PROMPT = tuple(range(10, 20))


def echoed(prompt: tuple[int, ...], count: int, index: int = 0) -> list[int]:
    return [echo(prompt, index, position) for position in range(count)]


def plans(core: EngineCore) -> RecordingRunner:
    assert isinstance(core.runner, RecordingRunner)
    return core.runner


def submit(core: EngineCore, key: int, prompt: tuple[int, ...], max_tokens: int = 4, **values: Any) -> None:
    core.submit(Submit(key, engine_request(prompt, max_tokens, **values)))


def tokens_by_key(outputs: list[SequenceOutput]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for output in outputs:
        tokens[output.key].extend(output.token_ids)
    return dict(tokens)


def test_a_budget_smaller_than_the_batch_would_starve_decodes() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        scripted_core(max_num_seqs=5, max_num_batched_tokens=4)


# --- two phases, one budget -----------------------------------------------------------------------


def test_running_sequences_go_first_and_newcomers_get_what_is_left() -> None:
    core = scripted_core(max_num_batched_tokens=12, num_blocks=64)
    submit(core, 1, PROMPT, 8)
    core.step()
    submit(core, 2, tuple(range(40, 60)), 8)
    core.step()
    assert [(row.seq_id, row.num_tokens, row.sample) for row in plans(core).plans[1].rows] == [
        (1, 1, True),
        (2, 11, False),
    ]
    core.step()
    assert [(row.seq_id, row.num_tokens, row.sample) for row in plans(core).plans[2].rows] == [
        (1, 1, True),
        (2, 9, True),
    ]


def test_a_newcomer_joins_within_one_step() -> None:
    core = scripted_core(num_blocks=64)
    submit(core, 1, PROMPT, 20)
    core.step()
    submit(core, 2, PROMPT[:3], 4)
    outputs = core.step().outputs
    assert {output.key for output in outputs} == {1, 2}


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("priority", [0, 9])
def test_fault_18_no_running_decode_misses_a_step_while_a_long_prompt_prefills(
    in_flight: int, priority: int
) -> None:
    """Bug of an ancestor: decode stalled until a waiting prefill was through.

    With the higher priority the long prompt stands before the decodes in rank and still may not take
    the tokens that they need.
    """
    core = scripted_core(
        num_blocks=200,
        max_num_batched_tokens=16,
        max_num_seqs=6,
        max_in_flight=in_flight,
        prefix_caching=False,
    )
    for key in range(1, 6):
        submit(core, key, (key + 10,) * 3, 80)
    for _ in range(3):
        core.step()
    submit(core, 6, tuple(range(2, 402)), 2, priority=priority)
    prefill_steps = 0
    while live_requests(core)[6].first_token_time is None:
        core.step()
        plan = plans(core).plans[-1]
        rows = {row.seq_id: row for row in plan.rows}
        assert all(rows[seq_id].sample for seq_id in range(1, 6)), "a decode waited"
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows) <= 16
        prefill_steps += 6 in rows
    assert prefill_steps >= 400 // 11
    run_to_end(core)
    assert_core_clean(core)


def test_a_batch_as_wide_as_the_budget_still_prefills() -> None:
    core = scripted_core(num_blocks=200, max_num_batched_tokens=3, max_num_seqs=3)
    for key in (1, 2):
        submit(core, key, (key + 10,), 100)
    core.step()
    submit(core, 3, tuple(range(2, 22)), 1)
    for _ in range(25):
        core.step()
    assert 3 not in live_requests(core)


@pytest.mark.parametrize("budget", [8, 9, 16, 64, 500])
def test_chunked_prefill_gives_the_tokens_of_an_unchunked_one(budget: int) -> None:
    prompt = tuple(range(2, 102))
    core = scripted_core(num_blocks=64, max_num_batched_tokens=budget)
    assert generate(core, only=engine_request(prompt, 10)) == {"only": echoed(prompt, 10)}
    chunks = plans(core).tokens_of(1)
    assert chunks[:-9] == [budget] * (100 // budget) + ([100 % budget] if 100 % budget else [])
    assert chunks[-9:] == [1] * 9


def test_fault_18_a_prompt_over_the_budget_is_chunked_and_the_engine_lives_on() -> None:
    """Bug of an ancestor: a prompt longer than the token budget killed the loop."""
    core = scripted_core(num_blocks=200, max_num_batched_tokens=8)
    prompt = tuple(range(2, 402))
    assert generate(core, long=engine_request(prompt, 5)) == {"long": echoed(prompt, 5)}
    assert generate(core, short=engine_request(PROMPT)) == {"short": echoed(PROMPT, 4)}


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_fault_14_slots_written_are_zero_to_n_minus_one_and_the_first_token_is_the_prompt_s(
    length: int,
) -> None:
    """Bug of two ancestors: the first decode fed the last prompt token again, or skipped a slot.

    `prompt + outputs - 1` tokens are computed, each once: the last output is never fed.
    """
    core = scripted_core(block_size=4)
    prompt = tuple(range(10, 10 + length))
    submit(core, 1, prompt, 6)
    first = core.step()
    assert [output.token_ids for output in first.outputs] == [(prompt[0],)]
    run_to_end(core)
    assert plans(core).tokens_of(1) == [length, 1, 1, 1, 1, 1]


def test_more_requests_than_places_run_one_after_another() -> None:
    core = scripted_core(max_num_seqs=2, max_num_batched_tokens=64, num_blocks=64)
    for key in range(1, 8):
        submit(core, key, (key, key + 1), 3)
    widths = []
    while core.has_work:
        core.step()
        widths.append(len(plans(core).plans[-1].rows))
        assert core.scheduler.num_running <= 2
    assert max(widths) == 2


def test_fault_19_500_queued_with_four_places_all_finish() -> None:
    """Bug of an ancestor: with more than 32 queued nothing was admitted and the loop ended silently."""
    core = scripted_core(max_num_seqs=4, max_num_batched_tokens=32, num_blocks=40)
    generator = random.Random(1)
    requests = {
        f"r{number}": engine_request(
            tuple(generator.randrange(2, 900) for _ in range(generator.randrange(1, 20))),
            generator.randrange(1, 8),
        )
        for number in range(500)
    }
    tokens = generate(core, **requests)
    for name, request in requests.items():
        assert tokens[name] == echoed(request.prompt_token_ids, request.max_tokens)
    assert_core_clean(core)


# --- preemption -----------------------------------------------------------------------------------


def crowded(**overrides: Any) -> EngineCore:
    """Two sequences that grow to 6 blocks each in a pool of 8."""
    return scripted_core(**({"num_blocks": 8, "block_size": 4, "prefix_caching": False} | overrides))


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_fault_11_a_preempted_stream_repeats_and_loses_nothing(in_flight: int, prefix_caching: bool) -> None:
    """Bugs of the ancestors: a resumed stream sent its text again; a failed allocation failed all."""
    core = crowded(max_in_flight=in_flight, prefix_caching=prefix_caching)
    first, second = tuple(range(10, 18)), tuple(range(30, 38))
    tokens = generate(core, first=engine_request(first, 16), second=engine_request(second, 16))
    assert tokens == {"first": echoed(first, 16), "second": echoed(second, 16)}
    stats = core.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.generation_tokens == 32
    assert (stats.prompt_tokens, stats.prefix_hits) == (16, 0), "finding one's own blocks again is no sharing"
    assert stats.prefix_queries == 16
    assert_core_clean(core)


def test_pool_exhaustion_hits_the_lowest_rank_and_harms_nobody_else() -> None:
    core = crowded(num_blocks=12)
    requests = {key: tuple(range(10 * key, 10 * key + 8)) for key in (1, 2, 3)}
    for key, priority in ((1, 0), (2, 5), (3, 1)):
        submit(core, key, requests[key], 12, priority=priority)
    preempted_first = None
    while core.has_work and preempted_first is None:
        live = live_requests(core)
        core.step()
        preempted_first = next((i for i, r in live.items() if r.num_preemptions), None)
    assert preempted_first == 1
    live = live_requests(core)
    assert live[1].status is RequestStatus.PREEMPTED
    assert live[1].block_ids == []
    assert (live[2].num_preemptions, live[3].num_preemptions) == (0, 0)
    core.scheduler.check_invariants()
    outputs = run_to_end(core)
    assert all(output.failure is None for output in outputs)
    assert next(o.key for o in outputs if o.is_last) == 2


def test_timings_tell_of_preemptions_and_keep_the_first_clock() -> None:
    clock = FakeClock()
    core = crowded(clock=clock)
    for key in (1, 2):
        submit(core, key, tuple(range(10 * key, 10 * key + 8)), 16)
    last: dict[int, SequenceOutput] = {}
    while core.has_work:
        for output in core.step().outputs:
            if output.is_last:
                last[output.key] = output
        clock.advance(1.0)
    assert last[1].timings is not None
    assert last[2].timings is not None
    assert last[1].timings.preemptions == 0
    assert last[2].timings.preemptions >= 1
    assert last[2].timings.started == last[2].timings.first_token == 1000.0
    assert last[2].timings.end is not None
    assert last[2].timings.end > 1016.0


def test_a_trace_on_24_blocks_completes() -> None:
    """Bug of an ancestor: a KV cache of fixed size ran out during decode at 24 blocks."""
    core = scripted_core(
        num_blocks=24, block_size=16, max_num_seqs=16, max_num_batched_tokens=128, prefix_caching=False
    )
    generator = random.Random(24)
    requests = {
        f"r{number}": engine_request(
            tuple(generator.randrange(2, 900) for _ in range(generator.randrange(1, 200))),
            generator.randrange(1, 180),
            eos_token_ids=(),
        )
        for number in range(40)
    }
    tokens = generate(core, **requests)
    assert all(tokens[n] == echoed(r.prompt_token_ids, r.max_tokens) for n, r in requests.items())
    assert core.scheduler.stats().preemptions > 0
    assert_core_clean(core)


def test_open_ended_requests_still_batch() -> None:
    """Bug of an ancestor: a request without max_tokens reserved the whole context."""
    context, options = 512, KVCacheOptions()
    num_blocks = 4 * context // options.block_size
    core = scripted_core(
        num_blocks=num_blocks, block_size=options.block_size, max_num_seqs=64, max_num_batched_tokens=1024
    )
    for key in range(1, 65):
        # The whole context that is left, as a request without max_tokens gets it.
        submit(core, key, (key + 1,) * 16, context - 16, eos_token_ids=())
    assert 64 * core.scheduler.kv.blocks_for(context) > num_blocks
    core.step()
    assert core.scheduler.num_running == 64
    for _ in range(8):
        assert len({output.key for output in core.step().outputs}) == 64
    assert core.scheduler.stats().preemptions == 0


def preempted_with_a_step_under_way(scheduler: Scheduler) -> ModelOutput:
    """Two prompts fill the pool; before the step is collected, the first preempts the second."""
    prompts = {1: tuple(range(10, 18)), 2: tuple(range(30, 38))}
    for seq_id, prompt in prompts.items():
        scheduler.add(sequence(seq_id, prompt))
    first = scheduler.schedule(0.0)
    assert [row.seq_id for row in first.rows] == [1, 2]
    second = scheduler.schedule(0.0)
    assert [row.seq_id for row in second.rows] == [1]
    assert second.removed == (2,)
    return ModelOutput(first.step, (1, 2), ((10,), (30,)), faults={2: RowFault.NON_FINITE_LOGITS})


def small_scheduler() -> Scheduler:
    return Scheduler(
        KVCacheManager(4, 4, prefix_caching=True),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        priority_boost_s=30.0,
    )


def test_a_sequence_preempted_before_its_fault_was_known_leaves_nothing_to_find() -> None:
    """Its blocks were free, and findable, before anybody knew that they were bad."""
    scheduler = small_scheduler()
    collected = preempted_with_a_step_under_way(scheduler)
    outputs, _ = scheduler.update(collected, 0.0)
    assert [output.failure for output in outputs] == [None, FailureKind.REQUEST_FAULT]
    scheduler.check_invariants()
    assert scheduler.kv.find_prefix(sequence(3, tuple(range(30, 39)))) == []
    assert len(scheduler.kv.find_prefix(sequence(4, tuple(range(10, 19))))) == 2


@pytest.mark.parametrize("end", ["abort", "clock", "finish"])
def test_a_fault_that_comes_after_the_end_of_its_sequence_still_leaves_nothing_to_find(end: str) -> None:
    """The call is over and nobody hears of the fault; its blocks would poison whoever shares them."""
    scheduler = small_scheduler()
    prompt = tuple(range(10, 18))
    scheduler.add(sequence(1, prompt, eos_token_ids=frozenset({50}), deadlines=Deadlines(end_by=1.0)))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    now, faulty = 0.5, first
    match end:
        case "abort":
            scheduler.abort(1, None, None, now)
        case "clock":
            now = 1.5
            scheduler.schedule(now)
        case "finish":
            (last,), _ = scheduler.update(ModelOutput(first.step, (1,), ((50,),)), now)
            assert last.finish is not None
            faulty = second
    assert not scheduler.has_unfinished
    later = sequence(2, (*prompt, 18))
    assert len(scheduler.kv.find_prefix(later)) == 2
    faults = {1: RowFault.NON_FINITE_LOGITS}
    dropped = scheduler.update(ModelOutput(faulty.step, (1,), ((0,),), faults=faults), now)
    assert dropped == ([], PlainTokens())
    assert scheduler.kv.find_prefix(later) == []
    scheduler.check_invariants()


def test_a_preempted_sequence_waits_for_the_token_that_is_under_way() -> None:
    scheduler = small_scheduler()
    collected = preempted_with_a_step_under_way(scheduler)
    scheduler.abort(1, None, None, 0.0)
    assert scheduler.schedule(0.0).is_empty, "resumed without its latest token"
    outputs, _ = scheduler.update(ModelOutput(collected.step, (1, 2), ((10,), (30,))), 0.0)
    assert [output.token_ids for output in outputs] == [(30,)]
    (row,) = scheduler.schedule(0.0).rows
    assert (row.seq_id, row.num_tokens, row.sample) == (2, 5, True), (
        "9 tokens; the first of its blocks was not reused"
    )


@pytest.mark.parametrize("in_flight", [1, 2])
def test_prompt_logprobs_come_once_and_whole_after_a_preemption(in_flight: int) -> None:
    core = scripted_core(
        num_blocks=4, block_size=4, max_num_batched_tokens=12, max_num_seqs=4, max_in_flight=in_flight
    )
    prompt = tuple(range(30, 38))
    submit(core, 1, tuple(range(10, 18)), 8)
    submit(core, 2, prompt, 8, prompt_top_logprobs=1)
    told = [output for output in run_to_end(core) if output.key == 2 and output.prompt_logprobs]
    assert core.scheduler.stats().preemptions > 0
    assert len(told) == 1
    assert told[0].token_ids == prompt[:1]
    assert told[0].prompt_logprobs == tuple(logprobs_of(token, 1) for token in prompt[1:])


def test_prompt_logprobs_of_a_life_before_the_preemption_are_dropped_however_late_they_come() -> None:
    scheduler = Scheduler(
        KVCacheManager(4, 4, prefix_caching=True),
        max_num_seqs=4,
        max_num_batched_tokens=12,
        priority_boost_s=30.0,
    )
    asking = SamplerSpec(sampling(), prompt_top_logprobs=0)
    scheduler.add(sequence(1, tuple(range(10, 18))))
    scheduler.add(sequence(2, tuple(range(30, 38)), sampler=asking))
    old = scheduler.schedule(0.0)
    assert [(row.seq_id, row.num_tokens) for row in old.rows] == [(1, 8), (2, 4)]
    assert scheduler.schedule(0.0).removed == (2,)
    scheduler.abort(1, None, None, 0.0)
    again = scheduler.schedule(0.0)
    assert [(new.seq_id, new.num_computed_tokens) for new in again.new] == [(2, 0)]
    stale = {2: tuple(logprobs_of(token, 0) for token in range(31, 35))}
    dropped = scheduler.update(ModelOutput(old.step, (1,), ((10,),), prompt_logprobs=stale), 0.0)
    assert dropped == ([], PlainTokens())
    whole = {2: tuple(logprobs_of(token, 0) for token in range(31, 38))}
    (output,), _ = scheduler.update(ModelOutput(again.step, (2,), ((30,),), prompt_logprobs=whole), 0.0)
    assert output.prompt_logprobs == whole[2]


def test_nobody_is_admitted_in_a_step_that_had_to_preempt() -> None:
    """What the victim gave back is for those who run; a newcomer of any rank waits for the next step."""
    scheduler = small_scheduler()
    for seq_id in (1, 2):
        scheduler.add(sequence(seq_id, tuple(range(10 * seq_id, 10 * seq_id + 8))))
    scheduler.schedule(0.0)
    scheduler.add(sequence(3, (5,), priority=9))
    tight = scheduler.schedule(0.0)
    assert (tight.removed, tight.new, [row.seq_id for row in tight.rows]) == ((2,), (), [1])
    assert [new.seq_id for new in scheduler.schedule(0.0).new] == [3]


# --- order ----------------------------------------------------------------------------------------


def finishing_order(core: EngineCore) -> list[int]:
    return [output.key for output in run_to_end(core) if output.is_last]


def test_priority_first_then_arrival() -> None:
    core = scripted_core(max_num_seqs=1, max_num_batched_tokens=64)
    for key, (priority, arrival) in enumerate([(0, 1000.0), (3, 1002.0), (3, 1001.0), (0, 999.0)], start=1):
        submit(core, key, PROMPT, 2, priority=priority, arrival_time=arrival)
    assert finishing_order(core) == [3, 2, 4, 1]


def test_of_equal_priority_the_one_with_the_least_slack_goes_first() -> None:
    core = scripted_core(max_num_seqs=1, max_num_batched_tokens=64)
    for key, end_by in enumerate([None, 1012.0, 1003.0, 1900.0, 1004.0], start=1):
        submit(core, key, PROMPT, 2, arrival_time=1000.0, deadlines=Deadlines(end_by=end_by))
    assert finishing_order(core) == [3, 5, 2, 1, 4]


def test_an_endless_flow_of_calls_without_slack_starves_nobody() -> None:
    """Two calls that must start at once come for each that is served: the patient one still gets its turn."""
    clock = FakeClock()
    core = scripted_core(max_num_seqs=1, max_num_batched_tokens=64, clock=clock, priority_boost_s=30.0)
    submit(core, 1, PROMPT, 1, arrival_time=clock())
    keys = itertools.count(2)
    while 1 in live_requests(core):
        for _ in range(2):
            deadlines = Deadlines(start_by=clock() + 2.0)
            submit(core, next(keys), PROMPT, 1, arrival_time=clock(), deadlines=deadlines)
        core.step()
        core.step()
        clock.advance(1.0)
        assert clock() <= 1000.0 + 15.0 + 2.0, "starved"
    assert clock() > 1000.0 + 10.0, "slack had no effect"


def test_an_endless_flow_of_urgent_requests_starves_nobody() -> None:
    """The first in, of the lowest priority, starts within `priority * boost` of its arrival."""
    clock = FakeClock()
    core = scripted_core(max_num_seqs=1, max_num_batched_tokens=64, clock=clock, priority_boost_s=30.0)
    submit(core, 1, PROMPT, 1, arrival_time=clock())
    keys = itertools.count(2)
    while 1 in live_requests(core):
        for _ in range(2):
            submit(core, next(keys), PROMPT, 1, priority=9, arrival_time=clock())
        core.step()
        core.step()
        clock.advance(1.0)
        assert clock() <= 1000.0 + 9 * 30.0 + 2.0, "starved"
    assert clock() > 1000.0 + 9 * 30.0 - 2.0, "priority had no effect"


def test_a_long_prompt_does_not_starve_behind_short_ones() -> None:
    """Bug of an ancestor: rows of equal length were grouped, and the long ones waited for ever."""
    clock = FakeClock()
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=8, clock=clock, prefix_caching=False)
    keys = itertools.count(2)

    def short() -> None:
        submit(core, next(keys), (5, 6, 7), 6, arrival_time=clock())

    for _ in range(8):
        short()
    core.step()
    submit(core, 1, tuple(range(10, 70)), 2, arrival_time=clock())
    for _ in range(12):
        clock.advance(0.01)
        short()
        if any(output.key == 1 and output.token_ids for output in core.step().outputs):
            return
    raise AssertionError("everyone behind it should have waited")


# --- clocks ---------------------------------------------------------------------------------------

_CLOCKS = {
    "start_by": FailureKind.QUEUE_TIMEOUT,
    "first_token_by": FailureKind.FIRST_TOKEN_TIMEOUT,
    "end_by": FailureKind.MAX_DURATION,
    "finish_by": FinishReason.TIME_LIMIT,
}
_STATES = ("waiting", "mid_chunk", "decoding", "preempted", "preempted_before_first_token")


def in_state(state: str, in_flight: int, **values: Any) -> tuple[EngineCore, FakeClock]:
    """A core whose request 2 is in `state`; request 1 keeps the core busy."""
    clock = FakeClock()
    tight = state.startswith("preempted")
    core = scripted_core(
        num_blocks=8 if tight else 64,
        block_size=4,
        max_num_seqs=1 if state == "waiting" else 4,
        max_num_batched_tokens=8 if state in ("mid_chunk", "preempted_before_first_token") else 64,
        max_in_flight=in_flight,
        clock=clock,
        prefix_caching=False,
    )
    submit(core, 1, tuple(range(30, 36)), 26)
    if state != "mid_chunk":
        core.step()
    length = {"mid_chunk": 40, "preempted_before_first_token": 24}.get(state, 8)
    submit(core, 2, tuple(range(40, 40 + length)), 8 if length == 24 else 20, **values)
    request = live_requests(core)[2]

    def reached() -> bool:
        match state:
            case "waiting":
                return request.status is RequestStatus.WAITING
            case "mid_chunk":
                return 0 < request.num_computed_tokens < 40
            case "decoding":
                return request.num_output_tokens >= 2
            case _:
                return request.status is RequestStatus.PREEMPTED

    for _ in range(40):
        if reached():
            return core, clock
        core.step()
    raise AssertionError(f"never {state}")


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("state", _STATES)
@pytest.mark.parametrize("name", _CLOCKS)
def test_each_clock_in_each_state(name: str, state: str, in_flight: int) -> None:
    deadlines = Deadlines(**{name: 1050.0})
    core, clock = in_state(state, in_flight, deadlines=deadlines)
    request = live_requests(core)[2]
    has_token = request.first_token_time is not None or request.num_pending_tokens
    idle_clock = (name == "start_by" and state != "waiting") or (name == "first_token_by" and has_token)
    clock.advance(49.9)
    outputs = list(core.step().outputs)
    assert not any(output.is_last for output in outputs if output.key == 2)
    clock.advance(0.1)
    if name == "first_token_by" and request.first_token_time is None and request.num_pending_tokens:
        idle_clock = False
    outputs = list(core.step().outputs)
    ended = [output for output in outputs if output.key == 2 and output.is_last]
    if idle_clock:
        assert not ended
    else:
        (last,) = ended
        expected = _CLOCKS[name]
        assert expected in (last.failure, last.finish and last.finish.reason)
        assert request.block_ids == []
        assert last.timings is not None
        assert last.timings.end == 1050.0
    outputs = run_to_end(core)
    assert sum(output.is_last for output in outputs if output.key == 2) == (1 if idle_clock else 0)
    assert_core_clean(core)


def test_the_hard_deadline_wins_over_the_others() -> None:
    clock = FakeClock()
    core = scripted_core(clock=clock)
    submit(core, 1, PROMPT, deadlines=Deadlines(1001.0, 1001.0, 1001.0, 1001.0))
    clock.advance(2)
    (last,) = core.step().outputs
    assert last.failure is FailureKind.MAX_DURATION


def test_a_time_limit_keeps_what_there_is() -> None:
    clock = FakeClock()
    core = scripted_core(clock=clock)
    submit(core, 1, PROMPT, 50, deadlines=Deadlines(finish_by=1005.0))
    outputs: list[SequenceOutput] = []
    while core.has_work:
        outputs.extend(core.step().outputs)
        clock.advance(1.0)
    assert tokens_by_key(outputs) == {1: echoed(PROMPT, 5)}
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.reason is FinishReason.TIME_LIMIT


# --- aborts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", list(AbortReason))
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("state", _STATES)
def test_cancel_in_each_state_frees_the_blocks_at_once(
    state: str, in_flight: int, reason: AbortReason
) -> None:
    """Bug of an ancestor: after a disconnect the tokens went on and the blocks were held."""
    core, _ = in_state(state, in_flight)
    request = live_requests(core)[2]
    others = sum(len(r.block_ids) for i, r in live_requests(core).items() if i != 2)
    core.abort(Abort(2, reason=reason))
    assert request.block_ids == []
    assert core.scheduler.stats().kv_blocks_used == others
    core.abort(Abort(2))
    outputs = run_to_end(core)
    of_two = [output for output in outputs if output.key == 2]
    assert len(of_two) == 1, "a late result of an aborted sequence was told"
    assert of_two[0].is_last
    expected = {
        AbortReason.CANCELLED: (None, FinishReason.ABORTED),
        AbortReason.OPERATOR: (FailureKind.OPERATOR_ABORT, None),
        AbortReason.DRAINING: (FailureKind.DRAINING, None),
    }
    finish = of_two[0].finish
    assert (of_two[0].failure, finish and finish.reason) == expected[reason]
    assert_core_clean(core)


def test_an_aborted_index_leaves_its_siblings_alone() -> None:
    core = scripted_core()
    submit(core, 1, PROMPT, 6, n=3)
    core.step()
    core.abort(Abort(1, index=1))
    outputs = run_to_end(core)
    tokens: Counter[int] = Counter()
    for output in outputs:
        tokens[output.index] += len(output.token_ids)
    assert (tokens[0], tokens[2]) == (5, 5)
    assert tokens[1] == 0
    assert_core_clean(core)


def test_aborting_what_nobody_knows_is_a_lost_race() -> None:
    core = scripted_core()
    core.abort(Abort(77))
    assert core.step().outputs == ()


# --- endings and results --------------------------------------------------------------------------


def test_fault_22_every_eos_and_stop_id_ends_a_completion() -> None:
    for ids, field, reason in (
        ({"eos_token_ids": (1, 12)}, "eos_token_id", FinishReason.EOS),
        ({"stop_token_ids": (12,)}, "stop_token_id", FinishReason.STOP),
    ):
        core = scripted_core()
        submit(core, 1, PROMPT, 9, **ids)
        last = run_to_end(core)[-1]
        assert last.finish is not None
        assert (last.finish.reason, getattr(last.finish, field)) == (reason, 12)
        assert core.scheduler.stats().generation_tokens == 3


def test_min_tokens_holds_back_eos() -> None:
    core = scripted_core()
    prompt = (12, 13, 14)
    submit(core, 1, prompt, 20, eos_token_ids=(12,), min_tokens=5)
    outputs = run_to_end(core)
    assert tokens_by_key(outputs)[1] == echoed(prompt, 7)


def test_eos_on_the_last_token_is_eos_and_not_the_length() -> None:
    core = scripted_core()
    submit(core, 1, PROMPT, 3, eos_token_ids=(12,))
    last = run_to_end(core)[-1]
    assert last.finish is not None
    assert last.finish.reason is FinishReason.EOS


def test_the_length_finish_is_the_one_asked_for() -> None:
    core = scripted_core()
    submit(core, 1, PROMPT, 3, length_finish=FinishReason.CONTEXT_LIMIT)
    last = run_to_end(core)[-1]
    assert last.finish is not None
    assert last.finish.reason is FinishReason.CONTEXT_LIMIT


def test_several_tokens_per_step_stop_at_the_first_that_ends_it() -> None:
    """A later runner drafts: tokens behind EOS or max_tokens must not come out."""
    scheduler = small_scheduler()
    scheduler.add(sequence(1, (5, 6), eos_token_ids=frozenset({9})))
    step = scheduler.schedule(0.0).step
    (output,), _ = scheduler.update(ModelOutput(step, (1,), ((7, 9, 8),)), 0.0)
    assert output.token_ids == (7, 9)
    assert output.finish is not None
    assert output.finish.eos_token_id == 9
    scheduler.add(sequence(2, (5, 6), max_tokens=2))
    step = scheduler.schedule(0.0).step
    (output,), _ = scheduler.update(ModelOutput(step, (2,), ((7, 7, 7),)), 0.0)
    assert output.token_ids == (7, 7)
    scheduler.check_invariants()


def test_late_results_of_an_ended_sequence_are_dropped() -> None:
    core = scripted_core(max_in_flight=2)
    submit(core, 1, PROMPT, 9, eos_token_ids=(11,))
    outputs = run_to_end(core)
    assert tokens_by_key(outputs) == {1: [10, 11]}
    assert sum(len(plan.rows) for plan in plans(core).plans) == 3, "one step was already under way"


def test_no_token_is_computed_beyond_max_tokens_even_with_steps_under_way() -> None:
    core = scripted_core(max_in_flight=2)
    submit(core, 1, PROMPT, 4)
    assert tokens_by_key(run_to_end(core)) == {1: echoed(PROMPT, 4)}
    assert plans(core).tokens_of(1) == [10, 1, 1, 1]


def test_removed_sequences_are_told_to_the_runner_exactly_once() -> None:
    core = crowded()
    for key in (1, 2, 3):
        submit(core, key, tuple(range(10 * key, 10 * key + 6)), 14)
    run_to_end(core)
    submit(core, 4, PROMPT)
    core.step()
    entered: Counter[int] = Counter()
    removed: Counter[int] = Counter()
    for plan in plans(core).plans:
        removed.update(plan.removed)
        assert all(removed[seq_id] <= entered[seq_id] for seq_id in removed)
        entered.update(new.seq_id for new in plan.new)
        assert all(entered[seq_id] - removed[seq_id] in (0, 1) for seq_id in entered)
    assert {seq_id: entered[seq_id] for seq_id in (1, 2, 3)} == dict(removed)


# --- figures --------------------------------------------------------------------------------------


def test_the_figures_balance() -> None:
    core = scripted_core(num_blocks=64, block_size=4)
    shared = tuple(range(100, 112))
    for key in range(1, 6):
        submit(core, key, (*shared, key), 3)
    waiting = core.scheduler.stats()
    assert (waiting.waiting, waiting.waiting_tokens, waiting.running) == (5, 65, 0)
    outputs = run_to_end(core)
    stats = core.scheduler.stats()
    assert stats.prompt_tokens == stats.prefix_queries == 65
    assert stats.prefix_hits == 4 * 12
    assert stats.generation_tokens == sum(len(output.token_ids) for output in outputs) == 15
    assert stats.steps == len(plans(core).plans)
    computed = sum(plan.num_tokens for plan in plans(core).plans)
    assert computed == 65 - stats.prefix_hits + 15 - 5
    assert (stats.kv_blocks_total, stats.block_size) == (64, 4)
    assert_core_clean(core)


def test_fault_01_a_row_fault_is_counted_and_ends_that_row_alone() -> None:
    core = scripted_core(faults={(3, 2): RowFault.NON_FINITE_LOGITS})
    submit(core, 1, (5, 6, 7), 6)
    submit(core, 2, PROMPT, 6)
    outputs = run_to_end(core)
    ends = {output.key: output for output in outputs if output.is_last}
    assert ends[1].failure is FailureKind.REQUEST_FAULT
    assert tokens_by_key(outputs) == {1: [5, 6], 2: echoed(PROMPT, 6)}
    assert core.scheduler.stats().faults == 1
    assert_told_once(core, outputs, (1, 2))
    assert_core_clean(core)


def test_a_full_pool_wastes_at_most_seven_percent_of_its_slots() -> None:
    """The ancestors claimed a share and measured none.

    A mixed load of contexts from 128 to 384 tokens keeps the default-sized blocks scarce; the share of
    slots that hold a token is averaged over the steps in which no block was left.
    """
    options = KVCacheOptions()
    core = scripted_core(
        num_blocks=320,
        block_size=options.block_size,
        max_num_seqs=64,
        max_num_batched_tokens=512,
    )
    generator = random.Random(93)
    for key in range(1, 121):
        total = generator.randrange(128, 385)
        length = generator.randrange(64, total)
        prompt = tuple(generator.randrange(2, 1000) for _ in range(length))
        submit(core, key, prompt, total - length, eos_token_ids=())
    shares = []
    while core.has_work:
        core.step()
        stats = core.scheduler.stats()
        if stats.kv_blocks_used == stats.kv_blocks_total:
            shares.append(stats.kv_slots_used / (stats.kv_blocks_used * stats.block_size))
    assert len(shares) >= 20, "the pool was hardly ever filled to its last block"
    assert sum(shares) / len(shares) >= 0.93
    assert core.scheduler.stats().preemptions > 0
    assert_core_clean(core)


def test_clocks_of_ended_requests_do_not_pile_up() -> None:
    clock = FakeClock()
    core = scripted_core(clock=clock)
    kept = engine_request((5, 6), 100, deadlines=Deadlines(end_by=clock() + 900))
    core.submit(Submit(1, kept))
    for key in range(2, 3000):
        core.submit(Submit(key, engine_request((5, 6), 1, deadlines=Deadlines(end_by=clock() + 900))))
        core.abort(Abort(key))
        if key % 50 == 0:
            core.step()
    assert len(core.scheduler._timers) < 1200
    clock.advance(1000)
    assert FailureKind.MAX_DURATION in [output.failure for output in core.step().outputs]
