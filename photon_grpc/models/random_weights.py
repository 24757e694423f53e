"""Weights drawn at random in place of a checkpoint's: the speed of a model without its gigabytes.

For benchmarks and load tests only. Every tensor is filled where it lies, so that a model of any size
stands in the time that the device needs to write it. The scales keep activations and logits in the range
of a trained model: linear layers preserve variance, and logits spread by about two, so that sampling has
neither one certain token nor a flat row to choose from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from photon_grpc.models.loader import Loadable

SEED = 0

_LOGIT_SPREAD = 2.0
_NORM_SPREAD = 0.1
_BIAS_SPREAD = 0.1


def draw_weights(model: Loadable, seed: int = SEED) -> None:
    """Fill every tensor of `model` and pack it, as `load_weights` does from files.

    The same seed gives the same weights on the same kind of device and data type.
    """
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, tensor in model.checkpoint_tensors():
            if tensor.device not in generators:
                generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
            mean, spread = _distribution(name, tensor)
            tensor.normal_(mean, spread, generator=generators[tensor.device])
    model.pack()


def _distribution(name: str, tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith("norm.weight"):
        return 1.0, _NORM_SPREAD
    if name.endswith(".bias"):
        return 0.0, _BIAS_SPREAD
    spread = 1 / math.sqrt(tensor.shape[-1])
    # The embedding may be the head as well. Its rows are then so short against what the layers add that
    # a token is no answer to itself.
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.0, _LOGIT_SPREAD * spread
    return 0.0, spread
