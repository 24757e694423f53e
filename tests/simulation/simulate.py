"""Run seeds; make a failure as small as it gets and say how to see it again."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tests.simulation.scenario import Call, Scenario, scenario_of
from tests.simulation.world import World

MAX_TRACE_LINES = 60


@dataclass(frozen=True)
class Failure:
    """What went wrong in a scenario. `place` is where it was noticed; `trace` what had happened."""

    error: str
    place: str
    trace: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A failing seed, and the fewest of its calls that still fail in the same place."""

    seed: int
    calls: tuple[Call, ...]
    failure: Failure

    @property
    def command(self) -> str:
        """The command that shows it again."""
        numbers = ",".join(str(call.number) for call in self.calls)
        return f"tools/simulate --seed {self.seed} --calls {numbers}"

    def __str__(self) -> str:
        scenario = replace(scenario_of(self.seed), calls=(), events=())
        lines = self.failure.trace
        left_out = [f"... {len(lines) - MAX_TRACE_LINES} lines before"] if len(lines) > MAX_TRACE_LINES else []
        return "\n".join(
            [
                f"seed {self.seed}: {self.failure.error}",
                f"  noticed at {self.failure.place}",
                f"  again: {self.command}",
                f"  {scenario}",
                *left_out,
                *lines[-MAX_TRACE_LINES:],
            ]
        )


class Simulator:
    """Runs scenarios one after another, in one event loop. Use inside `with`."""

    def __init__(self) -> None:
        self._loop = asyncio.Runner()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    def run(self, scenario: Scenario, *, trace: bool = False) -> Failure | None:
        """One scenario; None where nothing was wrong."""
        lines: list[str] | None = [] if trace else None
        try:
            self._loop.run(World(scenario, lines).run())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the seed has found
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error) or (frame.line or "")
            return Failure(
                f"{type(error).__name__}: {text}",
                f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} in {frame.name}",
                tuple(lines or ()),
            )
        return None

    def check(self, seed: int) -> Report | None:
        """One seed; a failure comes back with as few calls as it takes, and with its trace."""
        scenario = scenario_of(seed)
        failure = self.run(scenario)
        if failure is None:
            return None
        smallest = self._shrink(scenario, failure)
        traced = self.run(smallest, trace=True)
        assert traced is not None
        return Report(seed, smallest.calls, traced)

    def failures(self, seeds: Iterable[int]) -> Iterator[Report]:
        """The reports of those seeds that fail."""
        return (report for seed in seeds if (report := self.check(seed)) is not None)

    def _shrink(self, scenario: Scenario, failure: Failure) -> Scenario:
        """Leave out one call after another, as long as it fails in the same place."""
        for call in reversed(scenario.calls):
            smaller = with_calls(scenario, {c.number for c in scenario.calls} - {call.number})
            found = self.run(smaller)
            if found is not None and found.place == failure.place:
                scenario = smaller
        return scenario


def with_calls(scenario: Scenario, numbers: set[int]) -> Scenario:
    """The scenario with these of its calls alone."""
    return replace(scenario, calls=tuple(call for call in scenario.calls if call.number in numbers))
