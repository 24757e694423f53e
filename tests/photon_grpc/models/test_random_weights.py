"""Drawn weights: every tensor filled, the same each time, logits that a sampler can work with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.random_weights import draw_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.torch_ops import TorchOps
from tests.support import paged_model
from tests.support.tiny_model import tiny_model_folder


def _empty(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    model = build_model(load_config(folder), TorchOps(), dtype=dtype, device=torch.device("cpu"))
    for _, tensor in model.checkpoint_tensors():
        tensor.fill_(torch.nan)
    return model


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_drawn_and_the_seed_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(DecoderModel, "pack", lambda self: None)
    folder = tiny_model_folder(tmp_path, family, tokenizer=False)
    first, same, other = (_empty(folder, dtype) for _ in range(3))
    draw_weights(first)
    draw_weights(same)
    draw_weights(other, seed=1)

    found, again, different = (dict(model.checkpoint_tensors()) for model in (first, same, other))
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all()), name
        assert float(tensor.float().std()) > 0, name
        assert torch.equal(tensor, again[name]), name
        assert not torch.equal(tensor, different[name]), name


def test_the_model_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[bool] = []
    monkeypatch.setattr(DecoderModel, "pack", lambda self: packed.append(True))
    draw_weights(_empty(tiny_model_folder(tmp_path, tokenizer=False)))
    assert packed == [True]


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen3"])
@pytest.mark.parametrize("num_layers", [2, 24])
def test_logits_are_spread_like_a_model_s_and_depend_on_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, num_layers: int
) -> None:
    """By about two, however deep the model is; and neither head answers a token with itself."""
    folder = tiny_model_folder(tmp_path, family, tokenizer=False, num_hidden_layers=num_layers)
    monkeypatch.setattr(paged_model, "load_weights", lambda model, folder: draw_weights(model))
    ids = paged_model.random_prompt(200)
    (logits,) = paged_model.PagedModel(folder).step([("one", ids)])

    assert bool(logits.isfinite().all())
    assert 1.2 < float(logits.std()) < 3.5
    best = logits.argmax(-1)
    assert len(set(best.tolist())) > 20
    assert float((best == torch.tensor(ids)).float().mean()) < 0.2
