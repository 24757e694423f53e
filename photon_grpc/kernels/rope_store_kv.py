"""Rotary embedding, q/k norm and the write of keys and values into the paged cache, on the GPU.

See cuda_kernels/rope_store_kv.cu.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import index_name, require, require_index, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer

_THREADS = 128
# Elements of a head that one thread holds.
_SPAN = 16
_MAX_LANES = 32

_STORAGE = ("bf16", "f16", "f32")

ROPE_STORE_KV = KernelSpec(
    name="rope_store_kv",
    source="rope_store_kv",
    parameters=(*(Pointer,) * 8, *(np.int32,) * 5, *(np.int64,) * 2, np.float32),
    max_threads=_THREADS,
    macros=("PHOTON_STORAGE", "PHOTON_INDEX"),
    checked=tuple(
        {"PHOTON_STORAGE": storage, "PHOTON_INDEX": index} for storage in _STORAGE for index in ("int", "i64")
    ),
    # float32 has twice the words.
    max_registers=80,
    overlaps=True,
)
STORE_KV = KernelSpec(
    name="store_kv",
    source="rope_store_kv",
    parameters=(*(Pointer,) * 3, *(np.int32,) * 4, np.int64),
    max_threads=_THREADS,
    macros=("PHOTON_STORAGE", "PHOTON_INDEX"),
    checked=tuple({"PHOTON_STORAGE": storage, "PHOTON_INDEX": "i64"} for storage in _STORAGE),
    overlaps=True,
)
SPECS = (ROPE_STORE_KV, STORE_KV)


def rope_store_kv(
    q_out: Tensor,
    kv_cache: Tensor,
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Normalise (where there are `norms`) and rotate q and k, write k and v into their slots.

    `qkv` is [tokens, num_heads + 2 * num_kv_heads, head_dim]: q, k and v heads of a token side by side.
    `q_out` [tokens, num_heads, head_dim] may be the part of `qkv` that it comes from; rows of both may lie
    apart. `kv_cache` is [num_blocks, num_kv_heads, 2, block_size, head_dim]; `norms`
    are the weights [head_dim] of q and k; `table` is float32 [num_positions, head_dim], cosines then sines
    of each pair; `positions` int32 or int64 [tokens]; `slot_mapping` int64 [tokens], -1 for a token that
    is stored nowhere.
    """
    tokens, num_heads, head_dim = q_out.shape
    num_blocks, num_kv_heads, _, block_size, _ = kv_cache.shape
    dtype = qkv.dtype
    qkv_stride = require_rows("qkv", qkv, dtype, tokens, num_heads + 2 * num_kv_heads, head_dim)
    q_stride = require_rows("q_out", q_out, dtype, tokens, num_heads, head_dim)
    require("kv_cache", kv_cache, dtype, num_blocks, num_kv_heads, 2, block_size, head_dim)
    require_index("slot_mapping", slot_mapping, torch.int64, tokens)
    _launch_rope(
        (q_out, kv_cache, qkv),
        (num_heads, num_kv_heads, head_dim, block_size),
        (qkv_stride, q_stride),
        norms,
        eps,
        table,
        positions,
        slot_mapping,
    )


def rope(x: Tensor, table: Tensor, positions: Tensor) -> None:
    """Rotate the heads of `x` [tokens, heads, head_dim] in place; rows may lie apart."""
    qk_norm_rope(x, None, 0.0, table, positions)


def qk_norm_rope(x: Tensor, weight: Tensor | None, eps: float, table: Tensor, positions: Tensor) -> None:
    """Normalise the heads of `x` with `weight` [head_dim] where given, then rotate them, in place."""
    tokens, num_heads, head_dim = x.shape
    stride = require_rows("x", x, x.dtype, tokens, num_heads, head_dim)
    norms = None if weight is None else (weight, weight)
    _launch_rope(
        (x, None, x),
        (num_heads, 0, head_dim, 1),
        (stride, stride),
        norms,
        eps,
        table,
        positions,
        None,
    )


def store_kv(kv_cache: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
    """Write `kv` [tokens, 2, num_kv_heads, head_dim] into its slots; -1 is stored nowhere."""
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    tokens = kv.shape[0]
    lanes = _lanes(head_dim)
    stride = require_rows("kv", kv, kv.dtype, tokens, 2, num_kv_heads, head_dim)
    require("kv_cache", kv_cache, kv.dtype, num_blocks, num_kv_heads, 2, block_size, head_dim)
    require_index("slot_mapping", slot_mapping, torch.int64, tokens)
    kernel = launcher.load(STORE_KV.variant(PHOTON_STORAGE=storage_name(kv.dtype), PHOTON_INDEX="i64"))
    kernel(
        _grid(tokens, 2 * num_kv_heads, lanes),
        _THREADS,
        kv_cache.data_ptr(),
        kv.data_ptr(),
        slot_mapping.data_ptr(),
        np.int32(num_kv_heads),
        np.int32(head_dim),
        np.int32(block_size),
        np.int32(lanes),
        np.int64(stride),
    )


def _launch_rope(
    tensors: tuple[Tensor, Tensor | None, Tensor],
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor | None,
) -> None:
    num_heads, num_kv_heads, head_dim, _ = sizes
    qkv = tensors[-1]
    tokens = qkv.shape[0]
    lanes = _lanes(head_dim)
    for weight in norms or ():
        require("norm weight", weight, qkv.dtype, head_dim)
    require("table", table, torch.float32, table.shape[0], head_dim)
    require_index("positions", positions, positions.dtype, tokens)
    q_weight, k_weight = norms or (None, None)
    kernel = launcher.load(
        ROPE_STORE_KV.variant(
            PHOTON_STORAGE=storage_name(qkv.dtype), PHOTON_INDEX=index_name(positions.dtype)
        )
    )
    kernel(
        _grid(tokens, num_heads + 2 * num_kv_heads, lanes),
        _THREADS,
        *(_address(tensor) for tensor in (*tensors, q_weight, k_weight, table, positions, slot_mapping)),
        *(np.int32(size) for size in (*sizes, lanes)),
        *(np.int64(stride) for stride in strides),
        np.float32(eps),
    )


def _lanes(head_dim: int) -> int:
    """Threads that share a head: a power of two, so that they can sum by butterflies."""
    if head_dim % _SPAN or not 0 < head_dim <= _SPAN * _MAX_LANES:
        raise ValueError(f"head_dim is {head_dim}, not a multiple of {_SPAN} up to {_SPAN * _MAX_LANES}")
    return 1 << (head_dim // _SPAN - 1).bit_length()


def _grid(tokens: int, num_heads: int, lanes: int) -> tuple[int, int, int]:
    return tokens, -(-num_heads * lanes // _THREADS), 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
