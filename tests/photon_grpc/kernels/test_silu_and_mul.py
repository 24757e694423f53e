"""SwiGLU on the GPU against float64; what is refused, anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels.silu_and_mul import silu_and_mul
from tests.support.kernels import ALL_TYPES, FakeLauncher, Fenced, assert_repeatable, assert_ulps, randn


def oracle(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [8, 768, 2040, 2048, 2056, 4864, 8192, 18944])
@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 256])
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_silu_and_mul(dtype: torch.dtype, tokens: int, inner: int) -> None:
    memory = Fenced()
    gate_up = (randn(tokens, 2 * inner, dtype=torch.float32) * 4).to(dtype)
    on_device = memory.copy(gate_up)

    def run() -> Tensor:
        out = memory.empty(tokens, inner, dtype=dtype)
        silu_and_mul(out, on_device)
        return out

    # The smallest float16 values are far apart; a product that small does not matter to a sum of them.
    assert_ulps(assert_repeatable(run), oracle(gate_up), floor=torch.finfo(dtype).tiny)
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_both_ends(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 60000.0]], dtype=dtype)
    up = torch.tensor([[80.0, -80.0, 0.5, 80.0, -2.0, 3.0, 80.0, 1.0]], dtype=dtype)
    gate_up = torch.cat((gate, up), dim=-1)
    out = torch.full((1, 8), float("nan"), dtype=dtype, device="cuda")
    silu_and_mul(out, gate_up.cuda())

    assert_ulps(out, oracle(gate_up), floor=torch.finfo(dtype).tiny)


@pytest.mark.gpu
def test_more_tokens_than_a_grid_has_in_y() -> None:
    gate_up = torch.randn(70_000, 16, device="cuda", dtype=torch.bfloat16)
    out = torch.full((70_000, 8), float("nan"), device="cuda", dtype=torch.bfloat16)
    silu_and_mul(out, gate_up)
    assert_ulps(out, oracle(gate_up))


def test_what_the_kernel_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        silu_and_mul(torch.zeros(2, 12), torch.zeros(2, 24))
    with pytest.raises(ValueError, match="gate_up must have shape"):
        silu_and_mul(torch.zeros(2, 16), torch.zeros(2, 16))
    with pytest.raises(ValueError, match="gate_up must be contiguous"):
        silu_and_mul(torch.zeros(2, 16), torch.zeros(2, 40)[:, :32])
    assert fake.launches == []
    silu_and_mul(torch.zeros(2, 2056), torch.zeros(2, 4112))
    assert fake.launches[0].grid == (2, 2, 1)
