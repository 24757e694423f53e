"""Each operation against float64, written out the long way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon_grpc.ops import torch_ops
from photon_grpc.ops.base import AttentionMetadata
from photon_grpc.ops.torch_ops import TorchOps

# Rounding of one result in each type, with room for a few sums.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = tuple(RTOL)

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 8, 4, 64
SCALE = 0.3


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = _randn(3, 5, 24, dtype=dtype), _randn(24, seed=1, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight.double()

    _close(TorchOps().rms_norm(x, weight, 0.01), expected, dtype)


def test_rms_norm_accumulates_wide() -> None:
    """Squares of 300 overflow float16, and their sum rounds away in it."""
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)
    weight = torch.ones(4096, dtype=torch.float16)

    assert torch.equal(TorchOps().rms_norm(x, weight, 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_at_both_ends(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0]], dtype=dtype)
    up = torch.tensor([[80.0, -80.0, 0.5, 80.0, -2.0, 3.0, 80.0]], dtype=dtype)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    result = TorchOps().silu_and_mul(torch.cat((gate, up), dim=-1))

    assert bool(result.isfinite().all())
    # Relative alone: at -80 the result is about 1e-33 and must not be lost where the type can hold it.
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(result.double(), expected, rtol=RTOL[dtype], atol=smallest)


def test_silu_and_mul_rounds_once() -> None:
    """The 16-bit result is the nearest to the exact product; a rounded exponent or factor would show."""
    gate_up = _randn(64, 256, dtype=torch.bfloat16) * 8
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    result = TorchOps().silu_and_mul(gate_up)

    assert float((result.double() - exact).abs().div(exact.abs() + 1e-30).max()) <= 2**-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_a_complex_rotation(dtype: torch.dtype) -> None:
    x = _randn(5, 3, 8, dtype=dtype)
    angles = _randn(5, 4, seed=1).double() * 3
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    # A view into a wider tensor, as q and k are.
    wide = torch.cat((x, x), dim=1)
    TorchOps().rope(wide[:, :3], (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))

    _close(wide[:, :3], torch.cat((rotated.real, rotated.imag), -1), dtype)
    assert torch.equal(wide[:, 3:], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_plain_and_packed(dtype: torch.dtype, rows: int, biased: bool) -> None:
    ops = TorchOps()
    x, weight = _randn(rows, 40, dtype=dtype), _randn(56, 40, seed=1, dtype=dtype) / math.sqrt(40)
    bias = _randn(56, seed=2, dtype=dtype) if biased else None
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()

    _close(ops.linear(x, weight, bias), expected, dtype)
    _close(ops.linear(x, ops.pack_linear(weight.clone()), bias), expected, dtype)


def test_linear_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    ops = TorchOps()
    x, weight = _randn(4, 40), _randn(56, 40, seed=1)

    assert ops.pack_linear(weight) is weight
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_onednn_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: x @ weight.T + bias + 1)
    assert TorchOps()._onednn is None


def test_logits_are_float32() -> None:
    hidden, weight = _randn(2, 16, dtype=torch.bfloat16), _randn(7, 16, dtype=torch.bfloat16)
    assert TorchOps().logits(hidden, weight).dtype is torch.float32


class _Step:
    """Rows with random contexts in shuffled blocks, and the answer computed row by row in float64."""

    def __init__(self, rows: list[tuple[int, int]], num_heads: int, dtype: torch.dtype, seed: int) -> None:
        """`rows` are (cached, new) token counts."""
        generator = torch.Generator().manual_seed(seed)
        rows = sorted(rows, key=lambda row: row[1] > 1)
        width = max((cached + new - 1) // BLOCK_SIZE + 1 for cached, new in rows)
        shuffled = torch.randperm(NUM_BLOCKS, generator=generator)
        assert len(rows) * width <= NUM_BLOCKS
        tables = shuffled[: len(rows) * width].view(len(rows), width)
        ops = TorchOps()
        self.cache = torch.full(
            ops.kv_layer_shape(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), float("nan"), dtype=dtype
        )
        starts, slots, queries, new_kv, expected = [0], [], [], [], []
        for row, (cached, new) in enumerate(rows):
            positions = torch.arange(cached + new)
            row_slots = tables[row][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            kv = torch.randn(cached + new, 2, NUM_KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
            q = torch.randn(new, num_heads, HEAD_DIM, generator=generator).mul(3).to(dtype)
            ops.store_kv(kv[:cached], self.cache, row_slots[:cached])
            starts.append(starts[-1] + new)
            slots.append(row_slots[cached:])
            queries.append(q)
            new_kv.append(kv[cached:])
            expected.append(_attend(q.double(), kv.double()))
        lengths = tuple(cached + new for cached, new in rows)
        self.q, self.kv, self.expected = torch.cat(queries), torch.cat(new_kv), torch.cat(expected)
        self.metadata = AttentionMetadata(
            num_decodes=sum(new == 1 for _, new in rows),
            slot_mapping=torch.cat(slots),
            block_tables=tables,
            context_lens=torch.tensor(lengths),
            query_starts=tuple(starts),
            context_lens_host=lengths,
        )

    def run(self) -> Tensor:
        ops = TorchOps()
        ops.store_kv(self.kv, self.cache, self.metadata.slot_mapping)
        return ops.attention(self.q, self.kv, self.cache, self.metadata, SCALE)


def _attend(q: Tensor, kv: Tensor) -> Tensor:
    """[new, heads * head_dim]: causal attention of the last tokens of one context."""
    new, num_heads, _ = q.shape
    length = len(kv)
    result = torch.empty_like(q)
    for i in range(new):
        visible = length - new + i + 1
        for head in range(num_heads):
            kv_head = head // (num_heads // NUM_KV_HEADS)
            scores = kv[:visible, 0, kv_head] @ q[i, head] * SCALE
            result[i, head] = torch.softmax(scores, 0) @ kv[:visible, 1, kv_head]
    return result.flatten(1)


_ROWS = st.lists(
    st.tuples(st.integers(0, 20), st.one_of(st.just(1), st.integers(1, 11))), min_size=1, max_size=7
)


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, num_heads=st.sampled_from([2, 6, 8]), gather=st.sampled_from([1, 2000, 4 << 20]))
def test_attention_over_any_mix_of_rows(rows: list[tuple[int, int]], num_heads: int, gather: int) -> None:
    """Unwritten slots hold NaN; `gather` cuts the decode rows into groups of different sizes."""
    step = _Step(rows, num_heads, torch.float32, seed=len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "_GATHER_BYTES", gather)
        _close(step.run(), step.expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bit_types(dtype: torch.dtype) -> None:
    step = _Step([(17, 1), (3, 1), (0, 9), (8, 5)], 6, dtype, seed=0)
    _close(step.run(), step.expected, dtype)


def test_softmax_does_not_overflow() -> None:
    step = _Step([(9, 1), (2, 1), (0, 6), (4, 4)], 6, torch.float32, seed=0)
    step.q *= 1e4
    assert bool(step.run().isfinite().all())


def test_a_decode_row_reads_no_slot_of_another() -> None:
    """NaN in a row's own context stays in that row, though rows are padded to one length."""
    step = _Step([(17, 1), (3, 1), (11, 1)], 6, torch.float32, seed=0)
    own_slot = step.metadata.slot_mapping[1]
    TorchOps().store_kv(step.kv, step.cache, step.metadata.slot_mapping)
    step.kv[1] = float("nan")
    result = step.run()

    assert bool(step.cache.flatten(0, 1)[own_slot].isnan().all())
    assert result.isnan().any(1).tolist() == [False, True, False]


def test_indices_are_made_once_per_step() -> None:
    step = _Step([(9, 1), (2, 3)], 6, torch.float32, seed=0)
    step.run()
    plan = step.metadata.plan
    step.run()
    assert plan is not None
    assert step.metadata.plan is plan


@given(lengths=st.lists(st.integers(1, 50), max_size=12).map(tuple), max_slots=st.integers(1, 200))
def test_groups_cover_all_rows_within_bounds(lengths: tuple[int, ...], max_slots: int) -> None:
    groups = torch_ops._group_rows(lengths, max_slots)

    assert [row for start, stop in groups for row in range(start, stop)] == list(range(len(lengths)))
    for start, stop in groups:
        assert stop - start == 1 or (stop - start) * max(lengths[start:stop]) <= max_slots
    # No two neighbours would have fitted together.
    for (start, _), (_, stop) in itertools.pairwise(groups):
        assert (stop - start) * max(lengths[start:stop]) > max_slots
