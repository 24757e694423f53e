"""The seam between a model and the arithmetic of a device.

Owns the `Ops` interface, the metadata that tells attention how the rows of a step lie in the paged
cache, and the default compositions: a fused step is written here in terms of primitives, so a backend
may replace it with one kernel and has its oracle from the start. Knows nothing of models, requests or
schedulers. Used on the engine thread only.

Shapes: `num_tokens` counts the query tokens of all rows of a step, laid end to end. Tensors of one
step live on one device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

Projection = tuple[Tensor, Tensor | None]
"""A weight [out, in], as `Ops.pack_linear` left it, and its bias."""

Rotary = tuple[Tensor, Tensor]
"""What `Ops.rotary` makes for the tokens of a step and `rope` of the same Ops takes; opaque elsewhere."""


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of one step are, and what each of them may see. Built once per step.

    Rows stand in this order: first `num_decodes` rows of exactly one query token, then the others, of
    any number. Within a row the query tokens are the last ones of its context.
    """

    num_decodes: int
    slot_mapping: Tensor
    """[num_tokens] int64: block_id * block_size + offset, where each token's key and value go."""
    block_tables: Tensor
    """[num_rows, max_blocks] int64; entries behind a row's context are never used."""
    context_lens: Tensor
    """[num_rows] int64: tokens visible once this step's are written (positions 0..context_len - 1)."""
    query_starts: tuple[int, ...]
    """num_rows + 1 prefix sums of the query lengths, on the host."""
    context_lens_host: tuple[int, ...]
    """`context_lens`, on the host."""
    query_starts_device: Tensor | None = None
    """[rows behind the decodes + 1] int32: their part of `query_starts` on the device, from 0 on. A step
    that has it may be captured and replayed for other lengths: what is on the host is then void."""
    context_is_old: bool = False
    """Whether all that the decode rows see, but for their own tokens, was written before this step began."""
    plan: Any = field(default=None, init=False, repr=False)
    """What the backend derived from the rest at its first use in the step; it alone reads it."""


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """What the attention of one layer computes by, but for its output projection. Made once per layer.

    The weights are in their final form: as `Ops.pack_linear` left them.
    """

    norm: Tensor
    """[hidden], of the norm before the layer."""
    qkv: Projection
    """To the query, key and value heads side by side: [(num_heads + 2 * num_kv_heads) * head_dim, hidden]."""
    qk_norm: tuple[Tensor, Tensor] | None
    """[head_dim] each, of the norms of q and k heads; None where the family has none."""
    num_heads: int
    """Query heads."""
    head_dim: int
    eps: float
    """Of the norms."""
    scale: float
    """Of the scores."""


class LayerCaches(Protocol):
    """The part of a KV cache that a model passes through: one tensor per layer, laid out by the Ops."""

    @property
    def layers(self) -> Sequence[Tensor]: ...


class Ops(ABC):
    """Everything a decoder asks of a device. Stateless between steps; injected into the model.

    Results are new tensors unless a method says that it works in place. Sums, exponents and norms are
    computed in float32 or wider whatever the storage type.
    """

    @abstractmethod
    def kv_layer_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Shape of one layer's cache. Only `store_kv` and `attention` of the same Ops look inside."""

    @abstractmethod
    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of `weight` [vocab, hidden] for `token_ids` [num_tokens]: [num_tokens, hidden]."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] times `weight` [out, in] transposed, plus `bias`; `weight` may be packed."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    @abstractmethod
    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for `gate_up` [num_tokens, 2 * inner], gate first: [num_tokens, inner]."""

    @abstractmethod
    def rope(self, x: Tensor, rotary: Rotary) -> None:
        """Rotate the heads of `x` [num_tokens, heads, head_dim] in place (Su et al., 2021).

        The pairs are (i, i + head_dim / 2), as in Hugging Face checkpoints.
        """

    @abstractmethod
    def store_kv(self, kv: Tensor, layer_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write `kv` [num_tokens, 2, num_kv_heads, head_dim] (keys, values) into its slots."""

    @abstractmethod
    def attention(
        self, q: Tensor, kv: Tensor, layer_cache: Tensor, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        """Causal attention of each row over its own context: [num_tokens, num_heads * head_dim].

        `q` is [num_tokens, num_heads, head_dim]; query head h reads kv head h // (num_heads //
        num_kv_heads). The step's `kv` must be in `layer_cache` already and is passed besides, for a
        row whose whole context it is. No slot outside a row's context has any effect, whatever it holds.
        """

    def pack_linear(self, weight: Tensor) -> Tensor:
        """The form in which `linear` likes a weight best, made once after loading; it may take its place.

        Only `linear` of the same Ops can read the result.
        """
        return weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add `x` to `residual` in place and return the norm of the sum."""
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

    def rotary(self, table: Tensor, positions: Tensor) -> Rotary:
        """What `rope` needs to know of tokens at `positions` [num_tokens].

        `table` is float32 [num_positions, head_dim]: cos of each pair, then sin. By default cos and sin of
        the tokens, float32 [num_tokens, 1, head_dim]: cos repeated in both halves, sin negated in the
        first.
        """
        cos, sin = table.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def qk_norm_rope(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rotary: Rotary
    ) -> None:
        """Normalise each head of `q` and `k` over head_dim, then rotate it; both in place."""
        q.copy_(self.rms_norm(q, q_weight, eps))
        k.copy_(self.rms_norm(k, k_weight, eps))
        self.rope(q, rotary)
        self.rope(k, rotary)

    def rope_store_kv(
        self,
        heads: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Normalise q and k where there is a `qk_norm`, rotate them, and write k and v into the cache.

        `heads` [num_tokens, num_heads + 2 * num_kv_heads, head_dim] holds the query, key and value heads of
        each token side by side, and may be overwritten. Returns the `q` and `kv` that `attention` of the same
        Ops takes.
        """
        num_tokens, all_heads, head_dim = heads.shape
        num_heads = weights.num_heads
        num_kv_heads = (all_heads - num_heads) // 2
        q = heads[:, :num_heads]
        # q and k stand side by side, so one call rotates both.
        if weights.qk_norm is not None:
            k = heads[:, num_heads : num_heads + num_kv_heads]
            self.qk_norm_rope(q, k, *weights.qk_norm, weights.eps, rotary)
        else:
            self.rope(heads[:, : num_heads + num_kv_heads], rotary)
        kv = heads[:, num_heads:].view(num_tokens, 2, num_kv_heads, head_dim)
        self.store_kv(kv, layer_cache, metadata.slot_mapping)
        return q, kv

    def add_norm(self, update: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of `residual`, after `update` is added to it in place where there is one."""
        if update is None:
            return self.rms_norm(residual, weight, eps)
        return self.add_rms_norm(update, residual, weight, eps)

    # The steps of a decoder layer, as a backend may fuse them: from one residual to the next. `projection` is
    # (weight, bias). An update is what a product adds to the residual. It is None where the backend has added
    # it already, else whoever reads the residual next adds it, which fuses with the norm there.

    def norm_qkv_rope_store_kv(
        self,
        update: Tensor | None,
        residual: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Norm, projection to heads, and `rope_store_kv`; returns what that returns."""
        x = self.add_norm(update, residual, weights.norm, weights.eps)
        heads = self.linear(x, *weights.qkv).view(x.shape[0], -1, weights.head_dim)
        return self.rope_store_kv(heads, weights, rotary, layer_cache, metadata)

    def norm_qkv_attention(
        self,
        update: Tensor | None,
        residual: Tensor,
        weights: AttentionWeights,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """`norm_qkv_rope_store_kv`, and `attention` of what that returns."""
        q, kv = self.norm_qkv_rope_store_kv(update, residual, weights, rotary, layer_cache, metadata)
        return self.attention(q, kv, layer_cache, metadata, weights.scale)

    def norm_gate_up_silu(
        self, update: Tensor | None, residual: Tensor, norm: Tensor, eps: float, projection: Projection
    ) -> Tensor:
        """Norm, projection to gate and up, and `silu_and_mul`: [num_tokens, inner]."""
        return self.silu_and_mul(self.linear(self.add_norm(update, residual, norm, eps), *projection))

    def linear_update(self, x: Tensor, residual: Tensor, projection: Projection) -> Tensor | None:
        """The update that `x` [num_tokens, in] brings, or None where `residual` has it now."""
        return self.linear(x, *projection)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Scores of `hidden` [rows, hidden] against `weight` [vocab, hidden]: [rows, vocab] float32."""
        return self.linear(hidden, weight).float()

    def best_logits(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        """What `kernels.best_token` needs of `logits`: [rows, parts] int64, the best of each row by parts.

        None where no kernel finds them on the way, and the logits themselves have to be looked at.
        """
        return None
