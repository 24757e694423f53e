"""Whole models on a GPU against Hugging Face transformers and the CPU backend, layer by layer.

The truth is transformers in float32 on the weights as they are stored; a model of d layers shows the hidden
states after layer d, through nothing but the model's own interface. In 16 bits two right programs differ,
since they round in different places, so what we are allowed is measured: the error that transformers itself
makes in that type on the same tokens. We round the residual stream nowhere and fuse roundings away, so ours
must be no larger. In float32, where rounding is small, the numbers are held to each other and greedy tokens
must be equal.

Prompts enter in one step and are followed by decode steps of `BATCHES` rows, so that each kernel of products
(one tile and two tiles of `gemv`, `skinny_gemm`, cuBLASLt) computes whole models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.paged_model import PagedModel, TransformersModel, random_prompt
from tests.support.tiny_model import tiny_model_folder

pytestmark = pytest.mark.gpu

BATCHES = (1, 3, 8, 9, 17, 64, 65)
DEPTHS = (1, 2, 3, 4)
DECODES = 3
VOCAB_SIZE = 1024
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "tokenizer": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 64}),
    "llama3": ("llama3", {"head_dim": 32}),
    "biased": ("llama", {"head_dim": 128, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_attention_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 128, "num_key_value_heads": 8}),
}
# How other models share their kv heads: their groups, heads and biases, and their inner sizes' remainders.
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen25-0.5b": ("qwen2", {"hidden_size": 896, "intermediate_size": 608, "num_attention_heads": 14}),
    "qwen25-1.5b": ("qwen2", {"hidden_size": 1536, "intermediate_size": 560, "num_attention_heads": 12}),
    "qwen25-14b": ("qwen2", {"hidden_size": 1280, "intermediate_size": 864, "num_attention_heads": 10}),
    "qwen25-3b": ("qwen2", {"hidden_size": 2048, "intermediate_size": 688, "num_attention_heads": 16}),
    "qwen3-14b": ("qwen3", {"hidden_size": 320, "num_attention_heads": 10, "head_dim": 128}),
    "qwen3-32b": ("qwen3", {"num_attention_heads": 16, "head_dim": 128}),
    "llama32-3b": ("llama3", {"hidden_size": 768, "num_attention_heads": 6, "head_dim": 128}),
    "llama2-7b": ("llama", {"hidden_size": 1024, "num_key_value_heads": 8, "head_dim": 128}),
    "smollm2-135m": (
        "llama",
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    ),
}
CASES = [*((name, depth) for name in MODELS for depth in DEPTHS), *((name, 2) for name in GROUPS)]
# The error of transformers in the same type, times these: of all tokens together, and of the worst one. The
# second lets one token have bad luck; a wrong slot, position, angle or bias is off by tens of times that.
MOST_ON_THE_WHOLE = 1.05
MOST_OF_A_TOKEN = 1.5
# Of the norm of a token's states, in float32: a few hundred roundings of 2^-24, in other orders.
FLOAT32 = 1e-5
LOGITS_FLOAT32 = 1e-4


def cuda_model(folder: Path, dtype: torch.dtype) -> PagedModel:
    from photon_grpc.ops.cuda_ops import CudaOps

    return PagedModel(
        folder,
        dtype=dtype,
        num_blocks=512,
        ops=CudaOps(max_decodes=max(BATCHES)),
        device=torch.device("cuda"),
    )


@dataclass(frozen=True)
class States:
    """Of all tokens of some sequences, end to end: [tokens, hidden] and [tokens, vocab]."""

    hidden: Tensor
    logits: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> States:
        return cls(*(torch.cat(parts).double() for parts in zip(*pairs, strict=True)))


class Checkpoint:
    """One tiny model and all that compute it, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.theirs = functools.cache(self._theirs)
        self.ours = functools.cache(lambda dtype: cuda_model(folder, dtype))
        self.on_cpu = functools.cache(lambda dtype: PagedModel(folder, dtype=dtype, num_blocks=512))
        self.expected = functools.cache(self._expected)

    def _theirs(self, dtype: torch.dtype) -> TransformersModel:
        return TransformersModel(self.folder, dtype=dtype, device=torch.device("cuda"))

    def _expected(self, batch: int, dtype: torch.dtype) -> States:
        return States.of(self.theirs(dtype).states(sequences(batch)))


def sequences(batch: int) -> tuple[tuple[int, ...], ...]:
    """Of many lengths, block borders among them; the last `DECODES` tokens of each come by decode steps."""
    lengths = [1 + DECODES + (7 * row + 14) % 41 for row in range(batch)]
    return tuple(
        tuple(random_prompt(length, seed=100 * batch + row, vocab_size=VOCAB_SIZE))
        for row, length in enumerate(lengths)
    )


def computed(model: PagedModel, batch: int) -> States:
    """The prompts in one step, then decode steps of a row for each sequence, in another order every time."""
    tokens = sequences(batch)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tokens]
    for step in range(DECODES + 1):
        order = [(row * 5 + step) % batch if batch % 5 else row for row in range(batch)]
        rows = []
        for row in order:
            prompt_len = len(tokens[row]) - DECODES
            new = tokens[row][:prompt_len] if not step else tokens[row][prompt_len + step - 1 :][:1]
            rows.append((str(row), new))
        for row, states in zip(order, model.states(rows), strict=True):
            parts[row].append(states)
    for row in range(batch):
        model.release(str(row))
    return States.of([(torch.cat([h for h, _ in own]), torch.cat([z for _, z in own])) for own in parts])


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Of the norm: of all tokens together, and the largest of one token."""
    off = (actual - exact).norm(dim=-1)
    return float(off.norm() / exact.norm()), float((off / exact.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """By name, type of the weights and depth, each made once; a shallow one is the begin of a deep one."""

    @functools.cache
    def make(name: str, stored: torch.dtype, depth: int) -> Checkpoint:
        family, sizes = (MODELS | GROUPS)[name]
        sizes = {**SIZES, **sizes, "num_hidden_layers": depth, "dtype": str(stored).removeprefix("torch.")}
        return Checkpoint(tiny_model_folder(tmp_path_factory.mktemp(name), family, **sizes))

    assert not torch.backends.cuda.matmul.allow_tf32, "torch's own default"
    return make


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "depth"), CASES)
def test_errors_in_16_bits_are_no_larger_than_those_of_transformers(
    checkpoints: Any, name: str, dtype: torch.dtype, depth: int, batch: int
) -> None:
    checkpoint: Checkpoint = checkpoints(name, dtype, depth)
    exact, theirs = checkpoint.expected(batch, torch.float32), checkpoint.expected(batch, dtype)
    ours = computed(checkpoint.ours(dtype), batch)
    for what in ("hidden", "logits"):
        actual, other, truth = (getattr(states, what) for states in (ours, theirs, exact))
        assert bool(actual.isfinite().all())
        (whole, worst), (their_whole, their_worst) = errors(actual, truth), errors(other, truth)
        assert whole <= MOST_ON_THE_WHOLE * their_whole, (what, whole, their_whole)
        assert worst <= MOST_OF_A_TOKEN * their_worst, (what, worst, their_worst)
    # Where the truth's best two are further apart than both can be off, the greedy token is the truth's.
    off = float((theirs.logits - exact.logits).abs().max())
    best = exact.logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * off
    assert bool(clear.any())
    assert torch.equal(ours.logits[clear].argmax(-1), exact.logits[clear].argmax(-1))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", MODELS)
def test_the_cpu_backend_and_transformers_agree_in_float32(
    checkpoints: Any, name: str, depth: int, batch: int
) -> None:
    checkpoint: Checkpoint = checkpoints(name, torch.float32, depth)
    ours = computed(checkpoint.ours(torch.float32), batch)
    for other in (
        computed(checkpoint.on_cpu(torch.float32), batch),
        checkpoint.expected(batch, torch.float32),
    ):
        _, worst = errors(ours.hidden, other.hidden)
        assert worst <= FLOAT32
        torch.testing.assert_close(ours.logits, other.logits, rtol=0, atol=LOGITS_FLOAT32)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_cpu_backend_is_as_near_in_16_bits_as_both_may_be_off(
    checkpoints: Any, name: str, dtype: torch.dtype, depth: int, batch: int
) -> None:
    """Two programs that are each off as transformers may differ by the sum of both."""
    checkpoint: Checkpoint = checkpoints(name, dtype, depth)
    ours, on_cpu = (computed(make(dtype), batch) for make in (checkpoint.ours, checkpoint.on_cpu))
    allowed = errors(
        checkpoint.expected(batch, dtype).hidden, checkpoint.expected(batch, torch.float32).hidden
    )
    for found, most in zip(errors(ours.hidden, on_cpu.hidden), allowed, strict=True):
        assert found <= 2 * MOST_OF_A_TOKEN * most


@pytest.mark.parametrize("length", [1, 15, 16, 17, 200])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits_in_float32(checkpoints: Any, name: str, length: int) -> None:
    checkpoint: Checkpoint = checkpoints(name, torch.float32, 2)
    prompt = random_prompt(length, seed=length, vocab_size=VOCAB_SIZE)
    tokens, logits = checkpoint.ours(torch.float32).greedy(prompt)
    reference = checkpoint.theirs(torch.float32)
    assert tokens == reference.greedy(prompt)
    expected = reference.logits([*prompt, *tokens])[length - 1 : -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOGITS_FLOAT32)
