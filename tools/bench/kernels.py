"""`kernels`: the time of every kernel in a CUDA graph, beside its floor and what was predicted.

A measurement captures many launches, each on buffers of its own, into one graph. Before each timed replay
256 MB of something else are read, so that nothing of it is in the L2, and while that runs the replay is
queued behind it, so that the host's launch latency stays out. The time is that of the replay by events,
divided by the launches: gaps between nodes count, as they do in a decode step. Medians over replays, with
p10 and p90.

Needs a GPU, torch, CuPy and cuda-bindings; `python -m tools.bench.kernels` runs without what the rest of
the benchmarks need.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from photon_grpc.errors import StartupError
from photon_grpc.kernels.launcher import require_cuda
from tools.bench import kernel_cases, report
from tools.bench.kernel_cases import MAX_COPIES, READ_BYTES_PER_US, ROTATED_BYTES, Case

__all__ = ["KernelRow", "draw", "modules", "run", "table", "to_result"]

_MIN_LAUNCHES = 64
_WARM_UP, _TIMED = 5, 20
_EAGER_CALLS = 200


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One case, measured. Times in microseconds per launch."""

    module: str
    name: str
    num_bytes: int
    num_launches: int
    floor_us: float
    predicted_us: float | None
    median_us: float
    p10_us: float
    p90_us: float
    host_us: float
    """Of one launch from Python, outside of a graph."""
    eager_us: float | None
    """Of the same in plain torch, call after call in eager mode, as a user of it waits."""
    eager_device_us: float | None
    """Of the same in plain torch, in a graph: its kernels alone."""
    min_speedup: float

    @property
    def share(self) -> float:
        """Of the machine's read stream."""
        return self.num_bytes / self.median_us / READ_BYTES_PER_US

    @property
    def missed_by(self) -> float | None:
        """Measured over predicted, less 1."""
        return self.median_us / self.predicted_us - 1 if self.predicted_us else None

    @property
    def speedup(self) -> float | None:
        """Over eager torch."""
        return self.eager_us / self.median_us if self.eager_us else None

    @property
    def passed(self) -> bool:
        """Whether the promised speed-up is there."""
        return not self.min_speedup or (self.speedup or 0.0) >= self.min_speedup


def modules() -> list[str]:
    """Names of the modules of cases."""
    return sorted(found.name for found in pkgutil.iter_modules(kernel_cases.__path__))


def run(names: list[str], pattern: str = "") -> Iterator[KernelRow]:
    """Measure the cases of these modules whose names contain `pattern`."""
    require_cuda()
    # Read rather than written: dirty lines would be written back during the measurement.
    flush = torch.zeros(ROTATED_BYTES // 4, device="cuda")
    for name in names:
        for item in importlib.import_module(f"tools.bench.kernel_cases.{name}").cases():
            case = Case(*item)
            if pattern in case.name:
                yield _measure(name, case, flush)
            del case, item
            torch.cuda.empty_cache()


def _measure(module: str, case: Case, flush: torch.Tensor) -> KernelRow:
    count = max(_MIN_LAUNCHES, min(MAX_COPIES, -(-ROTATED_BYTES // case.num_bytes)))
    times = _graph_us(case.launch, count, flush)
    eager_us = eager_device_us = None
    if case.eager is not None:
        eager_us = _eager_us(case.eager)
        eager_device_us = median(_graph_us(case.eager, _MIN_LAUNCHES, flush))
    return KernelRow(
        module,
        case.name,
        case.num_bytes,
        count,
        case.floor_us,
        case.predicted_us,
        median(times),
        times[len(times) // 10],
        times[-1 - len(times) // 10],
        _host_us(case.launch),
        eager_us,
        eager_device_us,
        case.min_speedup,
    )


def _graph_us(launch: Callable[[int], None], count: int, flush: torch.Tensor) -> list[float]:
    """Sorted times per launch."""
    # Compilation, module loading and libraries' workspaces come before the capture.
    for i in range(3):
        launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    times = []
    for i in range(_WARM_UP + _TIMED):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.sum()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= _WARM_UP:
            times.append(start.elapsed_time(stop) * 1e3 / count)
    return sorted(times)


def _eager_us(call: Callable[[int], None]) -> float:
    """Host or device, whichever is slower: the median of several runs of calls without a wait between."""
    runs = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(_EAGER_CALLS):
            call(i)
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - start) * 1e6 / _EAGER_CALLS)
    return median(runs[2:])


def _host_us(call: Callable[[int], None]) -> float:
    """The host's part alone: few enough calls to fit the device's queue."""
    runs = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(_MIN_LAUNCHES):
            call(i)
        runs.append((time.perf_counter() - start) * 1e6 / _MIN_LAUNCHES)
    torch.cuda.synchronize()
    return median(runs[2:])


def table(rows: list[KernelRow]) -> str:
    """For people, and for cuda_kernels/README.md."""
    head = (
        "| kernel | MB | floor us | predicted us | measured us (p10, p90) | share of 4.54 TB/s "
        "| launch us | eager torch us (device) | speed-up |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        predicted = f"{row.predicted_us:.1f} ({row.missed_by:+.0%})" if row.predicted_us else ""
        eager = f"{row.eager_us:.1f} ({row.eager_device_us:.1f})" if row.eager_us else ""
        speedup = f"{row.speedup:.1f}" if row.speedup else ""
        if row.min_speedup:
            speedup += f", promised {row.min_speedup:g}: {'pass' if row.passed else 'FAIL'}"
        lines.append(
            f"| {row.name} | {row.num_bytes / 1e6:.2f} | {row.floor_us:.2f} | {predicted} "
            f"| {row.median_us:.2f} ({row.p10_us:.2f}, {row.p90_us:.2f}) | {row.share:.0%} "
            f"| {row.host_us:.1f} | {eager} | {speedup} |"
        )
    return "\n".join(lines)


def to_result(rows: list[KernelRow]) -> dict[str, Any]:
    """What goes into the JSON."""
    return {
        "device": _device(),
        "read_bytes_per_us": READ_BYTES_PER_US,
        "rows": [
            {
                **{field: getattr(row, field) for field in KernelRow.__dataclass_fields__},
                "share_of_read_stream": row.share,
                "missed_prediction_by": row.missed_by,
                "speedup_over_eager": row.speedup,
                "passed": row.passed,
            }
            for row in rows
        ],
    }


def draw(figure: Figure, rows: list[KernelRow]) -> None:
    """Measured against predicted time of every case."""
    figure.set_size_inches(10, 1 + 0.22 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.median_us for row in rows], color="C0", label="measured")
    predicted = [(place, row.predicted_us) for place, row in zip(places, rows, strict=True)]
    axes.plot(
        [us for _, us in predicted if us], [place for place, us in predicted if us], "k|", label="predicted"
    )
    axes.plot([row.floor_us for row in rows], places, "r|", label="floor")
    axes.set_yticks(places, [row.name for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds per launch, in a graph")
    axes.invert_yaxis()
    axes.legend()


def _device() -> dict[str, Any]:
    import cuda.bindings
    import cupy

    device = require_cuda()
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index}"],
            capture_output=True,
            text=True,
            check=True,
        )
        told = dict(zip(query.split(","), map(str.strip, done.stdout.strip().split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError):
        told = {}
    return {
        "name": device.name,
        "arch": device.arch,
        "num_multiprocessors": device.num_multiprocessors,
        "cuda": torch.version.cuda,
        "cupy": cupy.__version__,
        "cuda_bindings": cuda.bindings.__version__,
        **told,
    }


def main(names: list[str], pattern: str, output: Path, stem: str) -> int:
    """Measure, print, write; 1 when a promised speed-up is missed."""
    rows = []
    for row in run(names or modules(), pattern):
        rows.append(row)
        print(f"{row.name}: {row.median_us:.2f} us", flush=True)
    print(table(rows))
    path = report.write(output, stem, to_result(rows), lambda figure: draw(figure, rows))
    print(f"wrote {path}")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(modules())}; all by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for JSON and plot")
    parser.add_argument("--name", default="kernels", help="stem of the files")
    options = parser.parse_args()
    try:
        raise SystemExit(main(options.modules, options.only, options.output, options.name))
    except StartupError as error:
        print(error.message)
        raise SystemExit(2) from None
