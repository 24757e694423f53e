"""Rank: priority inside the window, age outside of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.scheduler.policy import rank
from photon_grpc.scheduler.request import Request
from tests.photon_grpc.scheduler.test_kv_cache_manager import sequence


def at(seq_id: int, arrival: float, priority: int = 0) -> Request:
    return sequence(seq_id, (1,), arrival_time=arrival, priority=priority)


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


def test_without_a_boost_priority_means_nothing() -> None:
    assert rank(at(1, 1.0, 0), 0) < rank(at(2, 1.5, 9), 0)
