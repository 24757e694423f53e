"""Tokens to rotate, normalise and store, and the float64 results to judge them by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.kernels import assert_ulps, randn

EPS = 1e-6
# Where the two products of a pair cancel, their own rounding is what is left of the result.
CANCELLED = 4e-6
NUM_POSITIONS = 5000


def angle_table(head_dim: int) -> Tensor:
    """[NUM_POSITIONS, head_dim] float32: cosines of each pair, then sines, at the base 10,000."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(NUM_POSITIONS, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rotated(x: Tensor, weight: Tensor | None, table: Tensor, positions: Tensor) -> Tensor:
    """[tokens, heads, head_dim] in float64, as complex numbers; with a weight normalised before."""
    wide = x.double()
    if weight is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    half = x.shape[-1] // 2
    angles = table[positions.long()].double()[:, None]
    product = torch.complex(wide[..., :half], wide[..., half:]) * torch.complex(
        angles[..., :half], angles[..., half:]
    )
    return torch.cat((product.real, product.imag), dim=-1)


@dataclass
class Case:
    """Tokens of random positions in random slots, every third of them idle."""

    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.tokens + self.head_dim)
        self.num_blocks = -(-self.tokens // self.block_size) * 2 + 1
        self.qkv = randn(self.tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim, dtype=self.dtype)
        self.positions = torch.randint(NUM_POSITIONS, (self.tokens,), generator=generator)
        self.slots = torch.randperm(self.num_blocks * self.block_size, generator=generator)[: self.tokens]
        self.slots[2::3] = -1
        self.table = angle_table(self.head_dim)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        return (self.num_blocks, self.num_kv_heads, 2, self.block_size, self.head_dim)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        q, k, v = self.qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def check_cache(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values are in their slots, and every other slot is as it was, NaN."""
        by_slot = cache.cpu().permute(0, 3, 2, 1, 4).flatten(0, 1)  # [slots, 2, num_kv_heads, head_dim]
        stored = self.slots >= 0
        found = by_slot[self.slots[stored]]
        assert_ulps(found[:, 0], keys[stored], floor=CANCELLED)
        assert torch.equal(found[:, 1], values[stored])
        others = torch.ones(len(by_slot), dtype=torch.bool)
        others[self.slots[stored]] = False
        assert bool(by_slot[others].isnan().all())
