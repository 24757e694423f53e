"""`serving`: the whole service under streaming load from other processes.

Every load is preceded by a short one that is not counted. CPU time is the server process's, all
threads, user and system, from the moment all clients are connected to the end of the last call; so it
holds the set-up of calls and the prefill, not only the stream of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from photon_grpc.engine_place import model_folder
from photon_grpc.options import ModelOptions
from tools.bench.figures import Distribution, LoadSummary, Objective, summarize
from tools.bench.load import Load, poisson_arrivals, run_load
from tools.bench.server_handle import CpuTimes, ServerHandle
from tools.bench.server_process import SCRIPTED_VOCAB_SIZE, ServerSpec

__all__ = ["Comparison", "ServingPlan", "ServingRow", "compare_sequential", "draw", "print_table", "run"]

# Below it are the special tokens of the models that tools/make_tiny_model.py and the demo model use.
_FIRST_ID = 4
_WARMUP_CALLS = 4


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What to run. Durations in seconds; `rates` in calls per second."""

    server: ServerSpec
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...]
    duration_s: float
    prompt_tokens: int
    new_tokens: int
    objective: Objective
    num_client_processes: int = 1
    repeats: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One load and what it cost. `per_core` figures divide by CPU seconds of the server, not by time."""

    label: str
    repeat: int
    concurrency: int | None
    rate: float | None
    load: LoadSummary
    server_cpu: CpuTimes
    client_cpu_s: float
    server_memory_bytes: int

    @property
    def cpu_us_per_token(self) -> float:
        """Microseconds of server CPU, all threads, for each token that reached a client."""
        return self.server_cpu.process / self.load.num_tokens * 1e6

    @property
    def tokens_per_core_second(self) -> float:
        """Tokens for each second of server CPU, all threads."""
        return self.load.num_tokens / self.server_cpu.process

    def to_dict(self) -> dict[str, object]:
        """For JSON: the fields and what is derived from them."""
        us = 1e6 / self.load.num_tokens
        return {
            "label": self.label,
            "repeat": self.repeat,
            "concurrency": self.concurrency,
            "rate": self.rate,
            "load": self.load,
            "server_cpu": self.server_cpu,
            "server_cpu_us_per_token": {
                "all_threads": self.cpu_us_per_token,
                "front_end": self.server_cpu.front_end * us,
                "event_loop_thread": self.server_cpu.event_loop * us,
                "engine_thread": self.server_cpu.engine * us,
                "other_threads": self.server_cpu.others * us,
            },
            "tokens_per_core_second": self.tokens_per_core_second,
            "server_cores_used": self.server_cpu.process / self.load.elapsed_s,
            "client_cpu_s": self.client_cpu_s,
            "server_memory_bytes": self.server_memory_bytes,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same requests one at a time and then together, in turns; tokens per second of each."""

    concurrency: int
    num_requests: int
    sequential: tuple[float, ...]
    concurrent: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Concurrent over sequential, pair by pair."""
        return [b / a for a, b in zip(self.sequential, self.concurrent, strict=True)]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        ratios = self.ratios
        return {
            "concurrency": self.concurrency,
            "num_requests": self.num_requests,
            "sequential_tokens_per_second": self.sequential,
            "concurrent_tokens_per_second": self.concurrent,
            "ratio": {"min": min(ratios), "median": median(ratios), "max": max(ratios)},
        }


def vocab_size(server: ServerSpec) -> int:
    """Of the model that the server will serve. Raises StartupError for a folder that is not there."""
    if not server.model:
        return SCRIPTED_VOCAB_SIZE
    config = json.loads((model_folder(ModelOptions(path=server.model)) / "config.json").read_text())
    return int(config["vocab_size"])


def _base_load(plan: ServingPlan, handle: ServerHandle) -> Load:
    return Load(
        address=handle.address,
        prompt_tokens=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
        first_id=_FIRST_ID,
        vocab_size=vocab_size(plan.server),
        seed=plan.seed,
    )


def _measure(
    plan: ServingPlan, handle: ServerHandle, load: Load, label: str, repeat: int, rate: float | None
) -> ServingRow:
    marks: list[CpuTimes] = []

    def mark() -> None:
        marks.append(handle.cpu_times())

    result = run_load(load, plan.num_client_processes, before=mark, after=mark)
    summary = summarize(result.records, plan.objective)
    if not summary.num_tokens:
        raise RuntimeError(f"{label}: no call brought a token: {summary.codes}")
    return ServingRow(
        label=label,
        repeat=repeat,
        concurrency=None if load.arrivals else load.concurrency,
        rate=rate,
        load=summary,
        server_cpu=marks[1] - marks[0],
        client_cpu_s=result.client_cpu_s,
        server_memory_bytes=handle.memory_bytes(),
    )


def _warm_up(plan: ServingPlan, handle: ServerHandle, load: Load) -> None:
    warm = replace(load, concurrency=_WARMUP_CALLS, num_requests=_WARMUP_CALLS)
    _measure(plan, handle, warm, "warm-up", 0, None)


def run(plan: ServingPlan) -> Iterable[ServingRow]:
    """Every closed loop and then every open one, `repeats` times round; rows as they are measured."""
    with ServerHandle(plan.server) as handle:
        base = _base_load(plan, handle)
        _warm_up(plan, handle, base)
        for repeat in range(plan.repeats):
            for concurrency in plan.concurrencies:
                load = replace(base, concurrency=concurrency, duration_s=plan.duration_s)
                yield _measure(plan, handle, load, f"{concurrency} streams", repeat, None)
            for rate in plan.rates:
                arrivals = poisson_arrivals(rate, plan.duration_s, plan.seed + repeat)
                if not arrivals:
                    raise ValueError(f"no call arrives in {plan.duration_s} s at {rate} per second")
                load = replace(base, arrivals=arrivals)
                yield _measure(plan, handle, load, f"{rate:g} calls/s", repeat, rate)


def compare_sequential(
    plan: ServingPlan, concurrency: int, num_requests: int
) -> tuple[Comparison, list[ServingRow]]:
    """The same requests one at a time and `concurrency` at a time, alternating, `repeats` pairs."""
    rows: list[ServingRow] = []
    speeds: dict[int, list[float]] = {1: [], concurrency: []}
    with ServerHandle(plan.server) as handle:
        base = _base_load(plan, handle)
        _warm_up(plan, handle, base)
        for repeat in range(plan.repeats):
            for at_a_time in (1, concurrency):
                load = replace(base, concurrency=at_a_time, num_requests=num_requests)
                row = _measure(plan, handle, load, f"{at_a_time} at a time", repeat, None)
                if row.load.codes.get("OK") != num_requests:
                    raise RuntimeError(f"calls failed: {row.load.codes}")
                rows.append(row)
                speeds[at_a_time].append(row.load.tokens_per_second)
    return Comparison(concurrency, num_requests, tuple(speeds[1]), tuple(speeds[concurrency])), rows


def _ms(distribution: Distribution | None) -> str:
    if distribution is None:
        return "-"
    return " / ".join(f"{1e3 * v:.1f}" for v in (distribution.p50, distribution.p90, distribution.p99))


def print_table(console: Console, rows: Sequence[ServingRow], title: str) -> None:
    """One line per load. Latencies as p50 / p90 / p99."""
    table = Table(title=title, caption="latencies in ms: p50 / p90 / p99; ITL spreads merged tokens evenly")
    table.add_column("load")
    for name in ("tok/s", "msg/s", "tok/msg", "TTFT", "ITL", "pause", "end to end", "goodput/s"):
        table.add_column(name, justify="right")
    for name in ("cpu us/tok", "loop", "engine", "others", "tok/core-s", "cores"):
        table.add_column(name, justify="right")
    table.add_column("codes")
    for row in rows:
        load, us = row.load, 1e6 / row.load.num_tokens
        table.add_row(
            row.label,
            f"{load.tokens_per_second:,.0f}",
            f"{load.messages_per_second:,.0f}",
            f"{load.tokens_per_token_message:.2f}",
            _ms(load.first_token),
            _ms(load.token_gap),
            _ms(load.pause),
            _ms(load.end_to_end),
            f"{load.goodput_calls_per_second:.1f}",
            f"{row.server_cpu.process * us:.1f}",
            f"{row.server_cpu.event_loop * us:.1f}",
            f"{row.server_cpu.engine * us:.1f}",
            f"{row.server_cpu.others * us:.1f}",
            f"{1e6 / (row.server_cpu.process * us):,.0f}" if row.server_cpu.process else "-",
            f"{row.server_cpu.process / load.elapsed_s:.2f}",
            " ".join(f"{code}:{count}" for code, count in load.codes.items()),
        )
    console.print(table)


def draw(figure: Figure, rows: Sequence[ServingRow]) -> None:
    """Speed, latency and CPU per token of each load."""
    speed, latency, cost = figure.subplots(1, 3)
    labels = [row.label if row.repeat == 0 else f"{row.label} ({row.repeat + 1})" for row in rows]
    places = range(len(rows))
    speed.bar(places, [row.load.tokens_per_second for row in rows])
    speed.set_title("tokens/s")
    for name, pick in (("TTFT", "first_token"), ("ITL", "token_gap"), ("pause", "pause")):
        for percentile, style in (("p50", "-"), ("p99", ":")):
            values = [
                1e3 * getattr(found, percentile) if (found := getattr(row.load, pick)) else float("nan")
                for row in rows
            ]
            latency.plot(places, values, style, marker="o", label=f"{name} {percentile}")
    latency.set_yscale("log")
    latency.set_title("latency, ms")
    latency.legend(fontsize=7)
    bottom = [0.0] * len(rows)
    for name in ("event_loop", "engine", "others"):
        values = [getattr(row.server_cpu, name) / row.load.num_tokens * 1e6 for row in rows]
        cost.bar(places, values, bottom=bottom, label=name.replace("_", " "))
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    cost.set_title("server CPU, µs per token")
    cost.legend(fontsize=7)
    for axes in (speed, latency, cost):
        axes.set_xticks(list(places), labels, rotation=30, ha="right", fontsize=7)


def default_processes() -> int:
    """Client processes for this machine: half of its cores, the other half is the server's."""
    import os

    return max(1, len(os.sched_getaffinity(0)) // 2)


def to_result(
    plan: ServingPlan, rows: Sequence[ServingRow], comparison: Comparison | None
) -> dict[str, object]:
    """For JSON."""
    return {
        "plan": plan,
        "rows": [row.to_dict() for row in rows],
        "comparison": None if comparison is None else comparison.to_dict(),
    }


def results_name(plan: ServingPlan) -> str:
    """The stem of the files of this plan."""
    return f"serving-{Path(plan.server.model).name}" if plan.server.model else "serving-fake-engine"
