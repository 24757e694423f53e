"""The synchronous step: order of plan, launch and collect must not show in the tokens."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.messages import Abort, EngineRequest, FailureKind, SequenceOutput, Submit
from photon_grpc.scheduler.output import ModelOutput, RowFault
from photon_grpc.types import Finish
from tests.support.aftermath import assert_core_clean
from tests.support.builders import RecordingRunner, engine_request, run_to_end, scripted_core

PROMPT = tuple(range(10, 20))

Told = dict[tuple[int, int], tuple[list[int], Finish | FailureKind | None]]


def told(outputs: list[SequenceOutput]) -> Told:
    tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
    ends: dict[tuple[int, int], Finish | FailureKind | None] = {}
    for output in outputs:
        name = (output.key, output.index)
        assert name not in ends, "something came after the last output"
        tokens[name].extend(output.token_ids)
        if output.is_last:
            ends[name] = output.finish or output.failure
    return {name: (tokens[name], ends[name]) for name in ends}


def run(requests: list[EngineRequest], **core: Any) -> Told:
    engine = scripted_core(**core)
    for key, request in enumerate(requests, start=1):
        engine.submit(Submit(key, request))
    outputs = run_to_end(engine)
    assert_core_clean(engine)
    assert engine.scheduler.stats().generation_tokens == sum(len(output.token_ids) for output in outputs)
    return told(outputs)


ENDINGS: dict[str, dict[str, Any]] = {
    "length": {},
    "one token": {"max_tokens": 1},
    "eos": {"eos_token_ids": (1, 14)},
    "stop id": {"stop_token_ids": (12, 13)},
    "min_tokens": {"eos_token_ids": (11,), "min_tokens": 4},
    "n": {"n": 3, "eos_token_ids": (16,)},
    "several blocks": {"max_tokens": 25},
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("in_flight", [2, 3])
def test_steps_under_way_change_no_token(in_flight: int, ending: str) -> None:
    """Bug of an ancestor: the pipeline dropped every other token."""
    requests = [
        engine_request(PROMPT, **({"max_tokens": 9} | ENDINGS[ending])),
        engine_request((30, 31, 32), 14),
    ]
    plain = run(requests)
    assert plain == run(requests, max_in_flight=in_flight)
    assert plain[2, 0][0] == [30 + position % 3 for position in range(14)]


request_lists = st.lists(
    st.builds(
        lambda prompt, max_tokens, n, eos: engine_request(
            tuple(prompt), max_tokens, n, eos_token_ids=(eos,), min_tokens=min(2, max_tokens)
        ),
        st.lists(st.integers(2, 9), min_size=1, max_size=20),
        st.integers(1, 12),
        st.integers(1, 3),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    requests=request_lists,
    in_flight=st.integers(1, 3),
    num_blocks=st.integers(8, 30),
    budget=st.integers(4, 64),
    max_num_seqs=st.integers(1, 4),
    prefix_caching=st.booleans(),
)
def test_tokens_do_not_depend_on_pool_budget_batch_or_pipeline(
    requests: list[EngineRequest],
    in_flight: int,
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
) -> None:
    roomy = run(requests, num_blocks=1000, max_num_batched_tokens=1000, max_num_seqs=50)
    assert roomy == run(
        requests,
        num_blocks=num_blocks,
        max_in_flight=in_flight,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        prefix_caching=prefix_caching,
    )


def test_completions_of_one_prompt_are_told_apart_and_share_its_blocks() -> None:
    core = scripted_core(num_blocks=64, block_size=4)
    core.submit(Submit(1, engine_request(PROMPT, 5, n=3)))
    result = told(run_to_end(core))
    for index in range(3):
        assert result[1, index][0] == [10 + (index + position) % 10 for position in range(5)]
    runner = core.runner
    assert isinstance(runner, RecordingRunner)
    assert [new.num_computed_tokens for plan in runner.plans for new in plan.new] == [0, 8, 8]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_fault_01_a_row_fault_ends_its_request_and_nobody_else_s_tokens_change(in_flight: int) -> None:
    requests = [engine_request((5, 6, 7), 8), engine_request(PROMPT, 8), engine_request((8, 9), 8)]
    healthy = run(requests, max_in_flight=in_flight)
    faulted = run(requests, max_in_flight=in_flight, faults={(10, 3): RowFault.NON_FINITE_LOGITS})
    assert faulted[2, 0] == ([10, 11, 12], FailureKind.REQUEST_FAULT)
    assert (faulted[1, 0], faulted[3, 0]) == (healthy[1, 0], healthy[3, 0])


def test_a_broken_step_is_raised_to_whoever_steps() -> None:
    core = scripted_core(crash_at_step=3)
    core.submit(Submit(1, engine_request(PROMPT, 8)))
    core.step()
    core.step()
    with pytest.raises(RuntimeError, match="scripted device fault"):
        core.step()


def test_a_runner_that_answers_out_of_order_is_caught() -> None:
    class Shuffling(RecordingRunner):
        def collect(self) -> ModelOutput:
            output = super().collect()
            return ModelOutput(output.step + 1, output.seq_ids, output.token_ids)

    core = scripted_core()
    core.runner = Shuffling(core.runner.model)
    core.submit(Submit(1, engine_request(PROMPT)))
    with pytest.raises(AssertionError, match="another step"):
        core.step()


def test_aborting_everything_while_a_step_is_under_way() -> None:
    core = scripted_core(max_in_flight=2)
    for key in (1, 2):
        core.submit(Submit(key, engine_request(PROMPT, 8)))
    core.step()
    core.abort_all(FailureKind.DRAINING)
    assert core.scheduler.stats().kv_blocks_used == 0
    outputs = run_to_end(core)
    assert [output.failure for output in outputs] == [FailureKind.DRAINING] * 2
    assert not core.has_work


def test_submit_and_abort_before_any_step() -> None:
    core = scripted_core()
    core.submit(Submit(1, engine_request(PROMPT, n=2)))
    core.abort(Abort(1))
    assert [output.index for output in core.step().outputs] == [0, 1]
    assert not core.has_work


def test_stop_ids_and_eos_may_not_be_drawn_before_min_tokens() -> None:
    """The sampler is told what to ban, and only the first completion scores the prompt."""
    core = scripted_core()
    core.submit(
        Submit(
            1,
            engine_request(
                PROMPT,
                n=2,
                min_tokens=3,
                eos_token_ids=(1, 2),
                stop_token_ids=(2, 7),
                top_logprobs=4,
                prompt_top_logprobs=5,
            ),
        )
    )
    core.step()
    runner = core.runner
    assert isinstance(runner, RecordingRunner)
    first, second = (new.sampler for new in runner.plans[0].new)
    assert sorted(first.banned_token_ids) == [1, 2, 7]
    assert (first.min_tokens, first.top_logprobs, first.index, second.index) == (3, 4, 0, 1)
    assert (first.prompt_top_logprobs, second.prompt_top_logprobs) == (5, None)
