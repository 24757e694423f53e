"""Products of up to 128 tokens with a weight, fused with what stands behind them.

See cuda_kernels/skinny_gemm.cu. A token's result depends on the weight's shape alone, not on how many tokens
there are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer
from photon_grpc.kernels.linear_output import OUTPUTS, POINTERS, SIZES, SOURCES, LinearOutput

TOKEN_TILES = (16, 32, 48, 64, 96, 128)
"""Tokens that a variant has room for; see `token_tile`."""
MAX_TOKENS = TOKEN_TILES[-1]

_THREADS = 128
_DEPTH = 64
_ROW_BYTES = 2 * _DEPTH
# CTAs of a cluster share a multiprocessor by twos, which hides that they wait for one another. Without a
# cluster one CTA has it for itself: those of the next kernel would gather where this one leaves room.
_CLUSTER_SHARED_BYTES = 98 << 10
_SINGLE_SHARED_BYTES = 160 << 10
_MIN_STAGES, _MAX_STAGES = 3, 8

_ROW_TILES = (128, 64)
_CLUSTERS = (1, 2, 4, 8)
# What keeps the memory of the largest GPUs busy: nine in ten of 132 multiprocessors.
_WANTED_CTAS = 120
_RESIDENT_CTAS = 132
_FILL_MARGIN = 0.05
# Rows of 128 take half of the x per weight, and a cluster of twice the size for as many CTAs: worth it from
# here on.
_WIDE_DEPTH = 1024
_MIN_DEPTH = 128

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_INDEX",
    "PHOTON_OUTPUT",
    "PHOTON_TOKENS",
    "PHOTON_ROWS",
    "PHOTON_CLUSTER",
    "PHOTON_STAGES",
    "PHOTON_SHARED_BYTES",
    "PHOTON_WARPGROUP",
)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a weight is cut: rows of a CTA's tile, and the CTAs that share a tile by k."""

    rows: int
    cluster: int


def tiling(n: int, k: int) -> Tiling:
    """Of a weight [n, k]: the least cluster that gives every multiprocessor something to read.

    Tiles of 128 rows where that leaves each CTA a k of 1,024, or where there are so many that no cluster is
    needed and their last round is as full as that of tiles of 64; else those.
    """
    wide, narrow = (Tiling(rows, _cluster(-(-n // rows), k)) for rows in _ROW_TILES)
    if -(-n // wide.rows) * wide.cluster < _WANTED_CTAS:
        return narrow
    if wide.cluster == 1:
        return wide if _fill(n, wide.rows) > _fill(n, narrow.rows) - _FILL_MARGIN else narrow
    return wide if k // wide.cluster >= _WIDE_DEPTH else narrow


def token_tile(tokens: int) -> int:
    """The least of TOKEN_TILES that holds them. Raises ValueError for more than MAX_TOKENS."""
    for size in TOKEN_TILES:
        if tokens <= size:
            return size
    raise ValueError(f"{tokens} tokens: there is room for {MAX_TOKENS}")


def num_stages(rows: int, tokens: int, cluster: int) -> int:
    """Stages of shared memory: with a cluster as many as leave room for a second CTA."""
    most = _SINGLE_SHARED_BYTES if cluster == 1 else _CLUSTER_SHARED_BYTES
    return max(_MIN_STAGES, min(_MAX_STAGES, most // _stage_bytes(rows, tokens)))


def _cluster(tiles: int, k: int) -> int:
    """The least of _CLUSTERS with _WANTED_CTAS, or the most that k allows."""
    allowed = [size for size in _CLUSTERS if size == 1 or k // size >= _MIN_DEPTH]
    return next((size for size in allowed if tiles * size >= _WANTED_CTAS), allowed[-1])


def _fill(n: int, rows: int) -> float:
    """Share of the places for CTAs that have work, over all rounds; 1 where there is one round."""
    tiles = -(-n // rows)
    rounds = -(-tiles // _RESIDENT_CTAS)
    return 1.0 if rounds == 1 else tiles / (rounds * _RESIDENT_CTAS)


def _stage_bytes(rows: int, tokens: int) -> int:
    return (rows + tokens) * _ROW_BYTES


def _macros(
    storage: str, kind: str, tile: Tiling, tokens: int, index: str = "i64", *, warpgroup: bool = False
) -> dict[str, int | str]:
    stages = num_stages(tile.rows, tokens, tile.cluster)
    shared_bytes = stages * _stage_bytes(tile.rows, tokens)
    values = (storage, index, kind, tokens, tile.rows, tile.cluster, stages, shared_bytes, int(warpgroup))
    return dict(zip(_MACROS, values, strict=True))


SKINNY_GEMM = KernelSpec(
    name="skinny_gemm",
    source="skinny_gemm",
    parameters=(
        *POINTERS,
        *(Pointer,) * 2,
        *SOURCES,
        np.int32,
        *SIZES,
        np.int32,
        *(np.int64,) * 2,
    ),
    max_threads=_THREADS,
    macros=_MACROS,
    # Every tile of tokens, every cut of a weight and every output, in the combinations of Llama 3.2 1B and
    # 3.1 8B first.
    checked=(
        *(_macros("bf16", "rope_and_store", Tiling(64, 4), tokens) for tokens in (16, 64, 128)),
        _macros("bf16", "rope_and_store", Tiling(128, 4), 64, "int"),
        *(_macros("bf16", "add_rows", Tiling(64, 4), tokens) for tokens in (32, 128)),
        *(_macros("bf16", "add_rows", Tiling(128, 8), tokens) for tokens in (16, 48, 64, 128)),
        *(_macros("bf16", "silu_and_mul", Tiling(128, 1), tokens) for tokens in TOKEN_TILES),
        *(_macros("bf16", "silu_and_mul", Tiling(64, 1), tokens) for tokens in (16, 64)),
        *(_macros("bf16", "float_rows", Tiling(128, 1), tokens) for tokens in (16, 128)),
        _macros("bf16", "store_rows", Tiling(128, 2), 128),
        *(_macros("f16", kind, Tiling(64, 2), 96) for kind in OUTPUTS),
        _macros("f16", "store_rows", Tiling(64, 8), 16),
        *(_macros("bf16", "silu_and_mul", Tiling(128, 1), tokens, warpgroup=True) for tokens in TOKEN_TILES),
        _macros("bf16", "float_rows", Tiling(128, 1), 128, warpgroup=True),
        _macros("bf16", "add_rows", Tiling(128, 8), 128, warpgroup=True),
        _macros("bf16", "rope_and_store", Tiling(64, 4), 64, warpgroup=True),
        _macros("f16", "store_rows", Tiling(64, 2), 32, warpgroup=True),
    ),
    # 128 rows and 128 tokens are 128 sums to a thread; two CTAs of 128 threads leave it 255 registers.
    max_registers=255,
    overlaps=True,
)
SPECS = (SKINNY_GEMM,)


def skinny_gemm(output: LinearOutput, x: Tensor, weight: Tensor, *, warpgroup: bool = False) -> None:
    """y [tokens, n] = x weight^T, and on as `output` says.

    `x` [tokens, k] of the weight's type, whose rows may lie apart; `weight` [n, k] bfloat16 or float16, k a
    multiple of 8. Up to MAX_TOKENS tokens, none launches nothing. With `warpgroup` the products are those of
    wgmma where there is one (compute capability 9.0), which adds in another order. Raises ValueError for
    anything else.
    """
    k = output.require_weight(weight)
    tokens, n = output.tokens, output.n
    if not k:
        raise ValueError("the weight has rows of no elements")
    x_stride = require_rows("x", x, weight.dtype, tokens, k)
    padded = token_tile(tokens)
    if not tokens or not n:
        return
    device = launcher.require_cuda()
    tile = tiling(n, k)
    if device.compute_capability < (9, 0):
        # There are no clusters.
        tile = Tiling(tile.rows, 1)
    macros = _macros(
        storage_name(weight.dtype),
        output.kind,
        tile,
        padded,
        output.index,
        warpgroup=warpgroup and device.arch == "sm_90a",
    )
    shared_bytes = macros["PHOTON_SHARED_BYTES"]
    assert isinstance(shared_bytes, int)
    kernel = launcher.load(SKINNY_GEMM.variant(**macros), shared_bytes)
    num_tiles = -(-n // tile.rows)
    resident = device.num_multiprocessors
    kernel(
        (tile.cluster, min(num_tiles, resident) if tile.cluster == 1 else num_tiles, 1),
        _THREADS,
        *output.targets,
        x.data_ptr(),
        weight.data_ptr(),
        *output.sources,
        np.int32(tokens),
        *output.sizes,
        np.int32(k),
        np.int64(x_stride),
        np.int64(output.row_stride),
    )
