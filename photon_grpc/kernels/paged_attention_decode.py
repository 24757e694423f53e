"""Attention of one new token per row over the paged cache; see cuda_kernels/paged_attention_decode.cu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_index, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer

CHUNK_TOKENS = 512
"""Tokens of a split, until a row has `max_splits`. A constant: results must not depend on the batch."""
MAX_ROWS = 1024

_THREADS = 256
_TILE = 16
_MAX_GROUP = 8
# Of a warp's partial result in shared memory.
_PARTIAL_PADDING = 8
_DEPTH = 16
_MAX_HEAD_DIM = 128
# Two CTAs are resident on a multiprocessor, with half of the registers each.
_SMALL_HEAD_DIM = 64
_WARPS = 8
# A row of so many tokens has a team for every item, or raw heads are left to a kernel of their own.
_RAW_CONTEXT = 4096
_SHARERS = (8, 4, 2, 1)
"""Warps that share an item."""
_CROWDING = 1.5
"""Items to a place for teams of all warps of a CTA."""
# Splits of the longest rows times kv heads: two waves of CTAs on 132 multiprocessors, from a single row.
_LONG_ROW_ITEMS = 256
_MIN_SPLITS, _MOST_SPLITS = 8, 64

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_HEAD_DIM",
    "PHOTON_KV_HEADS",
    "PHOTON_GROUP",
    "PHOTON_BLOCK_SIZE",
    "PHOTON_CHUNK",
    "PHOTON_MAX_SPLITS",
    "PHOTON_MAX_ROWS",
    "PHOTON_SHARERS",
    "PHOTON_HEADS",
)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Device memory for partial results, at fixed addresses; serves one launch at a time.

    Its contents are void between launches, but for the counters, which every launch leaves at zero.
    """

    acc: Tensor
    """[max_rows, num_kv_heads, max_splits, group, head_dim] float32."""
    stats: Tensor
    """[max_rows, num_kv_heads, max_splits, group, 2] float32: maximum and sum of each split."""
    counters: Tensor
    """[max_rows, num_kv_heads] int32."""


def max_splits(num_kv_heads: int) -> int:
    """Splits of the longest rows: a function of the model alone."""
    return min(max(_LONG_ROW_ITEMS // num_kv_heads, _MIN_SPLITS), _MOST_SPLITS)


def allocate_workspace(
    max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> DecodeWorkspace:
    """Room for launches of up to `max_rows` rows. Raises ValueError for shapes that the kernel has not."""
    group = _group(num_heads, num_kv_heads)
    if not 0 < max_rows <= MAX_ROWS:
        raise ValueError(f"max_rows is {max_rows}, not in 1 to {MAX_ROWS}")
    splits = max_splits(num_kv_heads)
    return DecodeWorkspace(
        torch.empty(max_rows, num_kv_heads, splits, group, head_dim, dtype=torch.float32, device=device),
        torch.empty(max_rows, num_kv_heads, splits, group, 2, dtype=torch.float32, device=device),
        torch.zeros(max_rows, num_kv_heads, dtype=torch.int32, device=device),
    )


def num_sharers(rows: int, num_kv_heads: int, group: int, head_dim: int, num_warps: int) -> int:
    """Warps of a team: as many as find room among `num_warps` of the device if no row has two splits.

    Of the largest teams there may be half as many again: they have a row's tokens all under way at once, and
    those that are left begin as soon as others end.

    And no fewer than have room in shared memory for the splits of the longest row. Large groups of small
    heads have no registers to spare.
    """
    if group > 4 and head_dim <= _SMALL_HEAD_DIM:
        return _WARPS
    fewest = 2 * max_splits(num_kv_heads) / (head_dim + _PARTIAL_PADDING)
    for sharers in _SHARERS:
        room = num_warps * (_CROWDING if sharers == _WARPS else 1)
        if rows * num_kv_heads * sharers <= room or sharers // 2 < fewest:
            return sharers
    return _SHARERS[-1]


def can_finish(rows: int, num_kv_heads: int, group: int, head_dim: int, max_context: int) -> bool:
    """Whether `rope_store_attend` is the faster way on this device for rows of up to `max_context` tokens.

    A kernel less saves 1 to 3 us, and every further item of a team costs 2, since its heads are requested
    when the one before is done. Lengths are not known where a step is captured: so it is for rows whose items
    have a team each, up to 4,096 tokens.
    """
    warps = launcher.require_cuda().num_multiprocessors * _WARPS
    splits = min(-(-min(max_context, _RAW_CONTEXT) // CHUNK_TOKENS), max_splits(num_kv_heads))
    sharers = num_sharers(rows, num_kv_heads, group, head_dim, warps)
    return rows * num_kv_heads * splits * sharers <= warps


def _macros(
    storage: str,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    sharers: int = _WARPS,
    *,
    heads: str = "finished",
) -> dict[str, int | str]:
    values = (
        storage,
        head_dim,
        num_kv_heads,
        group,
        block_size,
        CHUNK_TOKENS,
        max_splits(num_kv_heads),
        MAX_ROWS,
        sharers,
        heads,
    )
    return dict(zip(_MACROS, values, strict=True))


PAGED_ATTENTION_DECODE = KernelSpec(
    name="paged_attention_decode",
    source="paged_attention_decode",
    parameters=(
        *(Pointer,) * 8,
        *(Pointer,) * 5,
        np.int32,
        np.int32,
        np.int64,
        np.float32,
        np.int32,
        np.float32,
    ),
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
            (2, 5, 48, 16),
            # Many rows.
            *((*shape, sharers) for shape in ((8, 4, 64, 16), (8, 4, 128, 16)) for sharers in (4, 2, 1)),
            *((4, 7, 128, 16, sharers) for sharers in (4, 2)),
            (32, 1, 128, 16, 1),
            (4, 2, 80, 16, 2),
        )
    )
    # Qwen3 0.6B and 1.7B, 4B and 8B, 14B, 32B, and the other dims.
    + tuple(
        _macros(storage, *shape, heads="raw")
        for storage in ("bf16", "f16")
        for shape in (
            *((*shape, sharers) for shape in ((8, 2, 128, 16), (8, 4, 128, 32)) for sharers in (8, 2)),
            (8, 5, 128, 16),
            (8, 8, 128, 16),
            (4, 3, 80, 16),
            (4, 4, 32, 16),
        )
    ),
    # The loads in flight are held in registers.
    max_registers=255,
    # Two CTAs of small heads have 128 to a thread. Some words that an item needs once are left over, by which
    # release of the compiler it is; those of the loop over its tokens never were.
    max_spill_bytes=64,
    overlaps=True,
)
SPECS = (PAGED_ATTENTION_DECODE,)


def paged_attention_decode(
    out: Tensor,
    workspace: DecodeWorkspace,
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    reads_early: bool = False,
) -> None:
    """out [rows, num_heads, head_dim] = softmax(scale * q K^T) V over each row's own context.

    `q` [rows, num_heads, head_dim], whose rows may lie apart; `kv_cache`
    [num_blocks, num_kv_heads, 2, block_size, head_dim]; `block_tables` int32 [rows, max_blocks], of which
    the entries behind a row's context are never used; `context_lens` int32 [rows], the new token counted
    in, 0 for an idle row, whose output is zero. Lengths may change between replays of a captured launch.
    With `reads_early` the launch may begin to read while those before it in the stream still run: back to the
    last that waits before it lets the next one start, they write nothing of these but `q` and each row's
    newest token.
    Raises ValueError for shapes that the kernel has not: bfloat16 and float16, up to 8 query heads per
    kv head, head_dim a multiple of 16 up to 128, block_size a multiple of 16.
    """
    _launch(out, workspace, q, kv_cache, block_tables, context_lens, scale, reads_early, None)


def rope_store_attend(
    out: Tensor,
    workspace: DecodeWorkspace,
    qkv: Tensor,
    kv_cache: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    reads_early: bool = False,
) -> None:
    """`kernels.rope_store_kv.rope_store_kv` of each row's newest token and `paged_attention_decode` in one.

    `qkv` [rows, num_heads + 2 * num_kv_heads, head_dim], rows may lie apart; `norms`, `eps`, `table` and
    `slot_mapping` as there, `positions` int64 [rows]; the rest as here. Of a row with a context the slot is
    that of its newest token, or -1, which then is stored nowhere. What goes to the cache has the same bits as
    from there, and so have the results. No row may read the newest token of another: what a row sees was
    written by earlier launches. Raises ValueError as both do.
    """
    rows, all_heads, head_dim = qkv.shape
    num_kv_heads = kv_cache.shape[1]
    require_rows("qkv", qkv, qkv.dtype, rows, all_heads, head_dim)
    for weight in norms or ():
        require("norm weight", weight, qkv.dtype, head_dim)
    require("table", table, torch.float32, table.shape[0], head_dim)
    require_index("positions", positions, torch.int64, rows)
    require_index("slot_mapping", slot_mapping, torch.int64, rows)
    q_weight, k_weight = norms or (None, None)
    finish = _Finish(q_weight, k_weight, table, positions, slot_mapping, eps)
    q = qkv[:, : all_heads - 2 * num_kv_heads]
    _launch(out, workspace, q, kv_cache, block_tables, context_lens, scale, reads_early, finish)


@dataclass(frozen=True, slots=True)
class _Finish:
    """What the kernel makes raw heads final by."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    table: Tensor
    positions: Tensor
    slots: Tensor
    eps: float

    @property
    def addresses(self) -> tuple[int, ...]:
        tensors = (self.q_weight, self.k_weight, self.table, self.positions, self.slots)
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _launch(
    out: Tensor,
    workspace: DecodeWorkspace,
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    reads_early: bool,
    finish: _Finish | None,
) -> None:
    rows, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = _group(num_heads, num_kv_heads)
    storage = storage_name(q.dtype)
    if storage not in ("bf16", "f16"):
        raise ValueError(f"attention on the tensor cores takes bfloat16 and float16, not {q.dtype}")
    if head_dim % _DEPTH or not 0 < head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, not a multiple of {_DEPTH} up to {_MAX_HEAD_DIM}")
    if block_size % _TILE or block_size == 0:
        raise ValueError(f"block_size is {block_size}, not a multiple of {_TILE}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}")
    stride = require_rows("q", q, q.dtype, rows, num_heads, head_dim)
    require("out", out, q.dtype, rows, num_heads, head_dim)
    require("kv_cache", kv_cache, q.dtype, num_blocks, num_kv_heads, 2, block_size, head_dim)
    require_index("block_tables", block_tables, torch.int32, rows, block_tables.shape[-1])
    require_index("context_lens", context_lens, torch.int32, rows)
    max_rows = workspace.counters.shape[0]
    if rows > max_rows:
        raise ValueError(f"{rows} rows; the workspace has room for {max_rows}")
    splits = max_splits(num_kv_heads)
    require("acc", workspace.acc, torch.float32, max_rows, num_kv_heads, splits, group, head_dim)
    require("stats", workspace.stats, torch.float32, max_rows, num_kv_heads, splits, group, 2)
    require_index("counters", workspace.counters, torch.int32, max_rows, num_kv_heads)
    # As many CTAs as are resident at a time, or as a batch of these rows can have items.
    ctas_per_sm = 2 if head_dim == _SMALL_HEAD_DIM and finish is None else 1
    resident = launcher.require_cuda().num_multiprocessors * ctas_per_sm
    sharers = num_sharers(rows, num_kv_heads, group, head_dim, resident * _WARPS)
    ctas = min(resident, -(-rows * num_kv_heads * splits * sharers // _WARPS))
    heads = "finished" if finish is None else "raw"
    macros = _macros(storage, num_kv_heads, group, head_dim, block_size, sharers, heads=heads)
    kernel = launcher.load(PAGED_ATTENTION_DECODE.variant(**macros))
    kernel(
        (ctas, 1, 1),
        _THREADS,
        out.data_ptr(),
        workspace.acc.data_ptr(),
        workspace.stats.data_ptr(),
        workspace.counters.data_ptr(),
        q.data_ptr(),
        kv_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        *((0,) * 5 if finish is None else finish.addresses),
        np.int32(rows),
        np.int32(block_tables.shape[1]),
        np.int64(stride),
        np.float32(scale * math.log2(math.e)),
        np.int32(reads_early),
        np.float32(0.0 if finish is None else finish.eps),
    )


def _group(num_heads: int, num_kv_heads: int) -> int:
    group, rest = divmod(num_heads, num_kv_heads)
    if rest or not 0 < group <= _MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads on {num_kv_heads} kv heads: groups are of 1 to {_MAX_GROUP}"
        )
    return group
