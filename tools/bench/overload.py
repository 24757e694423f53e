"""`overload`: more calls than the server can serve, from two tenants, and what becomes of them.

First a closed loop that just fills the batch says what the server can do, then Poisson arrivals come at
multiples of that, from one process per tenant, the second of which asks for five times as much as the
first. Meanwhile a caller outside of the load asks for the server's health again and again. Until the queue
has filled nobody is refused, so figures are of the later part of the arrivals. The engine makes its tokens
up, each step takes the same time: everything but the model is under load.

A tenant's fair share is max-min: who asks for less than an equal part of what the server served gets all of
it, and what is left over goes to the others. Its demand is what really arrived in the measured time, its
goodput the tokens that came in that time. The engine evens out what tenants were given, not what they are
given at every moment: their difference is bounded by a few batches' work, so a short run says little.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tools.bench.bars import Bar
from tools.bench.figures import CallRecord, Distribution
from tools.bench.load import Load, poisson_arrivals, run_load, run_loads
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import SCRIPTED_VOCAB_SIZE, ServerSpec

__all__ = [
    "HealthCaller",
    "OverloadPlan",
    "OverloadRow",
    "Peak",
    "TenantRow",
    "arrivals_of",
    "callers_file",
    "draw",
    "is_told_when",
    "max_min_shares",
    "print_table",
    "promises",
    "run",
    "tenant_loads",
    "to_result",
    "tokens_per_second",
    "words",
]

TENANTS = ("small", "large")
# What a call may end with under overload; anything else is a fault of the server.
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
_FIRST_ID = 4
_HEALTH_INTERVAL_S = 0.02
# Of the arrivals' time; by then the queue has filled.
_RAMP_SHARE = 0.25
_MAX_CONNECT_S = 30.0


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """What to run: `factors` are multiples of the peak, durations in seconds.

    `demands` are the parts of the arrivals that come from each of `TENANTS`.
    """

    factors: tuple[float, ...] = (0.9, 2.0, 10.0)
    duration_s: float = 60.0
    step_s: float = 0.025
    max_num_seqs: int = 32
    max_queued_requests: int = 32
    prompt_tokens: int = 16
    new_tokens: int = 50
    spread: int = 25
    """Outputs of one length would enter and leave the batch together."""
    demands: tuple[float, float] = (1.0, 5.0)
    engine_process: str = "auto"
    settings: tuple[str, ...] = ()
    seed: int = 0

    def server(self, callers: Path) -> ServerSpec:
        """A scripted engine that takes every prompt of a full batch in one step."""
        return ServerSpec(
            step_s=self.step_s,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.prompt_tokens * self.max_num_seqs,
            process=self.engine_process,
            admin=True,
            settings=(
                f"limits.max_queued_requests={self.max_queued_requests}",
                f"auth.callers_file={callers}",
                *self.settings,
            ),
        )


@dataclass(frozen=True, slots=True)
class Peak:
    """What the server can do when its batch is just full, and the CPU time it needs for that."""

    tokens_per_second: float
    cpu_s_per_call: float


@dataclass(frozen=True, slots=True)
class TenantRow:
    """Calls per second of one tenant in the measured time; `share` is what it should have got."""

    name: str
    demand: float
    share: float
    goodput: float

    @property
    def deviation(self) -> float:
        """How far it was from its share, as a part of that."""
        return abs(self.goodput / self.share - 1)


@dataclass(frozen=True, slots=True)
class OverloadRow:
    """One multiple of the peak. `shed` are seconds from the moment a call was due to its refusal."""

    factor: float
    rate: float
    codes: dict[str, int]
    reasons: dict[str, int]
    goodput: float
    """Output tokens per second of calls that ended OK, over the peak's."""
    shed: Distribution | None
    health: Distribution | None
    send_lateness: Distribution | None
    tenants: tuple[TenantRow, ...]
    wrong: dict[str, int]
    """Calls that ended with neither OK nor a refusal that says when to come back, by what was said."""
    cpu_us_per_shed_call: float | None
    """Of the server but its engine, beyond what the served calls cost at the peak."""


def callers_file(folder: Path) -> Path:
    """A file with the two tenants, for `auth.callers_file`."""
    path = folder / "callers"
    path.write_text("".join(f"{name} infer,inspect token:{_token(name)}\n" for name in TENANTS))
    return path


def _token(tenant: str) -> str:
    return f"benchmark-token-of-{tenant}"


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


def is_told_when(record: CallRecord) -> bool:
    """Whether a call ended as it may under overload: OK, or refused with RetryInfo and pushback."""
    if record.code == "OK":
        return True
    return record.code in REFUSALS and record.refusal is not None and record.refusal.says_when


def words(record: CallRecord) -> str:
    """Status, and reason or message, of a call."""
    refusal = record.refusal
    return record.code if refusal is None else f"{record.code} {refusal.reason or refusal.text}"


def max_min_shares(demands: Sequence[float], capacity: float) -> list[float]:
    """What everybody gets when nobody can have more without somebody with less losing some."""
    shares = [0.0] * len(demands)
    left = capacity
    by_demand = sorted(range(len(demands)), key=lambda i: demands[i])
    for place, i in enumerate(by_demand):
        shares[i] = min(demands[i], left / (len(demands) - place))
        left -= shares[i]
    return shares


class HealthCaller:
    """Asks for the server's health from a thread of its own until it is left."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-health")
        self.answers: list[tuple[float, float]] = []
        """`(asked, seconds)` of each question; one that fails or is answered NOT_SERVING takes for ever."""

    def __enter__(self) -> HealthCaller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
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


def run(plan: OverloadPlan, progress: Callable[[str], None]) -> tuple[Peak, list[OverloadRow]]:
    """The peak, and a row for each factor."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerHandle(plan.server(callers_file(Path(folder)))) as server,
    ):
        progress("peak")
        peak = _peak(plan, server)
        rows = []
        for factor in plan.factors:
            progress(f"{factor:g} x peak")
            rows.append(_overload(plan, server, factor, peak))
    return peak, rows


def tenant_loads(plan: OverloadPlan, address: str) -> list[Load]:
    """What every call of each tenant is like; when they come is not said yet."""
    return [
        Load(
            address=address,
            prompt_tokens=plan.prompt_tokens,
            new_tokens=plan.new_tokens,
            spread=plan.spread,
            first_id=_FIRST_ID,
            vocab_size=SCRIPTED_VOCAB_SIZE,
            seed=plan.seed + number,
            metadata=(("authorization", f"Bearer {_token(tenant)}"),),
        )
        for number, tenant in enumerate(TENANTS)
    ]


def arrivals_of(plan: OverloadPlan, address: str, rate: float) -> list[Load]:
    """The tenants' loads, whose arrivals come `rate` times a second in all."""
    total = sum(plan.demands)
    return [
        replace(load, arrivals=poisson_arrivals(rate * demand / total, plan.duration_s, load.seed))
        for load, demand in zip(tenant_loads(plan, address), plan.demands, strict=True)
    ]


class _CpuUse:
    """CPU seconds of the server without its engine, while a load runs."""

    def __init__(self, server: ServerHandle) -> None:
        self._server = server
        self.seconds = 0.0

    def before(self) -> None:
        self._begin = self._server.cpu_times()

    def after(self) -> None:
        self.seconds = (self._server.cpu_times() - self._begin).front_end


def _peak(plan: OverloadPlan, server: ServerHandle) -> Peak:
    load = replace(
        tenant_loads(plan, server.address)[1], concurrency=plan.max_num_seqs, duration_s=plan.duration_s
    )
    cpu = _CpuUse(server)
    with HealthCaller(server.address):
        records = run_load(load, 1, before=cpu.before, after=cpu.after).records
    begin, end = _later_part(plan, records)
    num_ok = sum(record.code == "OK" for record in records)
    return Peak(tokens_per_second(records, begin, end), cpu.seconds / num_ok)


def _overload(plan: OverloadPlan, server: ServerHandle, factor: float, peak: Peak) -> OverloadRow:
    rate = factor * peak.tokens_per_second / plan.new_tokens
    cpu = _CpuUse(server)
    with HealthCaller(server.address) as health:
        results = run_loads(arrivals_of(plan, server.address, rate), before=cpu.before, after=cpu.after)
    records = [record for result in results for record in result.records]
    begin, end = _later_part(plan, records)
    shed = [record for record in records if record.code in REFUSALS]
    num_ok = sum(record.code == "OK" for record in records)
    return OverloadRow(
        factor=factor,
        rate=rate,
        codes=dict(Counter(record.code for record in records)),
        reasons=dict(Counter(r.refusal.reason for r in records if r.refusal is not None)),
        goodput=tokens_per_second(records, begin, end) / peak.tokens_per_second,
        shed=Distribution.of([r.ended - r.intended for r in shed if begin <= r.intended < end]),
        health=Distribution.of([seconds for asked, seconds in health.answers if begin <= asked < end]),
        send_lateness=Distribution.of([r.sent - r.intended for r in records if begin <= r.intended < end]),
        tenants=_tenant_rows(plan, [result.records for result in results], begin, end),
        wrong=dict(Counter(words(record) for record in records if not is_told_when(record))),
        cpu_us_per_shed_call=(
            (cpu.seconds - num_ok * peak.cpu_s_per_call) / len(shed) * 1e6 if shed else None
        ),
    )


def _tenant_rows(
    plan: OverloadPlan, records: Sequence[Sequence[CallRecord]], begin: float, end: float
) -> tuple[TenantRow, ...]:
    demands = [sum(begin <= r.intended < end for r in of_tenant) / (end - begin) for of_tenant in records]
    goodputs = [tokens_per_second(of_tenant, begin, end) / plan.new_tokens for of_tenant in records]
    shares = max_min_shares(demands, sum(goodputs))
    return tuple(map(TenantRow, TENANTS, demands, shares, goodputs))


def _later_part(plan: OverloadPlan, records: Sequence[CallRecord]) -> tuple[float, float]:
    """The time once the queue has filled: its begin and end."""
    start = min(record.intended for record in records)
    return start + _RAMP_SHARE * plan.duration_s, start + plan.duration_s


def promises(rows: Sequence[OverloadRow]) -> list[Bar]:
    """What is promised of every load above the peak."""
    bars = []
    for row in rows:
        bars.append(
            Bar(f"{row.factor:g} x: calls with a wrong end", sum(row.wrong.values()), 0, at_least=False)
        )
        if row.factor <= 1:
            continue
        worst = max(tenant.deviation for tenant in row.tenants) * 100
        bars += [
            Bar(f"{row.factor:g} x: refusal p99, ms", _p99_ms(row.shed), 20, at_least=False),
            Bar(f"{row.factor:g} x: goodput / peak", row.goodput, 0.9, at_least=True),
            Bar(f"{row.factor:g} x: health p99, ms", _p99_ms(row.health), 100, at_least=False),
            Bar(f"{row.factor:g} x: furthest from fair share, %", worst, 10, at_least=False),
        ]
    return bars


def _p99_ms(distribution: Distribution | None) -> float:
    """What was not seen at all keeps no promise."""
    return float("inf") if distribution is None else distribution.p99 * 1e3


def _ms(distribution: Distribution | None, percentile: str) -> str:
    return "-" if distribution is None else f"{getattr(distribution, percentile) * 1e3:.1f}"


def print_table(console: Console, peak: Peak, rows: Sequence[OverloadRow], title: str) -> None:
    """One line per factor, times in milliseconds."""
    table = Table(title=f"{title}; peak {peak.tokens_per_second:.0f} tokens/s", title_justify="left")
    names = (
        "x peak",
        "calls/s",
        "ended",
        "goodput / peak",
        "shed p50",
        "shed p99",
        "health p50",
        "health p99",
        "late p99",
        "cpu us/shed",
        *(f"{tenant}: goodput/share" for tenant in TENANTS),
    )
    for column in names:
        table.add_column(column, justify="right")
    for row in rows:
        cost = row.cpu_us_per_shed_call
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
            "-" if cost is None else f"{cost:.0f}",
            *(f"{t.goodput:.1f}/{t.share:.1f} = {t.goodput / t.share:.2f}" for t in row.tenants),
        )
    console.print(table)


def draw(figure: Figure, rows: Sequence[OverloadRow]) -> None:
    """Goodput, latencies of refusals and of health, and the tenants' parts, over the offered load."""
    factors = [row.factor for row in rows]
    goodput, latency, tenants = figure.subplots(1, 3)
    goodput.plot(factors, [row.goodput for row in rows], marker="o")
    goodput.set(ylabel="goodput / peak", ylim=(0, 1.1), title="calls served")
    for name, found in (("shed", [r.shed for r in rows]), ("health", [r.health for r in rows])):
        values = [float("nan") if d is None else d.p99 * 1e3 for d in found]
        latency.plot(factors, values, marker="o", label=name)
    latency.set(ylabel="p99, ms", title="calls refused, and health")
    latency.legend()
    for number, name in enumerate(TENANTS):
        of_tenant = [row.tenants[number] for row in rows]
        tenants.plot(factors, [t.goodput for t in of_tenant], marker="o", label=f"{name}: goodput")
        tenants.plot(factors, [t.share for t in of_tenant], "--", color="gray")
    tenants.set(ylabel="calls/s", ylim=(0, None), title="tenants; dashed: fair share")
    tenants.legend(fontsize=8)
    for axes in (goodput, latency, tenants):
        axes.set_xlabel("offered load / peak")


def to_result(plan: OverloadPlan, peak: Peak, rows: Sequence[OverloadRow]) -> dict[str, object]:
    """What goes into the JSON."""
    return {"plan": asdict(plan), "peak": asdict(peak), "rows": [asdict(row) for row in rows]}
