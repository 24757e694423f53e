"""Service fault 3 in the engine: a step that finds no memory costs its work and no token of anybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.core import MAX_FAILURES, EngineCore
from photon_grpc.engine.messages import Abort, EngineRequest, FailureKind, SequenceOutput, Submit
from photon_grpc.runner.base import StepOutOfMemoryError
from photon_grpc.scheduler.output import ModelOutput, SchedulerOutput
from tests.photon_grpc.engine.test_core import told
from tests.support.aftermath import assert_core_clean, assert_told_once
from tests.support.builders import RecordingRunner, engine_request, run_to_end, scripted_core

REQUESTS = [engine_request(tuple(range(10 * n, 10 * n + n)), 6 + n) for n in range(2, 9)]
Lacks = Callable[[SchedulerOutput], bool]


class Collecting(RecordingRunner):
    """Finds no memory for what it has computed: everything under way is lost in `collect` number `at`."""

    at = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_collected = 0

    def collect(self) -> ModelOutput:
        self.num_collected += 1
        if self.num_collected == self.at:
            lost = self.plans[-len(self._outputs) :]
            self._outputs.clear()
            num_tokens: Counter[int] = Counter()
            for scheduled in (row for plan in lost for row in plan.rows):
                num_tokens[scheduled.seq_id] += scheduled.num_tokens
            # What the lost steps wrote may be anything.
            for seq_id, row in self._rows.items():
                for position in range(row.num_computed - num_tokens[seq_id], row.num_computed):
                    self._slots.pop(self._slot(row, position), None)
            self._rows.clear()
            raise StepOutOfMemoryError("no memory for the tokens")
        return super().collect()


def submit(core: EngineCore, requests: list[EngineRequest]) -> None:
    for key, request in enumerate(requests, start=1):
        core.submit(Submit(key, request))


def run(requests: list[EngineRequest], **core: Any) -> tuple[EngineCore, list[SequenceOutput]]:
    engine = scripted_core(**core)
    submit(engine, requests)
    outputs = run_to_end(engine)
    assert_core_clean(engine)
    return engine, outputs


def once(lacks: Lacks) -> Lacks:
    """The first step for which `lacks` holds finds no memory; the same step finds it when it comes again."""
    has_failed = False

    def first(output: SchedulerOutput) -> bool:
        nonlocal has_failed
        if has_failed or not lacks(output):
            return False
        has_failed = True
        return True

    return first


MOMENTS: dict[str, Lacks] = {
    "the first prompt": lambda output: True,
    "a chunk": lambda output: any(not row.sample for row in output.rows),
    "a prompt beside decodes": lambda output: bool(output.new) and len(output.rows) > len(output.new),
    "a decode": lambda output: all(row.num_tokens == 1 for row in output.rows) and output.step > 4,
    "a block": lambda output: bool(output.new_block_ids),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_fault_03_no_token_is_lost_or_repeated(moment: str, in_flight: int, prefix_caching: bool) -> None:
    values: dict[str, Any] = {
        "max_num_batched_tokens": 9,
        "max_num_seqs": 4,
        "max_in_flight": in_flight,
        "prefix_caching": prefix_caching,
    }
    _, healthy = run(REQUESTS, **values)
    core, outputs = run(REQUESTS, out_of_memory=once(MOMENTS[moment]), **values)
    assert told(outputs) == told(healthy)
    assert_told_once(core, outputs, range(1, len(REQUESTS) + 1))
    stats = core.scheduler.stats()
    assert stats.lost_steps == 1
    assert stats.preemptions > 0
    assert stats.prompt_tokens == sum(len(request.prompt_token_ids) for request in REQUESTS)


@pytest.mark.parametrize("at", [1, 2, 5, 8])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_fault_03_steps_that_are_lost_when_they_are_collected(
    in_flight: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collecting, "at", at)
    _, healthy = run(REQUESTS, max_num_batched_tokens=9)
    core, outputs = run(REQUESTS, max_num_batched_tokens=9, max_in_flight=in_flight, make_runner=Collecting)
    assert told(outputs) == told(healthy)
    assert 1 <= core.scheduler.stats().lost_steps <= in_flight


@pytest.mark.parametrize("in_flight", [1, 2])
def test_fault_03_a_request_that_is_too_large_alone_fails_and_the_others_are_served(in_flight: int) -> None:
    requests = [
        engine_request((5, 6, 7), 9),
        engine_request(tuple(range(20, 50)), 9),
        engine_request((8,), 9),
    ]
    _, healthy = run(requests, max_in_flight=in_flight)

    def lacks(output: SchedulerOutput) -> bool:
        return any(row.num_tokens >= 30 for row in output.rows)

    core, outputs = run(requests, max_in_flight=in_flight, out_of_memory=lacks)
    expected = told(healthy)
    assert told(outputs) == {**expected, (2, 0): ([], FailureKind.OUT_OF_MEMORY)}
    assert_told_once(core, outputs, (1, 2, 3))


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("most", [1, 3])
def test_fault_03_a_device_for_fewer_rows_than_it_was_sized_for_serves_them_all(
    in_flight: int, most: int
) -> None:
    requests = [engine_request((10 + n,) * 5, 12) for n in range(30)]

    def lacks(output: SchedulerOutput) -> bool:
        return len(output.rows) > most

    _, healthy = run(requests, num_blocks=200)
    core, outputs = run(requests, num_blocks=200, max_in_flight=in_flight, out_of_memory=lacks)
    assert told(outputs) == told(healthy)
    # From eight down to one, and it tries for more again when a sequence has ended: not with every step.
    assert 0 < core.scheduler.stats().lost_steps <= 3 + len(requests)


def test_fault_03_repeats_are_capped() -> None:
    core = scripted_core(out_of_memory=lambda output: True, max_num_seqs=8)
    submit(core, [engine_request((10 + n,), 4) for n in range(40)])
    outputs: list[SequenceOutput] = []
    for _ in range(MAX_FAILURES - 1):
        outputs.extend(core.step().outputs)
    with pytest.raises(StepOutOfMemoryError):
        core.step()
    assert {output.failure for output in outputs} == {FailureKind.OUT_OF_MEMORY}
    assert 0 < len(outputs) < 40, (
        "one after another, first in rank first, until it is plain that none will do"
    )


def test_fault_03_failures_that_are_not_in_a_row_are_not_added_up() -> None:
    core, outputs = run(
        [engine_request((10 + n,) * 3, 4 * MAX_FAILURES) for n in range(2)],
        out_of_memory=lambda output: output.step % 4 == 0 and len(output.rows) > 1,
    )
    assert all(output.failure is None for output in outputs)
    assert core.scheduler.stats().lost_steps >= 1


@pytest.mark.parametrize("in_flight", [2, 3])
def test_fault_03_a_call_that_was_left_with_the_lost_steps_under_way(
    in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collecting, "at", 3)
    core = scripted_core(max_in_flight=in_flight, max_num_batched_tokens=9, make_runner=Collecting)
    submit(core, REQUESTS[:3])
    outputs: list[SequenceOutput] = []
    while core.runner.num_collected < 2:  # type: ignore[attr-defined]  # it is a Collecting
        outputs.extend(core.step().outputs)
    core.abort(Abort(1))
    outputs.extend(run_to_end(core))
    _, healthy = run(REQUESTS[:3], max_num_batched_tokens=9)
    assert {name: end for name, end in told(outputs).items() if name[0] != 1} == {
        name: end for name, end in told(healthy).items() if name[0] != 1
    }
    assert core.scheduler.stats().lost_steps >= 1
    assert_core_clean(core)


def test_fault_03_what_a_lost_step_was_to_compute_for_a_call_that_was_left_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody knows any more which blocks it had named, so no block is known."""
    monkeypatch.setattr(Collecting, "at", 1)
    prompt = tuple(range(10, 30))
    core = scripted_core(max_in_flight=2, max_num_batched_tokens=9, make_runner=Collecting)
    core.submit(Submit(1, engine_request(prompt, 4)))
    core.step()
    core.abort(Abort(1))
    core.step()
    assert core.scheduler.stats().lost_steps == 1
    core.submit(Submit(2, engine_request(prompt, 4)))
    outputs = run_to_end(core)
    assert told(outputs)[2, 0][0] == list(prompt[:4])
    assert core.scheduler.stats().prefix_hits == 0
    assert_core_clean(core)


def test_fault_03_the_batch_grows_again() -> None:
    core, _ = run(
        [engine_request((10 + n,) * 3, 6) for n in range(40)],
        num_blocks=200,
        max_num_seqs=8,
        out_of_memory=lambda output: output.step == 5,
    )
    runner = core.runner
    assert isinstance(runner, RecordingRunner)
    widths = [len(plan.rows) for plan in runner.plans]
    assert widths[3:6] == [8, 8, 4]
    assert max(widths[6:]) == 8


@settings(max_examples=100, deadline=None)
@given(
    lost=st.sets(st.integers(1, 60), max_size=12),
    lost_in_collect=st.integers(0, 20),
    in_flight=st.integers(1, 3),
    num_blocks=st.integers(8, 30),
    budget=st.integers(4, 64),
    max_num_seqs=st.integers(1, 4),
    prefix_caching=st.booleans(),
)
def test_fault_03_any_steps_may_be_lost(
    lost: set[int],
    lost_in_collect: int,
    in_flight: int,
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
) -> None:
    """Whoever does not fail has the tokens of a run in which nothing was lost."""

    class Runner(Collecting):
        at = lost_in_collect

    requests = [engine_request((7,) * 3 + (n,) * n, 4 + n, n=1 + n % 2) for n in range(2, 7)]
    _, healthy = run(requests, num_blocks=200)
    _, outputs = run(
        requests,
        make_runner=Runner,
        out_of_memory=lambda output: output.step in lost,
        num_blocks=num_blocks,
        max_in_flight=in_flight,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        prefix_caching=prefix_caching,
    )
    expected = told(healthy)
    for name, (tokens, end) in told(outputs).items():
        if end is FailureKind.OUT_OF_MEMORY:
            assert tokens == expected[name][0][: len(tokens)]
        else:
            assert (tokens, end) == expected[name]
