"""`gpu.json`: rows of several runs in one file, the table beside the bars, and the plot.

A row is named by its case. A run replaces the rows that it has measured and leaves the others, so that
the table can be made in parts; each row names the run, with its environment, that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tools.bench import report
from tools.bench.gpu.cases import BARS, SECTIONS, Bar, Case
from tools.bench.gpu.workers import Outcome

__all__ = ["ResultFile", "draw", "print_tables"]


class ResultFile:
    """The rows so far, on disk after every one of them."""

    def __init__(self, folder: Path, name: str, environment: dict[str, Any]) -> None:
        """Takes up what a file of that name holds."""
        self._folder = folder
        self.name = name
        found: dict[str, Any] = {"runs": [], "rows": []}
        path = folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
        self._runs: list[dict[str, Any]] = [*found["runs"], environment]
        self._rows: dict[Case, dict[str, Any]] = {Case(**row["case"]): row for row in found["rows"]}
        self.num_failed = 0

    def add(self, outcome: Outcome, **told: object) -> None:
        """Take a row, in place of an older one of the same case, and write the file."""
        row: dict[str, Any] = {"case": asdict(outcome.case), "run": len(self._runs) - 1, **told}
        if outcome.error:
            self.num_failed += 1
            row["error"] = outcome.error
        else:
            row["result"] = outcome.result
        self._rows[outcome.case] = row
        self._folder.mkdir(parents=True, exist_ok=True)
        report.write_json(self._folder / f"{self.name}.json", self.content())

    def result(self, case: Case) -> dict[str, Any] | None:
        """The result of a case; None where it failed or was not measured."""
        return self._rows.get(case, {}).get("result")

    def rows(self, section: str) -> list[tuple[Case, dict[str, Any]]]:
        """Cases and results of a section, in the order of the table; failed ones are left out."""
        found = [(case, row["result"]) for case, row in self._rows.items() if "result" in row]
        return sorted((pair for pair in found if pair[0].section == section), key=_order)

    def errors(self) -> list[tuple[Case, str]]:
        """What failed, in any run."""
        return [(case, row["error"]) for case, row in self._rows.items() if "error" in row]

    def content(self) -> dict[str, Any]:
        """What goes into the file: only runs that a row still comes from."""
        used = sorted({row["run"] for row in self._rows.values()})
        number = {run: place for place, run in enumerate(used)}
        rows = sorted(self._rows.items(), key=_order)
        return {
            "benchmark": self.name,
            "runs": [self._runs[run] for run in used],
            "bars": [
                {
                    "what": bar.what,
                    "unit": bar.unit,
                    "vllm": bar.vllm,
                    "to_reach": bar.target,
                    "at_least": bar.at_least,
                    "measured": value,
                    "reached": None if value is None else bar.is_reached(value),
                }
                for bar, value in self.judged()
            ],
            "rows": [{**row, "run": number[row["run"]]} for _, row in rows],
        }

    def judged(self) -> list[tuple[Bar, float | None]]:
        """Every bar and its figure, None where there is none."""
        return [(bar, bar.measured(self.result(bar.case) or {})) for bar in BARS]


def _order(pair: tuple[Case, Any]) -> tuple[object, ...]:
    case = pair[0]
    return (
        SECTIONS.index(case.section),
        case.model,
        case.prompt_tokens,
        case.batch,
        case.sampling,
        case.variant,
    )


def print_tables(console: Console, results: ResultFile, sections: Sequence[str]) -> None:
    """The tables of these sections, then the bars, then what failed."""
    for section in sections:
        rows = results.rows(section)
        if rows:
            _PRINTERS[section](console, rows)
    _print_bars(console, results)
    for case, error in results.errors():
        console.print(f"{case.label} failed:", _last_line(error), style="red", markup=False)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _table(title: str, columns: Iterable[str], caption: str = "") -> Table:
    table = Table(title=title, caption=caption)
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "what", "sampling", "kernel") else "right")
    return table


def _print_bars(console: Console, results: ResultFile) -> None:
    table = _table("the bars", ("what", "measured", "vLLM 0.24", "to reach", "against vLLM", ""))
    for bar, value in results.judged():
        if value is None:
            continue
        ratio = "-"
        if bar.vllm and value:
            ratio = f"{value / bar.vllm if bar.at_least else bar.vllm / value:.2f}x"
        table.add_row(
            f"{bar.what} [{bar.unit}]".replace("[", "\\["),
            _number(value),
            "-" if bar.vllm is None else _number(bar.vllm),
            _number(bar.target),
            ratio,
            "[green]reached" if bar.is_reached(value) else "[red]not reached",
        )
    if table.row_count:
        console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _print_decode(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    columns = ("model", "prompt", "batch", "sampling", "decode tok/s", "min - max", "of greedy", "steps/s")
    columns += ("step p50 / p99 ms", "schedule", "launch", "update", "elsewhere", "collect", "last TTFT ms")
    table = _table("decode in the engine", columns, "schedule to collect: us of the engine's thread per step")
    greedy = {
        (case.model, case.batch, case.prompt_tokens): result["decode_tokens_per_second"]["median"]
        for case, result in rows
        if case.sampling == "greedy"
    }
    for case, result in rows:
        speed, us = result["decode_tokens_per_second"], result["host_us_per_step"]
        beside = greedy.get((case.model, case.batch, case.prompt_tokens))
        table.add_row(
            case.model,
            str(case.prompt_tokens),
            str(case.batch),
            case.sampling,
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} - {speed['max']:,.0f}",
            "-" if case.sampling == "greedy" or not beside else f"{speed['median'] / beside:.1%}",
            f"{result['steps_per_second']:,.0f}",
            f"{_ms(result['step_s']['p50'])} / {_ms(result['step_s']['p99'])}",
            *(f"{us[part]:.0f}" for part in ("schedule", "launch", "update", "elsewhere", "collect")),
            _ms(result["first_token_s"]["max"]),
        )
    console.print(table)


def _print_first_tokens(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    table = _table("first tokens in the engine, ms", ("model", "prompt", "batch", "mean", "p50", "max"))
    for case, result in rows:
        found = result["first_token_s"]
        cells = (_ms(found["mean"]), _ms(found["p50"]), _ms(found["max"]))
        table.add_row(case.model, str(case.prompt_tokens), str(case.batch), *cells)
    console.print(table)


_KERNELS_SHOWN = 14


def _print_kernels(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    for case, result in rows:
        if "unavailable" in result:
            console.print(f"{case.label}: {result['unavailable']}", highlight=False)
            continue
        title = (
            f"{case.model}, batch {case.batch}: {result['span_us']:.0f} us a step, "
            f"{result['busy_us']:.0f} busy, kernels add up to {result['sum_us']:.0f}"
        )
        table = _table(title, ("kernel", "calls/step", "us/step", "share"))
        for kernel in result["kernels"][:_KERNELS_SHOWN]:
            table.add_row(
                kernel["name"][:90],
                f"{kernel['calls_per_step']:.1f}",
                f"{kernel['us_per_step']:.1f}",
                f"{kernel['us_per_step'] / result['sum_us']:.1%}",
            )
        console.print(table)


def _print_edges(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    table = _table("kernels alone, in a graph", ("kernel", "us", "eager torch us", "times faster"))
    for case, result in rows:
        us, eager = result["median_us"], result["eager_us"]
        table.add_row(
            case.variant.replace("[", "\\["),
            f"{us:.2f}",
            f"{eager:.2f}",
            f"{result['speedup_over_eager']:.1f}",
        )
    console.print(table)


def _print_serving(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    columns = ("model", "streams", "sampling", "what", "tok/s", "min - max", "tok/msg", "TTFT p50 / p99 ms")
    columns += ("ITL p50 / p99 ms", "pause p50 / p99 ms", "server cores", "client processes")
    caption = "ITL spreads merged tokens evenly; pause is the time between messages"
    table = _table("through gRPC, at the client", columns, caption)
    for case, result in rows:
        speed = result["tokens_per_second"]
        table.add_row(
            case.model,
            str(case.batch),
            case.sampling,
            case.variant,
            f"{speed['median']:,.0f}",
            f"{speed['min']:,.0f} - {speed['max']:,.0f}",
            f"{result['tokens_per_message']:.2f}",
            *(_percentiles(result[name]) for name in ("first_token_s", "token_gap_s", "pause_s")),
            f"{result['server_cores']:.2f}",
            str(result["client_processes"]),
        )
    console.print(table)


def _percentiles(figures: dict[str, Any]) -> str:
    """Of streams that had one message each there are no pauses."""
    return f"{_ms(figures['p50'])} / {_ms(figures['p99'])}" if "p50" in figures else "-"


def _print_start(console: Console, rows: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    table = _table("start of a server", ("model", "what", "seconds to SERVING"))
    for case, result in rows:
        table.add_row(case.model, case.variant, f"{result['serving_after_s']:.2f}")
    console.print(table)


_PRINTERS: dict[str, Callable[[Console, Sequence[tuple[Case, dict[str, Any]]]], None]] = {
    "engine": _print_decode,
    "ttft": _print_first_tokens,
    "context": _print_decode,
    "kernels": _print_kernels,
    "edges": _print_edges,
    "serving": _print_serving,
    "start": _print_start,
}


def draw(figure: Figure, results: ResultFile) -> None:
    """Bars as margins; where a step's host time goes; where a step's device time goes."""
    figure.set_size_inches(15, 9)
    margins, host = figure.subplots(1, 2, width_ratios=(3, 2))
    judged = [(bar, value) for bar, value in results.judged() if value is not None]
    places = range(len(judged))
    values = [value / bar.target if bar.at_least else bar.target / value for bar, value in judged]
    margins.barh(places, values, color=["C2" if value >= 1 else "C3" for value in values])
    for place, (bar, _) in zip(places, judged, strict=True):
        if bar.vllm is not None:
            beside = bar.vllm / bar.target if bar.at_least else bar.target / bar.vllm
            margins.plot([beside, beside], [place - 0.4, place + 0.4], color="black", linewidth=2)
    margins.axvline(1.0, color="black", linestyle=":")
    margins.set_yticks(places, [bar.what for bar, _ in judged], fontsize=7)
    margins.set_xlabel("1 is the bar, more is better; black: vLLM 0.24")
    margins.invert_yaxis()
    rows = [(case, result) for case, result in results.rows("engine")]
    left = [0.0] * len(rows)
    for part in ("schedule", "launch", "update", "elsewhere", "collect"):
        widths = [result["host_us_per_step"][part] for _, result in rows]
        color = "lightgrey" if part == "collect" else None
        host.barh(range(len(rows)), widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    names = [f"{case.model} {case.batch} {case.sampling}" for case, _ in rows]
    host.set_yticks(range(len(rows)), names, fontsize=7)
    host.set_xscale("symlog", linthresh=100)
    host.set_xlabel("us of the engine's thread per step; collect waits for the device")
    host.invert_yaxis()
    if rows:
        host.legend(fontsize=7)
