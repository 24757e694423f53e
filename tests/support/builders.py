"""Small makers of domain objects with sensible defaults, and a clock that tests move by hand."""

from __future__ import annotations

from typing import Any

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import EngineRequest, SequenceOutput, Submit
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import SchedulerOutput
from photon_grpc.scheduler.request import Request
from photon_grpc.types import EffectiveSampling, ModelInfo


class FakeClock:
    """Monotonic seconds that only `advance` moves."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def model_info(**overrides: Any) -> ModelInfo:
    values: dict[str, Any] = {
        "name": "scripted",
        "fingerprint": "0123456789abcdef",
        "vocab_size": 1000,
        "max_model_len": 512,
        "eos_token_ids": (1,),
    }
    return ModelInfo(**{**values, **overrides})


def sampling(**overrides: Any) -> EffectiveSampling:
    values: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "n": 1,
    }
    return EffectiveSampling(**{**values, **overrides})


def engine_request(
    prompt: tuple[int, ...], max_tokens: int = 4, n: int = 1, **overrides: Any
) -> EngineRequest:
    values: dict[str, Any] = {
        "prompt_token_ids": prompt,
        "sampling": sampling(n=n),
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "stop_token_ids": (),
        "eos_token_ids": (1,),
        "arrival_time": 1000.0,
    }
    return EngineRequest(**{**values, **overrides})


class RecordingRunner(ScriptedRunner):
    """A ScriptedRunner that keeps every plan it was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: list[SchedulerOutput] = []

    def launch(self, output: SchedulerOutput) -> None:
        self.plans.append(output)
        super().launch(output)

    def tokens_of(self, seq_id: int) -> list[int]:
        """How many tokens of a sequence each step computed, first step first."""
        return [sum(r.num_tokens for r in plan.rows if r.seq_id == seq_id) for plan in self.plans]


def live_requests(core: EngineCore) -> dict[int, Request]:
    """The scheduler's own records by seq_id; sequences are numbered from 1 in the order of submission."""
    return dict(core.scheduler._live)


def engine_core(runner: Runner, clock: FakeClock | None = None, **scheduler: Any) -> EngineCore:
    values: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    prefix_caching = scheduler.pop("prefix_caching", True)
    return EngineCore(
        runner,
        SchedulerOptions(**{**values, **scheduler}),
        KVCacheOptions(prefix_caching=prefix_caching),
        clock=clock or FakeClock(),
    )


def scripted_core(num_blocks: int = 32, block_size: int = 4, **scheduler: Any) -> EngineCore:
    """A core over a RecordingRunner, or a subclass; what `runner_keys` names goes to it."""
    runner_keys = ("script", "faults", "max_in_flight", "crash_at_step", "out_of_memory")
    make = scheduler.pop("make_runner", RecordingRunner)
    runner = make(
        model_info(),
        num_blocks=num_blocks,
        block_size=block_size,
        **{key: scheduler.pop(key) for key in runner_keys if key in scheduler},
    )
    return engine_core(runner, **scheduler)


def run_to_end(core: EngineCore, max_steps: int = 10_000) -> list[SequenceOutput]:
    """Step until idle; everything that came out."""
    outputs: list[SequenceOutput] = []
    for _ in range(max_steps):
        if not core.has_work:
            return outputs
        outputs.extend(core.step().outputs)
        core.scheduler.check_invariants()
    raise AssertionError(f"still busy after {max_steps} steps")


def generate(core: EngineCore, **requests: EngineRequest) -> dict[str, list[int]]:
    """Run named requests together; the token ids of each (completion 0)."""
    names = list(requests)
    for key, name in enumerate(names, start=1):
        core.submit(Submit(key, requests[name]))
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for output in run_to_end(core):
        assert output.failure is None
        if output.index == 0:
            tokens[names[output.key - 1]].extend(output.token_ids)
    return tokens
