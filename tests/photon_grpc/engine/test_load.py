"""Rates against figures worked out by hand; the clock is an argument."""

from __future__ import annotations

import pytest

from photon_grpc.engine.load import Throughput


def steady(seconds: float, *, start: float = 100.0, step_s: float = 0.01, tokens: int = 4) -> Throughput:
    """`tokens` per step of `step_s`."""
    throughput = Throughput(start)
    for step in range(1, round(seconds / step_s) + 1):
        throughput.observe(start + step * step_s, step * tokens)
    return throughput


def test_a_steady_engine() -> None:
    for seconds in (2.0, 10.0, 60.0):
        assert steady(seconds).rate(100.0 + seconds) == pytest.approx(400.0, rel=0.03)


def test_nothing_is_known_before_time_passes() -> None:
    assert Throughput(5.0).rate(5.0) is None
    assert Throughput(5.0).rate(6.0) == 0.0


def test_an_engine_that_falls_idle_fades_to_zero_within_the_window() -> None:
    throughput = steady(20.0)
    assert throughput.rate(125.0) == pytest.approx(200.0, rel=0.06)
    assert throughput.rate(131.0) == 0.0


def test_a_burst_after_a_long_silence_is_spread_over_the_window() -> None:
    throughput = Throughput(0.0)
    throughput.observe(1000.0, 50)
    assert throughput.rate(1000.0) == 5.0


def test_samples_are_bounded() -> None:
    throughput = steady(100.0, step_s=0.001)
    assert len(throughput._samples) < 50
