"""The server at its clients: a real server process with random weights, and load from other processes.

Token ids both ways, no text. A row is measured `repeats` times over rounds of as many calls as there are
streams, so prefill counts as it does for a user; figures are medians over the repeats. `one channel` is
the same load from one process over one connection: what a single client of today can take.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

from tools.bench.figures import Distribution, LoadSummary, Objective, summarize
from tools.bench.gpu.cases import Case, Plan
from tools.bench.gpu.workers import Outcome
from tools.bench.load import Load, run_load
from tools.bench.random_models import FIRST_ID, servable_folder, vocab_size
from tools.bench.server_handle import CpuTimes, ServerHandle
from tools.bench.server_process import ServerSpec

__all__ = ["client_processes", "run_cases"]

_MOST_CLIENTS = 8
_ROUNDS = 3
_OBJECTIVE = Objective(first_token_s=0.5, token_gap_s=0.05)


def client_processes() -> int:
    """A single Python client cannot take what the server sends; half of the cores are the server's."""
    return min(_MOST_CLIENTS, max(1, len(os.sched_getaffinity(0)) // 2))


def run_cases(
    plan: Plan, model: str, cases: Sequence[Case], progress: Callable[[str], None]
) -> Iterator[Outcome]:
    """Outcomes in the order of `cases`. After a failure the server is started anew for the next."""
    with servable_folder(model) as folder:
        spec = ServerSpec(
            model=str(folder),
            dtype=plan.dtype,
            backend=plan.backend,
            load_format="random",
            # The server's own choice, but for a CPU, where that would be most of the memory.
            kv_cache_memory_bytes=0 if plan.backend == "cuda" else 512 << 20,
            max_num_seqs=max([plan.max_num_seqs, *(case.batch for case in cases)]),
            max_num_batched_tokens=plan.max_num_batched_tokens,
            settings=plan.settings,
        )
        left = list(cases)
        while left:
            progress(f"{model}: starting the server")
            with ExitStack() as stack:
                try:
                    handle = stack.enter_context(ServerHandle(spec))
                except (RuntimeError, OSError) as error:
                    yield from (Outcome(case, error=f"no server: {error}") for case in left)
                    return
                while left:
                    case = left.pop(0)
                    progress(case.label)
                    try:
                        result = _measure(plan, case, handle)
                    except Exception as error:  # noqa: BLE001 - recorded as the row's outcome
                        yield Outcome(case, error=f"{type(error).__name__}: {error}")
                        break
                    yield Outcome(case, result)


def _measure(plan: Plan, case: Case, handle: ServerHandle) -> dict[str, Any]:
    one_channel = case.variant == "one channel"
    num_processes = 1 if one_channel else min(client_processes(), case.batch)
    calls = case.batch * (1 if plan.quick else _ROUNDS)
    load = Load(
        address=handle.address,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        first_id=FIRST_ID,
        vocab_size=vocab_size(case.model),
        concurrency=case.batch,
        num_requests=calls,
        seed=plan.seed,
        sampled=case.sampling == "sampled",
        text=False,
        streams_per_channel=case.batch if one_channel else 64,
    )
    _run(load, num_processes, handle, calls)
    rounds = [_run(load, num_processes, handle, calls) for _ in range(plan.repeats)]
    summaries = [summary for summary, _ in rounds]
    speeds = [summary.tokens_per_second for summary in summaries]
    return {
        "tokens_per_second": {
            "median": median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "all": speeds,
        },
        "messages_per_second": median(summary.messages_per_second for summary in summaries),
        "tokens_per_message": median(summary.tokens_per_token_message for summary in summaries),
        "first_token_s": _median_of([summary.first_token for summary in summaries]),
        "token_gap_s": _median_of([summary.token_gap for summary in summaries]),
        "pause_s": _median_of([summary.pause for summary in summaries]),
        "end_to_end_s": _median_of([summary.end_to_end for summary in summaries]),
        "server_cores": median(cpu.process / summary.elapsed_s for summary, cpu in rounds),
        "server_cpu_s": [asdict(cpu) for _, cpu in rounds],
        "server_memory_bytes": handle.memory_bytes(),
        "client_processes": num_processes,
        "channels": 1 if one_channel else num_processes * -(-case.batch // num_processes // 64),
        "calls": calls,
    }


def _run(load: Load, num_processes: int, handle: ServerHandle, calls: int) -> tuple[LoadSummary, CpuTimes]:
    marks: list[CpuTimes] = []

    def mark() -> None:
        marks.append(handle.cpu_times())

    result = run_load(load, num_processes, before=mark, after=mark)
    summary = summarize(result.records, _OBJECTIVE)
    if summary.codes != {"OK": calls}:
        raise RuntimeError(f"of {calls} calls: {summary.codes}")
    if summary.num_tokens != calls * load.new_tokens:
        raise RuntimeError(f"{summary.num_tokens} tokens of {calls * load.new_tokens}")
    return summary, marks[1] - marks[0]


def _median_of(found: Sequence[Distribution | None]) -> dict[str, float]:
    there = [one for one in found if one is not None]
    if not there:
        return {}
    return {
        "mean": median(one.mean for one in there),
        "p50": median(one.p50 for one in there),
        "p90": median(one.p90 for one in there),
        "p99": median(one.p99 for one in there),
        "max": median(one.maximum for one in there),
    }
