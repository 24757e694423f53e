"""`soak`: minutes of mixed load against a server, watched for errors and for anything that only grows.

While `mixed_load` runs, the server is looked at once a second: resident memory of its process and that
process's children, GPU memory, blocks and requests by GetLoad, descriptors, threads. The run passes when
every call ended as it may, every answer was what was asked for, the server is idle afterwards with every
block free, and neither memory nor descriptors grew once the first third, which warms up, was over.

With faults, rows fail and steps are slow by chance (`fault_runner`), an operator drains, flushes and
aborts, and clients vanish (`disturbances`). Calls may then end in the ways that belong to these and in no
other, and afterwards the server's log is held against what the clients saw: one end per call, the same on
both sides.

Of a run of many calls memory is judged for each kind of process on its own, in bytes per call over the second
half: what one call leaves for good is no more than a few bytes, and no other process's warming up hides it.

A server that is started here on the CPU keeps few of oneDNN's compiled products. Of each shape that it
meets torch keeps one, up to 1,024, and a load of random lengths meets new shapes for hours: growth that
ends, and that would hide a leak until it does.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from photon_grpc.client import Client
from photon_grpc.engine_place import model_folder
from photon_grpc.options import ModelOptions
from photon_grpc.v1 import control_pb2, control_pb2_grpc
from tools.bench import device, random_models, soak_log
from tools.bench.disturbances import EXPECTED, disturb
from tools.bench.mixed_load import MixedLoad, Tally, drive
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import ServerSpec

__all__ = [
    "PROCESS_KINDS",
    "Sample",
    "SoakPlan",
    "SoakResult",
    "bytes_per_call",
    "draw",
    "judge",
    "mib_per_hour",
    "run",
]

_WARM_UP_SHARE = 1 / 3
_EDGE_SHARE = 0.15
_IDLE_WITHIN_S = 20.0
_MAX_NEW_DESCRIPTORS = 16
_MAX_NEW_THREADS = 8
_MAX_NEW_TASKS = 8
# Over less time, or fewer calls, the slope of resident memory says nothing: of so many a page is 0.08 bytes
# each, and what a stretch of a heap takes at a time some 5.
_MIN_SLOPE_S = 300.0
_MIN_SLOPE_CALLS = 50_000
# A leak of 16 bytes in each call is found by it, also where nothing else grows.
_MAX_BYTES_PER_CALL = 15
_ROW_FAULT_RATE = 0.01
_SLOW_STEP_RATE = 0.005
# oneDNN's own cache, and that of torch in front of it.
_FEW_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
# Few enough for the demo model to run out of them now and then.
_CPU_POOL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """What to run. With an empty `address` a server is started; else `pid` names the one to watch, or 0."""

    model: str
    minutes: float
    concurrency: int = 32
    max_prompt_tokens: int = 512
    max_new_tokens: int = 256
    max_growth_bytes: int = 64 << 20
    address: str = ""
    admin_address: str = ""
    pid: int = 0
    backend: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 64
    kv_cache_memory_bytes: int | None = None
    """None: little on the CPU, so that the server has to preempt; its own choice on a GPU."""
    num_threads: int = 0
    settings: tuple[str, ...] = ()
    period_s: float = 1.0
    faults: bool = False
    """Only with a server that is started here."""
    disturbance_s: float = 5.0
    """Seconds between two disturbances, on average."""
    max_mib_per_hour: float = 32.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at a moment, in seconds from the start. None is what could not be seen."""

    time: float
    calls_ended: int
    tokens: int
    running: int
    queued: int
    used_blocks: int
    total_blocks: int
    resident_bytes: int | None = None
    engine_resident_bytes: int | None = None
    """Of the engine, where that has a process of its own."""
    acceptors_resident_bytes: int | None = None
    """Of the server's other children."""
    gpu_bytes: int | None = None
    descriptors: int | None = None
    threads: int | None = None


@dataclass(slots=True)
class SoakResult:
    """What was seen, and what of it is wrong: nothing, when it passed."""

    samples: list[Sample] = field(default_factory=list)
    after: Sample | None = None
    tally: Tally = field(default_factory=Tally)
    start: float = 0.0
    """The monotonic moment from which samples count."""
    before: Sample | None = None
    disturbances: Counter[str] = field(default_factory=Counter)
    exit_code: int | None = None
    log: soak_log.ServerLog | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[tuple[float, int]]:
        """`(seconds from the start, tasks of the event loop)`."""
        return [] if self.log is None else [(moment - self.start, n) for moment, n in self.log.tasks]

    def to_dict(self, plan: SoakPlan) -> dict[str, Any]:
        """For JSON."""
        growth = {name: grown(self.samples, name) for name in ("resident_bytes", "gpu_bytes", "descriptors")}
        return {
            "plan": asdict(plan),
            "passed": not self.problems,
            "problems": self.problems,
            "calls": self.tally.begun,
            "codes": dict(self.tally.codes),
            "tokens": self.tally.tokens,
            "growth": growth,
            "resident_mib_per_hour": mib_per_hour(self.samples),
            "bytes_per_call": {kind: bytes_per_call(self.samples, kind) for kind in PROCESS_KINDS},
            "disturbances": dict(self.disturbances),
            "injected": None if self.log is None else dict(self.log.injected),
            "ends_in_the_log": None if self.log is None else self.log.counted_ends(),
            "statuses_unheard": None if self.log is None else self.log.num_unheard,
            "errors_in_the_log": None if self.log is None else self.log.errors,
            "exit_code": self.exit_code,
            "before": None if self.before is None else asdict(self.before),
            "after": None if self.after is None else asdict(self.after),
            "tasks": self.tasks,
            "samples": [asdict(sample) for sample in self.samples],
        }


def grown(samples: Sequence[Sample], name: str) -> int | None:
    """How much a figure rose from the end of the warm-up to the end; None where it was not seen.

    Medians of a short time at either end, so that no single moment decides.
    """
    values = [(sample.time, getattr(sample, name)) for sample in samples]
    if len(values) < 2 or any(value is None for _, value in values):
        return None
    end = values[-1][0]
    start, edge = end * _WARM_UP_SHARE, end * _EDGE_SHARE
    early = [value for moment, value in values if start <= moment <= start + edge]
    late = [value for moment, value in values if moment >= end - edge]
    return round(median(late) - median(early)) if early and late else None


def mib_per_hour(samples: Sequence[Sample]) -> float | None:
    """The slope of resident memory over the second half, by least squares; None where it was not seen."""
    half = samples[-1].time / 2 if samples else 0.0
    later = [
        (s.time / 3600, s.resident_bytes / (1 << 20)) for s in samples if s.time >= half and s.resident_bytes
    ]
    if len(later) < 3:
        return None
    return float(np.polyfit(*zip(*later, strict=True), 1)[0])


PROCESS_KINDS: dict[str, Callable[[Sample], int]] = {
    "event loop": lambda sample: (
        (sample.resident_bytes or 0)
        - (sample.engine_resident_bytes or 0)
        - (sample.acceptors_resident_bytes or 0)
    ),
    "engine": lambda sample: sample.engine_resident_bytes or 0,
    "acceptors": lambda sample: sample.acceptors_resident_bytes or 0,
}
"""Resident bytes of each kind of process in a sample. An engine without a process is the event loop's."""


def bytes_per_call(samples: Sequence[Sample], kind: str) -> float | None:
    """The slope of resident memory of a kind of process over the second half of the calls, by least squares;
    None where there is no such process, or it was not seen."""
    half = samples[-1].calls_ended / 2 if samples else 0.0
    later = [s for s in samples if s.calls_ended >= half and s.resident_bytes]
    calls, resident = [s.calls_ended for s in later], [PROCESS_KINDS[kind](s) for s in later]
    if len(set(calls)) < 3 or not any(resident):
        return None
    return float(np.polyfit(calls, resident, 1)[0])


def judge(plan: SoakPlan, result: SoakResult) -> list[str]:
    """Everything that keeps a run from passing, in words."""
    tally, problems = result.tally, []
    if tally.num_problems:
        problems.append(f"{tally.num_problems} calls went wrong; the first: {tally.problems[0]}")
    if not tally.codes.get("OK"):
        problems.append("no call ended OK")
    after = result.after
    if after is None:
        problems.append("the server did not answer after the load")
    elif after.running or after.queued or after.used_blocks:
        problems.append(
            f"not idle after the load: {after.running} running, {after.queued} queued, "
            f"{after.used_blocks} of {after.total_blocks} blocks in use"
        )
    limits = (
        ("resident_bytes", plan.max_growth_bytes, "resident memory"),
        ("gpu_bytes", plan.max_growth_bytes, "GPU memory"),
        ("descriptors", _MAX_NEW_DESCRIPTORS, "open descriptors"),
        ("threads", _MAX_NEW_THREADS, "threads"),
    )
    for name, limit, what in limits:
        growth = grown(result.samples, name)
        if growth is not None and growth > limit:
            problems.append(f"{what} grew by {growth:,}, at most {limit:,} may be")
    problems += _judge_slopes(plan, result.samples)
    if result.log is not None:
        problems += _judge_log(result)
    return problems


def _judge_slopes(plan: SoakPlan, samples: Sequence[Sample]) -> list[str]:
    problems: list[str] = []
    if not samples:
        return problems
    slope = mib_per_hour(samples)
    if slope is not None and slope > plan.max_mib_per_hour and samples[-1].time >= 2 * _MIN_SLOPE_S:
        problems.append(
            f"resident memory grew by {slope:.1f} MiB/h in the second half, "
            f"at most {plan.max_mib_per_hour:g} may be"
        )
    if samples[-1].calls_ended >= 2 * _MIN_SLOPE_CALLS:
        for kind in PROCESS_KINDS:
            per_call = bytes_per_call(samples, kind)
            if per_call is not None and per_call > _MAX_BYTES_PER_CALL:
                problems.append(
                    f"resident memory of the {kind} grew by {per_call:.1f} bytes per call in the second "
                    f"half, at most {_MAX_BYTES_PER_CALL} may be"
                )
    return problems


def _judge_log(result: SoakResult) -> list[str]:
    assert result.log is not None
    problems = soak_log.audit(result.log, result.tally)
    tasks = [n for _, n in result.tasks]
    if not tasks:
        problems.append("the server logged no tasks")
    elif tasks[-1] - tasks[0] > _MAX_NEW_TASKS:
        problems.append(f"{tasks[-1]} tasks after the load, {tasks[0]} before")
    if result.exit_code != 0:
        problems.append(f"the server left with {result.exit_code}")
    return problems


def run(plan: SoakPlan, progress: Callable[[str], None]) -> SoakResult:
    """Start a server if none is named, load it, watch it. Raises RuntimeError where it does not serve."""
    handle: ServerHandle | None = None
    with ExitStack() as stack:
        address, admin, pid = plan.address, plan.admin_address, plan.pid
        if not address:
            progress("starting the server")
            handle = stack.enter_context(ServerHandle(_server(plan, stack), _FEW_PRODUCTS))
            assert handle.admin_address is not None
            address, admin, pid = handle.address, handle.admin_address, handle.pid
        client = stack.enter_context(Client(address))
        context = client.served_model().max_context_tokens
        load = MixedLoad(
            first_id=random_models.FIRST_ID,
            vocab_size=_vocab_size(plan.model),
            max_prompt_tokens=min(plan.max_prompt_tokens, context // 2),
            max_new_tokens=min(plan.max_new_tokens, context // 2 - 1),
            seed=plan.seed,
        )
        result = asyncio.run(_soak(plan, load, address, admin, pid, progress))
        if handle is not None:
            progress("stopping the server")
            result.exit_code = handle.stop()
            result.log = soak_log.read(handle.log_lines())
    result.problems = judge(plan, result)
    return result


def _server(plan: SoakPlan, stack: ExitStack) -> ServerSpec:
    model, load_format = plan.model, "safetensors"
    if plan.model in random_models.names():
        model = str(stack.enter_context(random_models.servable_folder(plan.model)))
        load_format = "random"
    on_gpu = plan.backend != "cpu" and torch.cuda.is_available()
    pool = plan.kv_cache_memory_bytes
    if pool is None:
        pool = 0 if on_gpu else _CPU_POOL_BYTES
    return ServerSpec(
        model=model,
        dtype=plan.dtype,
        backend=plan.backend,
        load_format=load_format,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=max(2048 if on_gpu else 512, plan.max_num_seqs),
        kv_cache_memory_bytes=pool,
        admin=True,
        num_threads=plan.num_threads,
        settings=plan.settings,
        row_fault_rate=_ROW_FAULT_RATE if plan.faults else 0.0,
        slow_step_rate=_SLOW_STEP_RATE if plan.faults else 0.0,
        fault_seed=plan.seed,
        tasks_interval_s=plan.period_s,
    )


def _vocab_size(model: str) -> int:
    if model in random_models.names():
        return random_models.vocab_size(model)
    config = model_folder(ModelOptions(path=model)) / "config.json"
    return int(json.loads(config.read_text())["vocab_size"])


async def _soak(
    plan: SoakPlan, load: MixedLoad, address: str, admin: str, pid: int, progress: Callable[[str], None]
) -> SoakResult:
    start = time.monotonic()
    result = SoakResult(start=start)
    async with grpc.aio.insecure_channel(admin) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)

        async def look() -> Sample:
            return await _sample(control, pid, start, result.tally)

        # Idle for as long as it takes to be seen by whoever looks once in a period.
        result.before = await look()
        await asyncio.sleep(2 * plan.period_s)
        end = time.monotonic() + plan.minutes * 60

        def keep_on() -> bool:
            return time.monotonic() < end

        async def watch() -> None:
            while keep_on():
                sample = await look()
                result.samples.append(sample)
                progress(
                    f"{sample.time:.0f} s, {sample.calls_ended} calls, {sample.running} running, "
                    f"{sample.used_blocks} of {sample.total_blocks} blocks, {result.tally.num_problems} wrong"
                )
                await asyncio.sleep(plan.period_s)

        async def disturb_it() -> None:
            result.disturbances = await disturb(
                control, address, plan.seed, plan.disturbance_s, keep_on, result.tally
            )

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            if plan.faults:
                group.create_task(disturb_it())
            expected = EXPECTED if plan.faults else frozenset()
            group.create_task(drive(load, address, plan.concurrency, keep_on, result.tally, expected))
        result.after = await _idle(look)
        await asyncio.sleep(2 * plan.period_s)
    return result


async def _idle(look: Callable[[], Any]) -> Sample:
    """The first sample of an idle server, or the last one that is waited for."""
    deadline = time.monotonic() + _IDLE_WITHIN_S
    while True:
        sample: Sample = await look()
        if not (sample.running or sample.queued or sample.used_blocks) or time.monotonic() > deadline:
            return sample
        await asyncio.sleep(0.1)


async def _sample(control: Any, pid: int, start: float, tally: Tally) -> Sample:
    load = await control.GetLoad(control_pb2.GetLoadRequest(), timeout=30)
    resident = of_engine = of_acceptors = descriptors = threads = None
    if pid:
        main = psutil.Process(pid)
        children = main.children(recursive=True)
        family = [main, *children]
        used = [(_is_engine(process), process.memory_info().rss) for process in children]
        of_engine = sum(rss for is_engine, rss in used if is_engine)
        of_acceptors = sum(rss for is_engine, rss in used if not is_engine)
        resident = main.memory_info().rss + of_engine + of_acceptors
        descriptors = sum(process.num_fds() for process in family)
        threads = sum(process.num_threads() for process in family)
    # nvidia-smi takes a moment, which the load must not lose.
    gpu = await asyncio.get_running_loop().run_in_executor(None, device.used_memory_bytes)
    return Sample(
        time=time.monotonic() - start,
        calls_ended=tally.ended,
        tokens=tally.tokens,
        running=load.running,
        queued=load.queued,
        used_blocks=load.used_kv_blocks,
        total_blocks=load.total_kv_blocks,
        resident_bytes=resident,
        engine_resident_bytes=of_engine,
        acceptors_resident_bytes=of_acceptors,
        gpu_bytes=gpu,
        descriptors=descriptors,
        threads=threads,
    )


def _is_engine(process: psutil.Process) -> bool:
    return any("photon_grpc.engine.child" in word for word in process.cmdline())


def draw(figure: Figure, result: SoakResult) -> None:
    """Memory, blocks and requests, tasks and descriptors, and calls per second over the time."""
    (memory, blocks), (tasks, calls) = figure.subplots(2, 2, sharex=True)
    times = [sample.time for sample in result.samples]
    for name, label in (("resident_bytes", "resident"), ("gpu_bytes", "GPU")):
        values = [getattr(sample, name) for sample in result.samples]
        if values and None not in values:
            memory.plot(times, [value / (1 << 20) for value in values], label=label)
    memory.set_title("memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    blocks.plot(times, [sample.used_blocks for sample in result.samples], label="blocks in use")
    blocks.plot(times, [sample.running for sample in result.samples], label="running")
    blocks.plot(times, [sample.queued for sample in result.samples], label="queued")
    blocks.set_title("blocks and requests")
    blocks.legend(fontsize=8)
    for name in ("descriptors", "threads"):
        values = [getattr(sample, name) for sample in result.samples]
        if values and None not in values:
            tasks.plot(times, values, label=name)
    if result.tasks:
        tasks.plot(*zip(*result.tasks, strict=True), label="tasks")
    tasks.set_title("descriptors, threads, tasks")
    tasks.legend(fontsize=8)
    pairs = list(zip(result.samples, result.samples[1:], strict=False))
    rates = [(b.calls_ended - a.calls_ended) / max(b.time - a.time, 1e-9) for a, b in pairs]
    calls.plot([b.time for _, b in pairs], rates)
    calls.set_title("calls ended, per second")
    for axes in (tasks, calls):
        axes.set_xlabel("seconds")
