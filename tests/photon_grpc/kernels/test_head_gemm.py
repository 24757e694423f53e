"""The head of a model for many rows: on a GPU of compute capability 9.0 by float64; refusals anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import head_gemm as module
from photon_grpc.kernels import linear_output
from photon_grpc.kernels.best_token import best_token
from photon_grpc.kernels.head_gemm import head_gemm, is_faster, num_parts
from photon_grpc.kernels.launcher import TENSOR_MAP_BYTES, Device, require_cuda
from photon_grpc.kernels.sampling import SamplingState
from tests.support.kernels import STORAGE, FakeLauncher, Fenced, randn

ROWS = (1, 15, 64, 65, 128, 129, 200, 255, 256, 257, 400, 513, 700)
# (vocabulary, k): models' own, and tails of every kind.
SIZES = ((32000, 256), (1000, 72), (257, 64), (255, 200), (1, 8), (50257, 128))


@pytest.fixture
def gpu() -> Device:
    device = require_cuda()
    if not module.is_available():
        pytest.skip(f"{device.name} is {device.arch}, this is a kernel of sm_90a")
    return device


def tokens_of(ranks: Tensor) -> list[int]:
    rows = len(ranks)
    state = SamplingState.allocate(rows, 1, torch.device("cuda"))
    token_ids = torch.empty(rows, dtype=torch.int32, device="cuda")
    best_token(token_ids, ranks, torch.arange(rows, dtype=torch.int32, device="cuda"), state)
    tokens: list[int] = token_ids.tolist()
    return tokens


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(("vocab", "k"), SIZES)
def test_logits_and_their_best(vocab: int, k: int, dtype: torch.dtype, gpu: Device) -> None:
    memory = Fenced()
    values = randn(vocab, k, dtype=dtype, seed=1)
    # Equals in one tile, in neighbours and at the end: the first one is the token.
    values[[min(vocab - 1, 9), vocab // 2, vocab - 1]] = values[0].clone()
    weight = memory.copy(values)
    exact_weight = weight.double()
    for rows in ROWS:
        x = randn(rows, k, dtype=dtype, seed=rows)
        x[rows // 2] = values[0] * 4
        on_device = memory.copy(x)
        found = []
        for stride in (vocab, vocab + 3):
            logits = memory.empty(rows, stride, dtype=torch.float32)
            ranks = memory.empty(rows, num_parts(vocab), dtype=torch.int64)
            head_gemm(linear_output.float_rows(logits[:, :vocab]), on_device, weight)
            head_gemm(linear_output.best_rows(ranks, vocab), on_device, weight)
            assert bool(logits[:, vocab:].isnan().all())
            exact = on_device.double() @ exact_weight.T
            size = on_device.double().abs() @ exact_weight.abs().T
            assert bool(((logits[:, :vocab].double() - exact).abs() <= 2e-6 * size + 1e-9).all()), rows
            largest = logits[:, :vocab] == logits[:, :vocab].max(-1, keepdim=True).values
            ids = torch.arange(vocab, device="cuda")
            first = torch.where(largest, ids, vocab).min(-1).values.tolist()
            assert tokens_of(ranks) == first, rows
            found.append((logits[:, :vocab].clone(), ranks))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), "not the same twice"
    memory.check()


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours(gpu: Device) -> None:
    x = randn(700, 128, dtype=torch.bfloat16, seed=1).cuda()
    weight = randn(3000, 128, dtype=torch.bfloat16, seed=2).cuda()

    def logits_of(rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), 3000, device="cuda")
        head_gemm(linear_output.float_rows(out), rows, weight)
        return out

    whole = logits_of(x)
    for start, stop in ((0, 1), (0, 129), (130, 300), (444, 700), (699, 700)):
        assert torch.equal(logits_of(x[start:stop]), whole[start:stop])


@pytest.mark.gpu
def test_a_weight_that_is_not_finite_leaves_no_token(gpu: Device) -> None:
    x = randn(300, 64, dtype=torch.bfloat16, seed=1).cuda()
    weight = randn(700, 64, dtype=torch.bfloat16, seed=2).cuda()
    ranks = torch.empty(300, num_parts(700), dtype=torch.int64, device="cuda")
    x[7, 3] = torch.nan
    head_gemm(linear_output.best_rows(ranks, 700), x, weight)
    tokens = tokens_of(ranks)
    assert [row for row, token in enumerate(tokens) if token < 0] == [7]
    weight[699, 0] = torch.inf
    x[7, 3] = 1.0
    head_gemm(linear_output.best_rows(ranks, 700), x, weight)
    # Times a negative x it is -inf, which never wins.
    positive = (x[:, 0] > 0).tolist()
    assert [token < 0 for token in tokens_of(ranks)] == positive


# --- anywhere -------------------------------------------------------------------------------------


def test_launch_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    monkeypatch.setattr(module, "tensor_map", lambda *_: np.void(bytes(TENSOR_MAP_BYTES)))
    for tokens, vocab in ((129, 128256), (256, 300), (600, 300)):
        x, weight = (
            torch.empty(tokens, 64, dtype=torch.bfloat16),
            torch.empty(vocab, 64, dtype=torch.bfloat16),
        )
        ranks = torch.empty(tokens, num_parts(vocab), dtype=torch.int64)
        head_gemm(linear_output.best_rows(ranks, vocab), x, weight)
    # All clusters; two tiles of a cluster, beside each other; three rounds of two.
    assert [launch.grid for launch in fake.launches] == [(132, 1, 1), (4, 1, 1), (12, 1, 1)]


def test_it_is_for_tiles_that_are_nearly_full() -> None:
    assert [rows for rows in range(129, 514) if is_faster(rows)] == [*range(180, 257), *range(431, 513)]


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    x, weight = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(700, 64, dtype=torch.bfloat16)
    ranks = torch.empty(3, num_parts(700) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 parts"):
        head_gemm(linear_output.best_rows(ranks, 700), x, weight)
    with pytest.raises(ValueError, match="store_rows"):
        head_gemm(linear_output.store_rows(torch.empty(3, 704, dtype=torch.bfloat16)), x, weight)
    with pytest.raises(ValueError, match="multiples of 8"):
        head_gemm(linear_output.float_rows(torch.empty(3, 700)), x[:, :60], weight[:, :60].contiguous())
    with pytest.raises(ValueError, match="float32"):
        head_gemm(linear_output.float_rows(torch.empty(3, 700)), x.float(), weight.float())
    fake.device = Device(0, "older", (8, 0), 108, 163 << 10)
    with pytest.raises(ValueError, match="sm_90a"):
        head_gemm(linear_output.float_rows(torch.empty(3, 700)), x, weight)
    assert not fake.launches
