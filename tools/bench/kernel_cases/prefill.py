"""Timing cases of what a step of many tokens has beside plain products: attention, SwiGLU with its products.

Floors are those of the tensor cores, at the rate of large bfloat16 products on one H100 or H200. `eager` is
torch's attention over whole prompts, on keys that need no table; and torch's product with our activation
behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from photon_grpc.kernels.paged_attention_prefill import paged_attention_prefill
from photon_grpc.kernels.silu_and_mul import silu_and_mul
from photon_grpc.kernels.swiglu_gemm import swiglu_gemm
from tools.bench.kernel_cases import Case
from tools.bench.products import BF16

FLOP_PER_US = 750e6

NUM_KV_HEADS, GROUP, BLOCK_SIZE = 8, 4, 16
# (rows, new tokens of each, its context).
CONTEXTS = ((64, 128, 128), (4, 2048, 2048), (1, 8192, 8192), (1, 2048, 32768))
# By head_dim: what was expected of long contexts.
_ATTENTION_FLOP_PER_US = {64: 400e6, 128: 550e6}

MLPS = (("llama32-1b", 8192, 2048), ("llama31-8b", 14336, 4096))
TOKENS = (512, 2048)
# The activation stands behind each tile, and nothing multiplies meanwhile.
_ACTIVATION_SHARE = 1.08


def cases() -> Iterator[Case]:
    """Attention of both head sizes at every context, and every MLP at every number of tokens."""
    for head_dim in _ATTENTION_FLOP_PER_US:
        for rows, new, context in CONTEXTS:
            yield _attention(head_dim, rows, new, context)
    for model, inner, k in MLPS:
        for tokens in TOKENS:
            yield _swiglu(model, inner, k, tokens)


def _attention(head_dim: int, rows: int, new: int, context: int) -> Case:
    num_heads = NUM_KV_HEADS * GROUP
    blocks = rows * context // BLOCK_SIZE
    cache = torch.randn(blocks, NUM_KV_HEADS, 2, BLOCK_SIZE, head_dim, device="cuda", dtype=BF16)
    tables = torch.randperm(blocks, device="cuda").to(torch.int32).view(rows, -1).contiguous()
    q = torch.randn(rows * new, num_heads, head_dim, device="cuda", dtype=BF16)
    out = torch.empty_like(q)
    lens = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    starts = (torch.arange(rows + 1, device="cuda") * new).to(torch.int32)
    scale = head_dim**-0.5

    def launch(_: int) -> None:
        paged_attention_prefill(out, q, cache, tables, lens, starts, scale)

    heads = q.view(rows, new, num_heads, head_dim).transpose(1, 2)
    keys, values = torch.randn(2, rows, NUM_KV_HEADS, context, head_dim, device="cuda", dtype=BF16)

    def eager(_: int) -> None:
        _ = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale, enable_gqa=True)

    visible = new * context - new * (new - 1) // 2
    flop = 4 * head_dim * num_heads * rows * visible
    return Case(
        f"attention [{head_dim}] {rows} rows of {new} new tokens, context {context}",
        2 * (2 * q.numel() + cache.numel()),
        flop / FLOP_PER_US,
        flop / _ATTENTION_FLOP_PER_US[head_dim] if context > 128 else None,
        launch,
        eager if new == context else None,
    )


def _swiglu(model: str, inner: int, k: int, tokens: int) -> Case:
    copies = 3
    weight = torch.randn(copies, 2 * inner, k, device="cuda", dtype=BF16) * k**-0.5
    x = torch.randn(tokens, k, device="cuda", dtype=BF16)
    out = torch.empty(tokens, inner, device="cuda", dtype=BF16)

    def launch(i: int) -> None:
        swiglu_gemm(out, x, weight[i % copies])

    def eager(i: int) -> None:
        silu_and_mul(out, F.linear(x, weight[i % copies]))

    floor_us = 4 * inner * k * tokens / FLOP_PER_US
    num_bytes = 2 * (weight[0].numel() + x.numel() + out.numel())
    name = f"swiglu_gemm {model} [{2 * inner}, {k}] {tokens} tokens"
    return Case(name, num_bytes, floor_us, _ACTIVATION_SHARE * floor_us, launch, eager)
