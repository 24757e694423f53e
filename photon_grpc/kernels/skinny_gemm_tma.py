"""Products of up to 128 tokens on compute capability 9.0, fused with what stands behind them.

See cuda_kernels/skinny_gemm_tma.cu. A token's result depends on the weight's shape alone, not on how many
tokens there are beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, TensorMap
from photon_grpc.kernels.linear_output import (
    BEST_ROWS,
    OUTPUTS,
    PAIRS_PER_TILE,
    POINTERS,
    SIZES,
    SOURCES,
    LinearOutput,
)
from photon_grpc.kernels.skinny_gemm import TOKEN_TILES, token_tile
from photon_grpc.kernels.tensor_map import tensor_map

ARCH = "sm_90a"
"""The one architecture that has what this needs."""

_DEPTH = 64
_ROW_BYTES = 2 * _DEPTH
_GROUP = 2 * PAIRS_PER_TILE
_WARPGROUP_ROWS, _WARPGROUP, _WARP = 64, 128, 32
_MAX_ROWS = 256
# Of a multiprocessor with one CTA; what the driver keeps for itself of every CTA.
_SHARED_BYTES, _RESERVED_BYTES = 227 << 10, 1 << 10
_BARRIER_BYTES = 8
# What a CTA of decode attention takes, with what the driver keeps. It reads what is old before q, k and v are
# there, so they leave it room beside them, unless too few stages were left.
_NEIGHBOUR_BYTES, _MIN_STAGES_BESIDE = 20 << 10, 4
# Four sums of one thread.
_FRAGMENT_BYTES = 16
_MAX_STAGES = 12

_WIDEST_ROWS, _WIDE_ROWS, _NARROW_ROWS = 192, 128, 64
# A cluster lies in one part of the GPU, and those of the largest have 16 or 18 multiprocessors: this many
# CTAs find room whatever the size of their clusters, where 128 in fours do not; but 112 in fours do.
_SURE_CTAS = 96
_SMALL_CLUSTER, _SMALL_CLUSTERS_CTAS = 4, 112
_RESIDENT_CTAS = 132
_WANTED_CTAS = 120
# Of small weights, whose CTAs are two to a multiprocessor.
_WANTED_SMALL_CTAS = 150
# Of tiles of 128 rows, after which the last one hardly counts.
_FEW_ROUNDS = 3
# The k of a CTA that is worth 192 rows.
_WIDEST_DEPTH = 768
_MAX_CLUSTER = 8
# Less would be too many copies to a stage.
_MIN_BOX_ROWS = 64
_MIN_SPLIT_DEPTH = 2 * _DEPTH
# Elements of a weight that the shared memory of all multiprocessors can nearly hold.
_SMALL_WEIGHT = 1 << 23

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_INDEX",
    "PHOTON_OUTPUT",
    "PHOTON_TOKENS",
    "PHOTON_ROWS",
    "PHOTON_SPLITS",
    "PHOTON_SHARERS",
    "PHOTON_CLUSTER",
    "PHOTON_RESIDENTS",
    "PHOTON_BOX_ROWS",
    "PHOTON_STAGES",
    "PHOTON_SHARED_BYTES",
)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a weight is cut: rows of a tile, CTAs that share one by k, and tiles that share their x; and CTAs
    that share a multiprocessor."""

    rows: int
    splits: int
    sharers: int
    residents: int = 1

    @property
    def cluster(self) -> int:
        return self.splits * self.sharers

    @property
    def threads(self) -> int:
        """Of a CTA: a warpgroup for every 64 rows, and a warp that starts the copies."""
        return self.rows // _WARPGROUP_ROWS * _WARPGROUP + _WARP


def cut(n: int, k: int) -> Cut:
    """Of a weight [n, k], without regard to the tokens, so that they get the same sums in any number.

    Where there are tiles of 128 rows for most multiprocessors, each has some for itself, and neighbours
    share their x. Of a weight that nearly fits shared memory, all is requested before x is there: narrow
    tiles, many splits, and two CTAs to a multiprocessor, one of which may be the next kernel's. In between
    the most splits for which clusters of that size find room at once. With many tokens a multiprocessor waits
    for what it takes in, so tiles of 192 rows, which need less x, are better wherever they occupy as many.
    """
    wide, narrow = (-(-n // rows) for rows in (_WIDE_ROWS, _NARROW_ROWS))
    if wide >= _SURE_CTAS:
        is_fuller = wide <= _FEW_ROUNDS * _RESIDENT_CTAS and _fill(n, _WIDEST_ROWS) > _fill(n, _WIDE_ROWS)
        return Cut(_WIDEST_ROWS if is_fuller else _WIDE_ROWS, 1, 2)
    if k < 2 * _MIN_SPLIT_DEPTH:
        return Cut(_WIDE_ROWS, 1, 2)
    most = min(_MAX_CLUSTER, k // _MIN_SPLIT_DEPTH)
    if n * k <= _SMALL_WEIGHT:
        if narrow >= _WANTED_CTAS:
            return Cut(_NARROW_ROWS, 1, 2, 2)
        enough = (size for size in range(2, most) if narrow * size >= _WANTED_SMALL_CTAS)
        return Cut(_NARROW_ROWS, next(enough, most), 1, 2)
    splits = _most_splits(wide, most)
    widest = -(-n // _WIDEST_ROWS)
    more = _most_splits(widest, min(most, _SMALL_CLUSTER))
    if wide * splits < _SURE_CTAS <= widest * more and k // more >= _WIDEST_DEPTH:
        return Cut(_WIDEST_ROWS, more, 1)
    return Cut(_WIDE_ROWS, splits, 2 if splits <= 2 and wide * splits <= _SURE_CTAS else 1)


def _most_splits(tiles: int, most: int) -> int:
    """CTAs that share each of so many tiles: as many as surely find room."""
    return next((size for size in range(most, 1, -1) if tiles * size <= _room(size)), 1)


def _room(cluster: int) -> int:
    """CTAs in clusters of that size that surely find room, one to a multiprocessor."""
    return _SMALL_CLUSTERS_CTAS if cluster <= _SMALL_CLUSTER else _SURE_CTAS


def _fill(n: int, rows: int) -> float:
    """Share of the places for tiles, in twos, that have work, over all rounds."""
    tiles = 2 * -(-n // (2 * rows))
    return tiles / (-(-tiles // _RESIDENT_CTAS) * _RESIDENT_CTAS)


def _share(cut: Cut, tokens: int) -> int:
    """Fragments of a tile that a CTA of a cluster finishes, those of a warp together."""
    warps_of_fragments = cut.rows * tokens * 4 // _FRAGMENT_BYTES // _WARP
    return -(-warps_of_fragments // cut.splits) * _WARP


def _macros(
    storage: str,
    kind: str,
    cut: Cut,
    tokens: int,
    index: str = "i64",
    blocks: int = _MAX_STAGES,
    box_rows: int = 0,
) -> dict[str, int | str]:
    """`blocks`: stages that a CTA fills for a tile; it needs no room for more where that is its only one.
    `box_rows`: of a tile's boxes, 0 where it is one.
    """
    stage_bytes = (cut.rows + tokens) * _ROW_BYTES
    sums_bytes = cut.splits * _share(cut, tokens) * _FRAGMENT_BYTES if cut.splits > 1 else 0
    all_bytes = _SHARED_BYTES - (cut.residents - 1) * _RESERVED_BYTES

    def room(num_bytes: int) -> int:
        most = num_bytes // cut.residents - sums_bytes - _BARRIER_BYTES
        return most // (stage_bytes + 2 * _BARRIER_BYTES)

    stages = room(all_bytes)
    if kind == "rope_and_store" and cut.residents > 1:
        beside = room(all_bytes - _NEIGHBOUR_BYTES)
        stages = beside if beside >= _MIN_STAGES_BESIDE else stages
    stages = min(stages, _MAX_STAGES) if cut.splits == 1 else min(stages, _MAX_STAGES, blocks)
    shared_bytes = stages * stage_bytes + sums_bytes + (2 * stages + 1) * _BARRIER_BYTES
    values = (
        storage,
        index,
        kind,
        tokens,
        cut.rows,
        cut.splits,
        cut.sharers,
        cut.cluster,
        cut.residents,
        box_rows or cut.rows,
        stages,
        shared_bytes,
    )
    return dict(zip(_MACROS, values, strict=True))


_CHECKED_CUTS = (
    *(("silu_and_mul", Cut(rows, 1, 2)) for rows in (128, 192)),
    *(("add_rows", by) for by in (Cut(128, 6, 1), Cut(128, 4, 1), Cut(128, 3, 1), Cut(192, 4, 1))),
    *(("add_rows", by) for by in (Cut(64, 4, 1, 2), Cut(64, 5, 1, 2), Cut(64, 7, 1, 2), Cut(64, 8, 1, 2))),
    *(("rope_and_store", by) for by in (Cut(64, 4, 1, 2), Cut(64, 5, 1, 2), Cut(64, 7, 1, 2))),
    *(("rope_and_store", by) for by in (Cut(128, 2, 2), Cut(128, 2, 1), Cut(128, 3, 1))),
    *(("store_rows", by) for by in (Cut(64, 2, 1, 2), Cut(64, 3, 1, 2), Cut(128, 2, 2))),
)

SKINNY_GEMM_TMA = KernelSpec(
    name="skinny_gemm_tma",
    source="skinny_gemm_tma",
    parameters=(
        *POINTERS,
        *(TensorMap,) * 2,
        *SOURCES,
        np.int32,
        *SIZES,
        np.int32,
        np.int64,
    ),
    max_threads=Cut(_MAX_ROWS, 1, 1).threads,
    macros=_MACROS,
    # Every cut of the models that we name with every tile of tokens, then every output and type.
    checked=(
        *(_macros("bf16", kind, by, tokens) for kind, by in _CHECKED_CUTS for tokens in TOKEN_TILES),
        _macros("bf16", "rope_and_store", Cut(128, 2, 2), 64, "int"),
        *(_macros("bf16", BEST_ROWS, Cut(128, 1, 2), tokens) for tokens in TOKEN_TILES),
        _macros("f16", BEST_ROWS, Cut(64, 1, 2, 2), 128),
        *(
            _macros("bf16", "rope_and_store", by, tokens, box_rows=64)
            for by in (Cut(192, 4, 1), Cut(192, 1, 2))
            for tokens in (16, 64, 128)
        ),
        *(
            _macros("bf16", "float_rows", Cut(rows, 1, 2), tokens)
            for rows in (128, 192)
            for tokens in (16, 64, 128)
        ),
        *(_macros("bf16", "store_rows", Cut(128, splits, 1), 48) for splits in (4, 5, 7, 8)),
        _macros("bf16", "store_rows", Cut(128, 1, 2), 64),
        _macros("bf16", "silu_and_mul", Cut(64, 2, 1, 2), 64),
        *(_macros("f16", kind, Cut(64, 1, 2, 2), 96) for kind in OUTPUTS),
    ),
    max_registers=255,
    # Of the one architecture that it runs on.
    chosen_by_room=True,
    overlaps=True,
)
SPECS = (SKINNY_GEMM_TMA,)


def is_available() -> bool:
    """Whether the device has what this needs. Raises BackendUnavailableError where there is no device."""
    return launcher.require_cuda().arch == ARCH


def can_multiply(output: LinearOutput, weight: Tensor) -> bool:
    """Whether it is available, and boxes of `weight` hold the pairs of a tile; odd sizes do not.

    A weight of few rows has no `best_rows`.
    """
    return is_available() and _misfit(output, cut(*weight.shape)) is None


def skinny_gemm_tma(output: LinearOutput, x: Tensor, weight: Tensor, *, by: Cut | None = None) -> None:
    """y [tokens, n] = x weight^T, and on as `output` says.

    `x` [tokens, k] of the weight's type, whose rows may lie apart; `weight` [n, k] bfloat16 or float16, k a
    multiple of 8. Up to MAX_TOKENS tokens, none launches nothing. Raises ValueError for anything else, for
    what `can_multiply` denies, and on any other architecture than ARCH.
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
    if device.arch != ARCH:
        raise ValueError(f"{device.name} is {device.arch}, this is a kernel of {ARCH}")
    by = by or cut(n, k)
    misfit = _misfit(output, by)
    if misfit is not None:
        raise ValueError(misfit)
    if output.kind == BEST_ROWS and output.row_stride != _num_groups(n, by) * by.cluster:
        raise ValueError(f"ranks have {_num_groups(n, by) * by.cluster} parts, not {output.row_stride}")
    blocks = -(-k // _DEPTH)
    macros = _macros(
        storage_name(weight.dtype),
        output.kind,
        by,
        padded,
        output.index,
        -(-blocks // by.splits),
        _box_rows(output, by.rows),
    )
    shared_bytes = macros["PHOTON_SHARED_BYTES"]
    assert isinstance(shared_bytes, int)
    kernel = launcher.load(SKINNY_GEMM_TMA.variant(**macros), shared_bytes)
    groups = _num_groups(n, by)
    kernel(
        (by.cluster, groups, 1),
        by.threads,
        *output.targets,
        tensor_map(x, (k, tokens), (x_stride,), (_DEPTH, padded // by.sharers)),
        _weight_map(output, weight, by.rows),
        *output.sources,
        np.int32(tokens),
        *output.sizes,
        np.int32(k),
        np.int64(output.row_stride),
    )


def num_parts(n: int, k: int) -> int:
    """How many ranks of `best_rows` there are for each token, on the current device."""
    by = cut(n, k)
    return _num_groups(n, by) * by.cluster


def _num_groups(n: int, by: Cut) -> int:
    """Of a launch: the second dimension of its grid."""
    groups = -(-n // (by.rows * by.sharers))
    if by.splits > 1:
        return groups
    return min(groups, launcher.require_cuda().num_multiprocessors * by.residents // by.sharers)


def _misfit(output: LinearOutput, by: Cut) -> str | None:
    """What keeps the pairs of a tile from being boxes of the weight, or its sums from being whole."""
    if output.kind == BEST_ROWS and by.splits > 1:
        return f"tiles whose sums {by.splits} CTAs share have no best row"
    if output.kind == BEST_ROWS and by.rows > _WIDE_ROWS:
        return f"the best row of tiles of {by.rows} was never measured"
    if output.kind == "silu_and_mul" and output.n // 2 % PAIRS_PER_TILE:
        return f"{output.n // 2} gates do not come in eights"
    head_dim = output.heads[2]
    if output.kind == "rope_and_store" and _box_rows(output, by.rows) < min(by.rows, head_dim, _MIN_BOX_ROWS):
        return f"heads of {head_dim} and tiles of {by.rows} rows cut one another"
    return None


def _box_rows(output: LinearOutput, rows: int) -> int:
    """Rows of a tile that one box has: whole heads, or parts that divide tile and head."""
    if output.kind != "rope_and_store":
        return rows
    head_dim = output.heads[2]
    return rows if rows % head_dim == 0 else math.gcd(rows, head_dim)


def _weight_map(output: LinearOutput, weight: Tensor, rows: int) -> TensorMap:
    """Whose boxes are tiles: 64 k of `rows` rows, in the order of linear_output.cuh's pairs."""
    n, k = weight.shape
    groups = _box_rows(output, rows) // _GROUP
    if output.kind == "silu_and_mul":
        # Eight rows, gate and up, groups of those.
        return tensor_map(
            weight,
            (k, PAIRS_PER_TILE, 2, n // _GROUP, 1),
            (k, n // 2 * k, PAIRS_PER_TILE * k, n * k),
            (_DEPTH, PAIRS_PER_TILE, 2, groups, 1),
        )
    if output.kind == "rope_and_store":
        # Eight rows, both halves of a head, groups of those, heads.
        head_dim = output.heads[2]
        per_head = head_dim // _GROUP
        return tensor_map(
            weight,
            (k, PAIRS_PER_TILE, 2, per_head, n // head_dim),
            (k, head_dim // 2 * k, PAIRS_PER_TILE * k, head_dim * k),
            (_DEPTH, PAIRS_PER_TILE, 2, min(groups, per_head), max(1, groups // per_head)),
        )
    return tensor_map(weight, (k, n), (k,), (_DEPTH, rows))
