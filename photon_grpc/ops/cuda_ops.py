"""Ops on an NVIDIA GPU: our kernels around torch's large matrix products, and in place of one of them.

Owns the results' memory (torch's allocator, so a graph capture places them in its pool) and the layout of
the cache. Knows nothing of models. Engine thread, on torch's current stream, under
`torch.inference_mode()`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from photon_grpc.errors import ConfigError, UnsupportedModelError
from photon_grpc.kernels import (
    embedding,
    gemv,
    head_gemm,
    linear_output,
    rmsnorm,
    rope_store_kv,
    silu_and_mul,
    skinny_gemm,
    skinny_gemm_tma,
    swiglu_gemm,
)
from photon_grpc.kernels.launcher import require_cuda
from photon_grpc.kernels.linear_output import LinearOutput
from photon_grpc.kernels.paged_attention_decode import (
    DecodeWorkspace,
    allocate_workspace,
    can_finish,
    paged_attention_decode,
    rope_store_attend,
)
from photon_grpc.kernels.paged_attention_prefill import paged_attention_prefill
from photon_grpc.ops.base import AttentionMetadata, AttentionWeights, Ops, Projection, Rotary

_HEAD_DIM_STEP = 16
_MAX_HEAD_DIM = 128
_BLOCK_SIZE_STEP = 16
# Tokens and bytes of a weight beyond which cuBLASLt is faster than our own products. With the copy engine
# (sm_90a) it takes more tokens, and any weight.
MAX_SKINNY_TOKENS = 64
MAX_COPIED_TOKENS = 128
MAX_SKINNY_BYTES = 96 << 20
# With the copy engine to bring x, CTAs are better off sharing it beyond so many tokens; without, beyond
# gemv's most.
MAX_UNSHARED_TOKENS = 4
MAX_UNSHARED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the kernels read of a step, in their types."""

    block_tables: Tensor
    """[num_rows, max_blocks] int32."""
    context_lens: Tensor
    """[num_rows] int32."""
    query_starts: Tensor | None
    """[prefill rows + 1] int32, from the first prefill token on; None where there is none."""


class CudaOps(Ops):
    """See `Ops`. A layer's cache is [num_blocks, num_kv_heads, 2 (K, V), block_size, head_dim].

    The residual stream is float32 whatever the storage type: it is small, and would be rounded twice in
    every layer. A token with slot -1 is stored nowhere; a decode row of context 0 is idle. Block tables and
    context lengths may be int32 or int64; int32 is what the kernels read, and saves a conversion. float32
    weights work too, with a slow attention: they are for comparisons.
    """

    def __init__(self, max_decodes: int) -> None:
        """For steps of up to `max_decodes` decode rows.

        Raises BackendUnavailableError where the machine lacks something.
        """
        require_cuda()
        self._max_decodes = max_decodes
        self._workspaces: dict[tuple[int, int, int], DecodeWorkspace] = {}

    def kv_layer_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        # Asked before anything else is made, so that a start fails here and no step does.
        if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"backend cuda: heads of {head_dim}; it has those that are a multiple of {_HEAD_DIM_STEP} up "
                f"to {_MAX_HEAD_DIM}"
            )
        if block_size % _BLOCK_SIZE_STEP:
            raise ConfigError(
                f"cache.block_size is {block_size}: backend cuda takes multiples of {_BLOCK_SIZE_STEP}"
            )
        return (num_blocks, num_kv_heads, 2, block_size, head_dim)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(token_ids.shape[0], weight.shape[1], dtype=torch.float32, device=token_ids.device)
        embedding.embedding(out, token_ids, weight)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def norm_qkv_rope_store_kv(
        self,
        update: Tensor | None,
        residual: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = weights.qkv
        if update is not None or not _has_few(residual, weight):
            return super().norm_qkv_rope_store_kv(update, residual, weights, rotary, layer_cache, metadata)
        if weights.qk_norm is not None:
            heads = self._heads(update, residual, weights)
            return self.rope_store_kv(heads, weights, rotary, layer_cache, metadata)
        q = weight.new_empty(residual.shape[0], weights.num_heads, weights.head_dim)
        output = linear_output.rope_and_store(q, layer_cache, *rotary, metadata.slot_mapping, bias)
        self._normed(output, residual, weights.norm, weights.eps, weight)
        # Attention reads the cache alone.
        return q, q

    def norm_qkv_attention(
        self,
        update: Tensor | None,
        residual: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        tokens = residual.shape[0]
        # The norm of a head needs all of it, and a CTA of the product has a part. Attention has it whole, and
        # where there are decode rows alone nobody else in the layer reads what it writes.
        if weights.qk_norm is None or not _finishes_heads(weights.num_heads, layer_cache, metadata, tokens):
            return super().norm_qkv_attention(update, residual, weights, rotary, layer_cache, metadata)
        heads = self._heads(update, residual, weights)
        out = heads.new_empty(tokens, weights.num_heads, weights.head_dim)
        plan = _plan_of(metadata)
        rope_store_attend(
            out,
            self._workspace_for(out, layer_cache),
            heads,
            layer_cache,
            weights.qk_norm,
            weights.eps,
            *rotary,
            metadata.slot_mapping,
            plan.block_tables,
            plan.context_lens,
            weights.scale,
            reads_early=tokens <= _max_skinny_tokens(),
        )
        return out.flatten(1)

    def _heads(self, update: Tensor | None, residual: Tensor, weights: AttentionWeights) -> Tensor:
        """q, k and v as the product leaves them: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]."""
        weight, bias = weights.qkv
        if update is not None or not _has_few(residual, weight):
            heads = self.linear(self.add_norm(update, residual, weights.norm, weights.eps), weight, bias)
        else:
            heads = weight.new_empty(residual.shape[0], weight.shape[0])
            output = linear_output.store_rows(heads, bias)
            self._normed(output, residual, weights.norm, weights.eps, weight)
        return heads.view(residual.shape[0], -1, weights.head_dim)

    def norm_gate_up_silu(
        self, update: Tensor | None, residual: Tensor, norm: Tensor, eps: float, projection: Projection
    ) -> Tensor:
        weight, bias = projection
        tokens, inner = residual.shape[0], weight.shape[0] // 2
        if update is not None or not _has_few(residual, weight):
            is_faster = weight.dtype is not torch.float32 and swiglu_gemm.is_faster(
                tokens, inner, weight.shape[1]
            )
            if bias is not None or not is_faster:
                return super().norm_gate_up_silu(update, residual, norm, eps, projection)
            out = weight.new_empty(tokens, inner)
            swiglu_gemm.swiglu_gemm(out, self.add_norm(update, residual, norm, eps), weight)
            return out
        out = weight.new_empty(tokens, inner)
        self._normed(linear_output.silu_and_mul(out, bias), residual, norm, eps, weight)
        return out

    def linear_update(self, x: Tensor, residual: Tensor, projection: Projection) -> Tensor | None:
        weight, bias = projection
        if not _has_few(x, weight):
            return super().linear_update(x, residual, projection)
        output = linear_output.add_rows(residual, bias)
        if _has_very_few(x) and not _suits_gemv(weight):
            # With nothing to norm, the copy engine is as fast for a token as for sixteen.
            skinny_gemm_tma.skinny_gemm_tma(output, x, weight, by=skinny_gemm_tma.cut_of_few(*weight.shape))
        else:
            _multiply(output, x, weight)
        return None

    def _normed(
        self, output: LinearOutput, residual: Tensor, norm: Tensor, eps: float, weight: Tensor
    ) -> None:
        """`output` of the normed residual, in one kernel where every CTA can afford to norm it again."""
        tokens, k = residual.shape[0], weight.shape[1]
        if tokens <= _max_gemv_tokens() and gemv.can_norm(tokens, k):
            gemv.normed_gemv(output, residual, norm, eps, weight)
        else:
            _multiply(output, self.rms_norm(residual, norm, eps), weight)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.dtype is torch.float32:
            return F.linear(hidden, weight)
        if 0 < hidden.shape[0] <= _max_skinny_tokens():
            out = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
            # So many rows that every CTA has tens of tiles: sharing x pays as soon as it is two mma wide.
            few = hidden.shape[0] <= gemv.TOKEN_TILES[0]
            _multiply(linear_output.float_rows(out), hidden, weight, by_gemv=few)
            return out
        if _is_wide_head(hidden):
            out = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
            head_gemm.head_gemm(linear_output.float_rows(out), hidden, weight)
            return out
        # The product's own accumulator, not rounded to 16 bits on the way.
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    def best_logits(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        rows, (n, k) = hidden.shape[0], weight.shape
        if hidden.dtype is torch.float32 or not rows:
            return None
        # Each by the kernel that multiplies it for `logits`, so that they are the best of the same sums.
        if _is_by_gemv(hidden, by_gemv=rows <= gemv.TOKEN_TILES[0]):
            ranks = _new_ranks(hidden, gemv.num_parts(rows, n))
            gemv.gemv(linear_output.best_rows(ranks, n), hidden, weight)
            return ranks
        if _is_wide_head(hidden):
            ranks = _new_ranks(hidden, head_gemm.num_parts(n))
            head_gemm.head_gemm(linear_output.best_rows(ranks, n), hidden, weight)
            return ranks
        if rows > MAX_COPIED_TOKENS or not skinny_gemm_tma.is_available():
            return None
        ranks = _new_ranks(hidden, skinny_gemm_tma.num_parts(n, k))
        output = linear_output.best_rows(ranks, n)
        if not skinny_gemm_tma.can_multiply(output, weight):
            return None
        skinny_gemm_tma.skinny_gemm_tma(output, hidden, weight)
        return ranks

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        rmsnorm.rms_norm(out.flatten(0, -2), x.flatten(0, -2), weight, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rmsnorm.add_rms_norm(out, residual, x, weight, eps)
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul.silu_and_mul(out, gate_up)
        return out

    def rotary(self, table: Tensor, positions: Tensor) -> Rotary:
        """The pair itself: the kernel looks the angles up."""
        return table, positions

    def rope(self, x: Tensor, rotary: Rotary) -> None:
        rope_store_kv.rope(x, *rotary)

    def qk_norm_rope(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rotary: Rotary
    ) -> None:
        rope_store_kv.qk_norm_rope(q, q_weight, eps, *rotary)
        rope_store_kv.qk_norm_rope(k, k_weight, eps, *rotary)

    def store_kv(self, kv: Tensor, layer_cache: Tensor, slot_mapping: Tensor) -> None:
        rope_store_kv.store_kv(layer_cache, kv, slot_mapping)

    def rope_store_kv(
        self,
        heads: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        q = heads[:, : weights.num_heads]
        rope_store_kv.rope_store_kv(
            q, layer_cache, heads, weights.qk_norm, weights.eps, *rotary, metadata.slot_mapping
        )
        # Attention reads the cache alone; the keys here are still those before the rotation.
        return q, heads[:, weights.num_heads :]

    def attention(
        self, q: Tensor, kv: Tensor, layer_cache: Tensor, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if q.dtype is torch.float32:
            _attend_float32(out, q, layer_cache, metadata, scale)
            return out.flatten(1)
        plan = _plan_of(metadata)
        decodes = metadata.num_decodes
        if decodes:
            paged_attention_decode(
                out[:decodes],
                self._workspace_for(q, layer_cache),
                q[:decodes],
                layer_cache,
                plan.block_tables[:decodes],
                plan.context_lens[:decodes],
                scale,
                # Behind a product of many tokens there is little to gain, and memory is busy.
                reads_early=metadata.context_is_old and decodes <= _max_skinny_tokens(),
            )
        if plan.query_starts is not None:
            paged_attention_prefill(
                out[decodes:],
                q[decodes:],
                layer_cache,
                plan.block_tables[decodes:],
                plan.context_lens[decodes:],
                plan.query_starts,
                scale,
            )
        return out.flatten(1)

    def _workspace_for(self, q: Tensor, layer_cache: Tensor) -> DecodeWorkspace:
        """One for all layers: their launches follow one another."""
        num_kv_heads, head_dim = layer_cache.shape[1], layer_cache.shape[4]
        shape = (q.shape[1], num_kv_heads, head_dim)
        workspace = self._workspaces.get(shape)
        if workspace is None:
            workspace = allocate_workspace(self._max_decodes, *shape, q.device)
            self._workspaces[shape] = workspace
        return workspace


def _has_few(x: Tensor, weight: Tensor) -> bool:
    """Whether so few tokens are best multiplied by our own kernels. float32 has none."""
    tokens = x.shape[0]
    if weight.dtype is torch.float32 or not 0 < tokens <= _max_skinny_tokens():
        return False
    if tokens <= gemv.MAX_TOKENS or skinny_gemm_tma.is_available():
        return True
    return weight.numel() * weight.element_size() <= MAX_SKINNY_BYTES


def _max_skinny_tokens() -> int:
    return MAX_COPIED_TOKENS if skinny_gemm_tma.is_available() else MAX_SKINNY_TOKENS


def _max_gemv_tokens() -> int:
    return MAX_UNSHARED_TOKENS if skinny_gemm_tma.is_available() else gemv.MAX_TOKENS


def _is_by_gemv(x: Tensor, *, by_gemv: bool) -> bool:
    return by_gemv and x.shape[0] <= _max_gemv_tokens()


def _is_wide_head(hidden: Tensor) -> bool:
    tokens = hidden.shape[0]
    return tokens > MAX_COPIED_TOKENS and head_gemm.is_available() and head_gemm.is_faster(tokens)


def _new_ranks(hidden: Tensor, parts: int) -> Tensor:
    return torch.empty(hidden.shape[0], parts, dtype=torch.int64, device=hidden.device)


def _has_very_few(x: Tensor) -> bool:
    """Whether gemv would take so few tokens although there is the copy engine."""
    return x.shape[0] <= _max_gemv_tokens() and skinny_gemm_tma.is_available()


def _suits_gemv(weight: Tensor) -> bool:
    """Whether each multiprocessor has one of its tiles, or there is little to read."""
    num_bytes = weight.numel() * weight.element_size()
    return num_bytes <= MAX_UNSHARED_BYTES or gemv.is_one_round(weight.shape[0])


def _multiply(output: LinearOutput, x: Tensor, weight: Tensor, *, by_gemv: bool = True) -> None:
    if _is_by_gemv(x, by_gemv=by_gemv):
        gemv.gemv(output, x, weight)
    elif skinny_gemm_tma.can_multiply(output, weight):
        skinny_gemm_tma.skinny_gemm_tma(output, x, weight)
    else:
        # wgmma where there is one: 2 to 7 % faster, and the same bits for any number of tokens.
        skinny_gemm.skinny_gemm(output, x, weight, warpgroup=True)


def _finishes_heads(
    num_heads: int, layer_cache: Tensor, metadata: AttentionMetadata, num_tokens: int
) -> bool:
    """Whether attention norms and rotates q and k of a step of so many tokens, and stores k and v.

    Where all are decode rows, of which none sees what another stores in this step, and it pays.
    """
    if not metadata.context_is_old or not metadata.num_decodes == num_tokens > 0:
        return False
    if layer_cache.dtype is torch.float32:
        return False
    _, num_kv_heads, _, block_size, head_dim = layer_cache.shape
    max_context = metadata.block_tables.shape[1] * block_size
    return can_finish(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim, max_context)


def _plan_of(metadata: AttentionMetadata) -> _Plan:
    plan: _Plan | None = metadata.plan
    if plan is None:
        plan = metadata.plan = _make_plan(metadata)
    return plan


def _make_plan(metadata: AttentionMetadata) -> _Plan:
    decodes = metadata.num_decodes
    query_starts = metadata.query_starts_device
    if query_starts is None and len(metadata.context_lens_host) > decodes:
        query_starts = torch.tensor(metadata.query_starts[decodes:], dtype=torch.int32) - decodes
        query_starts = query_starts.to(metadata.block_tables.device)
    return _Plan(metadata.block_tables.to(torch.int32), metadata.context_lens.to(torch.int32), query_starts)


def _attend_float32(
    out: Tensor, q: Tensor, layer_cache: Tensor, metadata: AttentionMetadata, scale: float
) -> None:
    """Row by row in torch: exact rather than fast, to compare with."""
    for row, context_len in enumerate(metadata.context_lens_host):
        start, stop = metadata.query_starts[row : row + 2]
        context = _gather(layer_cache, metadata.block_tables[row], context_len)
        out[start:stop] = _attend(q[start:stop], context, scale)


def _gather(layer_cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Keys and values of one row's context, in order: [context_len, 2, num_kv_heads, head_dim]."""
    positions = torch.arange(context_len, device=layer_cache.device)
    block_size = layer_cache.shape[3]
    blocks = block_table[positions // block_size]
    return layer_cache[blocks, :, :, positions % block_size].transpose(1, 2)


def _attend(q: Tensor, context: Tensor, scale: float) -> Tensor:
    """The last tokens of one context: [query_len, num_heads, head_dim]."""
    query_len, context_len = q.shape[0], context.shape[0]
    mask = None
    if 1 < query_len < context_len:
        mask = torch.ones(query_len, context_len, dtype=torch.bool, device=q.device)
        mask = mask.tril_(context_len - query_len)
    keys, values = context.unbind(1)
    return (
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=query_len == context_len,
            scale=scale,
            enable_gqa=True,
        )
        .squeeze(0)
        .transpose(0, 1)
    )
