"""RMSNorm on the GPU against float64; what is refused, anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels.rmsnorm import add_rms_norm, rms_norm
from tests.support.kernels import (
    ALL_TYPES,
    STORAGE,
    FakeLauncher,
    Fenced,
    assert_repeatable,
    assert_ulps,
    randn,
)

EPS = 1e-5
ROWS = (1, 2, 3, 7, 8, 33, 256)
HIDDEN = (8, 64, 320, 896, 1024, 1536, 2048, 3584, 4096, 8192)


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_rms_norm(dtype: torch.dtype, rows: int, hidden: int) -> None:
    memory = Fenced()
    x, weight = randn(rows, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    on_device, weights = memory.copy(x), memory.copy(weight)

    def run() -> Tensor:
        out = memory.empty(rows, hidden, dtype=dtype)
        rms_norm(out, on_device, weights, EPS)
        return out

    assert_ulps(assert_repeatable(run), oracle(x, weight))
    memory.check()
    assert torch.equal(on_device.cpu(), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_rms_norm_of_a_float32_residual(dtype: torch.dtype, rows: int) -> None:
    memory = Fenced()
    x, weight = randn(rows, 2048, dtype=torch.float32) * 30, randn(2048, dtype=dtype, seed=1)
    out = memory.empty(rows, 2048, dtype=dtype)
    rms_norm(out, memory.copy(x), memory.copy(weight), EPS)

    assert_ulps(out, oracle(x, weight))
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [8, 320, 896, 2048, 4096, 16384])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("wide", [False, True])
def test_add_rms_norm(dtype: torch.dtype, rows: int, hidden: int, wide: bool) -> None:
    residual_type = torch.float32 if wide else dtype
    memory = Fenced()
    x, weight = randn(rows, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    residual = randn(rows, hidden, dtype=residual_type, seed=2)
    total = (residual.float() + x.float()).to(residual_type)
    on_device, weights = memory.copy(x), memory.copy(weight)
    sums: list[Tensor] = []

    def run() -> Tensor:
        out, kept = memory.empty(rows, hidden, dtype=dtype), memory.copy(residual)
        add_rms_norm(out, kept, on_device, weights, EPS)
        sums.append(kept)
        return out

    assert_ulps(assert_repeatable(run), oracle(total, weight))
    assert all(torch.equal(kept.cpu(), total) for kept in sums)
    memory.check()


@pytest.mark.gpu
def test_rows_that_lie_apart() -> None:
    """As a slice of a wider tensor: what lies between is not read."""
    wide = torch.full((6, 3072), float("nan"), device="cuda", dtype=torch.bfloat16)
    x, weight = randn(6, 1024, dtype=torch.bfloat16), randn(1024, dtype=torch.bfloat16, seed=1)
    wide[:, 512:1536] = x.cuda()
    out = torch.empty(6, 1024, device="cuda", dtype=torch.bfloat16)
    rms_norm(out, wide[:, 512:1536], weight.cuda(), EPS)

    assert_ulps(out, oracle(x, weight))


@pytest.mark.gpu
def test_squares_that_overflow_float16() -> None:
    x = torch.full((3, 4096), 300.0, device="cuda", dtype=torch.float16)
    out = torch.empty_like(x)
    rms_norm(out, x, torch.ones(4096, device="cuda", dtype=torch.float16), 1e-6)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.gpu
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    x, weight = randn(64, 2048, dtype=torch.bfloat16).cuda(), randn(2048, dtype=torch.bfloat16).cuda()
    together, alone = torch.empty_like(x), torch.empty_like(x)
    rms_norm(together, x, weight, EPS)
    for row in range(64):
        rms_norm(alone[row : row + 1], x[row : row + 1], weight, EPS)
    assert torch.equal(together, alone)


@pytest.mark.gpu
def test_nan_stays_in_its_row() -> None:
    x = randn(5, 2048, dtype=torch.bfloat16).cuda()
    x[2, 7] = float("nan")
    out = torch.empty_like(x)
    rms_norm(out, x, torch.ones(2048, device="cuda", dtype=torch.bfloat16), EPS)
    assert out.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    return FakeLauncher().install(monkeypatch)


@pytest.mark.parametrize(("hidden", "threads"), [(8, 32), (512, 32), (520, 64), (2048, 128), (16384, 1024)])
def test_threads_hold_a_row_between_them(fake: FakeLauncher, hidden: int, threads: int) -> None:
    x, weight = randn(3, hidden, dtype=torch.bfloat16), randn(hidden, dtype=torch.bfloat16)
    rms_norm(torch.empty_like(x), x, weight, EPS)
    add_rms_norm(torch.empty_like(x), x.float(), x, weight, EPS)
    plain, added = fake.launches
    assert (plain.grid, plain.num_threads) == (added.grid, added.num_threads) == ((3, 1, 1), threads)
    assert plain.variant.macros == {"PHOTON_STORAGE": "bf16", "PHOTON_RESIDUAL": "bf16"}
    assert added.variant.macros == {"PHOTON_STORAGE": "bf16", "PHOTON_RESIDUAL": "f32"}


def test_what_the_kernel_cannot_do_is_refused(fake: FakeLauncher) -> None:
    x, weight = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    cases = [
        (x[:, :60], torch.zeros(60, dtype=torch.bfloat16), "multiple of 8"),
        (torch.zeros(1, 32768, dtype=torch.bfloat16), torch.zeros(32768, dtype=torch.bfloat16), "too long"),
        (x.half(), weight, "x must be torch.bfloat16"),
        (x, torch.zeros(72, dtype=torch.bfloat16), "weight must have shape"),
        (x.double(), weight.double(), "no kernel stores"),
        (torch.zeros(64, 4, dtype=torch.bfloat16).t(), weight, "rows of x must be contiguous"),
        (torch.zeros(4, 68, dtype=torch.bfloat16)[:, :64], weight, "start on 16 bytes"),
        (torch.zeros(260, dtype=torch.bfloat16)[4:].view(4, 64), weight, "start on 16 bytes"),
    ]
    for bad_x, bad_weight, message in cases:
        out = torch.zeros(bad_x.shape, dtype=bad_weight.dtype)
        with pytest.raises(ValueError, match=message):
            rms_norm(out, bad_x, bad_weight, EPS)
    with pytest.raises(ValueError, match="out must have shape"):
        rms_norm(torch.zeros(3, 64, dtype=torch.bfloat16), x, weight, EPS)
    with pytest.raises(ValueError, match=r"residual must be torch\.bfloat16"):
        add_rms_norm(torch.zeros_like(x), x.half(), x, weight, EPS)
    assert fake.launches == []
