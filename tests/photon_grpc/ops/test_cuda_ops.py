"""CudaOps on a GPU: attention over any mix of rows against float64, and what is refused at the start."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from photon_grpc.errors import ConfigError, UnsupportedModelError
from photon_grpc.ops.base import AttentionMetadata, AttentionWeights

pytestmark = pytest.mark.gpu

BLOCK_SIZES = (16, 32)
SHAPES = ((32, 8, 64), (32, 8, 128), (14, 2, 64), (8, 8, 64), (16, 2, 128), (6, 2, 32))
DTYPES = (torch.bfloat16, torch.float16)


class Step:
    """Rows of a step over a cache whose every slot outside their contexts is NaN."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        block_size: int,
        rows: list[tuple[int, int]],
        seed: int = 0,
    ) -> None:
        """`rows` are (query tokens, context length), those of one query token first."""
        self.num_heads, self.num_kv_heads, self.head_dim = shape
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-context // block_size) for _, context in rows]
        num_blocks = sum(blocks) + 3
        order = list(range(num_blocks))
        random.Random(seed).shuffle(order)
        cache = torch.full((num_blocks, self.num_kv_heads, 2, block_size, self.head_dim), float("nan"))
        tables = torch.zeros(len(rows), max([*blocks, 1]), dtype=torch.int64)
        self.contexts: list[Tensor] = []
        for row, (_, context) in enumerate(rows):
            own = [order.pop() for _ in range(blocks[row])]
            tables[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
            kv = torch.randn(context, 2, self.num_kv_heads, self.head_dim, generator=generator).to(dtype)
            for position in range(context):
                cache[own[position // block_size], :, :, position % block_size] = (
                    kv[position].transpose(0, 1).float()
                )
            self.contexts.append(kv)
        starts = [0]
        for count, _ in rows:
            starts.append(starts[-1] + count)
        self.rows = rows
        self.starts = starts
        self.q = torch.randn(starts[-1], self.num_heads, self.head_dim, generator=generator).to(dtype)
        self.cache = cache.to(dtype).cuda()
        self.metadata = AttentionMetadata(
            num_decodes=sum(count == 1 for count, _ in rows),
            slot_mapping=torch.zeros(starts[-1], dtype=torch.int64).cuda(),
            block_tables=tables.cuda(),
            context_lens=torch.tensor([context for _, context in rows]).cuda(),
            query_starts=tuple(starts),
            context_lens_host=tuple(context for _, context in rows),
        )

    def attend(self) -> Tensor:
        from photon_grpc.ops.cuda_ops import CudaOps

        self.metadata.plan = None
        ops = CudaOps(max_decodes=max(1, self.metadata.num_decodes))
        q = self.q.cuda()
        out = ops.attention(q, q, self.cache, self.metadata, self.head_dim**-0.5)
        return out.cpu().view(-1, self.num_heads, self.head_dim)

    def expected(self) -> Tensor:
        parts = []
        group = self.num_heads // self.num_kv_heads
        for row, (count, context) in enumerate(self.rows):
            q = self.q[self.starts[row] : self.starts[row + 1]].double()
            keys, values = self.contexts[row].double().repeat_interleave(group, dim=2).unbind(1)
            scores = torch.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
            visible = torch.ones(count, context, dtype=torch.bool).tril(context - count)
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(parts)

    def check(self) -> None:
        out, expected = self.attend().double(), self.expected()
        largest = max(float(kv[:, 1].abs().max()) for kv in self.contexts)
        assert bool(out.isfinite().all())
        assert float((out - expected).abs().max()) <= 2**-8 * largest


MIXES = {
    "one token": [(1, 1)],
    "decodes at block borders": [(1, n) for n in (1, 15, 16, 17, 31, 32, 33, 255, 256, 257)],
    "long decodes": [(1, 4095), (1, 4096), (1, 4097), (1, 3)],
    "prefills": [(2, 2), (63, 63), (64, 64), (65, 65), (200, 200)],
    "chunks behind a prefix": [(16, 100), (33, 257), (64, 1000), (7, 4099)],
    "everything": [(1, 7), (1, 900), (1, 16), (3, 3), (50, 300), (128, 128)],
}


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(
    shape: tuple[int, int, int], dtype: torch.dtype, block_size: int, rows: list[tuple[int, int]]
) -> None:
    Step(shape, dtype, block_size, rows).check()


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_of_query_heads(group: int) -> None:
    Step((2 * group, 2, 64), torch.bfloat16, 16, MIXES["everything"]).check()


def test_a_context_of_32k() -> None:
    Step((8, 2, 128), torch.bfloat16, 16, [(1, 32768), (1, 5), (20, 32000)]).check()


def test_batches_of_every_size_around_the_buckets() -> None:
    for size in (2, 3, 7, 8, 9, 31, 33, 64, 65, 128, 255, 256):
        Step((8, 2, 64), torch.bfloat16, 16, [(1, 1 + 7 * row % 300) for row in range(size)], size).check()


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    rows = MIXES["decodes at block borders"] + [(1, 2000)]
    together = Step((32, 8, 64), torch.bfloat16, 16, rows)
    whole = together.attend()
    for row in range(len(rows)):
        tables, lens = together.metadata.block_tables, together.metadata.context_lens
        alone = Step((32, 8, 64), torch.bfloat16, 16, [(1, 1)])
        alone.q, alone.cache = together.q[row : row + 1], together.cache
        alone.metadata = AttentionMetadata(
            1,
            together.metadata.slot_mapping[:1],
            tables[row : row + 1],
            lens[row : row + 1],
            (0, 1),
            (rows[row][1],),
        )
        assert torch.equal(alone.attend()[0], whole[row])


def test_two_runs_give_the_same_bits() -> None:
    step = Step((32, 8, 64), torch.bfloat16, 16, MIXES["everything"] + [(300, 2000)])
    assert torch.equal(step.attend(), step.attend())


def test_an_idle_row_is_zero() -> None:
    step = Step((32, 8, 64), torch.bfloat16, 16, [(1, 40), (1, 0), (1, 3)])
    out = step.attend()
    assert bool((out[1] == 0).all())
    assert bool(out.isfinite().all())


def test_shapes_without_a_kernel_are_refused_at_the_start() -> None:
    from photon_grpc.ops.cuda_ops import CudaOps

    ops = CudaOps(max_decodes=1)
    for head_dim in (24, 144, 256):
        with pytest.raises(UnsupportedModelError, match=f"heads of {head_dim}"):
            ops.kv_layer_shape(4, 16, 2, head_dim)
    with pytest.raises(ConfigError, match="block_size is 8"):
        ops.kv_layer_shape(4, 8, 2, 64)


@pytest.mark.parametrize("rows", [1, 7, 60, 140])
@pytest.mark.parametrize("is_normed", [True, False])
@pytest.mark.parametrize("context_is_old", [True, False])
def test_a_decode_step_is_what_its_parts_are(rows: int, is_normed: bool, context_is_old: bool) -> None:
    """From the residual to attention's result: the same cache, bit for bit, and results as good."""
    from photon_grpc.ops.base import Ops
    from photon_grpc.ops.cuda_ops import CudaOps

    shape, hidden, dtype = (16, 8, 128), 256, torch.bfloat16
    step = Step(shape, dtype, 16, [(1, 1 + 37 * row % 300) for row in range(rows)], rows)
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(rows)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).cuda()

    heads = num_heads + 2 * num_kv_heads
    residual = draw(rows, hidden)
    weights = AttentionWeights(
        norm=(1 + draw(hidden) / 8).to(dtype),
        qkv=((draw(heads * head_dim, hidden) / 16).to(dtype), (draw(heads * head_dim) / 8).to(dtype)),
        qk_norm=((1 + draw(128) / 8).to(dtype), (1 + draw(128) / 8).to(dtype)) if is_normed else None,
        num_heads=num_heads,
        head_dim=head_dim,
        eps=1e-6,
        scale=head_dim**-0.5,
    )
    rotary = draw(400, head_dim), step.metadata.context_lens - 1
    ends = step.metadata.context_lens - 1
    blocks = step.metadata.block_tables.gather(1, (ends // 16)[:, None])[:, 0]
    step.metadata.slot_mapping = blocks * 16 + ends % 16
    ops = CudaOps(max_decodes=rows)

    def run(kind: type[Ops], context_is_old: bool) -> tuple[Tensor, Tensor]:
        cache = step.cache.clone()
        step.metadata.plan, step.metadata.context_is_old = None, context_is_old
        attended = kind.norm_qkv_attention(ops, None, residual.clone(), weights, rotary, cache, step.metadata)
        assert attended.shape == (rows, num_heads * head_dim)
        return attended, cache

    found, stored = run(CudaOps, context_is_old)
    expected, cache = run(Ops, False)
    assert torch.equal(stored.view(torch.int16), cache.view(torch.int16))
    values = cache[:, :, 1].double()
    assert float((found.double() - expected.double()).abs().max()) <= 2**-7 * float(
        values.nan_to_num().abs().max()
    )
