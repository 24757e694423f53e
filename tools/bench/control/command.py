"""Runs the parts of `control`, prints them beside their bars, and writes JSON and plot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from tools.bench.bars import Bar
from tools.bench.control import cancel, drain, frozen, steps

__all__ = ["PARTS", "Found", "draw", "run"]

PARTS = ("drain", "cancel", "frozen", "steps")


@dataclass(frozen=True, slots=True)
class Found:
    """One part: its plan, its rows or its result, in words, and what is promised of it."""

    name: str
    plan: Any
    result: Any
    headline: str
    bars: list[Bar]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = self.result if isinstance(self.result, list) else [self.result]
        return {"plan": asdict(self.plan), "headline": self.headline, "rows": [asdict(row) for row in rows]}


def run(parts: tuple[str, ...], quick: bool, seed: int, progress: Callable[[str], None]) -> list[Found]:
    """The parts in their order; `quick` takes few rounds of each, to try the command."""
    found = []
    for part in parts:
        progress(part)
        found.append(_RUN[part](quick, seed))
    return found


def _drain(quick: bool, seed: int) -> Found:
    plan = drain.DrainPlan(rounds=1 if quick else 5, seed=seed)
    rows = drain.run(plan)
    return Found("drain", plan, rows, drain.headline(rows), drain.promises(plan, rows))


def _cancel(quick: bool, seed: int) -> Found:
    plan = cancel.CancelPlan(cancels=20 if quick else 300, seed=seed)
    result = cancel.run(plan)
    return Found("cancel", plan, result, cancel.headline(plan, result), cancel.promises(plan, result))


def _frozen(quick: bool, seed: int) -> Found:
    plan = frozen.FrozenPlan(clients=2 if quick else 5, seed=seed)
    result = frozen.run(plan)
    return Found("frozen", plan, result, frozen.headline(result), frozen.promises(result))


def _steps(quick: bool, seed: int) -> Found:
    plan = steps.StepsPlan(rounds=1 if quick else 5)
    rows = steps.run(plan)
    return Found("steps", plan, rows, steps.headline(rows), steps.promises(rows))


_RUN = {"drain": _drain, "cancel": _cancel, "frozen": _frozen, "steps": _steps}


def draw(figure: Figure, found: list[Found]) -> None:
    """Every bar that is not zero, as a part of its bound; below 1 is kept."""
    axes = figure.subplots()
    bars = [bar for part in found for bar in part.bars if bar.bound and not bar.at_least]
    axes.barh([bar.name for bar in bars], [bar.value / bar.bound for bar in bars])
    axes.axvline(1.0, color="black")
    axes.set_xlabel("measured / bound")
    axes.invert_yaxis()
