"""Rank: priority inside the window, slack inside of half of it, age outside of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.scheduler.policy import rank
from photon_grpc.scheduler.request import Deadlines, Request
from tests.photon_grpc.scheduler.test_kv_cache_manager import sequence


def at(seq_id: int, arrival: float, priority: int = 0, **clocks: float) -> Request:
    """`clocks` are seconds from the arrival."""
    deadlines = Deadlines(**{name: arrival + within for name, within in clocks.items()})
    return sequence(seq_id, (1,), arrival_time=arrival, priority=priority, deadlines=deadlines)


def test_equal_priorities_are_served_in_the_order_of_arrival_then_of_submission() -> None:
    first, second, third = at(9, 1.0), at(2, 2.0), at(3, 2.0)
    assert rank(first, 30) < rank(second, 30) < rank(third, 30)


@given(st.floats(0, 29.9), st.integers(0, 8), st.integers(1, 9))
def test_inside_the_window_a_higher_priority_wins(later: float, low: int, more: int) -> None:
    assert rank(at(2, 100 + later, low + more), 30) < rank(at(1, 100, low), 30)


@given(st.floats(0.1, 1e6), st.integers(0, 9))
def test_outside_the_window_age_wins_over_any_priority(beyond: float, priority: int) -> None:
    old, new = at(1, 100), at(2, 100 + 30 * priority + beyond, priority)
    assert rank(old, 30) < rank(new, 30)


BAD_ENDS = ("start_by", "first_token_by", "end_by")


@given(st.sampled_from(BAD_ENDS), st.sampled_from(BAD_ENDS), st.floats(0, 14.9), st.floats(0.1, 1000))
def test_of_those_who_came_together_the_one_with_less_slack_goes_first(
    tight: str, loose: str, slack: float, more: float
) -> None:
    assert rank(at(2, 100, **{tight: slack}), 30) < rank(at(1, 100, **{loose: slack + more}), 30)
    assert rank(at(2, 100, **{tight: slack}), 30) < rank(at(1, 100), 30)


@given(st.floats(15, 1e4), st.floats(15, 1e4), st.floats(0.001, 100))
def test_slack_beyond_the_window_is_no_reason_to_overtake(one: float, other: float, later: float) -> None:
    assert rank(at(1, 100, end_by=one), 30) < rank(at(2, 100 + later, end_by=other), 30)


@given(st.floats(0, 14.9), st.floats(0, 1e3), st.integers(0, 8), st.integers(1, 9))
def test_slack_never_outweighs_a_step_of_priority(later: float, slack: float, low: int, more: int) -> None:
    urgent = at(1, 100, low, end_by=slack)
    assert rank(at(2, 100 + later, low + more), 30) < rank(urgent, 30)


@given(st.floats(15.1, 1e6), st.integers(0, 9), st.sampled_from(BAD_ENDS), st.floats(0, 1e3))
def test_age_wins_over_any_priority_and_any_clock(
    beyond: float, priority: int, clock: str, slack: float
) -> None:
    new = at(2, 100 + 30 * priority + beyond, priority, **{clock: slack})
    assert rank(at(1, 100), 30) < rank(new, 30)


def test_a_clock_that_ends_well_is_no_hurry() -> None:
    assert rank(at(1, 100), 30) < rank(at(2, 100, finish_by=0.1), 30)


def test_without_a_boost_priority_means_nothing() -> None:
    assert rank(at(1, 1.0, 0), 0) < rank(at(2, 1.5, 9), 0)
