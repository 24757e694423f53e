"""The command: every case of a plan, each written as it comes, then tables and plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console

from photon_grpc.models.registry import load_config
from tools.bench import device, report
from tools.bench.gpu import edges, serving, start, workers
from tools.bench.gpu.cases import ENGINE_SECTIONS, Case, Plan, cases_of
from tools.bench.gpu.results import ResultFile, draw, print_tables
from tools.bench.gpu.workers import Outcome
from tools.bench.random_models import config_folder

__all__ = ["run"]


def run(plan: Plan, output: Path, name: str, console: Console) -> int:
    """Measure, print and write; 1 when a row failed. Raises FileNotFoundError for an unknown model."""
    cases = [case for case in cases_of(plan) if _fits(case)]
    environment = {**report.environment(), **device.describe(), "plan": plan}
    results = ResultFile(output, name, environment)
    with console.status("gpu") as status:
        for outcome in _outcomes(plan, cases, lambda text: status.update(f"gpu: {text}")):
            results.add(outcome, clocks=device.clocks())
            # Labels of kernels have brackets, which are not markup.
            console.print(
                f"{outcome.case.label}: {'failed' if outcome.error else 'done'}",
                markup=False,
                highlight=False,
            )
    print_tables(console, results, plan.sections)
    report.write_plot(output / f"{name}.png", lambda figure: draw(figure, results))
    console.print(f"wrote {output / name}.json", highlight=False)
    return int(results.num_failed > 0)


def _fits(case: Case) -> bool:
    """Whether the model has the positions for it."""
    if not case.model:
        return True
    config = load_config(config_folder(case.model))
    return case.prompt_tokens + case.new_tokens < config.max_position_embeddings


def _outcomes(plan: Plan, cases: list[Case], progress: Callable[[str], None]) -> Iterator[Outcome]:
    def place(case: Case) -> tuple[str, str]:
        return case.model, "engine" if case.section in ENGINE_SECTIONS else case.section

    runners = {
        "engine": workers.run_cases,
        "edges": edges.run_cases,
        "serving": serving.run_cases,
        "start": start.run_cases,
    }
    for (model, where), group in groupby(cases, key=place):
        yield from runners[where](plan, model, list(group), progress)
