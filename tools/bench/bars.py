"""Promises as numbers: what is required, what was measured, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

__all__ = ["Bar", "draw", "print_table", "to_result"]


@dataclass(frozen=True, slots=True)
class Bar:
    """What this release promises, as a ratio or a cost that hardly depends on the machine."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def print_table(console: Console, bars: Sequence[Bar], title: str) -> None:
    """One line per promise."""
    table = Table(title=title, title_justify="left")
    for column in ("bar", "required", "measured", ""):
        table.add_column(column)
    for bar in bars:
        table.add_row(
            bar.name,
            f"{'>=' if bar.at_least else '<='} {bar.bound:g}",
            f"{bar.value:,.2f}",
            "[green]pass" if bar.passed else "[red]FAIL",
        )
    console.print(table)


def to_result(bars: Sequence[Bar]) -> list[dict[str, object]]:
    """For JSON."""
    return [
        {
            "bar": bar.name,
            "bound": bar.bound,
            "at_least": bar.at_least,
            "value": bar.value,
            "passed": bar.passed,
        }
        for bar in bars
    ]


def draw(figure: Figure, bars: Sequence[Bar]) -> None:
    """How far each is from its bound."""
    axes = figure.subplots()
    margins = [bar.value / bar.bound if bar.at_least else bar.bound / bar.value for bar in bars]
    axes.barh([bar.name for bar in bars], margins, color=["C2" if bar.passed else "C3" for bar in bars])
    axes.axvline(1.0, color="black")
    axes.set_xlabel("margin: 1 is the bar, more is better")
    axes.invert_yaxis()
