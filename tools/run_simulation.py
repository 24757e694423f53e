"""Run seeds of the simulation in tests/simulation; a failing seed prints its report and its command.

    tools/simulate [--seeds N] [--start N] [--jobs N]     many seeds
    tools/simulate --seed N [--calls 2,5] [--trace]       one seed again, with these of its calls alone

Exit code 0 when no seed failed, else 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.simulation.scenario import scenario_of  # noqa: E402
from tests.simulation.simulate import Simulator, check_seeds, with_calls  # noqa: E402

SEEDS_PER_TASK = 200
MAX_REPORTS = 5


def run_one(seed: int, calls: str | None, trace: bool) -> int:
    """One seed; its trace where something is wrong, or always with `trace`."""
    scenario = scenario_of(seed)
    if calls is not None:
        scenario = with_calls(scenario, {int(number) for number in calls.split(",")})
    with Simulator() as simulator:
        report = simulator.check(scenario)
        if report is not None:
            print(report)
            return 1
        if trace:
            print("\n".join(simulator.trace(scenario)))
    print(f"seed {seed}: nothing wrong")
    return 0


def run_many(start: int, seeds: int, jobs: int) -> int:
    """Seeds `start` to `start + seeds - 1` in `jobs` processes."""
    began = time.monotonic()
    tasks = [
        range(first, min(first + SEEDS_PER_TASK, start + seeds))
        for first in range(start, start + seeds, SEEDS_PER_TASK)
    ]
    failed: list[int] = []
    done = 0
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for task, reports in zip(tasks, pool.map(check_seeds, tasks), strict=True):
            done += len(task)
            for report in reports:
                if len(failed) < MAX_REPORTS:
                    print(f"{report}\n", flush=True)
                failed.append(report.seed)
            rate = done / (time.monotonic() - began)
            print(f"\r{done}/{seeds} seeds, {rate:.0f}/s, {len(failed)} failed", end="", file=sys.stderr)
    print(file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {seeds} seeds failed: {' '.join(map(str, failed))}")
        return 1
    print(f"{seeds} seeds from {start}: nothing wrong ({time.monotonic() - began:.0f} s)")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/simulate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds to run")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--calls", help="with --seed: numbers of the calls to keep, as in 2,5")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return run_one(options.seed, options.calls, options.trace)
    return run_many(options.start, options.seeds, options.jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
