"""Rows over a poisoned paged cache of the kernels' layout, and attention in float64 to judge them by.

Every slot that no row's context covers is NaN: free blocks, and the tail of a row's last block. Block
table entries behind a row's context name a block far outside of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Probabilities are rounded once to the storage type before the second product, and the result once more.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Largest error of an output, as a share of the largest |V| in the row's context."""

_NO_BLOCK = 1 << 30


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def __str__(self) -> str:
        kind = "bf16" if self.dtype is torch.bfloat16 else "f16"
        return f"{self.num_kv_heads}x{self.group}x{self.head_dim}-bs{self.block_size}-{kind}"


@dataclass(frozen=True)
class Rows:
    """Contexts in a paged cache, and the same keys and values laid end to end."""

    shape: Shape
    lens: tuple[int, ...]
    kv_cache: Tensor
    """[num_blocks, num_kv_heads, 2, block_size, head_dim]."""
    block_tables: Tensor
    """[rows, max_blocks] int32."""
    context_lens: Tensor
    """[rows] int32."""
    contexts: tuple[Tensor, ...]
    """Of each row, on the CPU: [context_len, 2, num_kv_heads, head_dim]."""

    def select(self, *rows: int) -> Rows:
        """Some of the rows, over the same cache."""
        index = torch.tensor(rows, device=self.block_tables.device)
        return Rows(
            self.shape,
            tuple(self.lens[row] for row in rows),
            self.kv_cache,
            self.block_tables[index],
            self.context_lens[index],
            tuple(self.contexts[row] for row in rows),
        )


def make_rows(
    shape: Shape, lens: tuple[int, ...], device: torch.device | str, *, seed: int = 0, first_block: int = 0
) -> Rows:
    """Rows of these lengths in shuffled blocks, none of them below `first_block`."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // shape.block_size) for length in lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=generator) + first_block
    cache = torch.empty(
        (first_block + num_blocks, shape.num_kv_heads, 2, shape.block_size, shape.head_dim),
        dtype=shape.dtype,
        device=device,
    ).fill_(torch.nan)
    tables = torch.full((len(lens), max(counts) + 1), _NO_BLOCK, dtype=torch.int32)
    contexts = []
    used = 0
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        blocks = order[used : used + count]
        used += count
        tables[row, :count] = blocks.to(torch.int32)
        size = (length, 2, shape.num_kv_heads, shape.head_dim)
        context = torch.randn(size, generator=generator).to(shape.dtype)
        padded = torch.full((count * shape.block_size, *size[1:]), torch.nan, dtype=shape.dtype)
        padded[:length] = context
        tiles = padded.view(count, shape.block_size, *size[1:]).permute(0, 3, 2, 1, 4)
        cache[blocks.to(device)] = tiles.to(device)
        contexts.append(context)
    context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return Rows(shape, lens, cache, tables.to(device), context_lens, tuple(contexts))


def attend(q: Tensor, context: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens of one context, in float64: [query_len, num_heads, head_dim]."""
    query_len, num_heads, head_dim = q.shape
    context_len, _, num_kv_heads, _ = context.shape
    grouped = q.double().view(query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys, values = context.double().unbind(1)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
    position = torch.arange(context_len - query_len, context_len)
    scores.masked_fill_(torch.arange(context_len) > position[:, None], -torch.inf)
    return torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), values).reshape(q.shape)


def assert_close(out: Tensor, expected: Tensor, context: Tensor) -> None:
    """`out` [query_len, num_heads, head_dim], in the storage type, against `attend`'s result."""
    assert out.isfinite().all()
    worst = (out.cpu().double() - expected).abs().max()
    allowed = TOLERANCE[out.dtype] * context[:, 1].double().abs().max()
    assert worst <= allowed, f"off by {worst:.3g}, allowed {allowed:.3g}"
