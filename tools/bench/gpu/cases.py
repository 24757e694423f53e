"""What is measured, and the bars beside it: plain data.

A case is one row of the table. Bars are those of vLLM 0.24 on one H200 with random weights, greedy,
128 prompt tokens and 256 new ones, token ids in and out, and what this project set out to reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BARS", "ENGINE_SECTIONS", "SECTIONS", "Bar", "Case", "Plan", "cases_of"]

SECTIONS = ("engine", "ttft", "context", "kernels", "edges", "serving", "start")
ENGINE_SECTIONS = SECTIONS[:4]
"""What an engine without a server is enough for."""
SECTIONS_OF_A_MODEL = ("engine", "ttft", "kernels")
"""Those that are measured of every model of the table; the others, unless models are named, of the first."""

LLAMA_1B, LLAMA_8B = "llama32-1b", "llama31-8b"
DEFAULT_MODELS = (LLAMA_1B, LLAMA_8B)
_SMALL_MODEL_BATCHES = (1, 4, 8, 16, 35, 64, 128, 256)
_LARGE_MODEL_BATCHES = (1, 16, 64, 256)
_FEW_BATCHES = (1, 16, 64, 256)
_TTFT_BATCHES = (1, 64, 256)
_CONTEXTS = ((1024, 1), (1024, 16), (1024, 64), (8192, 1), (8192, 16))
_CONTEXT_NEW_TOKENS = 128
_STARTS = 3
EDGES = ("rms_norm [256, 2048]", "rope [256, 2048]")
"""Cases of `tools/bench/kernel_cases/edges.py`."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `batch` is rows in a step, or streams of clients; 0 where there are none.

    `variant` tells cases apart that are alike otherwise, such as all streams over one channel.
    """

    section: str
    model: str
    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    sampling: str = "greedy"
    variant: str = ""

    @property
    def label(self) -> str:
        """For progress and plots."""
        parts = [self.section, self.model] if self.model else [self.section]
        parts += [f"batch {self.batch}"] if self.batch else []
        parts += [f"{self.prompt_tokens}+{self.new_tokens}"] if self.prompt_tokens else []
        parts += [self.sampling] if self.sampling != "greedy" else []
        return " ".join([*parts, self.variant]).strip()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Empty `models` or `batches`: those of the table."""

    sections: tuple[str, ...] = SECTIONS
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    prompt_tokens: int = 128
    new_tokens: int = 256
    repeats: int = 3
    quick: bool = False
    backend: str = "cuda"
    dtype: str = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    settings: tuple[str, ...] = ()
    seed: int = 0


def cases_of(plan: Plan) -> list[Case]:
    """Every row of the plan, model by model, in an order in which an engine can be kept.

    The profile of a step comes after all that is timed: the profiler's hooks stay in the process.
    """
    models = plan.models or DEFAULT_MODELS
    cases: list[Case] = []
    for model in models:
        for section in plan.sections:
            if section in SECTIONS_OF_A_MODEL or plan.models or model == models[0]:
                cases += _section(plan, section, model)
    # They need a GPU, and no model.
    if "edges" in plan.sections and plan.backend == "cuda":
        cases += [Case("edges", "", variant=kernel) for kernel in EDGES]
    return cases


def _section(plan: Plan, section: str, model: str) -> list[Case]:
    prompt, new = plan.prompt_tokens, plan.new_tokens
    match section:
        case "engine":
            default = _SMALL_MODEL_BATCHES if model == LLAMA_1B else _LARGE_MODEL_BATCHES
            batches = _batches(plan, default)
            return [
                Case("engine", model, batch, prompt, new, sampling)
                for batch in batches
                for sampling in ("greedy", "sampled")
            ]
        case "ttft":
            return [Case("ttft", model, batch, prompt, 1) for batch in _batches(plan, _TTFT_BATCHES)]
        case "context":
            contexts: Sequence[tuple[int, int]] = _CONTEXTS[:1] if plan.quick else _CONTEXTS
            return [Case("context", model, batch, n, _CONTEXT_NEW_TOKENS) for n, batch in contexts]
        case "kernels":
            return [Case("kernels", model, batch, prompt, new) for batch in _batches(plan, _FEW_BATCHES)]
        case "serving":
            batches = _batches(plan, _FEW_BATCHES)
            widest = max(batches)
            return [
                *(Case("serving", model, batch, prompt, new) for batch in batches),
                Case("serving", model, widest, prompt, new, "sampled"),
                Case("serving", model, widest, prompt, new, variant="one channel"),
            ]
        case "edges":
            return []
        case "start":
            return [
                Case("start", model, variant=f"start {n + 1}") for n in range(1 if plan.quick else _STARTS)
            ]
    raise ValueError(f"{section}: no such section; there are {', '.join(SECTIONS)}")


def _batches(plan: Plan, default: Sequence[int]) -> tuple[int, ...]:
    if plan.batches:
        return plan.batches
    return (default[0], default[-1]) if plan.quick else tuple(default)


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure to reach. `metric` is its path in a row's result; `scale` brings it to `unit`."""

    case: Case
    metric: str
    what: str
    unit: str
    vllm: float | None
    target: float
    at_least: bool = True
    scale: float = 1.0

    def measured(self, result: dict[str, Any]) -> float | None:
        """The figure of a row, None where the row has none."""
        value: Any = result
        for part in self.metric.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is None else float(value) * self.scale

    def is_reached(self, value: float) -> bool:
        """Whether a measured figure is as good as the bar."""
        return value >= self.target if self.at_least else value <= self.target


def _decode(model: str, batch: int, vllm: float, target: float) -> Bar:
    case = Case("engine", model, batch, 128, 256)
    return Bar(
        case, "decode_tokens_per_second/median", f"{model} decode, batch {batch}", "tok/s", vllm, target
    )


def _first_token(batch: int, vllm: float, target: float) -> Bar:
    case = Case("ttft", LLAMA_1B, batch, 128, 1)
    what = f"{LLAMA_1B} last first token, batch {batch}"
    return Bar(case, "first_token_s/max", what, "ms", vllm, target, at_least=False, scale=1e3)


def _served(batch: int, vllm: float, target: float) -> Bar:
    case = Case("serving", LLAMA_1B, batch, 128, 256)
    return Bar(
        case, "tokens_per_second/median", f"{LLAMA_1B} through gRPC, {batch} streams", "tok/s", vllm, target
    )


def _pause(batch: int, vllm: float, target: float) -> Bar:
    case = Case("serving", LLAMA_1B, batch, 128, 256)
    what = f"{LLAMA_1B} pause p99, {batch} streams"
    return Bar(case, "pause_s/p99", what, "ms", vllm, target, at_least=False, scale=1e3)


BARS: tuple[Bar, ...] = (
    _decode(LLAMA_1B, 1, 811, 1_400),
    _decode(LLAMA_1B, 4, 3_184, 5_400),
    _decode(LLAMA_1B, 8, 6_326, 10_500),
    _decode(LLAMA_1B, 16, 12_131, 19_000),
    _decode(LLAMA_1B, 35, 23_454, 36_000),
    _decode(LLAMA_1B, 64, 38_511, 56_000),
    _decode(LLAMA_1B, 128, 59_067, 88_000),
    _decode(LLAMA_1B, 256, 82_465, 115_000),
    _first_token(1, 4.6, 1.8),
    _first_token(64, 36, 24),
    _first_token(256, 122, 95),
    _decode(LLAMA_8B, 1, 206, 260),
    _decode(LLAMA_8B, 16, 3_126, 3_800),
    _decode(LLAMA_8B, 64, 10_613, 12_500),
    _decode(LLAMA_8B, 256, 23_099, 25_500),
    _served(1, 792, 1_350),
    _served(16, 10_633, 18_000),
    _served(64, 30_547, 50_000),
    _served(256, 60_430, 95_000),
    _pause(64, 3.5, 2.5),
    _pause(256, 19.6, 10),
    *(
        Bar(
            Case("edges", "", variant=kernel),
            "speedup_over_eager",
            f"{kernel} against eager torch",
            "x",
            None,
            target,
        )
        for kernel, target in zip(EDGES, (5.0, 6.0), strict=True)
    ),
    # The first start may compile kernels; from the second on their cache is warm.
    Bar(
        Case("start", LLAMA_1B, variant="start 2"),
        "serving_after_s",
        f"{LLAMA_1B} start to SERVING, warm kernel cache",
        "s",
        22,
        8,
        at_least=False,
    ),
)
