"""The parts of a decoder: projections, norms and rotary tables over weights in their final storage.

A part names the checkpoint tensors that it is filled from and gives each a view to be copied into, so
projections that are one product at run time (q, k, v; gate, up) are one tensor from the start, and the
loader needs no knowledge of any model. No state besides weights. Engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from photon_grpc.models.config import LinearRopeScaling, Llama3RopeScaling, RopeConfig
from photon_grpc.ops.base import Ops, Projection

CheckpointTensors = Iterator[tuple[str, Tensor]]
"""Pairs of a name in the checkpoint and the storage that it fills."""


class Linear:
    """One or several dense projections of the same input, as one product.

    `parts` are the checkpoint's modules and their numbers of output features, in storage order.
    """

    def __init__(
        self,
        ops: Ops,
        in_features: int,
        parts: Sequence[tuple[str, int]],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        out_features = sum(rows for _, rows in parts)
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self._ops = ops
        self._parts = tuple(parts)

    @property
    def projection(self) -> Projection:
        """What the Ops multiply with."""
        return self.weight, self.bias

    def pack(self) -> None:
        """Let the Ops choose the weight's final form. Nothing can be loaded afterwards."""
        self.weight = self._ops.pack_linear(self.weight)

    def checkpoint_tensors(self, prefix: str) -> CheckpointTensors:
        start = 0
        for name, rows in self._parts:
            yield f"{prefix}.{name}.weight", self.weight[start : start + rows]
            if self.bias is not None:
                yield f"{prefix}.{name}.bias", self.bias[start : start + rows]
            start += rows


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """[num_positions, head_dim] float32: cos of every pair, then sin, as `Ops.rotary` takes it.

    Angles are products in float64: at position 32k a float32 angle is already off by a thousandth.
    Only cos and sin are rounded.
    """
    positions = torch.arange(num_positions, dtype=torch.float64)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))  # [num_positions, head_dim / 2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, torch.float32)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float64: radians per position of each pair (Su et al., 2021), after scaling."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = torch.pow(rope.theta, -exponents)
    match rope.scaling:
        case None:
            return frequencies
        case LinearRopeScaling(factor):
            return frequencies / factor
        case Llama3RopeScaling() as scaling:
            return _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Keep frequencies that turn often within the original context, divide those that hardly turn.

    Between `low_freq_factor` and `high_freq_factor` turns the two are mixed linearly (Llama 3.1).
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
