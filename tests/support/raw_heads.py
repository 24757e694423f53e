"""Decode steps whose q, k and v are as their product leaves them, for one launch or the launches apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon_grpc.kernels.paged_attention_decode import (
    DecodeWorkspace,
    max_splits,
    paged_attention_decode,
    rope_store_attend,
)
from photon_grpc.kernels.rope_store_kv import rope_store_kv
from tests.support.kernels import Fenced, randn
from tests.support.paged_attention import Rows, Shape, assert_close, attend
from tests.support.rotary import EPS, angle_table, rotated


@dataclass
class RawStep:
    """A decode step over some rows: what is given to the launches, fenced, and where they write."""

    rows: Rows
    normed: bool = True
    seed: int = 3

    def __post_init__(self) -> None:
        shape, lens = self.rows.shape, self.rows.lens
        self.memory = Fenced()
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self.host_qkv = randn(len(lens), heads, shape.head_dim, dtype=shape.dtype, seed=self.seed)
        self.qkv = self.memory.copy(self.host_qkv)
        weights = [1 + randn(shape.head_dim, dtype=shape.dtype, seed=seed) / 4 for seed in (5, 6)]
        self.host_norms = (weights[0], weights[1]) if self.normed else None
        self.norms = (self.memory.copy(weights[0]), self.memory.copy(weights[1])) if self.normed else None
        self.host_table = angle_table(shape.head_dim)
        self.table = self.memory.copy(self.host_table)
        # Not where the row ends: that they agree is the caller's business.
        self.host_positions = torch.tensor([length * 7 % 4999 for length in lens])
        self.positions = self.memory.copy(self.host_positions)
        self.slots = self.memory.copy(newest_slots(self.rows))
        self.context_lens = self.memory.copy(self.rows.context_lens)
        self.block_tables = self.memory.copy(self.rows.block_tables)
        self.cache = self.memory.copy(self.rows.kv_cache)
        self.workspace = workspace_in(self.memory, shape, len(lens))
        self.out = self.memory.empty(len(lens), shape.num_heads, shape.head_dim, dtype=shape.dtype)

    @property
    def attention(self) -> tuple[Tensor, Tensor, float]:
        return self.block_tables, self.context_lens, self.rows.shape.scale

    def apart(self) -> tuple[Tensor, Tensor]:
        """Result and cache of the two launches that one stands for."""
        q = torch.full_like(self.out, torch.nan)
        self.reset()
        rope_store_kv(q, self.cache, self.qkv, self.norms, EPS, self.table, self.positions, self.slots)
        paged_attention_decode(self.out, self.workspace, q, self.cache, *self.attention)
        return self.out.clone(), self.cache.clone()

    def together(self, *, reads_early: bool = False) -> tuple[Tensor, Tensor]:
        self.reset()
        self.launch(reads_early=reads_early)
        self.memory.check()
        assert not self.workspace.counters.any()
        return self.out.clone(), self.cache.clone()

    def launch(self, *, reads_early: bool) -> None:
        rope_store_attend(
            self.out,
            self.workspace,
            self.qkv,
            self.cache,
            self.norms,
            EPS,
            self.table,
            self.positions,
            self.slots,
            *self.attention,
            reads_early=reads_early,
        )

    def reset(self) -> None:
        """As before the step: the newest tokens' slots are NaN, and so is all that launches write first."""
        self.cache.copy_(self.rows.kv_cache)
        flat = self.cache.permute(0, 3, 1, 2, 4)
        stored = newest_slots(self.rows)
        stored = stored[stored >= 0].to(self.cache.device)
        flat[stored // flat.shape[1], stored % flat.shape[1]] = torch.nan
        for tensor in (self.out, self.workspace.acc, self.workspace.stats):
            tensor.fill_(torch.nan)

    def check(self, found: Tensor) -> None:
        """The result of a launch, row by row."""
        for row, length in enumerate(self.rows.lens):
            if length:
                context, expected = self.expected(row)
                assert_close(found[row : row + 1], expected, context)
            else:
                assert not found[row].any(), "an idle row is zero"

    def expected(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's context with its newest token, and its result, from float64."""
        shape = self.rows.shape
        heads = self.host_qkv[row : row + 1]
        q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        q_weight, k_weight = self.host_norms or (None, None)
        position = self.host_positions[row : row + 1]
        context = self.rows.contexts[row].clone()
        context[-1, 0] = rotated(k, k_weight, self.host_table, position)[0]
        context[-1, 1] = v[0]
        turned = rotated(q, q_weight, self.host_table, position).to(shape.dtype)
        return context, attend(turned, context, shape.scale)


def newest_slots(rows: Rows) -> Tensor:
    slots = [-1] * len(rows.lens)
    for row, length in enumerate(rows.lens):
        if length:
            block, offset = divmod(length - 1, rows.shape.block_size)
            slots[row] = int(rows.block_tables[row, block]) * rows.shape.block_size + offset
    return torch.tensor(slots)


def workspace_in(memory: Fenced, shape: Shape, rows: int) -> DecodeWorkspace:
    size = (rows, shape.num_kv_heads)
    splits = max_splits(shape.num_kv_heads)
    return DecodeWorkspace(
        memory.empty(*size, splits, shape.group, shape.head_dim, dtype=torch.float32),
        memory.empty(*size, splits, shape.group, 2, dtype=torch.float32),
        memory.copy(torch.zeros(size, dtype=torch.int32)),
    )
