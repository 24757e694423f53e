"""Rows of the embedding table: the very values, and nothing outside of the table."""

from __future__ import annotations

import pytest
import torch

from photon_grpc.kernels.embedding import embedding
from tests.support.kernels import ALL_TYPES, FakeLauncher, Fenced, randn


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [8, 320, 896, 2048, 4096])
@pytest.mark.parametrize("tokens", [1, 3, 64, 257])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_rows_are_the_tables(
    dtype: torch.dtype, index_type: torch.dtype, tokens: int, hidden: int, wide: bool
) -> None:
    memory = Fenced()
    weight = randn(1000, hidden, dtype=dtype)
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(1), dtype=index_type)
    ids[0] = 999
    out = memory.empty(tokens, hidden, dtype=torch.float32 if wide else dtype)
    embedding(out, memory.copy(ids), memory.copy(weight))

    assert torch.equal(out.cpu(), weight[ids.long()].to(out.dtype))
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_ids_outside_of_the_table_give_zeros(index_type: torch.dtype) -> None:
    weight = torch.full((10, 64), 1.0, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([-1, 0, 9, 10, torch.iinfo(index_type).max], dtype=index_type, device="cuda")
    out = torch.full((5, 64), float("nan"), device="cuda")
    embedding(out, ids, weight)
    assert out.sum(1).tolist() == [0, 64, 64, 0, 0]


@pytest.mark.gpu
def test_a_table_past_four_gibibytes() -> None:
    weight = torch.zeros(600_000, 4096, device="cuda", dtype=torch.bfloat16)
    weight[-1] = 1
    out = torch.empty(1, 4096, device="cuda")
    embedding(out, torch.tensor([599_999], device="cuda"), weight)
    assert float(out.sum()) == 4096


def test_what_the_kernel_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    ids, weight = torch.zeros(3, dtype=torch.int64), torch.zeros(10, 64, dtype=torch.bfloat16)
    cases = [
        (torch.zeros(3, 64, dtype=torch.float16), ids, weight, "out is torch.float16"),
        (torch.zeros(2, 64), ids, weight, "out must have shape"),
        (torch.zeros(3, 64), ids.short(), weight, "int32 or int64"),
        (torch.zeros(3, 64), torch.zeros(6, dtype=torch.int64)[::2], weight, "token_ids must be contiguous"),
        (torch.zeros(3, 60), ids, torch.zeros(10, 60, dtype=torch.bfloat16), "multiple of 8"),
    ]
    for out, bad_ids, bad_weight, message in cases:
        with pytest.raises(ValueError, match=message):
            embedding(out, bad_ids, bad_weight)
    assert fake.launches == []
