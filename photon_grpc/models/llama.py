"""The decoder that Llama 2/3.x, Mistral, Qwen2/2.5 and Qwen3 share.

A pre-norm transformer with rotary, grouped-query attention and a SwiGLU MLP; what differs between the
families (biases, q/k norm, head sizes, rope scaling) is data in `ModelConfig`. Owns weights and the
order of operations. Knows no device (every operation is the Ops' business), no request and no batch
policy. Used on the engine thread, under `torch.inference_mode()`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from photon_grpc.models.config import ModelConfig
from photon_grpc.models.layers import CheckpointTensors, Linear, rotary_table
from photon_grpc.ops.base import (
    AttentionMetadata,
    AttentionWeights,
    LayerCaches,
    Ops,
    Projection,
    Rotary,
)


class DecoderModel:
    """A whole model, from token ids to logits. Weights are uninitialised until they are loaded."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self._ops = ops
        num_positions = min(max_positions or config.max_position_embeddings, config.max_position_embeddings)
        self._rotary_table = rotary_table(config.rope, config.head_dim, num_positions, device)
        self._embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self._layers = tuple(_DecoderLayer(config, ops, dtype, device) for _ in range(config.num_layers))
        self._norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self._head = self._embedding if config.tie_word_embeddings else torch.empty_like(self._embedding)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_cache: LayerCaches,
        metadata: AttentionMetadata,
        *,
        wanted: Tensor | None = None,
        num_layers: int | None = None,
    ) -> Tensor:
        """Hidden states after the final norm: [num_tokens, hidden_size].

        `token_ids` and `positions` are int64 [num_tokens], in the row order of `metadata`. Writes the
        keys and values of all tokens into `kv_cache`. With `wanted`, int64 [n], the states are those of these
        tokens alone, [n, hidden_size]: behind the last layer's attention nobody reads the others, and what
        follows it is most of a layer. With `num_layers` it goes through the first ones alone, for whoever
        wants every kind of operation done, and no result: the second does all that follow do.
        """
        rotary = self._ops.rotary(self._rotary_table, positions)
        residual = self._ops.embedding(token_ids, self._embedding)
        update: Tensor | None = None
        layers, caches = self._layers[:num_layers], kv_cache.layers[:num_layers]
        for layer, layer_cache in zip(layers[:-1], caches[:-1], strict=True):
            update = layer(update, residual, rotary, layer_cache, metadata)
        last, last_cache = layers[-1], caches[-1]
        attended = last.attention(update, residual, rotary, last_cache, metadata)
        if wanted is not None:
            attended, residual = attended.index_select(0, wanted), residual.index_select(0, wanted)
        update = last.finish(attended, residual)
        return self._ops.add_norm(update, residual, self._norm, self.config.rms_norm_eps)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary: [rows, hidden_size] -> [rows, vocab_size] float32."""
        return self._ops.logits(hidden, self._head)

    def find_best_logits(self, hidden: Tensor) -> Tensor | None:
        """The best of each row's logits as `Ops.best_logits` has them; None where it takes the logits."""
        return self._ops.best_logits(hidden, self._head)

    def checkpoint_tensors(self) -> CheckpointTensors:
        """Every tensor that a checkpoint must have, with the storage that it fills."""
        yield "model.embed_tokens.weight", self._embedding
        for index, layer in enumerate(self._layers):
            yield from layer.checkpoint_tensors(f"model.layers.{index}")
        yield "model.norm.weight", self._norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self._head

    def pack(self) -> None:
        """Bring the loaded weights into the form that the Ops compute with, one at a time.

        A tied head stays as it is: rows of it are still looked up, and two copies would cost more memory
        than the packed form gains.
        """
        for layer in self._layers:
            layer.pack()
        if not self.config.tie_word_embeddings:
            self._head = self._ops.pack_linear(self._head)


class _DecoderLayer:
    def __init__(self, config: ModelConfig, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self._ops = ops
        self._eps = config.rms_norm_eps
        self._input_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.attention = _Attention(config, ops, self._input_norm, dtype, device)
        self._post_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self._gate_up = Linear(
            ops,
            config.hidden_size,
            (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )
        self._down = Linear(
            ops,
            config.intermediate_size,
            (("down_proj", config.hidden_size),),
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )

    def __call__(
        self,
        update: Tensor | None,
        residual: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor | None:
        """Take the previous layer's `update` into `residual`, in place, and return this layer's.

        Either may be None: some Ops add at once, others leave the addition to the norm that reads the sum.
        """
        attended = self.attention(update, residual, rotary, layer_cache, metadata)
        return self.finish(attended, residual)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor | None:
        """What the layer does behind its attention, token by token; its update as the call has it."""
        ops = self._ops
        update = ops.linear_update(attended, residual, self.attention.output)
        inner = ops.norm_gate_up_silu(update, residual, self._post_norm, self._eps, self._gate_up.projection)
        return ops.linear_update(inner, residual, self._down.projection)

    def pack(self) -> None:
        self.attention.pack()
        self._gate_up.pack()
        self._down.pack()

    def checkpoint_tensors(self, prefix: str) -> CheckpointTensors:
        yield f"{prefix}.input_layernorm.weight", self._input_norm
        yield from self.attention.checkpoint_tensors(f"{prefix}.self_attn")
        yield f"{prefix}.post_attention_layernorm.weight", self._post_norm
        yield from self._gate_up.checkpoint_tensors(f"{prefix}.mlp")
        yield from self._down.checkpoint_tensors(f"{prefix}.mlp")


class _Attention:
    """`norm` is the layer's input norm, which is fused with the projection to heads."""

    def __init__(
        self, config: ModelConfig, ops: Ops, norm: Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ops = ops
        self._qkv = Linear(
            ops,
            config.hidden_size,
            (("q_proj", config.q_size), ("k_proj", config.kv_size), ("v_proj", config.kv_size)),
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self._output = Linear(
            ops,
            config.q_size,
            (("o_proj", config.hidden_size),),
            bias=config.o_bias,
            dtype=dtype,
            device=device,
        )
        # One row each for q and k; no storage where the family has no such norm.
        self._qk_norm = torch.empty(2 * config.qk_norm, config.head_dim, dtype=dtype, device=device)
        self._weights = AttentionWeights(
            norm=norm,
            qkv=self._qkv.projection,
            qk_norm=(self._qk_norm[0], self._qk_norm[1]) if config.qk_norm else None,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
        )

    def __call__(
        self,
        update: Tensor | None,
        residual: Tensor,
        rotary: Rotary,
        layer_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """What it gives for each token, before the output projection."""
        return self._ops.norm_qkv_attention(update, residual, self._weights, rotary, layer_cache, metadata)

    @property
    def output(self) -> Projection:
        """From what attention gives to an update of the residual."""
        return self._output.projection

    def pack(self) -> None:
        self._qkv.pack()
        # At once, so that the form before it is free as soon as there is the next.
        self._weights = replace(self._weights, qkv=self._qkv.projection)
        self._output.pack()

    def checkpoint_tensors(self, prefix: str) -> CheckpointTensors:
        yield from self._qkv.checkpoint_tensors(prefix)
        yield from self._output.checkpoint_tensors(prefix)
        for name, weight in zip(("q_norm", "k_norm"), self._qk_norm, strict=False):
            yield f"{prefix}.{name}.weight", weight
