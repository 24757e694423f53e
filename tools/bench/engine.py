"""`engine`: decode in one process, without gRPC, against Hugging Face `generate` in the same run.

Both sides get the same prompts, the same lengths, the same data type and the same number of torch
threads, decode greedily and ignore EOS. They take turns, each round with new prompts, so that a machine
that slows down slows both. The first, uncounted round warms both up.

Prefill is the time until every row of the batch has its first token; decode is the rest, and its speed
counts only tokens that came after the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import EngineRequest, Submit
from photon_grpc.engine_place import model_folder
from photon_grpc.options import EngineOptions, KVCacheOptions, ModelOptions, Options, SchedulerOptions
from photon_grpc.runner.backend import resolve_dtype
from photon_grpc.runner.factory import build_runner
from photon_grpc.types import EffectiveSampling, Finish

__all__ = ["EnginePlan", "EngineRow", "draw", "print_table", "run"]

_GREEDY = EffectiveSampling(
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
# Below it are the special tokens of the models that tools/make_tiny_model.py and the demo model use.
_FIRST_ID = 4
_KV_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What to run. `num_threads` 0: torch's own choice, for both sides."""

    model: str
    dtype: str
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    num_threads: int = 0
    repeats: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """One side's run of one batch. Seconds; `token_ids` has the new tokens of each row."""

    prefill_s: float
    decode_s: float
    tokens_after_prefill: int
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the whole batch."""
        return self.tokens_after_prefill / self.decode_s

    @property
    def total_tokens_per_second(self) -> float:
        """New tokens over all the time, prefill included."""
        return sum(map(len, self.token_ids)) / (self.prefill_s + self.decode_s)


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One batch size: ours and theirs, repeat by repeat. `same_rows` of `num_rows` had equal tokens."""

    batch: int
    ours: tuple[Generation, ...]
    theirs: tuple[Generation, ...]

    @property
    def decode_ratios(self) -> list[float]:
        """Our decode speed over theirs, turn by turn."""
        return [
            a.decode_tokens_per_second / b.decode_tokens_per_second
            for a, b in zip(self.ours, self.theirs, strict=True)
        ]

    @property
    def total_ratios(self) -> list[float]:
        """The same, prefill included."""
        return [
            a.total_tokens_per_second / b.total_tokens_per_second
            for a, b in zip(self.ours, self.theirs, strict=True)
        ]

    @property
    def same_rows(self) -> tuple[int, int]:
        """`(rows whose tokens are the same on both sides, rows)`."""
        pairs = [
            (mine, other)
            for a, b in zip(self.ours, self.theirs, strict=True)
            for mine, other in zip(a.token_ids, b.token_ids, strict=True)
        ]
        return sum(mine == other for mine, other in pairs), len(pairs)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        same, rows = self.same_rows
        return {
            "batch": self.batch,
            "photon": _side(self.ours),
            "transformers": _side(self.theirs),
            "decode_ratio": _spread(self.decode_ratios),
            "total_ratio": _spread(self.total_ratios),
            "rows_with_equal_tokens": same,
            "rows": rows,
        }


def _spread(values: Sequence[float]) -> dict[str, object]:
    return {"min": min(values), "median": median(values), "max": max(values), "all": list(values)}


def _side(generations: Sequence[Generation]) -> dict[str, object]:
    return {
        "decode_tokens_per_second": _spread([g.decode_tokens_per_second for g in generations]),
        "total_tokens_per_second": _spread([g.total_tokens_per_second for g in generations]),
        "prefill_s": _spread([g.prefill_s for g in generations]),
    }


Side = Callable[[list[list[int]], int], Generation]
"""`(prompts, new tokens per row)` -> what came of it."""


def photon(plan: EnginePlan, folder: Path) -> Side:
    """Our engine core and model runner, driven on this thread. Raises StartupError."""
    batch = max(plan.batches)
    options = Options(
        model=ModelOptions(path=plan.model, dtype=plan.dtype, backend="cpu"),
        # Prompts never repeat, so nothing would be found; the other side hashes nothing either.
        cache=KVCacheOptions(kv_cache_memory_bytes=_KV_BYTES, prefix_caching=False),
        scheduler=SchedulerOptions(max_num_seqs=max(batch, 64)),
        engine=EngineOptions(num_threads=plan.num_threads),
    )
    core = EngineCore(build_runner(folder, options), options.scheduler, options.cache, clock=time.monotonic)
    last_key = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> Generation:
        nonlocal last_key
        outputs: dict[int, list[int]] = {}
        start = time.perf_counter()
        for prompt in prompts:
            last_key += 1
            outputs[last_key] = []
            core.submit(Submit(last_key, _engine_request(prompt, new_tokens)))
        num_begun = num_ended = tokens_in_prefill = 0
        prefill_end = start
        while num_ended < len(prompts):
            for output in core.step().outputs:
                row = outputs[output.key]
                num_begun += not row
                row += output.token_ids
                if output.is_last:
                    assert isinstance(output.finish, Finish), output.failure
                    num_ended += 1
            if num_begun == len(prompts) and prefill_end == start:
                prefill_end = time.perf_counter()
                tokens_in_prefill = sum(map(len, outputs.values()))
        end = time.perf_counter()
        return Generation(
            prefill_s=prefill_end - start,
            decode_s=end - prefill_end,
            tokens_after_prefill=sum(map(len, outputs.values())) - tokens_in_prefill,
            token_ids=tuple(map(tuple, outputs.values())),
        )

    return generate


def _engine_request(prompt: list[int], new_tokens: int) -> EngineRequest:
    return EngineRequest(
        prompt_token_ids=tuple(prompt),
        sampling=_GREEDY,
        max_tokens=new_tokens,
        min_tokens=0,
        stop_token_ids=(),
        eos_token_ids=(),
        arrival_time=time.monotonic(),
    )


class _FirstToken(transformers.StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Never stops anything; notes when the first token was there."""

    def __init__(self) -> None:
        self.moment: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.moment is None:
            self.moment = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def hugging_face(plan: EnginePlan, folder: Path) -> Side:
    """`AutoModelForCausalLM.generate` with its usual settings, greedy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=resolve_dtype(plan.dtype, "cpu"), local_files_only=True
    ).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(prompts: list[list[int]], new_tokens: int) -> Generation:
        input_ids = torch.tensor(prompts)
        clock = _FirstToken()
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=new_tokens,
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )
        end = time.perf_counter()
        assert clock.moment is not None
        new = output[:, input_ids.shape[1] :].tolist()
        assert all(len(row) == new_tokens for row in new), "generate() stopped early"
        return Generation(
            prefill_s=clock.moment - start,
            decode_s=end - clock.moment,
            tokens_after_prefill=len(prompts) * (new_tokens - 1),
            token_ids=tuple(map(tuple, new)),
        )

    return generate


def run(plan: EnginePlan, progress: Callable[[str], None]) -> list[EngineRow]:
    """Every batch size in turn; `progress` hears what runs. Raises StartupError."""
    folder = model_folder(ModelOptions(path=plan.model))
    if plan.num_threads:
        torch.set_num_threads(plan.num_threads)
    progress("loading")
    ours, theirs = photon(plan, folder), hugging_face(plan, folder)
    vocab_size = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
    rows = []
    for batch in plan.batches:
        rounds: tuple[list[Generation], list[Generation]] = ([], [])
        for repeat in range(plan.repeats + 1):
            progress(f"batch {batch}, round {repeat} of {plan.repeats}")
            generator = np.random.default_rng((plan.seed, batch, repeat))
            prompts = generator.integers(_FIRST_ID, vocab_size, (batch, plan.prompt_tokens)).tolist()
            sides = [(ours, rounds[0]), (theirs, rounds[1])]
            # Who goes first changes from round to round: a cache left warm by one helps the other.
            for side, results in sides if repeat % 2 else reversed(sides):
                result = side(prompts, plan.new_tokens)
                if repeat:
                    results.append(result)
        rows.append(EngineRow(batch, tuple(rounds[0]), tuple(rounds[1])))
    return rows


def print_table(console: Console, rows: Sequence[EngineRow], title: str) -> None:
    """One line per batch size; medians, and the ratio with its spread."""
    table = Table(title=title, caption="medians over the rounds; ratio: photon_grpc / Hugging Face")
    for name in ("batch", "photon tok/s", "HF tok/s", "decode ratio", "min - max", "ratio with prefill"):
        table.add_column(name, justify="right")
    table.add_column("prefill ms, photon / HF", justify="right")
    table.add_column("rows with equal tokens", justify="right")
    for row in rows:
        ratios = row.decode_ratios
        same, num_rows = row.same_rows
        table.add_row(
            str(row.batch),
            f"{median(g.decode_tokens_per_second for g in row.ours):,.1f}",
            f"{median(g.decode_tokens_per_second for g in row.theirs):,.1f}",
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f} - {max(ratios):.2f}",
            f"{median(row.total_ratios):.2f}",
            f"{1e3 * median(g.prefill_s for g in row.ours):.1f} / "
            f"{1e3 * median(g.prefill_s for g in row.theirs):.1f}",
            f"{same} of {num_rows}",
        )
    console.print(table)


def draw(figure: Figure, rows: Sequence[EngineRow]) -> None:
    """Decode speed by batch size, both sides, and their ratio."""
    speed, ratio = figure.subplots(1, 2)
    places = np.arange(len(rows))
    labels = [str(row.batch) for row in rows]
    for offset, name, pick in ((-0.2, "photon_grpc", "ours"), (0.2, "Hugging Face generate", "theirs")):
        values = [median(g.decode_tokens_per_second for g in getattr(row, pick)) for row in rows]
        speed.bar(places + offset, values, 0.4, label=name)
    speed.set_title("decode, tokens/s of the batch")
    speed.legend(fontsize=8)
    middle = [median(row.decode_ratios) for row in rows]
    below = [m - min(row.decode_ratios) for m, row in zip(middle, rows, strict=True)]
    above = [max(row.decode_ratios) - m for m, row in zip(middle, rows, strict=True)]
    ratio.errorbar(places, middle, (below, above), fmt="o", capsize=4)
    ratio.axhline(1.0, linestyle=":", color="grey")
    ratio.set_ylim(bottom=0)
    ratio.set_title("photon_grpc / Hugging Face: median, min, max")
    for axes in (speed, ratio):
        axes.set_xticks(places, labels)
        axes.set_xlabel("batch")


def to_result(plan: EnginePlan, rows: Sequence[EngineRow]) -> dict[str, object]:
    """For JSON."""
    return {
        "plan": plan,
        "torch_threads": torch.get_num_threads(),
        "rows": [row.to_dict() for row in rows],
    }
