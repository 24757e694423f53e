"""Service fault 12: a thousand seeds of engine, scheduler, cache and queue, with faults, in virtual time."""

from __future__ import annotations

import pytest

from photon_grpc.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    OverloadedError,
)
from photon_grpc.scheduler.output import FailureKind
from photon_grpc.types import FinishReason
from tests.simulation.scenario import CrashPoint, Happening, State, Way, scenario_of
from tests.simulation.simulate import Simulator, check_seeds, with_calls

NUM_SEEDS = 1000

# What no engine says by itself: the client makes ENGINE_DEAD of the end of its thread, and constraints
# do not exist yet.
ELSEWHERE = {FailureKind.ENGINE_DEAD, FinishReason.CONSTRAINT_DEAD_END}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fault_12_a_thousand_seeds() -> None:
    with Simulator() as simulator:
        reports = list(simulator.failures(range(NUM_SEEDS)))
        assert not reports, "\n\n".join(map(str, reports[:3]))
        # A simulation that no longer gets anywhere would find nothing.
        ends = {*FinishReason, *FailureKind} - ELSEWHERE
        refusals = {DuplicateRequestError, EngineDeadError, EngineDrainingError, OverloadedError}
        expected = {*ends, *refusals, *State, *Way, *Happening, *CrashPoint}
        expected |= {"lifted", "a fair share before rank", "a turn was passed"}
        expected |= {
            (end, how) for end in ends - {FailureKind.QUEUE_TIMEOUT} for how in ("preempted", "shared")
        }
        expected |= {("lost", point) for point in CrashPoint}
        assert expected - simulator.reached == set()


@pytest.mark.parametrize("seed", [3, 40, 77])
def test_a_seed_is_the_same_every_time(seed: int) -> None:
    assert scenario_of(seed) == scenario_of(seed) != scenario_of(seed + 1)
    with Simulator() as one, Simulator() as other:
        other.trace(scenario_of(seed + 1))
        assert one.trace(scenario_of(seed)) == other.trace(scenario_of(seed))


def test_calls_can_be_left_out() -> None:
    scenario = with_calls(scenario_of(3), {2, 5})
    assert [call.number for call in scenario.calls] == [2, 5]
    with Simulator() as simulator:
        trace = "\n".join(simulator.trace(scenario))
    assert "number=2" in trace
    assert "number=1," not in trace


def test_worker_processes_report_nothing_where_nothing_is_wrong() -> None:
    assert check_seeds(range(5)) == []
