"""Which kernel CudaOps takes for o and down of few tokens, by the sizes alone; no GPU needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from photon_grpc.kernels import skinny_gemm_tma
from photon_grpc.kernels.launcher import TENSOR_MAP_BYTES, Device
from photon_grpc.ops import cuda_ops
from photon_grpc.ops.cuda_ops import CudaOps
from tests.support.kernels import FakeLauncher


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    launcher = FakeLauncher().install(monkeypatch)
    monkeypatch.setattr(cuda_ops, "require_cuda", lambda: launcher.device)
    monkeypatch.setattr(skinny_gemm_tma, "tensor_map", lambda *_: np.void(bytes(TENSOR_MAP_BYTES)))
    return launcher


def launched(fake: FakeLauncher, tokens: int, n: int, k: int) -> str:
    weight = torch.empty(n, k, dtype=torch.bfloat16)
    x, residual = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(tokens, n)
    assert CudaOps(max_decodes=1).linear_update(x, residual, (weight, None)) is None
    macros = fake.launches.pop().variant
    assert fake.launches == []
    name = macros.spec.name
    if name == "gemv":
        return name
    return f"{name} {macros.macros['PHOTON_ROWS']}/{macros.macros['PHOTON_SPLITS']}"


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    ("n", "k", "expected"),
    [
        # 128 tiles for 132 multiprocessors.
        (2048, 8192, "gemv"),
        # 16 MB and less.
        (896, 4864, "gemv"),
        (1536, 1536, "gemv"),
        # 160, 192, 224 and 320 tiles.
        (2560, 9728, "skinny_gemm_tma 128/4"),
        (3072, 8192, "skinny_gemm_tma 128/4"),
        (3584, 18944, "skinny_gemm_tma 128/4"),
        (5120, 13824, "skinny_gemm_tma 192/4"),
        (1536, 8960, "skinny_gemm_tma 128/8"),
        # Two halves of 64 narrow tiles.
        (4096, 14336, "skinny_gemm_tma 64/2"),
    ],
)
def test_few_tokens(fake: FakeLauncher, tokens: int, n: int, k: int, expected: str) -> None:
    assert launched(fake, tokens, n, k) == expected


def test_more_tokens_are_cut_by_the_weight_alone(fake: FakeLauncher) -> None:
    assert {launched(fake, tokens, 4096, 14336) for tokens in (5, 16, 64, 128)} == {"skinny_gemm_tma 128/3"}
    assert launched(fake, 5, 2048, 8192) == "skinny_gemm_tma 128/6"


def test_without_the_copy_engine_gemv_has_them_all(fake: FakeLauncher) -> None:
    fake.device = Device(0, "none", (8, 0), 108, 163 << 10)
    assert {launched(fake, tokens, 5120, 4096) for tokens in (1, 4, 16)} == {"gemv"}
