"""Prompts beside decodes: who is held up, what a step may have of prompts then, and that everyone ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import SequenceOutput, Submit
from photon_grpc.runner.scripted import echo
from photon_grpc.scheduler.mixed_steps import MixedSteps
from photon_grpc.scheduler.request import Request
from tests.photon_grpc.scheduler.test_kv_cache_manager import sequence
from tests.support.builders import (
    FakeClock,
    RecordingRunner,
    engine_request,
    scripted_core,
)

MOST = 64
CHUNK = 8


def decoding(seq_id: int, first_token: float | None) -> Request:
    request = sequence(seq_id, (2, 3, 4), first_token_time=first_token)
    request.token_ids.append(5)
    request.num_computed_tokens = 3
    return request


def prefilling(seq_id: int, arrival: float) -> Request:
    return sequence(seq_id, (2, 3, 4), arrival_time=arrival, num_computed_tokens=1)


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens"):
        MixedSteps(-1)


def test_a_step_that_holds_nobody_up_has_all_that_fits() -> None:
    mixed = MixedSteps(CHUNK)
    assert mixed.limit(MOST, [], 9, 1.0) == MOST
    together = [decoding(1, 2.0), decoding(2, None), prefilling(3, 1.0)]
    assert mixed.limit(MOST, together, 0, None) == MOST


def test_decodes_that_had_begun_are_held_up_by_a_piece_at_a_time() -> None:
    mixed = MixedSteps(CHUNK)
    decodes = [decoding(number, 0.5) for number in range(4)]
    assert mixed.limit(MOST, decodes, 1, 1.0) == CHUNK
    assert mixed.limit(MOST, [*decodes, prefilling(9, 1.0)], 0, None) == CHUNK
    assert mixed.limit(5, decodes, 1, 1.0) == 5
    assert MixedSteps(0).limit(MOST, decodes, 1, 1.0) == MOST


def test_the_longer_step_of_many_decodes_has_more_pieces() -> None:
    mixed = MixedSteps(CHUNK)
    for num_decodes, num_pieces in ((127, 1), (128, 2), (255, 2), (256, 3)):
        decodes = [decoding(number, 0.5) for number in range(num_decodes)]
        assert mixed.limit(MOST, decodes, 1, 1.0) == num_pieces * CHUNK


def test_a_few_do_not_hold_up_many() -> None:
    mixed = MixedSteps(CHUNK)
    decodes = [decoding(1, 0.5), decoding(2, 0.5)]
    assert [mixed.limit(MOST, decodes, waiting, 1.0) for waiting in (1, 3, 4, 7, 8, 1000)] == [
        8,
        8,
        16,
        24,
        32,
        MOST,
    ]


def test_those_of_a_burst_that_have_begun_count_with_those_that_wait() -> None:
    """Or its last prompts would come in small pieces, once most of it decodes."""
    mixed = MixedSteps(CHUNK)
    running = [decoding(1, 0.5), *(decoding(number, 3.0) for number in range(2, 6)), prefilling(9, 1.0)]
    assert mixed.limit(MOST, running, 0, None) == 5 * CHUNK


def test_who_waited_for_something_else_begins_to_wait_when_a_step_is_full() -> None:
    """Else a queue that is never empty would count everyone as having come together."""
    mixed = MixedSteps(CHUNK)
    decodes = [decoding(number, 5.0) for number in range(4)]
    assert mixed.limit(MOST, decodes, 1, 1.0) == MOST
    mixed.had_room(6.0)
    assert mixed.limit(MOST, decodes, 1, 1.0) == CHUNK


@given(
    chunk=st.integers(1, 100),
    most=st.integers(1, 200),
    firsts=st.lists(st.none() | st.floats(0, 10), max_size=20),
    waiting=st.integers(0, 50),
    arrivals=st.lists(st.floats(0, 10), max_size=5),
    arrival=st.none() | st.floats(0, 10),
    had_room=st.none() | st.floats(0, 10),
)
def test_there_is_always_some_progress_and_never_more_than_fits(
    chunk: int,
    most: int,
    firsts: Sequence[float | None],
    waiting: int,
    arrivals: Sequence[float],
    arrival: float | None,
    had_room: float | None,
) -> None:
    mixed = MixedSteps(chunk)
    if had_room is not None:
        mixed.had_room(had_room)
    running = [decoding(number, first) for number, first in enumerate(firsts)]
    running += [prefilling(100 + number, moment) for number, moment in enumerate(arrivals)]
    limit = mixed.limit(most, running, waiting, arrival)
    assert min(chunk, most) <= limit <= most
    # More who wait never make it less.
    assert mixed.limit(most, running, waiting + 1, arrival) >= limit


# --- the whole engine core ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What came of one run: tokens by key, and of each step the moment, plan and outputs."""

    tokens: dict[int, list[int]]
    prompt_tokens: list[int]
    """By step."""
    rows: list[dict[int, int]]
    """Tokens by sequence, by step."""


def run(
    arrivals: Sequence[tuple[int, int, int]], chunk: int, *, in_flight: int = 2, budget: int = MOST
) -> Run:
    """Calls of (step at which it comes, prompt tokens, output tokens), all in a roomy pool; keys from 1."""
    clock = FakeClock(0.0)
    core = scripted_core(
        num_blocks=600,
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        mixed_chunk_tokens=chunk,
        max_in_flight=in_flight,
        prefix_caching=False,
        clock=clock,
    )
    left = sorted(enumerate(arrivals, start=1), key=lambda one: one[1][0])
    tokens: dict[int, list[int]] = {key: [] for key, _ in left}
    step = 0
    while left or core.has_work:
        while left and left[0][1][0] <= step:
            key, (_, length, count) = left.pop(0)
            request = engine_request(prompt_of(key, length), count, arrival_time=clock(), eos_token_ids=())
            core.submit(Submit(key, request))
        take(core, tokens)
        clock.advance(1.0)
        step += 1
        assert step < 10_000
    runner = core.runner
    assert isinstance(runner, RecordingRunner)
    rows = [{row.seq_id: row.num_tokens for row in plan.rows} for plan in runner.plans]
    prompt_tokens = []
    for plan in runner.plans:
        new_ids = {new.seq_id for new in plan.new}
        prompts = [r for r in plan.rows if r.num_tokens > 1 or not r.sample or r.seq_id in new_ids]
        prompt_tokens.append(sum(row.num_tokens for row in prompts))
    return Run(tokens, prompt_tokens, rows)


def take(core: EngineCore, tokens: dict[int, list[int]]) -> None:
    outputs: Sequence[SequenceOutput] = core.step().outputs
    core.scheduler.check_invariants()
    for output in outputs:
        assert output.failure is None
        tokens[output.key].extend(output.token_ids)


def prompt_of(key: int, length: int) -> tuple[int, ...]:
    return tuple(2 + (key + position) % 900 for position in range(length))


calls = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 90), st.integers(1, 25)), min_size=1, max_size=14
)


@settings(deadline=None, max_examples=50)
@given(calls, st.sampled_from((1, 3, 8, 20)), st.integers(1, 2))
def test_every_call_gets_its_tokens_whatever_the_chunk(
    arrivals: list[tuple[int, int, int]], chunk: int, in_flight: int
) -> None:
    found = run(arrivals, chunk, in_flight=in_flight)
    for key, (_, length, count) in enumerate(arrivals, start=1):
        prompt = prompt_of(key, length)
        assert found.tokens[key] == [echo(prompt, 0, position) for position in range(count)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.just(0), st.integers(1, 90), st.integers(1, 25)), min_size=1, max_size=16))
def test_prompts_that_come_together_take_the_steps_they_would_take_without_it(
    arrivals: list[tuple[int, int, int]],
) -> None:
    assert run(arrivals, CHUNK).rows == run(arrivals, 0).rows


@settings(deadline=None, max_examples=50)
@given(
    num_decodes=st.integers(1, 8),
    length=st.integers(2, 700),
    chunk=st.sampled_from((1, 4, 8, 30)),
    in_flight=st.integers(1, 2),
)
def test_a_long_prompt_beside_decodes_ends_in_bounded_time_and_holds_none_up_for_long(
    num_decodes: int, length: int, chunk: int, in_flight: int
) -> None:
    decodes = [(0, 3, 100)] * num_decodes
    # Beyond 100 steps nobody is held up.
    comes, ends = 10, 90
    found = run([*decodes, (comes, length, 5)], chunk, in_flight=in_flight)
    piece = min(chunk, MOST - num_decodes)
    steps = [step for step, tokens in enumerate(found.prompt_tokens) if tokens and step >= comes]
    for step in steps[:-1]:
        if step < ends:
            assert found.rows[step][num_decodes + 1] == piece
    for step in range(ends):
        assert found.prompt_tokens[step] <= piece or step < comes
        # A decode never misses a step.
        if step > 3:
            assert all(found.rows[step].get(seq_id) == 1 for seq_id in range(1, num_decodes + 1))
    assert len(steps) <= -(-length // piece)
    assert steps == list(range(steps[0], steps[0] + len(steps)))


def test_many_prompts_beside_one_decode_take_full_steps() -> None:
    found = run([(0, 3, 50)] + [(10, 40, 2)] * 12, CHUNK)
    # Twelve wait and one is held up: 12 * 8 tokens would be allowed, 63 fit.
    assert found.prompt_tokens[10] == MOST - 1


def test_a_full_batch_with_a_queue_is_not_taken_for_a_burst() -> None:
    """Each who leaves makes room for one who has waited longer than anybody has decoded."""
    arrivals = [(0, 2, 40 + 5 * number) for number in range(16)] + [(1, 40, 100)] * 8
    found = run(arrivals, CHUNK)
    later = [tokens for tokens in found.prompt_tokens[20:100] if tokens]
    assert sum(later) == 8 * 40
    assert max(later) <= CHUNK


def test_without_the_setting_a_prompt_takes_all_that_is_left() -> None:
    arrivals = [(0, 3, 20)] * 4 + [(5, 300, 2)]
    assert max(run(arrivals, 0).prompt_tokens[5:]) == MOST - 4
    assert max(run(arrivals, 3).prompt_tokens[5:15]) == 3
