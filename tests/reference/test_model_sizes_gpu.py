"""Layers in the sizes of real models on a GPU, against plain torch in float32 on the same weights.

Which kernel multiplies a weight, and how the weight is cut, follows from its sizes, so every configuration of
`tools/bench/models` computes a layer in its own: heads that come in threes, fives and sevens, rows of 576
and 896, inner sizes that fill no tile. Steps have each number of rows at which another kernel or another tile
takes over. What we are allowed is what plain torch makes itself in the type, as in
`test_transformers_gpu.py`; and float32 is the truth. `TorchOps` is held to transformers on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from photon_grpc.models.config import ModelConfig
from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.random_weights import draw_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.base import AttentionMetadata, Ops
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.runner.kv_cache import KVCache
from tools.bench import random_models

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
# Of decode rows: each kernel of products, each of its tiles of tokens, and one more than that.
ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 33, 48, 64, 65, 96, 128, 129, 160, 200, 256)
# Of one step's prompts: their new tokens.
PROMPTS = ((1, 2), (17,), (100, 28), (513, 3), (700, 1, 299))
LONGEST_OLD = 300
VOCAB_SIZE = 1032
HEAD_ROWS = (1, 4, 8, 9, 16, 40, 64, 100, 128, 129, 256)
# (hidden, vocabulary): those of the models, and of checkpoints to which tokens were added.
HEADS = ((896, 151936), (2048, 32000), (576, 49152), (2048, 32001), (960, 32019), (1024, 128258))
# As in test_transformers_gpu.py, but a root mean square of n errors is itself known to a part of
# 1 / sqrt(2 n): four times that of the quotient of two comes on top. One token's keys and values may be 512
# numbers.
MOST_ON_THE_WHOLE, MOST_OF_A_TOKEN = 1.05, 1.5
UNCERTAINTY = 4.0
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Step:
    """Rows of a step, all of one new token or all prompts, and the contexts that they end."""

    new: tuple[int, ...]
    contexts: tuple[int, ...]
    decodes: bool


def steps() -> Iterator[Step]:
    for rows in ROWS:
        yield Step((1,) * rows, tuple(1 + 37 * row % LONGEST_OLD for row in range(rows)), True)
    for new in PROMPTS:
        yield Step(new, tuple(count + 41 * row % LONGEST_OLD for row, count in enumerate(new)), False)


class Layer:
    """A model of one layer with its cache, whose old tokens are the same whatever the Ops."""

    def __init__(self, config: ModelConfig, ops: Ops, dtype: torch.dtype, num_blocks: int) -> None:
        self.model: DecoderModel = build_model(config, ops, dtype=dtype, device=CUDA, max_positions=2048)
        self._cache = KVCache(config, ops, num_blocks, BLOCK_SIZE, dtype=dtype, device=CUDA)
        self._is_by_head = not isinstance(ops, TorchOps)

    def take_weights(self, other: Layer) -> None:
        theirs = dict(other.model.checkpoint_tensors())
        for name, tensor in self.model.checkpoint_tensors():
            tensor.copy_(theirs[name])
        self.model.pack()

    def fill(self, old: Tensor) -> None:
        """`old` [num_blocks, block_size, 2, num_kv_heads, head_dim]."""
        self._cache.layers[0].copy_(old.permute(0, 3, 2, 1, 4) if self._is_by_head else old)

    def slots(self) -> Tensor:
        """[num_blocks * block_size, 2, num_kv_heads, head_dim]."""
        layer = self._cache.layers[0]
        return (layer.permute(0, 3, 2, 1, 4) if self._is_by_head else layer).flatten(0, 1)

    def compute(self, step: Step) -> Tensor:
        """Hidden states, [tokens, hidden]."""
        ids, positions, metadata = inputs(step)
        return self.model.forward(ids, positions, self._cache, metadata)


def inputs(step: Step) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """Each row has the blocks behind those of the row before it, in the order of a fixed shuffle."""
    needed = [-(-context // BLOCK_SIZE) for context in step.contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int64)
    slots, positions, starts = [], [], [0]
    for row, (count, context) in enumerate(zip(step.new, step.contexts, strict=True)):
        own = [order.pop() for _ in range(needed[row])]
        tables[row, : len(own)] = torch.tensor(own)
        for position in range(context - count, context):
            positions.append(position)
            slots.append(own[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        starts.append(len(positions))
    generator = torch.Generator().manual_seed(len(positions))
    ids = torch.randint(VOCAB_SIZE, (len(positions),), generator=generator)
    metadata = AttentionMetadata(
        num_decodes=len(needed) if step.decodes else 0,
        slot_mapping=torch.tensor(slots, device=CUDA),
        block_tables=tables.to(CUDA),
        context_lens=torch.tensor(step.contexts, device=CUDA),
        query_starts=tuple(starts),
        context_lens_host=step.contexts,
        context_is_old=step.decodes,
    )
    return ids.to(CUDA), torch.tensor(positions, device=CUDA), metadata


def num_blocks(every: Sequence[Step]) -> int:
    return max(sum(-(-context // BLOCK_SIZE) for context in step.contexts) for step in every)


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Of the norm: of all tokens together, and the largest of one token."""
    actual, exact = actual.flatten(1).double(), exact.flatten(1).double()
    off = (actual - exact).norm(dim=-1)
    return float(off.norm() / exact.norm()), float((off / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", random_models.names())
def test_a_layer_is_no_further_off_than_plain_torch(name: str, dtype: torch.dtype) -> None:
    from photon_grpc.ops.cuda_ops import CudaOps

    assert not torch.backends.cuda.matmul.allow_tf32, "torch's own default"
    config = load_config(random_models.config_folder(name))
    config = replace(config, num_layers=1, vocab_size=VOCAB_SIZE)
    every = list(steps())
    blocks = num_blocks(every)
    with torch.inference_mode():
        ours = Layer(config, CudaOps(max_decodes=max(ROWS)), dtype, blocks)
        draw_weights(ours.model)
        theirs = Layer(config, TorchOps(), dtype, blocks)
        exact = Layer(config, TorchOps(), torch.float32, blocks)
        for other in (theirs, exact):
            other.take_weights(ours)
        shape = (blocks, BLOCK_SIZE, 2, config.num_kv_heads, config.head_dim)
        old = torch.randn(shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(3)).to(dtype)
        for step in every:
            for layer in (ours, theirs, exact):
                layer.fill(old)
            _, _, metadata = inputs(step)
            found, rounded, truth = (layer.compute(step) for layer in (ours, theirs, exact))
            assert bool(found.isfinite().all())
            check(found, rounded, truth, f"{step.new}: hidden")
            written = metadata.slot_mapping
            caches = [layer.slots() for layer in (ours, theirs, exact)]
            check(*(cache[written] for cache in caches), f"{step.new}: keys and values")
            kept = torch.ones(len(caches[0]), dtype=torch.bool, device=CUDA)
            kept[written] = False
            assert torch.equal(caches[0][kept], old.flatten(0, 1)[kept]), (
                f"{step.new}: another slot was written"
            )


def check(found: Tensor, rounded: Tensor, truth: Tensor, what: str) -> None:
    (whole, worst), (their_whole, their_worst) = errors(found, truth), errors(rounded, truth)
    most = MOST_ON_THE_WHOLE + UNCERTAINTY / found.numel() ** 0.5
    assert whole <= most * their_whole, (what, whole, their_whole)
    assert worst <= MOST_OF_A_TOKEN * their_worst, (what, worst, their_worst)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden_size", "vocab_size"), HEADS)
def test_logits_of_every_vocabulary(hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Sums in float32 that nothing rounds: as near as such a sum is, whatever the rows."""
    from photon_grpc.ops.cuda_ops import CudaOps

    ops = CudaOps(max_decodes=1)
    generator = torch.Generator(CUDA).manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, device=CUDA, generator=generator).mul_(0.1).to(dtype)
    hidden = torch.randn(max(HEAD_ROWS), hidden_size, device=CUDA, generator=generator).to(dtype)
    truth = hidden.double() @ weight.double().T
    sizes = hidden.double().abs() @ weight.double().abs().T
    with torch.inference_mode():
        for rows in HEAD_ROWS:
            logits = ops.logits(hidden[:rows], weight)
            assert logits.dtype is torch.float32
            assert logits.shape == (rows, vocab_size)
            assert bool(((logits - truth[:rows]).abs() <= 1e-5 * sizes[:rows]).all()), rows
