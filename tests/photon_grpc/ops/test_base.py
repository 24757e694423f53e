"""The default compositions: what a fused kernel has to reproduce."""

from __future__ import annotations

import pytest
import torch

from photon_grpc.ops.base import AttentionMetadata, AttentionWeights
from photon_grpc.ops.torch_ops import TorchOps


def test_add_rms_norm_updates_the_residual_in_place() -> None:
    ops = TorchOps()
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    total = x + residual
    result = ops.add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(residual, total)
    torch.testing.assert_close(result, ops.rms_norm(total, weight, 1e-5), rtol=0, atol=0)


def test_qk_norm_rope_normalises_each_head_before_it_rotates() -> None:
    ops = TorchOps()
    heads = torch.randn(4, 5, 8)
    q_weight, k_weight = torch.randn(8), torch.randn(8)
    cos, sin = torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    wide = heads.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    normed[:, :3] *= q_weight
    normed[:, 3:] *= k_weight
    swapped = torch.cat((normed[..., 4:], normed[..., :4]), -1)

    ops.qk_norm_rope(heads[:, :3], heads[:, 3:], q_weight, k_weight, 1e-3, (cos, sin))
    torch.testing.assert_close(heads.double(), normed * cos + swapped * sin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_rope_store_kv_is_its_parts_in_order(normed: bool) -> None:
    ops = TorchOps()
    heads = torch.randn(3, 4 + 2 * 2, 8)
    table = torch.randn(10, 8)
    cache = torch.zeros(ops.kv_layer_shape(5, 4, 2, 8))
    rotary = ops.rotary(table, torch.tensor([7, 0, 3]))
    metadata = AttentionMetadata(
        num_decodes=3,
        slot_mapping=torch.tensor([13, 2, 6]),
        block_tables=torch.zeros(3, 1, dtype=torch.int64),
        context_lens=torch.ones(3, dtype=torch.int64),
        query_starts=(0, 1, 2, 3),
        context_lens_host=(1, 1, 1),
    )
    q, k, v = heads[:, :4].clone(), heads[:, 4:6].clone(), heads[:, 6:].clone()
    norms = (torch.randn(8), torch.randn(8)) if normed else None
    if norms is not None:
        q, k = ops.rms_norm(q, norms[0], 1e-3), ops.rms_norm(k, norms[1], 1e-3)
    ops.rope(q, rotary)
    ops.rope(k, rotary)

    unused = torch.empty(0)
    weights = AttentionWeights(unused, (unused, None), norms, num_heads=4, head_dim=8, eps=1e-3, scale=1.0)
    found_q, found_kv = ops.rope_store_kv(heads, weights, rotary, cache, metadata)
    assert torch.equal(found_q, q)
    assert torch.equal(found_kv, torch.stack((k, v), dim=1))
    assert torch.equal(cache.flatten(0, 1)[[13, 2, 6]], found_kv)
    assert int(cache.flatten(0, 1).abs().sum((1, 2, 3)).count_nonzero()) == 3
