"""The runner without a model: it must refuse what a real cache could not serve, or it proves nothing."""

from __future__ import annotations

from typing import Any

import pytest

from photon_grpc.runner.scripted import ScriptedRunner, echo, logprobs_of
from photon_grpc.scheduler.output import (
    ModelOutput,
    NewSequence,
    RowFault,
    SamplerSpec,
    ScheduledSequence,
    SchedulerOutput,
)
from tests.support.builders import model_info, sampling

PROMPT = (5, 6, 7, 8, 9)


def runner(**overrides: Any) -> ScriptedRunner:
    return ScriptedRunner(model_info(), **({"num_blocks": 8, "block_size": 4} | overrides))


def new(seq_id: int, token_ids: tuple[int, ...] = PROMPT, **values: Any) -> NewSequence:
    defaults: dict[str, Any] = {
        "num_prompt_tokens": len(token_ids),
        "num_computed_tokens": 0,
        "block_ids": (0, 1),
        "sampler": SamplerSpec(sampling()),
    }
    return NewSequence(seq_id, token_ids, **(defaults | values))


def step(
    number: int,
    *rows: tuple[int, int, bool] | ScheduledSequence,
    new: tuple[NewSequence, ...] = (),
    removed: tuple[int, ...] = (),
) -> SchedulerOutput:
    scheduled = tuple(row if isinstance(row, ScheduledSequence) else ScheduledSequence(*row) for row in rows)
    return SchedulerOutput(number, removed, new, scheduled, sum(row.num_tokens for row in scheduled))


def run(it: ScriptedRunner, output: SchedulerOutput) -> ModelOutput:
    it.launch(output)
    return it.collect()


def test_echo_says_the_prompt_again_and_each_completion_begins_elsewhere() -> None:
    assert [echo((1, 2, 3), 0, position) for position in range(5)] == [1, 2, 3, 1, 2]
    assert [echo((1, 2, 3), 1, position) for position in range(4)] == [2, 3, 1, 2]


def test_chunks_then_tokens() -> None:
    it = runner()
    assert run(it, step(1, (1, 3, False), new=(new(1),))).seq_ids == ()
    assert run(it, step(2, (1, 2, True))) == ModelOutput(2, (1,), ((5,),))
    assert run(it, step(3, (1, 1, True))) == ModelOutput(3, (1,), ((6,),))


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    it = runner()
    again = new(1, (*PROMPT, 5, 6), num_prompt_tokens=5)
    assert run(it, step(1, (1, 7, True), new=(again,))).token_ids == ((7,),)


def test_sampling_before_the_last_token_is_refused() -> None:
    with pytest.raises(AssertionError, match="sampling before"):
        runner().launch(step(1, (1, 4, True), new=(new(1),)))


def test_a_block_that_another_sequence_has_written_is_noticed() -> None:
    """Bug of an ancestor: recycled KV slots were read by the sequence that no longer owned them."""
    it = runner()
    run(it, step(1, (1, 5, True), new=(new(1),)))
    with pytest.raises(AssertionError, match="another sequence's keys"):
        it.launch(step(2, (1, 1, True), (2, 5, True), new=(new(2, (9, 9, 9, 9, 9), block_ids=(1, 2)),)))


def test_a_prefix_that_was_never_computed_is_noticed() -> None:
    it = runner()
    with pytest.raises(AssertionError, match="another sequence's keys"):
        it.launch(step(1, (1, 1, True), new=(new(1, num_computed_tokens=4),)))


def test_a_table_that_is_too_short_is_noticed() -> None:
    with pytest.raises(IndexError):
        runner().launch(step(1, (1, 5, True), new=(new(1, block_ids=(0,)),)))


def test_a_sequence_that_is_unknown_or_enters_twice_is_noticed() -> None:
    it = runner()
    with pytest.raises(KeyError):
        it.launch(step(1, (1, 1, True)))
    run(it, step(2, (1, 5, True), new=(new(1),)))
    with pytest.raises(AssertionError):
        it.launch(step(3, (1, 5, True), new=(new(1),)))


def test_removed_rows_may_come_back() -> None:
    it = runner()
    run(it, step(1, (1, 5, True), new=(new(1),)))
    assert run(it, step(2, (1, 5, True), new=(new(1),), removed=(1,))).token_ids == ((5,),)


def test_no_more_steps_under_way_than_allowed_and_collected_in_order() -> None:
    it = runner(max_in_flight=2)
    it.launch(step(1, (1, 5, True), new=(new(1),)))
    it.launch(step(2, (1, 1, True)))
    with pytest.raises(AssertionError, match="under way"):
        it.launch(step(3, (1, 1, True)))
    assert [it.collect().step, it.collect().step] == [1, 2]


def test_faults_and_crashes_happen_where_they_were_asked_for() -> None:
    it = runner(faults={(5, 1): RowFault.NON_FINITE_LOGITS}, crash_at_step=3)
    assert run(it, step(1, (1, 5, True), new=(new(1),))).faults == {}
    assert run(it, step(2, (1, 1, True))).faults == {1: RowFault.NON_FINITE_LOGITS}
    with pytest.raises(RuntimeError, match="scripted device fault"):
        it.launch(step(3, (1, 1, True)))


def test_logprobs_for_those_who_asked() -> None:
    it = runner()
    asking = SamplerSpec(sampling(), top_logprobs=2, prompt_top_logprobs=1)
    first = run(
        it,
        step(
            1,
            (1, 3, False),
            (2, 5, True),
            new=(new(1, sampler=asking), new(2, block_ids=(2, 3))),
        ),
    )
    assert first.logprobs == {}
    assert first.prompt_logprobs == {1: tuple(logprobs_of(token, 1) for token in (6, 7, 8))}
    second = run(it, step(2, (1, 2, True), (2, 1, True)))
    assert second.prompt_logprobs == {1: (logprobs_of(9, 1),)}
    assert second.logprobs == {1: (logprobs_of(5, 2),)}
    third = run(it, step(3, (1, 1, True)))
    assert third.prompt_logprobs == {}
    assert third.logprobs == {1: (logprobs_of(6, 2),)}


def test_closing_twice() -> None:
    it = runner()
    it.close()
    it.close()
