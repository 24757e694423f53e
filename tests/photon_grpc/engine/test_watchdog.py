"""Budgets by hand and on a clock that is an argument; what becomes of a hang is in `tests/e2e`."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from photon_grpc.engine.messages import EngineReady, EngineStopped, LoopMessage, StepOutputs, Submit
from photon_grpc.engine.thread import EngineThread
from photon_grpc.engine.watchdog import StepWatchdog, longest_step_s, step_budget_s
from photon_grpc.errors import EngineDeadError
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from tests.support.builders import FakeClock, engine_request
from tests.support.engine_factories import Hanging


@pytest.mark.parametrize(
    ("num_tokens", "budget_s"), [(0, 10.0), (1, 10.03), (500, 25.0), (1000, 40.0), (2000, 40.0)]
)
def test_the_budget_grows_with_the_tokens(num_tokens: int, budget_s: float) -> None:
    assert step_budget_s(10.0, num_tokens, 1000) == pytest.approx(budget_s)


def test_no_budget_is_above_the_longest() -> None:
    assert max(step_budget_s(10.0, tokens, 1000) for tokens in range(0, 3000, 100)) == longest_step_s(10.0)


def test_a_step_is_hung_once_its_budget_is_over_and_not_before() -> None:
    clock = FakeClock(100.0)
    tokens = 0
    watchdog = StepWatchdog(10.0, 1000, lambda: tokens, lambda: None, clock=clock)
    assert not watchdog.is_hung()
    clock.advance(1e6)
    assert not watchdog.is_hung(), "an engine without work is not hung"
    watchdog.step_begins()
    clock.advance(9.9)
    assert not watchdog.is_hung()
    clock.advance(0.2)
    assert watchdog.is_hung()
    # What is under way is known only once the step is planned, and counts then.
    tokens = 1000
    assert not watchdog.is_hung()
    clock.advance(30.0)
    assert watchdog.is_hung()
    watchdog.step_ended()
    assert not watchdog.is_hung()


def test_without_a_timeout_there_is_no_thread() -> None:
    before = threading.active_count()
    with StepWatchdog(0.0, 1000, lambda: 0, lambda: None):
        assert threading.active_count() == before


def test_the_thread_ends_with_the_engine() -> None:
    with StepWatchdog(60.0, 1000, lambda: 0, lambda: None):
        assert "photon-watchdog" in {thread.name for thread in threading.enumerate()}
    assert "photon-watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_hung_thread_is_told_once_with_all_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    mailbox: SimpleQueue[LoopMessage] = SimpleQueue()
    thread = EngineThread(
        Hanging(hang_at_step=3), SchedulerOptions(), KVCacheOptions(), mailbox.put, step_timeout_s=0.2
    )
    thread.start()
    assert isinstance(mailbox.get(timeout=20), EngineReady)
    thread.post(Submit(1, engine_request((5, 6, 7), 8)))
    told = [mailbox.get(timeout=20) for _ in range(3)]
    assert [type(message) for message in told] == [StepOutputs, StepOutputs, EngineStopped]
    assert isinstance(told[-1], EngineStopped)
    assert isinstance(told[-1].error, EngineDeadError)
    stacks = capfd.readouterr().err
    assert "in launch" in stacks
    assert "engine_factories.py" in stacks
    assert not thread.join(0.5)
    assert mailbox.empty()
