"""`overload`: more calls than the server can serve, and what becomes of those that it takes and of the rest.

First a closed loop that just fills the batch says what the server can do, then Poisson arrivals come at a
multiple of that. Meanwhile a caller outside of the load asks for the server's health again and again. Until
the queue has filled nobody is refused, so figures are of the later part of the arrivals. The engine makes its
tokens up, each step takes the same time: everything but the model is under load.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tools.bench.figures import CallRecord, Distribution
from tools.bench.load import Load, poisson_arrivals, run_load
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import SCRIPTED_VOCAB_SIZE, ServerSpec

__all__ = ["OverloadPlan", "OverloadRow", "draw", "print_table", "run", "to_result", "tokens_per_second"]

_FIRST_ID = 4
_HEALTH_INTERVAL_S = 0.02
# Of the arrivals' time; by then the queue has filled.
_RAMP_SHARE = 0.4
_MAX_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """What to run: `factors` are multiples of the peak, durations in seconds."""

    factors: tuple[float, ...] = (2.0, 10.0)
    duration_s: float = 10.0
    step_s: float = 0.02
    max_num_seqs: int = 16
    max_queued_requests: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 50
    num_client_processes: int = 1
    seed: int = 0

    @property
    def server(self) -> ServerSpec:
        """A scripted engine that takes every prompt of a full batch in one step."""
        return ServerSpec(
            step_s=self.step_s,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.prompt_tokens * self.max_num_seqs,
            settings=(f"limits.max_queued_requests={self.max_queued_requests}",),
        )


@dataclass(frozen=True, slots=True)
class OverloadRow:
    """One multiple of the peak. `shed` are seconds from sending a call to its refusal."""

    factor: float
    rate: float
    codes: dict[str, int]
    goodput: float
    """Output tokens per second of calls that ended OK, over the peak's."""
    shed: Distribution | None
    health: Distribution | None
    send_lateness: Distribution | None


def tokens_per_second(records: Sequence[CallRecord], begin: float, end: float) -> float:
    """Tokens that calls which ended OK brought between two moments, per second."""
    within = (
        count
        for record in records
        if record.code == "OK"
        for received, count in record.tokens
        if begin <= received < end
    )
    return sum(within) / (end - begin)


class _HealthCaller:
    """Asks for the server's health from a thread of its own until it is left."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-health")
        self.answers: list[tuple[float, float]] = []
        """`(asked, seconds)` of each question; one that fails or is answered NOT_SERVING takes for ever."""

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._leave.set()
        self._thread.join()

    def _run(self) -> None:
        with grpc.insecure_channel(self._address) as channel:
            grpc.channel_ready_future(channel).result(_MAX_CONNECT_S)
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="photon.v1.InferenceService")
            while not self._leave.wait(_HEALTH_INTERVAL_S):
                asked = time.monotonic()
                try:
                    answer = stub.Check(request, timeout=_MAX_CONNECT_S)
                    is_well = answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.RpcError:
                    is_well = False
                self.answers.append((asked, time.monotonic() - asked if is_well else float("inf")))


def run(plan: OverloadPlan, progress: Callable[[str], None]) -> tuple[float, list[OverloadRow]]:
    """The peak in tokens per second, and a row for each factor."""
    with ServerHandle(plan.server) as server:
        load = Load(
            address=server.address,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
            first_id=_FIRST_ID,
            vocab_size=SCRIPTED_VOCAB_SIZE,
            seed=plan.seed,
        )
        progress("peak")
        full = replace(load, concurrency=plan.max_num_seqs, duration_s=plan.duration_s)
        peak = _later_part(plan, _records(plan, full))[0]
        rows = []
        for factor in plan.factors:
            progress(f"{factor:g} x peak")
            rows.append(_overload(plan, load, factor, peak))
    return peak, rows


def _overload(plan: OverloadPlan, load: Load, factor: float, peak: float) -> OverloadRow:
    rate = factor * peak / plan.new_tokens
    arrivals = poisson_arrivals(rate, plan.duration_s, plan.seed)
    caller = _HealthCaller(load.address)
    caller.start()
    try:
        records = _records(plan, replace(load, arrivals=arrivals))
    finally:
        caller.stop()
    goodput, begin, end = _later_part(plan, records)
    later = [record for record in records if begin <= record.intended < end]
    return OverloadRow(
        factor=factor,
        rate=rate,
        codes=dict(Counter(record.code for record in records)),
        goodput=goodput / peak,
        shed=Distribution.of([r.ended - r.sent for r in later if r.code == "UNAVAILABLE"]),
        health=Distribution.of([seconds for asked, seconds in caller.answers if begin <= asked < end]),
        send_lateness=Distribution.of([r.sent - r.intended for r in later]),
    )


def _records(plan: OverloadPlan, load: Load) -> Sequence[CallRecord]:
    result = run_load(load, plan.num_client_processes, before=lambda: None, after=lambda: None)
    return result.records


def _later_part(plan: OverloadPlan, records: Sequence[CallRecord]) -> tuple[float, float, float]:
    """Tokens per second once the queue has filled, and that time's begin and end."""
    start = min(record.intended for record in records)
    begin, end = start + _RAMP_SHARE * plan.duration_s, start + plan.duration_s
    return tokens_per_second(records, begin, end), begin, end


def _ms(distribution: Distribution | None, percentile: str) -> str:
    return "-" if distribution is None else f"{getattr(distribution, percentile) * 1e3:.1f}"


def print_table(console: Console, peak: float, rows: Sequence[OverloadRow], title: str) -> None:
    """One line per factor, times in milliseconds."""
    table = Table(title=f"{title}; peak {peak:.0f} tokens/s", title_justify="left")
    names = (
        "x peak",
        "calls/s",
        "ended",
        "goodput / peak",
        "shed p50",
        "shed p99",
        "health p50",
        "health p99",
    )
    for column in (*names, "late p99"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.factor:g}",
            f"{row.rate:.0f}",
            ", ".join(f"{code} {count}" for code, count in sorted(row.codes.items())),
            f"{row.goodput:.3f}",
            _ms(row.shed, "p50"),
            _ms(row.shed, "p99"),
            _ms(row.health, "p50"),
            _ms(row.health, "p99"),
            _ms(row.send_lateness, "p99"),
        )
    console.print(table)


def draw(figure: Figure, rows: Sequence[OverloadRow]) -> None:
    """Goodput on the left, latencies of refusals and of health on the right, over the offered load."""
    factors = [row.factor for row in rows]
    goodput, latency = figure.subplots(1, 2)
    goodput.plot(factors, [row.goodput for row in rows], marker="o")
    goodput.set(xlabel="offered load / peak", ylabel="goodput / peak", ylim=(0, 1.1), title="calls served")
    for name, found in (("shed", [r.shed for r in rows]), ("health", [r.health for r in rows])):
        values = [None if d is None else d.p99 * 1e3 for d in found]
        latency.plot(factors, values, marker="o", label=name)
    latency.set(xlabel="offered load / peak", ylabel="p99, ms", title="calls refused, and health")
    latency.legend()


def to_result(plan: OverloadPlan, peak: float, rows: Sequence[OverloadRow]) -> dict[str, object]:
    """What goes into the JSON."""
    return {"plan": asdict(plan), "peak_tokens_per_second": peak, "rows": [asdict(row) for row in rows]}
