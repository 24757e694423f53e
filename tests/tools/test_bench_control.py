"""`bench control`: what it counts as a failed call, a cancel's delay, a loss; and short runs for real."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tools.bench.bars import Bar
from tools.bench.control import cancel, command, drain, frozen, steps
from tools.bench.figures import CallRecord, Refusal

DRAINING = Refusal("DRAINING", 100, 100)
NOBODY = Refusal("", None, None)
SIGNALLED = 10.0


def call(
    sent: float, ended: float, code: str = "OK", refusal: Refusal | None = None, messages: int = 0
) -> CallRecord:
    return CallRecord(sent, sent, ended, code, messages, (), refusal)


def test_calls_around_a_sigterm_are_told_apart() -> None:
    records = (
        call(1.0, 2.0),
        call(9.0, 11.0, messages=3),
        call(9.5, 11.0, "UNAVAILABLE", DRAINING),
        call(9.9, 10.5, "UNAVAILABLE", replace(NOBODY, text="cut"), messages=2),
        call(10.1, 10.2, "UNAVAILABLE", DRAINING),
        call(10.2, 10.3, "UNAVAILABLE", replace(DRAINING, pushback_ms=None)),
        call(12.0, 12.1, "UNAVAILABLE", NOBODY),
        call(10.3, 12.1, "INTERNAL", Refusal("INTERNAL", None, -1)),
    )
    row = drain.judge(records, SIGNALLED, 0, 1.5)
    assert (row.in_flight, row.in_flight_failed, row.failed_after_begin) == (3, 2, 1)
    # Wrong: cut off, refused without saying when, and an error that has nothing to do with a drain.
    wrong = {"UNAVAILABLE cut": 1, "UNAVAILABLE DRAINING": 1, "INTERNAL INTERNAL": 1}
    assert (row.refused, row.too_late, row.wrong) == (2, 1, wrong)
    assert [bar.passed for bar in drain.promises(drain.DrainPlan(), [row])] == [False, False, True, True]


def test_a_drain_that_ends_calls_in_flight_or_hangs_keeps_no_promise() -> None:
    plan = drain.DrainPlan(propagation_s=1.0, max_s=2.0)
    good = drain.judge((call(9.0, 11.0), call(11.0, 11.1, "UNAVAILABLE", DRAINING)), SIGNALLED, 0, 2.5)
    assert all(bar.passed for bar in drain.promises(plan, [good]))
    for bad in (
        replace(good, in_flight_failed=1),
        replace(good, failed_after_begin=1),
        replace(good, wrong={"INTERNAL": 1}),
        replace(good, exit_code=1),
        replace(good, exit_s=3.1),
    ):
        assert not all(bar.passed for bar in drain.promises(plan, [good, bad]))


def test_each_cancel_has_the_next_removal() -> None:
    assert cancel.first_after([1.0, 2.0, 3.5], [0.5, 1.2, 2.0, 3.6]) == [1.2, 2.0, 3.6]
    with pytest.raises(RuntimeError, match="never removed"):
        cancel.first_after([1.0, 4.0], [1.2, 2.0])


def test_a_frozen_client_that_stays_keeps_no_promise() -> None:
    def passed(result: frozen.FrozenResult) -> list[bool]:
        return [bar.passed for bar in frozen.promises(result)]

    assert passed(frozen.FrozenResult([29.0, 31.0], True)) == [True, True]
    assert passed(frozen.FrozenResult([29.0, None], True)) == [False, True]
    assert passed(frozen.FrozenResult([29.0, 36.0], False)) == [False, False]


def test_what_is_lost_is_of_the_medians_and_a_promise_only_with_a_process_of_its_own() -> None:
    row = steps.StepsRow("demo", "own", [100.0, 90.0, 300.0], [80.0, 85.0, 20.0], [300.0] * 3)
    assert row.lost == pytest.approx(0.2)
    shared = replace(row, process="shared")
    (bar,) = steps.promises([row, shared])
    assert (bar.value, bar.passed) == (pytest.approx(20), False)


def test_bars_are_kept_at_their_bounds() -> None:
    assert Bar("", 10.0, 10.0, at_least=False).passed
    assert Bar("", 10.0, 10.0, at_least=True).passed
    assert not Bar("", math.inf, 10.0, at_least=False).passed


@pytest.mark.slow
def test_a_short_drain_for_real() -> None:
    plan = drain.DrainPlan(rounds=1, duration_s=2.0, load=0.3, max_s=60.0)
    (row,) = drain.run(plan)
    assert row.in_flight_failed == row.failed_after_begin == row.exit_code == 0
    assert row.wrong == {}


@pytest.mark.slow
def test_a_few_cancels_for_real() -> None:
    result = cancel.run(cancel.CancelPlan(cancels=3, background_streams=2))
    assert result.freed.count == result.seen.count == 3
    assert 0 < result.freed.p50 <= result.seen.p50


@pytest.mark.slow
def test_a_short_count_of_steps_for_real() -> None:
    plan = steps.StepsPlan(models=("",), processes=("own",), rounds=1, new_tokens=20, rate=50.0)
    (row,) = steps.run(plan)
    assert (len(row.alone), len(row.with_calls), len(row.calls_per_second)) == (1, 1, 1)
    assert min(*row.alone, *row.with_calls, *row.calls_per_second) > 0


def test_parts_are_known_by_their_names() -> None:
    assert set(command.PARTS) == set(command._RUN)
