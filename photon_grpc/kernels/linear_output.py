"""Where the results of a product with few tokens go; see cuda_kernels/include/photon/linear_output.cuh.

Every kernel that includes that header takes the same description of its output, checks it in the same way
and passes the same arguments; this is the Python half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels.checks import index_name, require, require_index, require_rows
from photon_grpc.kernels.launcher import Argument, Pointer

OUTPUTS = ("store_rows", "add_rows", "float_rows", "silu_and_mul", "rope_and_store")
BEST_ROWS = "best_rows"
"""One more, of `gemv` and `skinny_gemm_tma` alone."""
PAIRS_PER_TILE = 8

POINTERS = (Pointer, Pointer)
"""Of `LinearOutput.targets`."""
SOURCES = (Pointer,) * 4
"""Of `LinearOutput.sources`."""
SIZES = (np.int32,) * 5
"""Of `LinearOutput.sizes`."""

_HEAD_DIM_STEP = 16


@dataclass(frozen=True, slots=True)
class LinearOutput:
    """One of OUTPUTS, or BEST_ROWS, with its tensors; `kind` names it. Made by one of the functions below.

    `n` is the number of rows of the weight, `tokens` that of the tokens, `row_stride` the elements between
    the rows of `out`.
    """

    kind: str
    out: Tensor
    n: int
    tokens: int
    row_stride: int
    bias: Tensor | None = None
    kv_cache: Tensor | None = None
    table: Tensor | None = None
    positions: Tensor | None = None
    slots: Tensor | None = None
    heads: tuple[int, int, int, int] = (0, 0, 0, 0)
    """num_heads, num_kv_heads, head_dim, block_size."""

    @property
    def index(self) -> str:
        """PHOTON_INDEX: the type of positions."""
        return "i64" if self.positions is None else index_name(self.positions.dtype)

    @property
    def num_tiles(self) -> int:
        """Tiles of sixteen rows of the weight."""
        return -(-self.n // (2 * PAIRS_PER_TILE))

    @property
    def targets(self) -> tuple[Argument, ...]:
        """The first arguments: what is written."""
        return self.out.data_ptr(), _address(self.kv_cache)

    @property
    def sources(self) -> tuple[Argument, ...]:
        """What is read besides x and the weight: bias, table, positions, slots."""
        return (
            _address(self.bias),
            _address(self.table),
            _address(self.positions),
            _address(self.slots),
        )

    @property
    def sizes(self) -> tuple[Argument, ...]:
        """n, num_heads, num_kv_heads, head_dim, block_size."""
        return np.int32(self.n), *(np.int32(size) for size in self.heads)

    def require_weight(self, weight: Tensor) -> int:
        """Check `weight` [n, k] and the bias; k. Raises ValueError."""
        k = weight.shape[-1]
        require("weight", weight, weight.dtype, self.n, k)
        if weight.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"the weight is bfloat16 or float16, not {weight.dtype}")
        if k % 8:
            raise ValueError(f"rows of the weight are multiples of 8, not {k}")
        if self.n * k >= 1 << 32:
            raise ValueError(f"the weight has {self.n} x {k} elements, 2^32 or more")
        if self.bias is not None:
            require("bias", self.bias, weight.dtype, self.n)
        if self.kind in ("store_rows", "silu_and_mul", "rope_and_store") and self.out.dtype != weight.dtype:
            raise ValueError(f"out must be {weight.dtype}, not {self.out.dtype}")
        if self.kv_cache is not None and self.kv_cache.dtype != weight.dtype:
            raise ValueError(f"kv_cache must be {weight.dtype}, not {self.kv_cache.dtype}")
        return k


def store_rows(out: Tensor, bias: Tensor | None = None) -> LinearOutput:
    """out [tokens, n] = y + bias; rows may lie apart."""
    tokens, n = out.shape
    return LinearOutput("store_rows", out, n, tokens, _row_stride("out", out), bias)


def add_rows(residual: Tensor, bias: Tensor | None = None) -> LinearOutput:
    """residual [tokens, n] float32 += y + bias."""
    tokens, n = residual.shape
    require("residual", residual, torch.float32, tokens, n)
    return LinearOutput("add_rows", residual, n, tokens, n, bias)


def float_rows(out: Tensor) -> LinearOutput:
    """out [tokens, n] float32 = y; rows may lie apart, by any number of elements."""
    tokens, n = out.shape
    if out.dtype is not torch.float32 or out.stride(1) != 1:
        raise ValueError(f"out must be float32 in contiguous rows, not {out.dtype} with {out.stride()}")
    return LinearOutput("float_rows", out, n, tokens, out.stride(0) if tokens > 1 else n)


def best_rows(ranks: Tensor, n: int) -> LinearOutput:
    """ranks [tokens, parts] int64 = the best of the n entries of y, by parts; for `best_token`.

    How many parts there are the kernel says: `num_parts` of its module.
    """
    tokens, parts = ranks.shape
    require("ranks", ranks, torch.int64, tokens, parts)
    return LinearOutput(BEST_ROWS, ranks, n, tokens, parts)


def silu_and_mul(out: Tensor, bias: Tensor | None = None) -> LinearOutput:
    """out [tokens, n / 2] = silu(gate) * up, gate the first half of the weight's rows."""
    tokens, inner = out.shape
    return LinearOutput("silu_and_mul", out, 2 * inner, tokens, _row_stride("out", out), bias)


def rope_and_store(
    q_out: Tensor,
    kv_cache: Tensor,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
) -> LinearOutput:
    """q heads rotated to `q_out` [tokens, num_heads, head_dim], k (rotated) and v heads into the cache.

    As `kernels.rope_store_kv.rope_store_kv`: `kv_cache` [num_blocks, num_kv_heads, 2, block_size, head_dim],
    `table` float32 [num_positions, head_dim], `positions` int32 or int64 [tokens], `slots` int64 [tokens].
    """
    tokens, num_heads, head_dim = q_out.shape
    num_blocks, num_kv_heads, _, block_size, _ = kv_cache.shape
    if head_dim % _HEAD_DIM_STEP:
        raise ValueError(f"head_dim is {head_dim}, not a multiple of {_HEAD_DIM_STEP}")
    stride = require_rows("q_out", q_out, q_out.dtype, tokens, num_heads, head_dim)
    require("kv_cache", kv_cache, kv_cache.dtype, num_blocks, num_kv_heads, 2, block_size, head_dim)
    require("table", table, torch.float32, table.shape[0], head_dim)
    require_index("positions", positions, positions.dtype, tokens)
    require_index("slots", slots, torch.int64, tokens)
    n = (num_heads + 2 * num_kv_heads) * head_dim
    heads = (num_heads, num_kv_heads, head_dim, block_size)
    return LinearOutput(
        "rope_and_store", q_out, n, tokens, stride, bias, kv_cache, table, positions, slots, heads
    )


def _row_stride(name: str, out: Tensor) -> int:
    return require_rows(name, out, out.dtype, *out.shape)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
