"""The first half of a gated MLP for many tokens, in one kernel; see cuda_kernels/swiglu_gemm.cu."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, TensorMap
from photon_grpc.kernels.tensor_map import ROW_ELEMENTS, tensor_map

_THREADS = 384
_TILE_TOKENS, TILE_INNER = 128, 128
_DEPTH_STEP = 8
_CLUSTER = 2
_WARPGROUP_TOKENS = 64
_STAGES, _STAGE_BYTES = 4, (_TILE_TOKENS + 2 * TILE_INNER) * 128
_OUTPUT_BYTES, _BARRIER_BYTES = _TILE_TOKENS * TILE_INNER * 2, 64
_SHARED_BYTES = _STAGES * _STAGE_BYTES + _OUTPUT_BYTES + _BARRIER_BYTES
_ARCH = "sm_90a"
# Of the places of its tiles, those that have work, from which on it is faster. With no more tokens than two
# CTAs take, where cuBLASLt leaves places empty too: of one round, and of more. With more tokens: the fewer,
# the shorter a row of the weight is beside what the activation costs cuBLASLt.
_TOKENS_OF_TWO = _CLUSTER * _TILE_TOKENS
_MIN_TOKENS, _MIN_FILL_OF_ONE_ROUND = 129, 0.45
_MIN_TOKENS_OF_ROUNDS, _MIN_TILES_OF_ROUNDS = 192, 0.74
_MIN_FILL_OF_MANY, _ACTIVATION_DEPTH = 0.88, 320

SWIGLU_GEMM = KernelSpec(
    name="swiglu_gemm",
    source="swiglu_gemm",
    parameters=(np.int32, np.int32, np.int32, TensorMap, TensorMap, TensorMap),
    max_threads=_THREADS,
    macros=("PHOTON_STORAGE", "PHOTON_SHARED_BYTES"),
    checked=tuple(
        {"PHOTON_STORAGE": storage, "PHOTON_SHARED_BYTES": _SHARED_BYTES} for storage in ("bf16", "f16")
    ),
    # At launch; warpgroups then change what they have.
    max_registers=168,
    # Of no use, and never launched, where there is less shared memory than on sm_90a.
    chosen_by_room=True,
    overlaps=True,
)
SPECS = (SWIGLU_GEMM,)


def can_multiply(inner: int) -> bool:
    """Whether there is a kernel for a weight [2 * inner, any k] on this GPU."""
    return inner % TILE_INNER == 0 and launcher.require_cuda().arch == _ARCH


def is_faster(tokens: int, inner: int, k: int) -> bool:
    """Whether this beats a product of cuBLASLt and the activation behind it, by the shape alone.

    By 3 to 13 % of an MLP on an H100, 512 to 8,192 tokens of Llama 3.2 1B and 3.1 8B; with 160 to 256 tokens
    by up to 15 % of fourteen models' MLPs, and where this says no it would lose up to 14 %. With fewer than
    129 `skinny_gemm_tma` does better.
    """
    if tokens < _MIN_TOKENS or not can_multiply(inner):
        return False
    tiles = _num_tiles(tokens, inner)
    clusters = launcher.require_cuda().num_multiprocessors // _CLUSTER
    rounds = -(-tiles // clusters)
    fill = tokens * inner / (rounds * clusters * _CLUSTER * _TILE_TOKENS * TILE_INNER)
    if tokens > _TOKENS_OF_TWO:
        return fill >= _MIN_FILL_OF_MANY - _ACTIVATION_DEPTH / k
    if rounds == 1:
        return fill >= _MIN_FILL_OF_ONE_ROUND
    return tokens >= _MIN_TOKENS_OF_ROUNDS and tiles >= _MIN_TILES_OF_ROUNDS * rounds * clusters


def _num_tiles(tokens: int, inner: int) -> int:
    """Of the two CTAs of a cluster together."""
    return -(-tokens // (_CLUSTER * _TILE_TOKENS)) * (inner // TILE_INNER)


def swiglu_gemm(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out [tokens, inner] = silu(x gate^T) * (x up^T).

    `x` [tokens, k], whose rows may lie apart; `weight` [2 * inner, k], gate first; all bfloat16 or all
    float16. A token's result depends on nothing but itself and the weight. No tokens launch nothing. Raises
    ValueError for what the kernel has not: inner a multiple of 128, k of 8.
    """
    tokens, inner = out.shape
    k = weight.shape[1]
    storage = storage_name(out.dtype)
    if storage not in ("bf16", "f16"):
        raise ValueError(f"the tensor cores take bfloat16 and float16, not {out.dtype}")
    if inner % TILE_INNER or not inner or k % _DEPTH_STEP or not k:
        raise ValueError(
            f"a weight of twice {inner} rows of {k}: no multiples of {TILE_INNER} and {_DEPTH_STEP}"
        )
    require("out", out, out.dtype, tokens, inner)
    require("weight", weight, out.dtype, 2 * inner, k)
    stride = require_rows("x", x, out.dtype, tokens, k)
    if not tokens:
        return
    device = launcher.require_cuda()
    kernel = launcher.load(
        SWIGLU_GEMM.variant(PHOTON_STORAGE=storage, PHOTON_SHARED_BYTES=_SHARED_BYTES), _SHARED_BYTES
    )
    clusters = min(device.num_multiprocessors // _CLUSTER, _num_tiles(tokens, inner))
    kernel(
        (_CLUSTER * clusters, 1, 1),
        _THREADS,
        np.int32(tokens),
        np.int32(inner),
        np.int32(k),
        tensor_map(out, (inner, tokens), (inner,), (ROW_ELEMENTS, _WARPGROUP_TOKENS)),
        tensor_map(x, (k, tokens), (stride,), (ROW_ELEMENTS, _TILE_TOKENS)),
        tensor_map(weight, (k, 2 * inner), (k,), (ROW_ELEMENTS, TILE_INNER)),
    )
