"""Rates and the estimated wait against figures worked out by hand; the clock is an argument."""

from __future__ import annotations

import pytest

from photon_grpc.engine.load import EngineLoad, Throughput, load_of
from photon_grpc.engine.messages import EngineStats


def steady(seconds: float, *, start: float = 100.0, step_s: float = 0.01, tokens: int = 4) -> Throughput:
    """`tokens` per step of `step_s`, a sequence ending in every tenth."""
    throughput = Throughput(start)
    for step in range(1, round(seconds / step_s) + 1):
        throughput.observe(start + step * step_s, step * tokens, step % 10 == 0)
    return throughput


def test_a_steady_engine() -> None:
    for seconds in (2.0, 10.0, 60.0):
        assert steady(seconds).rates(100.0 + seconds) == pytest.approx((400.0, 10.0), rel=0.03)


def test_nothing_is_known_before_time_passes() -> None:
    assert Throughput(5.0).rates(5.0) is None
    assert Throughput(5.0).rates(6.0) == (0.0, 0.0)


def test_an_engine_that_falls_idle_fades_to_zero_within_the_window() -> None:
    throughput = steady(20.0)
    assert throughput.rates(125.0) == pytest.approx((200.0, 5.0), rel=0.06)
    assert throughput.rates(131.0) == (0.0, 0.0)


def test_a_burst_after_a_long_silence_is_spread_over_the_window() -> None:
    throughput = Throughput(0.0)
    throughput.observe(1000.0, 50, 2)
    assert throughput.rates(1000.0) == (5.0, 0.2)


def test_samples_are_bounded() -> None:
    throughput = steady(100.0, step_s=0.001)
    assert len(throughput._samples) < 50


@pytest.mark.parametrize(
    ("running", "waiting", "ended", "wait"),
    [
        (0, 0, 0.0, 0.0),
        (7, 0, 0.0, 0.0),
        (8, 0, 4.0, 0.25),
        (8, 11, 4.0, 3.0),
        # Too few blocks, not too few places.
        (3, 1, 4.0, 0.5),
        (8, 0, 0.0, None),
        (8, 5, 0.0, None),
    ],
)
def test_the_wait(running: int, waiting: int, ended: float, wait: float | None) -> None:
    stats = EngineStats(running=running, waiting=waiting)
    assert load_of(stats, (100.0, ended), 8) == EngineLoad(stats, 100.0, wait)


def test_without_rates_nothing_is_claimed() -> None:
    assert load_of(EngineStats(), None, 8) == EngineLoad(EngineStats())
