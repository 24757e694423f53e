"""From a model folder to a model that has everything but its weights.

Owns the map from Hugging Face architecture names to classes. A new family is a row here, one in
`config.FAMILIES`, and a module if its forward pass differs. Any thread; the model itself belongs to
the engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from photon_grpc.errors import ModelLoadError
from photon_grpc.models.config import ModelConfig, read_config
from photon_grpc.ops.base import Ops

if TYPE_CHECKING:
    from photon_grpc.models.llama import DecoderModel

MODELS: Mapping[str, str] = {
    "LlamaForCausalLM": "photon_grpc.models.llama:DecoderModel",
    "MistralForCausalLM": "photon_grpc.models.llama:DecoderModel",
    "Qwen2ForCausalLM": "photon_grpc.models.llama:DecoderModel",
    "Qwen3ForCausalLM": "photon_grpc.models.llama:DecoderModel",
}


def load_config(folder: Path) -> ModelConfig:
    """The checked configuration of the checkpoint in `folder`.

    Raises ModelLoadError or UnsupportedModelError, naming file and key.
    """
    return read_config(folder)


def build_model(
    config: ModelConfig,
    ops: Ops,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int | None = None,
) -> DecoderModel:
    """An empty model of `config`: storage is allocated, `loader.load_weights` fills it.

    Positions up to `max_positions` can be computed; None: all that the model allows. Raises
    ModelLoadError where the storage does not fit into memory.
    """
    module_name, class_name = MODELS[config.architecture].split(":")
    model_class: type[DecoderModel] = getattr(import_module(module_name), class_name)
    try:
        return model_class(config, ops, dtype=dtype, device=device, max_positions=max_positions)
    except (MemoryError, RuntimeError) as error:
        size = config.num_parameters * dtype.itemsize
        raise ModelLoadError(f"the model's weights ({size} bytes) do not fit into memory") from error
