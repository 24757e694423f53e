"""One engine in this process, driven step by step: decode speed, first tokens, host time, kernels.

The engine core and the runner are those of the server; gRPC, text and the engine thread are left out.

- Decode counts from the step after which every row of the batch has its first token to the last step:
  tokens of that time over that time. Steps in which rows still come in are prefill.
- A first token counts from just before the first row of the batch is submitted.
- Host time is what the engine's thread spends in planning, launching and updating. `collect` holds the
  wait for the device: near zero means that the host, not the device, sets the pace.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import EngineRequest, StepOutputs, Submit
from photon_grpc.models.registry import load_config
from photon_grpc.options import KVCacheOptions, ModelOptions, Options, SchedulerOptions
from photon_grpc.runner.backend import resolve_dtype
from photon_grpc.runner.factory import build_runner
from photon_grpc.runner.kv_cache import kv_bytes_per_token
from photon_grpc.types import EffectiveSampling, Finish
from tools.bench.gpu.cases import Case, Plan
from tools.bench.random_models import FIRST_ID, config_folder
from tools.bench.settings import with_assignments

__all__ = ["Engine", "Generation", "sampling_of"]

# Room for an 8k prompt, and for the block tables of a server that allows one.
_MAX_MODEL_LEN = 16_384
_SPARE_BLOCKS = 64
_PROFILED_STEPS = 20
_SETTLING_STEPS = 8
_HOST_PARTS = ("schedule", "launch", "collect", "update")


def sampling_of(name: str, seed: int) -> EffectiveSampling:
    """`greedy`, or `sampled`: temperature 0.8, top_p 0.95, top_k 50 and a seed."""
    sampled = name == "sampled"
    return EffectiveSampling(
        temperature=0.8 if sampled else 0.0,
        top_p=0.95 if sampled else 1.0,
        top_k=50 if sampled else 0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=seed,
        n=1,
    )


@dataclass(slots=True)
class Generation:
    """One batch, start to end. Moments are seconds from just before the first submission.

    `step_ends` has the end of every step after which all rows had begun, that one included.
    """

    first_token_s: list[float] = field(default_factory=list)
    step_ends: list[float] = field(default_factory=list)
    tokens_after_prefill: int = 0

    @property
    def decode_s(self) -> float:
        """From the step that brought the last first token to the end."""
        return self.step_ends[-1] - self.step_ends[0]

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.tokens_after_prefill / self.decode_s


def _generation(batch: int, steps: Sequence[tuple[float, StepOutputs]]) -> Generation:
    """What the steps of one batch came to; those after the last token, which only wind up, are left out."""
    found = Generation()
    begun: set[int] = set()
    num_ended = 0
    for moment, step in steps:
        all_had_begun = len(begun) == batch
        for output in step.outputs:
            if output.token_ids and output.key not in begun:
                begun.add(output.key)
                found.first_token_s.append(moment)
            if all_had_begun:
                found.tokens_after_prefill += len(output.token_ids)
            if output.is_last:
                if not isinstance(output.finish, Finish):
                    raise RuntimeError(f"a row ended with {output.failure}")
                num_ended += 1
        if len(begun) == batch:
            found.step_ends.append(moment)
        if num_ended == batch:
            return found
    raise RuntimeError(f"{num_ended} of {batch} rows ended")


class Stopwatch:
    """Adds up the time spent in methods of objects, by name, while it is on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._restore: list[tuple[object, str]] = []

    def watch(self, thing: object, *names: str) -> None:
        """Time these methods of `thing` from now on."""
        for name in names:
            setattr(thing, name, self._timed(name, getattr(thing, name)))
            self._restore.append((thing, name))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def stop(self) -> None:
        """Give the objects their own methods back."""
        for thing, name in self._restore:
            delattr(thing, name)
        self._restore.clear()


class Engine:
    """A model with random weights behind an engine core, with room for every case given."""

    def __init__(self, plan: Plan, model: str, cases: Sequence[Case]) -> None:
        """Raises StartupError."""
        folder = config_folder(model)
        self._plan = plan
        self.options = engine_options(plan, folder, cases)
        self.runner = build_runner(folder, self.options)
        self.vocab_size = self.runner.model.vocab_size
        self._core = EngineCore(self.runner, self.options.scheduler, self.options.cache, clock=time.monotonic)
        self._last_key = 0
        self._round = 0
        # What was loaded lives as long as the process; a server keeps the collector away from it too.
        gc.collect()
        gc.freeze()

    def measure(self, case: Case) -> dict[str, Any]:
        """The result of one case."""
        match case.section:
            case "engine" | "context":
                return self._decode(case)
            case "ttft":
                return self._first_tokens(case)
            case "kernels":
                return self._profile(case)
        raise ValueError(f"{case.section} is not measured in an engine")

    def generate(self, case: Case, new_tokens: int) -> Generation:
        """One batch of the case with new prompts. Raises RuntimeError for a row that fails.

        What the steps bring is looked at when all of them are done, so that looking costs them nothing.
        """
        core = self._core
        messages = [Submit(key, request) for key, request in self._requests(case, new_tokens)]
        steps: list[tuple[float, StepOutputs]] = []
        start = time.perf_counter()
        for message in messages:
            core.submit(message)
        while core.has_work:
            brought = core.step()
            steps.append((time.perf_counter() - start, brought))
        return _generation(case.batch, steps)

    def _requests(self, case: Case, new_tokens: int) -> list[tuple[int, EngineRequest]]:
        self._round += 1
        generator = np.random.default_rng((self._plan.seed, self._round))
        prompts = generator.integers(FIRST_ID, self.vocab_size, (case.batch, case.prompt_tokens)).tolist()
        requests = []
        for row, prompt in enumerate(prompts):
            self._last_key += 1
            request = EngineRequest(
                prompt_token_ids=tuple(prompt),
                sampling=sampling_of(case.sampling, seed=row),
                max_tokens=new_tokens,
                min_tokens=0,
                stop_token_ids=(),
                eos_token_ids=(),
                arrival_time=time.monotonic(),
            )
            requests.append((self._last_key, request))
        return requests

    def _decode(self, case: Case) -> dict[str, Any]:
        self.generate(case, min(case.new_tokens, 16))
        rounds = [self.generate(case, case.new_tokens) for _ in range(self._plan.repeats)]
        watch = Stopwatch()
        watch.watch(self._core.scheduler, "schedule", "update")
        watch.watch(self.runner, "launch", "collect")
        started = time.perf_counter()
        watched = self.generate(case, case.new_tokens)
        elapsed = time.perf_counter() - started
        watch.stop()
        num_steps = len(watched.step_ends) + 1
        us = {part: watch.seconds[part] * 1e6 / num_steps for part in _HOST_PARTS}
        us["elsewhere"] = elapsed * 1e6 / num_steps - sum(us.values())
        steps = np.concatenate([np.diff(one.step_ends) for one in rounds])
        prompt_tokens = case.batch * case.prompt_tokens
        return {
            "decode_tokens_per_second": spread([one.decode_tokens_per_second for one in rounds]),
            "steps_per_second": median((len(one.step_ends) - 1) / one.decode_s for one in rounds),
            "step_s": {
                "mean": float(steps.mean()),
                **{f"p{p}": float(np.percentile(steps, p)) for p in (50, 90, 99)},
                "max": float(steps.max()),
            },
            "host_us_per_step": us,
            "first_token_s": first_token_figures(rounds),
            "prompt_tokens_per_second": median(prompt_tokens / max(one.first_token_s) for one in rounds),
            "memory": self._memory(),
        }

    def _first_tokens(self, case: Case) -> dict[str, Any]:
        self.generate(case, 1)
        # A generation of one token is short, and one of them is little evidence.
        rounds = [self.generate(case, 1) for _ in range(3 * self._plan.repeats)]
        return {"first_token_s": first_token_figures(rounds), "rounds": len(rounds)}

    def _profile(self, case: Case) -> dict[str, Any]:
        """Kernel by kernel, what a decode step of the batch takes on the device."""
        steps = _PROFILED_STEPS
        core = self._core
        keys = []
        for key, request in self._requests(case, _SETTLING_STEPS + steps + 16):
            keys.append(key)
            core.submit(Submit(key, request))
        begun: set[int] = set()
        while len(begun) < case.batch:
            begun.update(output.key for output in core.step().outputs if output.token_ids)
        for _ in range(_SETTLING_STEPS):
            core.step()
        on_device = self.options.model.backend != "cpu" and torch.cuda.is_available()
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if on_device else kinds.CPU]) as profiler:
            for _ in range(steps):
                core.step()
            if on_device:
                torch.cuda.synchronize()
        while core.has_work:
            core.step()
        wanted = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == wanted
        ]
        if not spans:
            return {"unavailable": "the profiler saw nothing on the device: CUPTI does not work here"}
        return {"device": "cuda" if on_device else "cpu", **kernel_figures(spans, steps)}

    def _memory(self) -> dict[str, int]:
        if self.options.model.backend == "cpu" or not torch.cuda.is_available():
            return {}
        return {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }

    def close(self) -> None:
        """Give the device's memory back."""
        self.runner.close()
        del self.runner, self._core
        gc.collect()


def engine_options(plan: Plan, folder: Path, cases: Sequence[Case]) -> Options:
    """The options of an engine that has room for every case. Raises StartupError."""
    config = load_config(folder)
    model_len = min(
        config.max_position_embeddings,
        max([_MAX_MODEL_LEN, *(case.prompt_tokens + case.new_tokens + 1 for case in cases)]),
    )
    block_size = KVCacheOptions().block_size
    blocks = max(_blocks(case, block_size) for case in cases)
    blocks = max(blocks, -(-model_len // block_size)) + _SPARE_BLOCKS
    dtype = resolve_dtype(plan.dtype, plan.backend)
    size = blocks * block_size * kv_bytes_per_token(config, dtype)
    options = Options(
        model=ModelOptions(
            path=str(folder),
            dtype=plan.dtype,
            backend=plan.backend,
            load_format="random",
            max_model_len=model_len,
        ),
        cache=KVCacheOptions(kv_cache_memory_bytes=size),
        scheduler=SchedulerOptions(
            max_num_seqs=max([plan.max_num_seqs, *(case.batch for case in cases)]),
            max_num_batched_tokens=plan.max_num_batched_tokens,
        ),
    )
    return with_assignments(options, plan.settings)


def _blocks(case: Case, block_size: int) -> int:
    # One token more than is asked for may be under way, and profiles run a little longer.
    tokens = case.prompt_tokens + max(case.new_tokens, _PROFILED_STEPS + _SETTLING_STEPS + 16) + 2
    return case.batch * (-(-tokens // block_size) + 1)


def spread(values: Sequence[float]) -> dict[str, object]:
    """Median, extremes and all of the repeats."""
    return {"median": median(values), "min": min(values), "max": max(values), "all": list(values)}


def first_token_figures(rounds: Sequence[Generation]) -> dict[str, object]:
    """Mean, p50 and last first token of a batch; medians over the rounds."""
    return {
        "mean": median(fmean(one.first_token_s) for one in rounds),
        "p50": median(median(one.first_token_s) for one in rounds),
        "max": median(max(one.first_token_s) for one in rounds),
        "max_all": [max(one.first_token_s) for one in rounds],
    }


def kernel_figures(spans: Sequence[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Sums by name of `(name, start, end)` in microseconds, per step, longest first.

    `sum_us` counts kernels that overlap twice, `busy_us` once; `span_us` is the time from the first
    start to the last end, so what it has beyond `busy_us` is idle.
    """
    time_of: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, start, end in spans:
        time_of[name] += end - start
        calls[name] += 1
    busy, reached = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda one: one[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    return {
        "steps": steps,
        "sum_us": sum(time_of.values()) / steps,
        "busy_us": busy / steps,
        "span_us": span / steps,
        "kernels": [
            {"name": name, "calls_per_step": calls[name] / steps, "us_per_step": total / steps}
            for name, total in time_of.most_common()
        ],
    }
