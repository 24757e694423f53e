"""Greedy tokens from the best of each part of the vocabulary: on a GPU those of the logits, bit for bit; the
arguments that are refused, anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import gemv, launcher, linear_output, sampling, skinny_gemm_tma
from photon_grpc.kernels.best_token import best_token
from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.ops.cuda_ops import CudaOps
from tests.support.kernels import STORAGE, FakeLauncher, Fenced, randn

ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 31, 33, 48, 64, 65, 96, 100, 127, 128, 192, 256, 500)
# Models' own, and tails: rows that fill no tile, and one row.
HEADS = ((128256, 256), (151936, 128), (32000, 512), (50257, 64), (12290, 1096), (16400, 8))


def rank(value: float, token_id: int) -> int:
    """As photon/rank.cuh has it."""
    bits = int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) & 0xFFFF_FFFF
    key = bits if bits & 0x8000_0000 else ~bits & 0x7FFF_FFFF
    return key << 24 | token_id


def state_of(rows: int) -> SamplingState:
    return SamplingState.allocate(rows, 4, torch.device("cuda"))


def tokens_of(ranks: Tensor, slots: Tensor, state: SamplingState) -> list[int]:
    memory = Fenced()
    token_ids = memory.empty(len(ranks), dtype=torch.int32)
    best_token(token_ids, ranks, slots, state)
    memory.check()
    tokens: list[int] = token_ids.tolist()
    return tokens


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 31, 32, 33, 128, 129, 264])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 130])
def test_the_least_rank_is_the_token(parts: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(parts * 1000 + rows)
    values = torch.randn(rows, parts, generator=generator)
    ids = torch.randperm(1 << 18, generator=generator)[:parts].sort().values
    ranks = torch.tensor(
        [[rank(v, int(i)) for v, i in zip(row.tolist(), ids, strict=True)] for row in values]
    )
    slots = torch.randperm(rows, generator=generator).to(torch.int32)
    idle = rows // 2 if rows > 1 else rows
    slots[idle:] = -1
    state = state_of(rows)
    state.num_outputs.fill_(41)
    state.last_token_ids.fill_(-7)
    tokens = tokens_of(ranks.cuda(), slots.cuda(), state)
    expected = ids[values.argmax(-1)].tolist()
    assert tokens == expected[:idle] + [-1] * (rows - idle)
    counted, last = state.num_outputs.tolist(), state.last_token_ids.tolist()
    for row, slot in enumerate(slots[:idle].tolist()):
        assert (counted[slot], last[slot]) == (42, expected[row])
    busy = set(slots[:idle].tolist())
    assert all((counted[slot], last[slot]) == (41, -7) for slot in range(rows) if slot not in busy)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_a_fault(poison: float) -> None:
    good = [rank(2.0, 5), rank(1.0, 9)]
    bad = [rank(2.0, 5), rank(poison, 9)]
    nothing = [rank(-math.inf, (1 << 24) - 1)] * 2
    some = [rank(-math.inf, (1 << 24) - 1), rank(-1e38, 3)]
    state = state_of(4)
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    ranks = torch.tensor([good, bad, nothing, some], device="cuda")
    assert tokens_of(ranks, slots, state) == [5, -1, -1, 3]
    assert state.num_outputs.tolist() == [1, 0, 0, 1]


def greedy_tokens(logits: Tensor) -> list[int]:
    rows = len(logits)
    token_ids = torch.empty(rows, dtype=torch.int32, device="cuda")
    sampling.sample_greedy(
        token_ids, logits, torch.arange(rows, dtype=torch.int32, device="cuda"), state_of(rows)
    )
    tokens: list[int] = token_ids.tolist()
    return tokens


def first_largest(logits: Tensor) -> list[int]:
    """torch's argmax is any of several equals."""
    is_largest = logits == logits.max(-1, keepdim=True).values
    ids = torch.arange(logits.shape[1], device=logits.device)
    first: list[int] = torch.where(is_largest, ids, logits.shape[1]).min(-1).values.tolist()
    return first


def best_tokens(ops: CudaOps, hidden: Tensor, weight: Tensor) -> list[int] | None:
    ranks = ops.best_logits(hidden, weight)
    if ranks is None:
        return None
    rows = len(hidden)
    return tokens_of(ranks, torch.arange(rows, dtype=torch.int32, device="cuda"), state_of(rows))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("vocab", "k"), HEADS)
def test_tokens_are_those_of_the_logits(vocab: int, k: int, dtype: torch.dtype) -> None:
    ops = CudaOps(max_decodes=4)
    memory = Fenced()
    weight = randn(vocab, k, dtype=dtype, seed=1)
    # Equals: the first one wins, in other tiles, in the same one, and as the last row of all.
    for original, copies in ((3, (4, 11, vocab // 2, vocab - 1)), (vocab - 2, (vocab - 1,))):
        weight[list(copies)] = weight[original].clone()
    on_device = memory.copy(weight)
    num_found = 0
    for rows in ROWS:
        x = randn(rows, k, dtype=dtype, seed=rows)
        # The first rows want the equals.
        x[0] = weight[3] * 4
        x[rows // 2] = weight[vocab - 2] * 4
        hidden = memory.copy(x)
        logits = ops.logits(hidden, on_device)
        found = best_tokens(ops, hidden, on_device)
        if found is None:
            assert launcher.require_cuda().arch != skinny_gemm_tma.ARCH
            continue
        num_found += 1
        assert found == greedy_tokens(logits) == first_largest(logits), rows
        assert found == best_tokens(ops, hidden, on_device), "not the same twice"
        exact = hidden.double() @ on_device.double().T
        best = exact.max(-1).values
        chosen = exact.gather(1, torch.tensor(found, device="cuda")[:, None])[:, 0]
        assert bool(((best - chosen) <= 1e-5 * (1 + best.abs())).all())
    memory.check()
    # By gemv, which is everywhere.
    assert num_found >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 5, 64, 128])
def test_a_fault_is_of_its_row_alone(rows: int) -> None:
    ops = CudaOps(max_decodes=4)
    weight = randn(16400, 64, dtype=torch.bfloat16, seed=1).cuda()
    hidden = randn(rows, 64, dtype=torch.bfloat16, seed=2).cuda()
    healthy = best_tokens(ops, hidden, weight)
    assert healthy is not None
    assert -1 not in healthy
    for poison in (math.nan, math.inf, -math.inf):
        ill = hidden.clone()
        ill[rows - 1, 3] = poison
        assert best_tokens(ops, ill, weight) == [*healthy[:-1], -1]
    # A row of the weight: of every token.
    weight[16399, 5] = math.nan
    assert best_tokens(ops, hidden, weight) == [-1] * rows


@pytest.mark.gpu
def test_scores_below_zero_win_over_rows_that_are_not_there() -> None:
    ops = CudaOps(max_decodes=4)
    weight = torch.full((12300, 64), 0.5, dtype=torch.bfloat16)
    weight[777] = 0.25
    hidden = torch.full((128, 64), -1.0, dtype=torch.bfloat16)
    for rows in (1, 4, 5, 100, 128):
        assert best_tokens(ops, hidden[:rows].cuda(), weight.cuda()) == [777] * rows


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    ops = CudaOps(max_decodes=4)
    weight = randn(32000, 256, dtype=torch.bfloat16, seed=1).cuda()
    for rows in (3, 40):
        hidden = randn(rows, 256, dtype=torch.bfloat16, seed=2).cuda()
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        token_ids = torch.empty(rows, dtype=torch.int32, device="cuda")
        state = state_of(rows)

        def run() -> None:
            ranks = ops.best_logits(hidden, weight)  # noqa: B023 - called in this round
            assert ranks is not None
            best_token(token_ids, ranks, slots, state)  # noqa: B023 - called in this round

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for seed in range(3, 8):
            hidden.copy_(randn(rows, 256, dtype=torch.bfloat16, seed=seed))
            graph.replay()
            assert token_ids.tolist() == first_largest(ops.logits(hidden, weight))


# --- anywhere -------------------------------------------------------------------------------------


def hopper(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    return FakeLauncher().install(monkeypatch)


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = hopper(monkeypatch)
    state = SamplingState.allocate(2, 1, torch.device("cpu"))
    none = torch.empty(0, dtype=torch.int32)
    best_token(none, torch.empty(0, 5, dtype=torch.int64), none, state)
    assert not fake.launches


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    state = SamplingState.allocate(2, 1, torch.device("cpu"))
    ids, ranks = torch.empty(2, dtype=torch.int32), torch.empty(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="ranks"):
        best_token(ids, ranks.int(), ids, state)
    with pytest.raises(ValueError, match="ranks"):
        best_token(ids, torch.empty(5, 2, dtype=torch.int64).T, ids, state)
    with pytest.raises(ValueError, match="token_ids"):
        best_token(ids.long(), ranks, ids, state)
    with pytest.raises(ValueError, match="row_slots"):
        best_token(ids, ranks, torch.empty(3, dtype=torch.int32), state)


def test_ranks_of_another_number_of_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    x, weight = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(16400, 64, dtype=torch.bfloat16)
    for module, parts in (
        (gemv.gemv, gemv.num_parts(3, 16400)),
        (skinny_gemm_tma.skinny_gemm_tma, skinny_gemm_tma.num_parts(16400, 64)),
    ):
        ranks = torch.empty(3, parts + 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"{parts} parts"):
            module(linear_output.best_rows(ranks, 16400), x, weight)


def test_a_weight_of_few_rows_has_no_best_row(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    weight = torch.empty(512, 2048, dtype=torch.bfloat16)
    ranks = torch.empty(8, skinny_gemm_tma.num_parts(512, 2048), dtype=torch.int64)
    assert not skinny_gemm_tma.can_multiply(linear_output.best_rows(ranks, 512), weight)
