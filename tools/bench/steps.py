"""`steps`: how near a model's steps on the GPU come to what its bytes or its products allow, shape by shape.

A model of random weights gets few layers, enough that their weights do not stay in the L2, and its steps
are captured as the runner captures them, padded to the same shapes. Timed is the graph alone: the host, the
step's inputs and what lies between two steps are left out. So a table of many numbers of rows, contexts and
prompts takes seconds a model, and shows where a rule or a kernel does not suit its sizes.

Floors: a decode step reads its weights and its rows' keys and values once, at `READ_BYTES_PER_US`; a prompt
is bound by that or by its products, at `FLOP_PER_US`. The rows of a step that are asked for count, not the
idle ones that fill its shape. Times are medians of several replays, of one layer; the head stands apart.

    python -m tools.bench.steps --model qwen25-0.5b --model tinyllama-1.1b --name steps
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from photon_grpc.errors import StartupError
from photon_grpc.models.config import ModelConfig
from photon_grpc.models.random_weights import draw_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.base import AttentionMetadata, Ops
from photon_grpc.runner.buckets import Buckets, StepShape
from photon_grpc.runner.kv_cache import KVCache
from tools.bench import report
from tools.bench.random_models import config_folder

__all__ = ["DECODES", "PROMPTS", "Decode", "Prompt", "StepModel", "StepRow", "few_layers", "floor_us"]

READ_BYTES_PER_US = 3.05e6
FLOP_PER_US = 750e6
"""Of one H100: its read stream, and large products in 16 bits."""

BLOCK_SIZE = 16
MAX_ROWS, MAX_TOKENS = 256, 2048
"""As a server on CUDA has them."""
_ROWS = (1, 2, 3, 5, 7, 8, 12, 16, 17, 24, 33, 48, 64, 65, 96, 128, 129, 200, 256)
_LONGER = {2048: (1, 16, 64), 8192: (1, 4, 16), 32768: (1, 4)}
_PROMPT_TOKENS = (1, 17, 128, 257, 513, 1000, 1025, 2048)
_CONTEXT = 128

# More than the L2, so that weights are read from memory each time; layers of a graph, so that its start
# does not count.
_WEIGHT_BYTES = 300 << 20
_MIN_LAYERS, _GRAPH_LAYERS = 4, 16
_WARM_UP, _TIMED = 2, 5
_BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of `rows` sequences, one token each, that see `context` tokens."""

    rows: int
    context: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.rows} rows" + (f" of {self.context}" if self.context != _CONTEXT else "")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A step of `tokens` of one prompt, the last of its `context`."""

    tokens: int
    context: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.tokens} tokens" + (f" of {self.context}" if self.context != self.tokens else "")


DECODES = (
    *(Decode(rows, _CONTEXT) for rows in _ROWS),
    *(Decode(rows, context) for context, numbers in _LONGER.items() for rows in numbers),
)
# A prompt of 8,192 comes in steps of 2,048, of which this is the last.
PROMPTS = (*(Prompt(tokens, tokens) for tokens in _PROMPT_TOKENS), Prompt(2048, 8192))


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of a model: microseconds of a layer, and of the head where rows are decoded."""

    model: str
    case: Decode | Prompt
    layer_us: float
    layer_floor_us: float
    head_us: float | None
    head_floor_us: float

    @property
    def share(self) -> float:
        """Of what the layer could be."""
        return self.layer_floor_us / self.layer_us


def few_layers(config: ModelConfig) -> ModelConfig:
    """The same with as few layers as keep their weights out of the L2."""
    wanted = max(_MIN_LAYERS, math.ceil(_WEIGHT_BYTES / layer_bytes(config)))
    return replace(config, num_layers=min(config.num_layers, wanted))


def layer_bytes(config: ModelConfig) -> int:
    """Of the weights of a layer in 16 bits."""
    vocab = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return 2 * (config.num_parameters - vocab - config.hidden_size) // config.num_layers


def floor_us(config: ModelConfig, case: Decode | Prompt) -> float:
    """Least time of a layer."""
    weights = layer_bytes(config)
    token_bytes = 4 * config.kv_size
    if isinstance(case, Decode):
        return (weights + case.rows * case.context * token_bytes) / READ_BYTES_PER_US
    visible = case.tokens * case.context - case.tokens * (case.tokens - 1) // 2
    flop = weights * case.tokens + 4 * config.q_size * visible
    return max((weights + case.context * token_bytes) / READ_BYTES_PER_US, flop / FLOP_PER_US)


class StepModel:
    """A model of few layers, and its steps as they are captured on a GPU."""

    def __init__(
        self, config: ModelConfig, cases: Sequence[Decode | Prompt], ops: Ops, device: torch.device
    ) -> None:
        """With room for `cases`. Raises StartupError where the machine or the model will not do."""
        self.config = config
        self._device = device
        positions = max(case.context for case in cases)
        self._model = build_model(
            replace(config, max_position_embeddings=max(positions, config.max_position_embeddings)),
            ops,
            dtype=_BF16,
            device=self._device,
            max_positions=positions,
        )
        draw_weights(self._model)
        blocks = max(_blocks(case) for case in cases)
        self._cache = KVCache(config, ops, blocks, BLOCK_SIZE, dtype=_BF16, device=self._device)
        for layer in self._cache.layers:
            layer.normal_()
        self._order = torch.randperm(blocks, device=self._device).to(torch.int32)
        self._buckets = Buckets(MAX_ROWS, MAX_TOKENS)

    def forward_us(self, case: Decode | Prompt) -> float:
        """Of a layer."""
        shape = self.shape(case)
        ids, positions, metadata = self.inputs(case, shape)
        passes = 1 if isinstance(case, Prompt) else -(-_GRAPH_LAYERS // self.config.num_layers)

        def run() -> None:
            for _ in range(passes):
                metadata.plan = None
                self._model.forward(ids, positions, self._cache, metadata)

        return graph_us(run) / (passes * self.config.num_layers)

    def head_us(self, rows: int) -> float:
        """Of the logits of a decode step, idle rows included."""
        padded = self.shape(Decode(rows, 1)).num_rows
        hidden = torch.randn(padded, self.config.hidden_size, device=self._device).to(_BF16)
        return graph_us(lambda: [self._model.compute_logits(hidden) for _ in range(2)]) / 2

    def shape(self, case: Decode | Prompt) -> StepShape:
        """What the runner pads such a step to."""
        found = (
            self._buckets.fit(case.rows, 0, 0)
            if isinstance(case, Decode)
            else self._buckets.fit(0, 1, case.tokens)
        )
        assert found is not None, "no captured step has room for it"
        return found

    def inputs(self, case: Decode | Prompt, shape: StepShape) -> tuple[Tensor, Tensor, AttentionMetadata]:
        rows = case.rows if isinstance(case, Decode) else 1
        new = 1 if isinstance(case, Decode) else case.tokens
        width = -(-case.context // BLOCK_SIZE)
        tables = torch.zeros(shape.num_rows, width, dtype=torch.int32, device=self._device)
        tables[:rows] = self._order[: rows * width].view(rows, width)
        lens = torch.zeros(shape.num_rows, dtype=torch.int32, device=self._device)
        lens[:rows] = case.context
        # The last tokens of each context, row after row; those of no row go nowhere.
        places = torch.arange(case.context - new, case.context, device=self._device).repeat(rows)
        blocks = tables[:rows].long().gather(1, (places.view(rows, new) // BLOCK_SIZE))
        positions = torch.zeros(shape.num_tokens, dtype=torch.int64, device=self._device)
        slots = torch.full_like(positions, -1)
        positions[: rows * new] = places
        slots[: rows * new] = blocks.flatten() * BLOCK_SIZE + places % BLOCK_SIZE
        starts = None
        if shape.num_prefills:
            starts = torch.full((shape.num_prefills + 1,), new, dtype=torch.int32, device=self._device)
            starts[0] = 0
        ids = torch.randint(self.config.vocab_size, (shape.num_tokens,), device=self._device)
        decodes = tuple(range(shape.num_decodes + 1))
        metadata = AttentionMetadata(
            num_decodes=shape.num_decodes,
            slot_mapping=slots,
            block_tables=tables,
            context_lens=lens,
            query_starts=decodes + decodes[-1:] * shape.num_prefills,
            context_lens_host=(0,) * shape.num_rows,
            query_starts_device=starts,
            context_is_old=not shape.num_prefills,
        )
        return ids, positions, metadata


def graph_us(run: Callable[[], object]) -> float:
    """Median time of a replay of what `run` enqueues, once everything has been compiled."""
    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for i in range(_WARM_UP + _TIMED):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if i >= _WARM_UP:
                times.append(start.elapsed_time(stop) * 1e3)
    return median(times)


def _blocks(case: Decode | Prompt) -> int:
    rows = case.rows if isinstance(case, Decode) else 1
    return rows * -(-case.context // BLOCK_SIZE)


def measure(name: str, cases: Sequence[Decode | Prompt]) -> Iterator[StepRow]:
    """Every case that the model has the positions for, in order."""
    from photon_grpc.ops.cuda_ops import CudaOps

    whole = load_config(config_folder(name))
    fitting = [case for case in cases if case.context <= whole.max_position_embeddings]
    config = few_layers(whole)
    model = StepModel(config, fitting, CudaOps(max_decodes=MAX_ROWS), torch.device("cuda"))
    heads: dict[int, float] = {}
    head_floor = 2 * config.vocab_size * config.hidden_size / READ_BYTES_PER_US
    for case in fitting:
        head = None
        if isinstance(case, Decode):
            padded = model.shape(case).num_rows
            head = heads[padded] = heads.get(padded) or model.head_us(case.rows)
        yield StepRow(name, case, model.forward_us(case), floor_us(config, case), head, head_floor)


def table(rows: Sequence[StepRow]) -> str:
    """Per cent of the floor that a layer reaches: models by cases, and below it the head's."""
    cases = list(dict.fromkeys(row.case for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    found = {(row.model, row.case): row for row in rows}
    lines = [f"| % of the floor | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for case in cases:
        cells = []
        for model in models:
            row = found.get((model, case))
            cell = f"{row.share:.0%} ({row.layer_us:.1f})" if row else ""
            if row and row.head_us:
                cell += f" {row.head_floor_us / row.head_us:.0%}"
            cells.append(cell)
        lines.append(f"| {case.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def to_result(rows: Sequence[StepRow]) -> dict[str, Any]:
    """What goes into the JSON."""
    return {
        "read_bytes_per_us": READ_BYTES_PER_US,
        "flop_per_us": FLOP_PER_US,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "rows": [
            {
                "model": row.model,
                "case": row.case.label,
                "layer_us": row.layer_us,
                "layer_floor_us": row.layer_floor_us,
                "share": row.share,
                "head_us": row.head_us,
                "head_floor_us": row.head_floor_us,
            }
            for row in rows
        ],
    }


def draw(figure: Figure, rows: Sequence[StepRow]) -> None:
    """Share of the floor over rows and over tokens, a line a model."""
    figure.set_size_inches(12, 5)
    for axes, kind in zip(figure.subplots(1, 2), (Decode, Prompt), strict=True):
        for model in dict.fromkeys(row.model for row in rows):
            own = [row for row in rows if row.model == model and isinstance(row.case, kind)]
            if kind is Decode:
                own = [row for row in own if row.case.context == _CONTEXT]
            sizes = [row.case.rows if isinstance(row.case, Decode) else row.case.tokens for row in own]
            axes.plot(sizes, [row.share for row in own], ".-", label=model)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1)
        axes.set_xlabel("rows" if kind is Decode else "tokens of a prompt")
        axes.set_ylabel("floor / measured, of a layer")
        axes.legend(fontsize=7)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="name or folder; may be repeated")
    parser.add_argument("--rows", action="append", type=int, help="decode rows, context 128; no others")
    parser.add_argument("--tokens", action="append", type=int, help="tokens of a prompt, no others")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for JSON and plot")
    parser.add_argument("--name", default="", help="stem of the files; none: nothing is written")
    options = parser.parse_args()
    cases: list[Decode | Prompt] = [*DECODES, *PROMPTS]
    if options.rows or options.tokens:
        cases = [Decode(rows, _CONTEXT) for rows in options.rows or ()]
        cases += [Prompt(tokens, tokens) for tokens in options.tokens or ()]
    rows: list[StepRow] = []
    for model in options.model:
        own = list(measure(model, cases))
        rows += own
        torch.cuda.empty_cache()
        print(table(own), flush=True)
    print(table(rows))
    if options.name:
        path = report.write(options.output, options.name, to_result(rows), lambda figure: draw(figure, rows))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except StartupError as error:
        print(error.message)
        raise SystemExit(2) from None
