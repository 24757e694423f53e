"""Ops in plain torch: how the CPU serves, and the oracle for every kernel.

Knows nothing of models. On a CPU the cost of a small model is as much the number of torch calls as the
arithmetic, so whatever depends on the step alone (gather indices, masks) is made once per step and
kept in the metadata, decode rows are one vectorised call, and reads of the cache are one gather for
keys and values together.

Used on the engine thread only, under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from photon_grpc.ops.base import AttentionMetadata, Ops, Rotary

# Decode rows are gathered in groups whose padded context stays about this large: more falls out of the
# processor's cache between the gather and its use, and without a bound one long row would make all
# others as large as itself.
_GATHER_BYTES = 4 << 20

# The number of rows that a packed weight is laid out for. The layout serves all numbers of rows well;
# asking for one row gives the plain layout, which serves none.
_PACK_ROWS = 16


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows `start` to `stop`, padded to `width` tokens of context."""

    start: int
    stop: int
    width: int
    slots: Tensor
    """[rows * width]; behind a row's context its own last slot again, so no foreign slot is read."""
    mask: Tensor | None
    """[rows, 1, 1, width], -inf on the padding; None where there is none."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One row with query tokens `start` to `stop`."""

    start: int
    stop: int
    slots: Tensor | None
    """[context_len]; None where the query tokens are the whole context."""
    mask: Tensor | None
    """[query_len, context_len], -inf above the diagonal; None for a single query and with no slots."""


@dataclass(frozen=True, slots=True)
class _Plan:
    decodes: tuple[_DecodeGroup, ...]
    prefills: tuple[_Prefill, ...]


@dataclass(frozen=True, slots=True)
class _OneDnn:
    pack: Callable[..., Tensor]
    product: Callable[..., Tensor]


class TorchOps(Ops):
    """See `Ops`. A layer's cache is [num_blocks, block_size, 2, num_kv_heads, head_dim]."""

    def __init__(self) -> None:
        self._onednn = _find_onednn()

    def kv_layer_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, 2, num_kv_heads, head_dim)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return weight.index_select(0, token_ids)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._onednn is not None and _suits_onednn(weight):
            return self._onednn.product(x, weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def pack_linear(self, weight: Tensor) -> Tensor:
        if self._onednn is not None and _suits_onednn(weight):
            return self._onednn.pack(weight, _PACK_ROWS)
        return weight

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype is torch.float32:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        gate, up = gate_up.float().chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    def rope(self, x: Tensor, rotary: Rotary) -> None:
        cos, sin = rotary
        if x.dtype is torch.float32:
            swapped = x.roll(x.shape[-1] // 2, dims=-1).mul_(sin)
            x.mul_(cos).add_(swapped)
            return
        wide = x.float()
        self.rope(wide, rotary)
        x.copy_(wide)

    def store_kv(self, kv: Tensor, layer_cache: Tensor, slot_mapping: Tensor) -> None:
        layer_cache.flatten(0, 1).index_copy_(0, slot_mapping, kv)

    def attention(
        self, q: Tensor, kv: Tensor, layer_cache: Tensor, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        plan: _Plan | None = metadata.plan
        if plan is None:
            plan = metadata.plan = _make_plan(metadata, layer_cache, q.dtype)
        slots = layer_cache.flatten(0, 1)  # [num_slots, 2, num_kv_heads, head_dim]
        if len(plan.decodes) == 1 and not plan.prefills:
            return _attend_decodes(q, slots, plan.decodes[0], scale).reshape(q.shape[0], -1)
        out = q.new_empty(q.shape)
        for group in plan.decodes:
            result = _attend_decodes(q[group.start : group.stop], slots, group, scale)
            out[group.start : group.stop] = result.reshape(-1, *q.shape[1:])
        for row in plan.prefills:
            span = slice(row.start, row.stop)
            out[span] = _attend_prefill(q[span], kv[span], slots, row, scale)
        return out.flatten(1)


def _attend_decodes(q: Tensor, slots: Tensor, group: _DecodeGroup, scale: float) -> Tensor:
    """One query token per row: [rows, num_kv_heads, queries_per_kv_head, head_dim].

    The query heads that share a kv head take the place of query positions, so no head is repeated.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads = slots.shape[2]
    gathered = slots.index_select(0, group.slots).view(rows, group.width, 2, num_kv_heads, head_dim)
    keys, values = gathered.transpose(1, 3).unbind(2)  # [rows, num_kv_heads, width, head_dim]
    grouped = q.view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)


def _attend_prefill(q: Tensor, kv: Tensor, slots: Tensor, row: _Prefill, scale: float) -> Tensor:
    """All query tokens of one row: [query_len, num_heads, head_dim]."""
    context = kv if row.slots is None else slots.index_select(0, row.slots)
    keys, values = context.unbind(1)  # [context_len, num_kv_heads, head_dim]
    return (
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=row.mask,
            is_causal=row.slots is None,
            scale=scale,
            enable_gqa=True,
        )
        .squeeze(0)
        .transpose(0, 1)
    )


def _make_plan(metadata: AttentionMetadata, layer_cache: Tensor, dtype: torch.dtype) -> _Plan:
    block_size = layer_cache.shape[1]
    slot_bytes = layer_cache[0, 0].numel() * layer_cache.element_size()
    max_slots = max(1, _GATHER_BYTES // slot_bytes)
    num_rows = len(metadata.context_lens_host)
    return _Plan(
        decodes=tuple(
            _plan_decodes(metadata, start, stop, block_size, dtype)
            for start, stop in _group_rows(metadata.context_lens_host[: metadata.num_decodes], max_slots)
        ),
        prefills=tuple(
            _plan_prefill(metadata, row, block_size, dtype) for row in range(metadata.num_decodes, num_rows)
        ),
    )


def _group_rows(context_lens: tuple[int, ...], max_slots: int) -> list[tuple[int, int]]:
    """Runs of rows, in order, whose padded size is at most `max_slots`; a longer row stands alone."""
    groups: list[tuple[int, int]] = []
    start = width = 0
    for row, length in enumerate(context_lens):
        width = max(width, length)
        if row > start and (row + 1 - start) * width > max_slots:
            groups.append((start, row))
            start, width = row, length
    if context_lens:
        groups.append((start, len(context_lens)))
    return groups


def _plan_decodes(
    metadata: AttentionMetadata, start: int, stop: int, block_size: int, dtype: torch.dtype
) -> _DecodeGroup:
    lengths = metadata.context_lens_host[start:stop]
    width = max(lengths)
    context_lens = metadata.context_lens[start:stop, None]
    positions = torch.arange(width, device=context_lens.device)[None]
    mask = None
    if min(lengths) < width:
        mask = torch.zeros(stop - start, 1, 1, width, dtype=dtype, device=context_lens.device)
        mask.masked_fill_((positions >= context_lens)[:, None, None], float("-inf"))
        positions = torch.minimum(positions, context_lens - 1)
    else:
        positions = positions.expand(stop - start, width)
    slots = _slots(metadata.block_tables[start:stop], positions, block_size)
    return _DecodeGroup(start, stop, width, slots.flatten(), mask)


def _plan_prefill(metadata: AttentionMetadata, row: int, block_size: int, dtype: torch.dtype) -> _Prefill:
    start, stop = metadata.query_starts[row : row + 2]
    query_len, context_len = stop - start, metadata.context_lens_host[row]
    if query_len == context_len:
        return _Prefill(start, stop, None, None)
    device = metadata.block_tables.device
    positions = torch.arange(context_len, device=device)[None]
    slots = _slots(metadata.block_tables[row : row + 1], positions, block_size).flatten()
    if query_len == 1:
        return _Prefill(start, stop, slots, None)
    mask = torch.full((query_len, context_len), float("-inf"), dtype=dtype, device=device)
    return _Prefill(start, stop, slots, mask.triu_(context_len - query_len + 1))


def _slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """[rows, n] slots of `positions` [rows, n]."""
    blocks = positions // block_size
    return block_tables.gather(1, blocks) * block_size + (positions - blocks * block_size)


def _suits_onednn(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and weight.device.type == "cpu"


def _find_onednn() -> _OneDnn | None:
    """oneDNN's float32 product, two to three times as fast as the BLAS that F.linear calls.

    F.linear takes oneDNN for 16-bit types only. These entries are the ones that compiled models call;
    they are not public, so they are tried on a small product first, and F.linear does the work where
    they are missing or differ.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # not annotated in torch
        return None
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if pack is None or product is None:
        return None
    weight = torch.arange(24 * 32, dtype=torch.float32).remainder_(7).view(24, 32)
    x, bias = weight[:3] - 3, weight[:, 0].contiguous()
    expected = F.linear(x, weight, bias)
    try:
        results = [product(x, form, bias, "none", [], "") for form in (weight, pack(weight, _PACK_ROWS))]
    except (RuntimeError, TypeError):
        return None
    # Whole numbers this small have exact sums.
    return _OneDnn(pack, product) if all(torch.equal(result, expected) for result in results) else None
