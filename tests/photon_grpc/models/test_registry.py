"""Architecture names and the classes behind them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from photon_grpc.errors import ModelLoadError
from photon_grpc.models.config import FAMILIES
from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.registry import MODELS, build_model, load_config
from photon_grpc.ops.torch_ops import TorchOps
from tests.support.tiny_model import tiny_model_folder

CPU = torch.device("cpu")


def test_config_and_registry_know_the_same_architectures() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_builds_every_family_in_the_asked_type(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    config = load_config(tiny_model_folder(tmp_path, family, tokenizer=False))
    model = build_model(config, TorchOps(), dtype=dtype, device=CPU)

    assert isinstance(model, DecoderModel)
    assert {tensor.dtype for _, tensor in model.checkpoint_tensors()} == {dtype}


def test_a_model_larger_than_memory_is_a_startup_error(tmp_path: Path) -> None:
    config = load_config(tiny_model_folder(tmp_path, tokenizer=False))
    absurd = dataclasses.replace(config, vocab_size=1 << 31, hidden_size=1 << 31)
    with pytest.raises(ModelLoadError, match="do not fit into memory"):
        build_model(absurd, TorchOps(), dtype=torch.float32, device=CPU)
