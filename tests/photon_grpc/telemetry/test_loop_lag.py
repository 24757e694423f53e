"""A loop that is held up says so, while it is and for a while after."""

from __future__ import annotations

import asyncio
import time

import pytest

from photon_grpc.telemetry.loop_lag import LoopLag


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_blocked_loop_shows_while_it_is_blocked_and_afterwards() -> None:
    lag = LoopLag()
    lag.start()
    await asyncio.sleep(0.15)
    time.sleep(0.5)  # noqa: ASYNC251 - holding the loop up is the point
    during = lag.seconds()
    await asyncio.sleep(0.15)
    assert during >= 0.35
    assert lag.seconds() >= 0.35
    lag.stop()


async def test_an_old_hold_up_is_forgotten() -> None:
    clock = Clock()
    lag = LoopLag(clock)
    lag.start()
    clock.now += 5.1
    lag._look()
    assert lag.seconds() == pytest.approx(5.0)
    for _ in range(300):
        clock.now += 0.1
        lag._look()
    assert lag.seconds() == pytest.approx(0.0, abs=1e-6)
    lag.stop()


async def test_nothing_is_measured_before_the_start_and_after_the_stop() -> None:
    clock = Clock()
    lag = LoopLag(clock)
    assert lag.seconds() == 0
    lag.start()
    lag.stop()
    lag.stop()
    clock.now += 50
    assert lag.seconds() == 0
