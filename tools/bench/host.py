"""`host`: what the engine thread does in Python between two launches, without a model or a device.

A batch of decoding rows is kept going with two steps under way, as a device runner keeps it: plan a step,
take the tokens of the one before the last, make the message for the event loop. The runner is left out;
its tokens are made up outside the measured time. Prompts differ in length, so that in every step about
one row in `block_size` begins a new KV block and names a full one.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import EngineRequest, Submit
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import ModelOutput, SchedulerOutput
from photon_grpc.types import EffectiveSampling, ModelInfo

__all__ = ["HostPlan", "HostRow", "draw", "print_table", "run"]

_PARTS = ("schedule", "update", "message")
_IN_FLIGHT = 2
_WARMUP_STEPS = 64
_PROMPT_TOKENS = (64, 192)
_BLOCK_SIZE = 16
_VOCAB_SIZE = 32_000
# Made-up tokens stay clear of it, so that no sequence ends while the clock runs.
_EOS = 1


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What to run: `steps` measured steps per batch size and round."""

    batches: tuple[int, ...]
    steps: int = 1000
    repeats: int = 5
    prefix_caching: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HostRow:
    """Microseconds per step of one batch size: the median step of the best round, and the 99th percentile.

    The best round, because whatever else the machine does only ever adds. `pickle` is what the message
    would cost on its way to another process; it is not part of `total`.
    """

    batch: int
    median_us: dict[str, float]
    p99_us: dict[str, float]
    pickle_bytes: int


def run(plan: HostPlan, progress: Callable[[str], None]) -> list[HostRow]:
    """Every batch size in turn; `progress` hears what runs."""
    rows = []
    for batch in plan.batches:
        rounds = []
        for repeat in range(plan.repeats):
            progress(f"batch {batch}, round {repeat + 1} of {plan.repeats}")
            rounds.append(_measure(plan, batch, np.random.default_rng((plan.seed, batch, repeat))))
        rows.append(min(rounds, key=lambda row: row.median_us["total"]))
    return rows


def _measure(plan: HostPlan, batch: int, generator: np.random.Generator) -> HostRow:
    core = _core(plan, batch, generator)
    scheduler, clock = core.scheduler, time.perf_counter_ns
    in_flight: deque[ModelOutput] = deque()
    tokens = _tokens(batch, generator)
    nanoseconds = np.zeros((plan.steps, len(_PARTS) + 1))
    size = 0
    for step in range(-_WARMUP_STEPS, plan.steps):
        begin = clock()
        planned = scheduler.schedule(time.monotonic())
        after_schedule = clock()
        in_flight.append(_answer(planned, next(tokens)))
        if len(in_flight) < _IN_FLIGHT:
            continue
        collected = in_flight.popleft()
        before_update = clock()
        told = scheduler.update(collected, time.monotonic())
        after_update = clock()
        message = core.flush(*told)
        after_message = clock()
        pickled = pickle.dumps(message, protocol=5)
        after_pickle = clock()
        if step >= 0:
            assert len(planned.rows) == len(message.tokens.token_ids) == batch, "not everyone decodes"
            nanoseconds[step] = (
                after_schedule - begin,
                after_update - before_update,
                after_message - after_update,
                after_pickle - after_message,
            )
            size = max(size, len(pickled))
    microseconds = dict(zip((*_PARTS, "pickle"), nanoseconds.T / 1e3, strict=True))
    microseconds["total"] = nanoseconds[:, : len(_PARTS)].sum(axis=1) / 1e3
    return HostRow(
        batch,
        {name: float(np.median(values)) for name, values in microseconds.items()},
        {name: float(np.percentile(values, 99)) for name, values in microseconds.items()},
        size,
    )


def _core(plan: HostPlan, batch: int, generator: np.random.Generator) -> EngineCore:
    """A core with `batch` requests that outlast the measurement; its runner is only asked for its sizes."""
    shortest, longest = _PROMPT_TOKENS
    max_tokens = plan.steps + _WARMUP_STEPS + longest
    length = longest + max_tokens
    core = EngineCore(
        ScriptedRunner(
            ModelInfo("host", "", vocab_size=_VOCAB_SIZE, max_model_len=length, eos_token_ids=(_EOS,)),
            num_blocks=batch * -(-length // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
        ),
        SchedulerOptions(max_num_seqs=batch, max_num_batched_tokens=max(8192, batch)),
        KVCacheOptions(prefix_caching=plan.prefix_caching),
        clock=time.monotonic,
    )
    sampling = EffectiveSampling(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=0,
        n=1,
    )
    for key in range(1, batch + 1):
        prompt = generator.integers(_EOS + 1, _VOCAB_SIZE, generator.integers(shortest, longest))
        core.submit(
            Submit(
                key,
                EngineRequest(
                    prompt_token_ids=tuple(prompt.tolist()),
                    sampling=sampling,
                    max_tokens=max_tokens,
                    min_tokens=0,
                    stop_token_ids=(),
                    eos_token_ids=(_EOS,),
                    arrival_time=time.monotonic(),
                ),
            )
        )
    return core


def _tokens(batch: int, generator: np.random.Generator) -> Iterator[list[int]]:
    while True:
        yield generator.integers(_EOS + 1, _VOCAB_SIZE, batch).tolist()


def _answer(planned: SchedulerOutput, tokens: list[int]) -> ModelOutput:
    seq_ids = tuple([row.seq_id for row in planned.rows if row.sample])
    return ModelOutput(planned.step, seq_ids, tuple(zip(tokens[: len(seq_ids)], strict=True)))


def print_table(console: Console, rows: Sequence[HostRow], title: str) -> None:
    """One line per batch size."""
    table = Table(title=title, caption="us per step: the median step of the best round (99th percentile)")
    table.add_column("rows", justify="right")
    names = (*_PARTS, "total", "pickle")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("us per row", justify="right")
    table.add_column("pickled bytes", justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            *(f"{row.median_us[name]:,.1f} ({row.p99_us[name]:,.1f})" for name in names),
            f"{row.median_us['total'] / row.batch:.2f}",
            f"{row.pickle_bytes:,}",
        )
    console.print(table)


def draw(figure: Figure, rows: Sequence[HostRow]) -> None:
    """The parts of a step, stacked, by batch size."""
    axes = figure.subplots()
    places = np.arange(len(rows))
    below = np.zeros(len(rows))
    for part in _PARTS:
        values = np.array([row.median_us[part] for row in rows])
        axes.bar(places, values, 0.6, bottom=below, label=part)
        below += values
    axes.set_xticks(places, [str(row.batch) for row in rows])
    axes.set_xlabel("decoding rows")
    axes.set_title("Python on the engine thread, us per step")
    axes.legend(fontsize=8)


def to_result(plan: HostPlan, rows: Sequence[HostRow]) -> dict[str, object]:
    """For JSON."""
    return {"plan": plan, "block_size": _BLOCK_SIZE, "rows": [asdict(row) for row in rows]}
