"""Run scenarios; make a failure as small as it gets and say how to see it again."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tests.simulation.scenario import Scenario, scenario_of
from tests.simulation.world import World

MAX_TRACE_LINES = 60


@dataclass(frozen=True)
class Failure:
    """What went wrong, and where it was noticed."""

    error: str
    place: str


@dataclass(frozen=True)
class Report:
    """A failure of the smallest scenario that was found for it, and what had happened until then."""

    scenario: Scenario
    failure: Failure
    trace: tuple[str, ...]

    @property
    def seed(self) -> int:
        return self.scenario.seed

    @property
    def command(self) -> str:
        """The command that shows it again."""
        numbers = ",".join(str(call.number) for call in self.scenario.calls)
        return f"tools/simulate --seed {self.seed} --calls {numbers}"

    def __str__(self) -> str:
        num_left_out = len(self.trace) - MAX_TRACE_LINES
        return "\n".join(
            [
                f"seed {self.seed}: {self.failure.error}",
                f"  noticed at {self.failure.place}",
                f"  again: {self.command}",
                f"  {replace(self.scenario, calls=(), events=())}",
                *([f"  ... {num_left_out} lines before"] if num_left_out > 0 else []),
                *self.trace[-MAX_TRACE_LINES:],
            ]
        )


class Simulator:
    """Runs scenarios one after another, in one event loop. Use inside `with`.

    `reached` is what they have led to, all together.
    """

    def __init__(self) -> None:
        self._loop = asyncio.Runner()
        self.reached: set[object] = set()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    def run(self, scenario: Scenario, trace: list[str] | None = None) -> Failure | None:
        """One scenario; None where nothing was wrong. What happens is added to `trace`."""
        world = World(scenario, trace)
        try:
            self._loop.run(world.run())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the seed has found
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return Failure(
                f"{type(error).__name__}: {str(error) or frame.line}",
                f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} in {frame.name}",
            )
        self.reached |= world.reached
        return None

    def trace(self, scenario: Scenario) -> tuple[str, ...]:
        """What happens in a scenario."""
        lines: list[str] = []
        self.run(scenario, lines)
        return tuple(lines)

    def check(self, scenario: Scenario) -> Report | None:
        """One scenario; a failure comes back with as few calls as it takes, and with its trace."""
        failure = self.run(scenario)
        if failure is None:
            return None
        smallest = self._shrink(scenario, failure.place)
        lines: list[str] = []
        failure = self.run(smallest, lines)
        assert failure is not None, "the same scenario went well the second time"
        return Report(smallest, failure, tuple(lines))

    def failures(self, seeds: Iterable[int]) -> Iterator[Report]:
        """The reports of those seeds that fail."""
        return (report for seed in seeds if (report := self.check(scenario_of(seed))) is not None)

    def _shrink(self, scenario: Scenario, place: str) -> Scenario:
        """Leave out one call after another, as long as it fails in the same place."""
        for call in reversed(scenario.calls):
            smaller = with_calls(scenario, {kept.number for kept in scenario.calls} - {call.number})
            failure = self.run(smaller)
            if failure is not None and failure.place == place:
                scenario = smaller
        return scenario


def with_calls(scenario: Scenario, numbers: set[int]) -> Scenario:
    """The scenario with these of its calls alone."""
    return replace(scenario, calls=tuple(call for call in scenario.calls if call.number in numbers))


def check_seeds(seeds: range) -> list[Report]:
    """The reports of those seeds that fail; for worker processes."""
    with Simulator() as simulator:
        return list(simulator.failures(seeds))
