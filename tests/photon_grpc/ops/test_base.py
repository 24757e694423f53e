"""The default compositions: what a fused kernel has to reproduce."""

from __future__ import annotations

import torch

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

    ops.qk_norm_rope(heads[:, :3], heads[:, 3:], q_weight, k_weight, 1e-3, cos, sin)
    torch.testing.assert_close(heads.double(), normed * cos + swapped * sin, rtol=1e-5, atol=1e-5)
