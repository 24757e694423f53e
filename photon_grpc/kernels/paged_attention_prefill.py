"""Causal attention of new tokens over the paged cache.

See cuda_kernels/paged_attention_prefill.cu, and paged_attention_prefill_wgmma.cu for what sm_90a has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_index, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer, TensorMap
from photon_grpc.kernels.tensor_map import ROW_ELEMENTS, tensor_map

_QUERY_TILE = 128
_KEY_TILE = 64
_THREADS = 2 * _QUERY_TILE
_DEPTH = 16
_MAX_HEAD_DIM = 128

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_HEAD_DIM",
    "PHOTON_KV_HEADS",
    "PHOTON_GROUP",
    "PHOTON_BLOCK_SIZE",
    "PHOTON_QUERY_TILE",
    "PHOTON_KEY_TILE",
    "PHOTON_SHARED_BYTES",
)


def _shared_bytes(head_dim: int) -> int:
    """Two stages of a tile of keys and one of values, each row padded by 16 bytes."""
    return 4 * _KEY_TILE * (2 * head_dim + 16)


def _macros(
    storage: str, num_kv_heads: int, group: int, head_dim: int, block_size: int
) -> dict[str, int | str]:
    values = (
        storage,
        head_dim,
        num_kv_heads,
        group,
        block_size,
        _QUERY_TILE,
        _KEY_TILE,
        _shared_bytes(head_dim),
    )
    return dict(zip(_MACROS, values, strict=True))


PAGED_ATTENTION_PREFILL = KernelSpec(
    name="paged_attention_prefill",
    source="paged_attention_prefill",
    parameters=(*(Pointer,) * 6, np.int32, np.int32, np.int64, np.float32),
    max_threads=_THREADS,
    macros=_MACROS,
    # Llama 3.2 1B and 3B, Llama 3 8B, Qwen2.5 0.5B and 7B, Llama 2 7B, and the other groups and dims.
    checked=tuple(
        _macros(storage, *shape)
        for storage in ("bf16", "f16")
        for shape in (
            (8, 4, 64, 16),
            (8, 4, 64, 32),
            (8, 3, 128, 16),
            (8, 4, 128, 32),
            (2, 7, 64, 16),
            (4, 7, 128, 16),
            (32, 1, 128, 16),
            (1, 8, 128, 32),
            (4, 2, 80, 16),
            (1, 1, 16, 16),
            (2, 6, 96, 16),
        )
    ),
    # Queries, scores and accumulators of 16 rows per warp.
    max_registers=255,
)


@dataclass(frozen=True, slots=True)
class WgmmaTiling:
    """How the kernel of sm_90a is cut for a head_dim; what the names mean stands in its source."""

    warpgroups: int
    key_tile: int
    stages: int
    ctas: int
    """Of a multiprocessor."""
    registers: int
    """Of a thread that computes: as many as the CTAs leave it."""
    lookahead: bool
    in_turn: bool

    @property
    def threads(self) -> int:
        return _WARPGROUP * (self.warpgroups + 1)

    def tile_tokens(self, group: int) -> int:
        """Tokens of a CTA, which has all heads of a kv head."""
        return _WARPGROUP_ROWS * self.warpgroups // group

    def shared_bytes(self, head_dim: int) -> int:
        """Queries of two tiles, stages of keys and values, and what the barriers need."""
        rows = _QUERY_STAGES * _WARPGROUP_ROWS * self.warpgroups + 2 * self.stages * self.key_tile
        return 2 * head_dim * rows + _BARRIER_BYTES


_WARPGROUP, _WARPGROUP_ROWS = 128, 64
_QUERY_STAGES = 2
_BARRIER_BYTES = 256
_WGMMA_ARCH = "sm_90a"
_MAX_WGMMA_GROUP = 64
WGMMA_TILINGS = {
    64: WgmmaTiling(3, 128, 2, 1, 160, lookahead=True, in_turn=True),
    128: WgmmaTiling(2, 128, 2, 1, 240, lookahead=True, in_turn=True),
}
"""By head_dim; other heads take the kernel of every architecture."""

_WGMMA_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_HEAD_DIM",
    "PHOTON_KV_HEADS",
    "PHOTON_GROUP",
    "PHOTON_BLOCK_SIZE",
    "PHOTON_BOX_KEYS",
    "PHOTON_WARPGROUPS",
    "PHOTON_KEY_TILE",
    "PHOTON_STAGES",
    "PHOTON_CTAS",
    "PHOTON_REGISTERS",
    "PHOTON_LOOKAHEAD",
    "PHOTON_IN_TURN",
    "PHOTON_SHARED_BYTES",
)


def _wgmma_macros(
    storage: str, num_kv_heads: int, group: int, head_dim: int, block_size: int
) -> dict[str, int | str]:
    tiling = WGMMA_TILINGS[head_dim]
    values = (
        storage,
        head_dim,
        num_kv_heads,
        group,
        block_size,
        math.gcd(block_size, tiling.key_tile),
        tiling.warpgroups,
        tiling.key_tile,
        tiling.stages,
        tiling.ctas,
        tiling.registers,
        int(tiling.lookahead),
        int(tiling.in_turn),
        tiling.shared_bytes(head_dim),
    )
    return dict(zip(_WGMMA_MACROS, values, strict=True))


PAGED_ATTENTION_PREFILL_WGMMA = KernelSpec(
    name="paged_attention_prefill_wgmma",
    source="paged_attention_prefill_wgmma",
    parameters=(*(Pointer,) * 4, *(np.int32,) * 3, np.float32, TensorMap, TensorMap),
    max_threads=_WARPGROUP * 4,
    macros=_WGMMA_MACROS,
    checked=tuple(
        _wgmma_macros(storage, *shape)
        for storage in ("bf16", "f16")
        for shape in (
            (8, 4, 64, 16),
            (8, 4, 64, 32),
            (8, 3, 128, 16),
            (8, 4, 128, 32),
            (2, 7, 64, 16),
            (4, 7, 128, 16),
            (32, 1, 128, 16),
            (1, 8, 128, 32),
            (1, 16, 64, 64),
        )
    ),
    # At launch; warpgroups then change what they have.
    max_registers=168,
    # Of no use, and never launched, where there is less shared memory than on sm_90a.
    chosen_by_room=True,
)
SPECS = (PAGED_ATTENTION_PREFILL, PAGED_ATTENTION_PREFILL_WGMMA)


def paged_attention_prefill(
    out: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> None:
    """out [tokens, num_heads, head_dim] = causal attention of each row's new tokens over its context.

    `q` [tokens, num_heads, head_dim], whose tokens may lie apart; `kv_cache`
    [num_blocks, num_kv_heads, 2, block_size, head_dim]; `block_tables` int32 [rows, max_blocks];
    `context_lens` int32 [rows], new tokens counted in; `query_starts` int32 [rows + 1]: row r has tokens
    query_starts[r] to query_starts[r + 1] - 1, the last of its context. A row may have none, and tokens of
    no row keep their output. Lengths may change between replays of a captured launch. Raises ValueError
    for shapes that the kernel has not: bfloat16 and float16, head_dim a multiple of 16 up to 128.
    """
    tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _, block_size, _ = kv_cache.shape
    rows = context_lens.shape[0]
    group, rest = divmod(num_heads, num_kv_heads)
    if rest or group == 0:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} kv heads evenly")
    storage = storage_name(q.dtype)
    if storage not in ("bf16", "f16"):
        raise ValueError(f"attention on the tensor cores takes bfloat16 and float16, not {q.dtype}")
    if head_dim % _DEPTH or not 0 < head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, not a multiple of {_DEPTH} up to {_MAX_HEAD_DIM}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}")
    stride = require_rows("q", q, q.dtype, tokens, num_heads, head_dim)
    require("out", out, q.dtype, tokens, num_heads, head_dim)
    require("kv_cache", kv_cache, q.dtype, num_blocks, num_kv_heads, 2, block_size, head_dim)
    require_index("block_tables", block_tables, torch.int32, rows, block_tables.shape[-1])
    require_index("context_lens", context_lens, torch.int32, rows)
    require_index("query_starts", query_starts, torch.int32, rows + 1)
    scale_log2 = np.float32(scale * math.log2(math.e))
    if not tokens:
        return
    by_wgmma = head_dim in WGMMA_TILINGS and group <= _MAX_WGMMA_GROUP
    if by_wgmma and (device := launcher.require_cuda()).arch == _WGMMA_ARCH:
        tiling = WGMMA_TILINGS[head_dim]
        macros = _wgmma_macros(storage, num_kv_heads, group, head_dim, block_size)
        kernel = launcher.load(PAGED_ATTENTION_PREFILL_WGMMA.variant(**macros), tiling.shared_bytes(head_dim))
        tile_tokens = tiling.tile_tokens(group)
        num_items = (tokens // tile_tokens + min(rows, tokens)) * num_kv_heads
        kernel(
            (min(num_items, tiling.ctas * device.num_multiprocessors), 1, 1),
            tiling.threads,
            out.data_ptr(),
            block_tables.data_ptr(),
            context_lens.data_ptr(),
            query_starts.data_ptr(),
            np.int32(rows),
            np.int32(block_tables.shape[1]),
            np.int32(num_items),
            scale_log2,
            tensor_map(
                q,
                (head_dim, num_heads, tokens),
                (head_dim, stride),
                (ROW_ELEMENTS, group, tile_tokens),
            ),
            tensor_map(
                kv_cache,
                (head_dim, kv_cache.numel() // head_dim),
                (head_dim,),
                (ROW_ELEMENTS, math.gcd(block_size, tiling.key_tile)),
            ),
        )
        return
    kernel = launcher.load(
        PAGED_ATTENTION_PREFILL.variant(**_macros(storage, num_kv_heads, group, head_dim, block_size)),
        _shared_bytes(head_dim),
    )
    # Each row rounds up by less than a tile, and a row without tokens has none.
    tiles = tokens * group // _QUERY_TILE + min(rows, tokens)
    kernel(
        (tiles * num_kv_heads, 1, 1),
        _THREADS,
        out.data_ptr(),
        q.data_ptr(),
        kv_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        query_starts.data_ptr(),
        np.int32(rows),
        np.int32(block_tables.shape[1]),
        np.int64(stride),
        scale_log2,
    )
