"""Rotary tables against float64 and transformers; projections and their views."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from photon_grpc.models.config import Llama3RopeScaling, RopeConfig, read_config
from photon_grpc.models.layers import Linear, inverse_frequencies, rotary_table
from photon_grpc.ops.torch_ops import TorchOps
from tests.support.tiny_model import tiny_model_folder

CPU = torch.device("cpu")
LLAMA_3_2 = Llama3RopeScaling(32.0, 1.0, 4.0, 8192)


def test_angles_at_32k_match_float64() -> None:
    """float32 angles are off by 1e-3 here, bfloat16 tables by more."""
    table = rotary_table(RopeConfig(500000.0), head_dim=128, num_positions=32769, device=CPU)
    positions = torch.tensor([0, 1, 4095, 32767, 32768])
    cos, sin = TorchOps().rotary(table, positions)
    exponents = torch.arange(64, dtype=torch.float64) / 64
    angles = positions.double()[:, None] / 500000.0**exponents

    assert cos.dtype is torch.float32
    for half in (cos[:, 0, :64], cos[:, 0, 64:]):
        torch.testing.assert_close(half.double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[:, 0, :64].double(), -angles.sin(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[:, 0, 64:].double(), angles.sin(), rtol=0, atol=1e-7)


def test_each_row_is_rotated_by_its_own_position() -> None:
    table = rotary_table(RopeConfig(10000.0), head_dim=8, num_positions=50, device=CPU)
    ops = TorchOps()
    together = ops.rotary(table, torch.tensor([7, 0, 49, 7]))
    for row, position in enumerate((7, 0, 49, 7)):
        alone_there = ops.rotary(table, torch.tensor([position]))
        for batch, alone in zip(together, alone_there, strict=True):
            assert torch.equal(batch[row], alone[0])


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_theta": 1234.5}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
        ("llama", {"spelling": "rope_theta", "rope_scaling": {"type": "linear", "factor": 2.5}}),
        ("llama3", {}),
        ("llama3", {"spelling": "rope_theta", "head_dim": 128, "rope_theta": 500000.0}),
    ],
)
def test_inverse_frequencies_are_those_of_transformers(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    folder = tiny_model_folder(tmp_path, family, tokenizer=False, **overrides)
    config = read_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq

    actual = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-6, atol=0)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    plain = inverse_frequencies(RopeConfig(500000.0), 64)
    scaled = inverse_frequencies(RopeConfig(500000.0, LLAMA_3_2), 64)

    assert float(scaled[0]) == float(plain[0])
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / 32)
    assert bool((scaled <= plain).all())


def test_linear_parts_are_views_of_one_weight() -> None:
    ops = TorchOps()
    linear = Linear(ops, 12, (("q_proj", 6), ("k_proj", 3)), bias=True, dtype=torch.float32, device=CPU)
    views = dict(linear.checkpoint_tensors("attn"))
    assert list(views) == ["attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight", "attn.k_proj.bias"]
    for view in views.values():
        view.normal_()
    x = torch.randn(2, 12)
    expected = torch.cat(
        [x @ views[f"attn.{name}.weight"].T + views[f"attn.{name}.bias"] for name in ("q_proj", "k_proj")], 1
    )

    torch.testing.assert_close(ops.linear(x, *linear.projection), expected)
    linear.pack()
    torch.testing.assert_close(ops.linear(x, *linear.projection), expected)
