"""Attention of one new token per row on the GPU against float64; what is refused, anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import linear_output
from photon_grpc.kernels import paged_attention_decode as module
from photon_grpc.kernels.gemv import gemv, normed_gemv
from photon_grpc.kernels.paged_attention_decode import (
    CHUNK_TOKENS,
    MAX_ROWS,
    PAGED_ATTENTION_DECODE,
    DecodeWorkspace,
    allocate_workspace,
    max_splits,
    num_sharers,
    paged_attention_decode,
)
from photon_grpc.kernels.rope_store_kv import store_kv
from tests.support.kernels import FakeLauncher, Fenced, randn
from tests.support.linear import make_weight
from tests.support.paged_attention import Rows, Shape, assert_close, attend, make_rows

F16 = torch.float16

LLAMA_1B = Shape(8, 4, 64, 16)
LLAMA_8B = Shape(8, 4, 128, 32)

# Each kv head count, group, head_dim, block_size and type at least once, every group from 1 to 8.
SHAPES = (
    LLAMA_1B,
    Shape(8, 4, 64, 32, F16),
    LLAMA_8B,
    Shape(8, 3, 128, 16),
    Shape(2, 7, 64, 16, F16),
    Shape(4, 7, 128, 16, F16),
    Shape(32, 1, 128, 16),
    Shape(1, 8, 128, 32),
    Shape(3, 8, 64, 64),
    Shape(4, 2, 80, 16),
    Shape(1, 1, 16, 16),
    Shape(2, 6, 96, 16),
    Shape(2, 5, 48, 16),
    Shape(5, 2, 112, 32, F16),
    Shape(1, 4, 32, 16),
)


class Decode:
    """Buffers for launches over some rows: fenced, and poisoned wherever a launch has to write."""

    def __init__(self, rows: Rows, *, max_rows: int | None = None, seed: int = 7) -> None:
        shape = self.shape = rows.shape
        self.rows = rows
        self.memory = Fenced()
        self.q = self.memory.copy(
            randn(len(rows.lens), shape.num_heads, shape.head_dim, dtype=shape.dtype, seed=seed)
        )
        size = (max_rows or len(rows.lens), shape.num_kv_heads)
        splits = max_splits(shape.num_kv_heads)
        self.workspace = DecodeWorkspace(
            self.memory.empty(*size, splits, shape.group, shape.head_dim, dtype=torch.float32),
            self.memory.empty(*size, splits, shape.group, 2, dtype=torch.float32),
            self.memory.copy(torch.zeros(size, dtype=torch.int32)),
        )
        self.context_lens = self.memory.copy(rows.context_lens)
        self.block_tables = self.memory.copy(rows.block_tables)
        self.out = self.memory.empty(*self.q.shape, dtype=shape.dtype)

    def launch(self, *, reads_early: bool = False) -> Tensor:
        paged_attention_decode(
            self.out,
            self.workspace,
            self.q,
            self.rows.kv_cache,
            self.block_tables,
            self.context_lens,
            self.shape.scale,
            reads_early=reads_early,
        )
        return self.out

    def run(self) -> Tensor:
        """The result of one launch from poisoned memory, checked for what it left behind."""
        self.workspace.acc.fill_(torch.nan)
        self.workspace.stats.fill_(torch.nan)
        self.out.fill_(torch.nan)
        result = self.launch().clone()
        self.memory.check()
        assert not self.workspace.counters.any()
        return result

    def check(self, result: Tensor) -> None:
        q = self.q.cpu()
        for row, context in enumerate(self.rows.contexts):
            if context.shape[0] == 0:
                assert not result[row].any(), "an idle row is zero"
            else:
                expected = attend(q[row : row + 1], context, self.shape.scale)
                assert_close(result[row : row + 1], expected, context)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def alone(rows: Rows, q: Tensor, row: int) -> Tensor:
    decode = Decode(rows.select(row))
    decode.q.copy_(q[row : row + 1])
    return decode.run()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_round_every_boundary(shape: Shape) -> None:
    edges = (shape.block_size, CHUNK_TOKENS, 2 * CHUNK_TOKENS)
    lens = (1, 2, 0, *(edge + step for edge in edges for step in (-1, 0, 1)), 8, 15, 17, 33, 130)
    rows = make_rows(shape, lens, "cuda")
    before = bits(rows.kv_cache).clone()
    decode = Decode(rows)

    first, second = decode.run(), decode.run()

    decode.check(first)
    assert torch.equal(bits(first), bits(second))
    assert torch.equal(bits(rows.kv_cache), before)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [LLAMA_1B, LLAMA_8B, Shape(2, 7, 64, 16, F16), Shape(32, 1, 128, 16)], ids=str
)
def test_long_contexts(shape: Shape) -> None:
    """Past 4,096 tokens, past the point where splits grow, and where a warp fetches block ids again."""
    growth = max_splits(shape.num_kv_heads) * CHUNK_TOKENS
    lens = (4095, 4096, 4097, growth - 1, growth, growth + 1, growth + 300, 32768, 5)
    decode = Decode(make_rows(shape, lens, "cuda"))

    first, second = decode.run(), decode.run()

    decode.check(first)
    assert torch.equal(bits(first), bits(second))


@pytest.mark.gpu
@pytest.mark.parametrize("sharers", [4, 2, 1])
@pytest.mark.parametrize(
    "shape", [LLAMA_1B, LLAMA_8B, Shape(32, 1, 128, 16), Shape(8, 4, 64, 32, F16)], ids=str
)
def test_smaller_teams(shape: Shape, sharers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer warps: every boundary, several items to a team, and rows that are folded."""
    monkeypatch.setattr(module, "num_sharers", lambda *_: sharers)
    edges = (shape.block_size, 32 * sharers, CHUNK_TOKENS, 2 * CHUNK_TOKENS)
    growth = max_splits(shape.num_kv_heads) * CHUNK_TOKENS
    lens = (1, 2, 0, *(edge + step for edge in edges for step in (-1, 0, 1)), 4097, growth + 300, 20_000)
    decode = Decode(make_rows(shape, lens + tuple(range(1, 600, 7)), "cuda"))

    first, second = decode.run(), decode.run()

    decode.check(first)
    assert torch.equal(bits(first), bits(second))


@pytest.mark.gpu
def test_splits_of_more_tokens_than_a_warp_has_lanes_for() -> None:
    """Eight splits of 5,000 tokens: more than 32 tiles for each of eight warps."""
    shape = Shape(32, 1, 16, 16)
    assert 40_000 / max_splits(shape.num_kv_heads) > 32 * 8 * 16
    decode = Decode(make_rows(shape, (40_000, 3), "cuda"))
    decode.check(decode.run())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31, 33, 64, 65, 128, 255, 256, 257, MAX_ROWS])
def test_any_number_of_rows(count: int) -> None:
    shape = Shape(2, 4, 64, 16)
    generator = torch.Generator().manual_seed(count)
    lens = torch.randint(0, 700, (count,), generator=generator).tolist()
    decode = Decode(make_rows(shape, tuple(lens), "cuda", seed=count))
    decode.check(decode.run())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(shape: Shape) -> None:
    lens = (5, 300, 4097, 1, 0, 256, 257, 9000, 700, 255, 20_000, 64)
    rows = make_rows(shape, lens, "cuda")
    decode = Decode(rows)
    together = decode.run()
    for row in range(len(lens)):
        assert torch.equal(bits(alone(rows, decode.q, row)), bits(together[row : row + 1])), lens[row]


@pytest.mark.gpu
def test_a_row_of_nothing_but_nan_spoils_no_other() -> None:
    rows = make_rows(LLAMA_1B, (300, 40, 700), "cuda")
    decode = Decode(rows)
    clean = decode.run()
    blocks = rows.block_tables[1, : -(-40 // LLAMA_1B.block_size)].long()
    rows.kv_cache[blocks] = torch.nan

    spoilt = decode.run()

    assert spoilt[1].isnan().all()
    assert torch.equal(bits(spoilt[::2]), bits(clean[::2]))


@pytest.mark.gpu
def test_equal_values_come_out_as_they_are() -> None:
    """The weights add up to one although they are rounded."""
    rows = make_rows(LLAMA_1B, (1000, 77), "cuda")
    values = rows.kv_cache[:, :, 1]
    values.masked_fill_(~values.isnan(), 3.0)
    assert (Decode(rows).run() == 3.0).all()


@pytest.mark.gpu
def test_scores_far_apart_and_far_out() -> None:
    """Exponents over the whole range: a softmax without its maximum taken off would overflow."""
    rows = make_rows(LLAMA_8B, (513, 1025), "cuda")
    decode = Decode(rows)
    decode.q.mul_(64)
    decode.check(decode.run())


@pytest.mark.gpu
def test_query_rows_may_lie_apart() -> None:
    rows = make_rows(LLAMA_1B, (300, 17, 256), "cuda")
    decode = Decode(rows)
    expected = decode.run()
    heads = LLAMA_1B.num_heads + 2 * LLAMA_1B.num_kv_heads
    qkv = torch.full((3, heads, LLAMA_1B.head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    qkv[:, : LLAMA_1B.num_heads] = decode.q
    decode.q = qkv[:, : LLAMA_1B.num_heads]
    assert torch.equal(bits(decode.run()), bits(expected))


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths() -> None:
    """Captured over idle rows, replayed over others; counters and workspace serve replay after replay."""
    shape = LLAMA_1B
    lens = ((300, 0, 5000, 1), (1, 9000, 0, 256), (0, 0, 0, 0), (4097, 4096, 8193, 12_000))
    batches = [make_rows(shape, some, "cuda", seed=seed) for seed, some in enumerate(lens)]
    eager = [Decode(rows).run() for rows in batches]
    width = max(rows.block_tables.shape[1] for rows in batches)
    blocks = max(rows.kv_cache.shape[0] for rows in batches)
    cache = torch.full((blocks, *batches[0].kv_cache.shape[1:]), torch.nan, dtype=shape.dtype, device="cuda")
    decode = Decode(batches[0])
    decode.rows = Rows(shape, (0,) * 4, cache, batches[0].block_tables, batches[0].context_lens, ())
    decode.block_tables = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    decode.context_lens = torch.zeros(4, dtype=torch.int32, device="cuda")
    decode.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            decode.launch()

    for rows, expected in zip(batches * 2, eager * 2, strict=True):
        cache[: rows.kv_cache.shape[0]] = rows.kv_cache
        decode.block_tables[:, : rows.block_tables.shape[1]] = rows.block_tables
        decode.context_lens.copy_(rows.context_lens)
        decode.out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(bits(decode.out), bits(expected))
    decode.memory.check()
    assert not decode.workspace.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "sharers"),
    [*((shape, 8) for shape in SHAPES), (LLAMA_1B, 4), (LLAMA_1B, 2), (LLAMA_1B, 1), (LLAMA_8B, 1)],
    ids=str,
)
def test_what_is_read_early_waits_for_the_newest_token(
    shape: Shape, sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel before each launch writes q and the newest tokens, others every time, over NaN."""
    monkeypatch.setattr(module, "num_sharers", lambda *_: sharers)
    lens = (1, 2, 15, 16, 17, 0, 31, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 769, 1025, 4097, 9000)
    rows = make_rows(shape, lens, "cuda")
    decode = Decode(rows)
    present = [row for row, length in enumerate(lens) if length]
    slots = torch.full((len(lens),), -1, dtype=torch.int64)
    for row in present:
        block, offset = divmod(lens[row] - 1, shape.block_size)
        slots[row] = int(rows.block_tables[row, block]) * shape.block_size + offset
    slots = slots.cuda()
    size = (len(lens), 2, shape.num_kv_heads, shape.head_dim)
    newest = [randn(*size, dtype=shape.dtype, seed=seed).cuda() for seed in range(3)]
    queries = [decode.q.roll(seed, 0).contiguous() for seed in range(3)]
    nothing = torch.full_like(newest[0], torch.nan)
    expected = []
    for kv, q in zip(newest, queries, strict=True):
        store_kv(rows.kv_cache, kv, slots)
        decode.q.copy_(q)
        torch.cuda.synchronize()
        expected.append(decode.run())

    outs = [torch.full_like(decode.out, torch.nan) for _ in newest]

    def steps() -> None:
        for kv, q, out in zip(newest, queries, outs, strict=True):
            # Not overlapping: these are what a launch that did not wait would see.
            store_kv(rows.kv_cache, nothing, slots)
            decode.q.fill_(torch.nan)
            decode.q.copy_(q)
            store_kv(rows.kv_cache, kv, slots)
            decode.launch(reads_early=True)
            out.copy_(decode.out)

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            steps()
    for _ in range(10):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out, wanted in zip(outs, expected, strict=True):
            assert torch.equal(bits(out), bits(wanted))
    assert not decode.workspace.counters.any()
    decode.memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(250,), (1, 300, 17, 1025), (600, 2, 31, 512, 513, 100, 77, 4000)], ids=len)
def test_the_products_beside_it_start_early_and_wait(lens: tuple[int, ...]) -> None:
    """Layers of a decode step, of which every kernel lets the next one start before it waits itself."""
    shape, eps, num_layers = LLAMA_1B, 1e-5, 3
    hidden, tokens = shape.num_heads * shape.head_dim, len(lens)
    layers = [make_rows(shape, lens, "cuda", seed=seed) for seed in range(num_layers)]
    decodes = [Decode(rows) for rows in layers]
    weights = [
        [make_weight(n, hidden, torch.bfloat16, 2 * layer + i).cuda() for i, n in enumerate((3072, hidden))]
        for layer in range(num_layers)
    ]
    norm = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    start = randn(tokens, hidden, dtype=torch.float32).cuda()
    table, residual = torch.rand(max(lens), shape.head_dim, device="cuda"), torch.empty_like(start)
    positions = torch.tensor(lens, device="cuda") - 1
    blocks = positions // shape.block_size
    slots = [
        rows.block_tables.cuda().long().gather(1, blocks[:, None])[:, 0] * shape.block_size
        + positions % shape.block_size
        for rows in layers
    ]

    def step(*, reads_early: bool) -> None:
        residual.copy_(start)
        for decode, slot, (qkv, output) in zip(decodes, slots, weights, strict=True):
            heads = linear_output.rope_and_store(decode.q, decode.rows.kv_cache, table, positions, slot)
            normed_gemv(heads, residual, norm, eps, qkv)
            attended = decode.launch(reads_early=reads_early)
            gemv(linear_output.add_rows(residual), attended.flatten(1), output)

    step(reads_early=False)
    expected = residual.clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(reads_early=True)
    for _ in range(500):
        for rows, slot, decode in zip(layers, slots, decodes, strict=True):
            store_kv(rows.kv_cache, torch.full((tokens, 2, 8, 64), torch.nan).bfloat16().cuda(), slot)
            decode.q.fill_(torch.nan)
            decode.out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(residual, expected)


@pytest.mark.gpu
def test_many_launches_one_after_another() -> None:
    """The counters are back at zero each time, and overlapping launches keep out of one workspace."""
    rows = make_rows(LLAMA_1B, (3000, 700, 257, 1) * 8, "cuda")
    decode = Decode(rows)
    expected = decode.run()
    for _ in range(2000):
        decode.launch()
    assert torch.equal(bits(decode.out), bits(expected))
    assert not decode.workspace.counters.any()


@pytest.mark.gpu
def test_cache_of_more_than_2_to_the_31_elements() -> None:
    shape = LLAMA_8B
    per_block = 2 * shape.num_kv_heads * shape.block_size * shape.head_dim
    first_block = (1 << 31) // per_block
    rows = make_rows(shape, (700, 1, 300), "cuda", first_block=first_block)
    assert rows.kv_cache.numel() > 1 << 31
    assert all(int(table[0]) >= first_block for table in rows.block_tables)
    decode = Decode(rows)
    decode.check(decode.run())


# --- what needs no device -----------------------------------------------------------------------


def _arguments(
    rows: int = 3, num_heads: int = 8, num_kv_heads: int = 2, head_dim: int = 64, block_size: int = 16
) -> dict[str, object]:
    q = torch.zeros(rows, num_heads, head_dim, dtype=torch.bfloat16)
    return {
        "out": torch.zeros_like(q),
        "workspace": allocate_workspace(4, num_heads, num_kv_heads, head_dim, "cpu"),
        "q": q,
        "kv_cache": torch.zeros(9, num_kv_heads, 2, block_size, head_dim, dtype=torch.bfloat16),
        "block_tables": torch.zeros(rows, 5, dtype=torch.int32),
        "context_lens": torch.zeros(rows, dtype=torch.int32),
        "scale": 0.125,
    }


def _launch(**changes: object) -> None:
    paged_attention_decode(**{**_arguments(), **changes})  # type: ignore[arg-type]


def test_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    _launch()
    launch = fake.launches[0]
    assert launch.grid == (264, 1, 1)
    assert launch.num_threads == 256
    assert list(launch.arguments[8:13]) == [0] * 5, "what would finish heads"
    rows, stride, q_stride, scale, reads_early = launch.arguments[13:18]
    assert (rows, stride, q_stride, reads_early) == (3, 5, 512, 0)
    assert scale == pytest.approx(0.125 * math.log2(math.e))
    assert launch.variant.macros["PHOTON_GROUP"] == 4
    assert launch.variant.macros["PHOTON_MAX_SPLITS"] == 64


def test_grid_is_no_larger_than_the_work_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    paged_attention_decode(**_arguments(rows=1, num_heads=4, num_kv_heads=1))  # type: ignore[arg-type]
    paged_attention_decode(**_arguments(rows=4, head_dim=128))  # type: ignore[arg-type]
    assert [launch.grid for launch in fake.launches] == [(64, 1, 1), (132, 1, 1)]


def test_teams_are_as_large_as_there_is_room_for() -> None:
    resident = 264 * 8
    # A team or two too many wait for one that ends.
    assert [num_sharers(rows, 8, 4, 64, resident) for rows in (1, 32, 48, 50, 64, 128, 256, 1024)] == [
        *(8, 8, 8, 4, 4, 2, 1, 1)
    ]
    # Scratch for 64 splits takes two warps' room at 64 dims, one's at 128.
    assert num_sharers(1024, 2, 4, 64, resident) == 2
    assert num_sharers(1024, 4, 4, 128, resident) == 1
    assert num_sharers(1024, 2, 7, 64, resident) == 8


def test_splits_are_a_function_of_the_model_alone() -> None:
    assert [max_splits(heads) for heads in (1, 2, 4, 8, 16, 32, 40)] == [64, 64, 64, 32, 16, 8, 8]


def test_every_shape_here_is_compiled_without_a_gpu_by_kind() -> None:
    """Groups and head dims of the check without a GPU cover those of these tests."""
    checked = PAGED_ATTENTION_DECODE.checked
    assert {macros["PHOTON_HEAD_DIM"] for macros in checked} >= {16, 48, 64, 80, 96, 128}
    assert {macros["PHOTON_GROUP"] for macros in checked} == set(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": torch.zeros(3, 8, 64)}, "float32"),
        ({"q": torch.zeros(3, 7, 64, dtype=torch.bfloat16)}, "7 query heads on 2 kv heads"),
        ({"q": torch.zeros(3, 18, 64, dtype=torch.bfloat16)}, "groups are of 1 to 8"),
        ({"q": torch.zeros(5, 8, 64, dtype=torch.bfloat16)}, "out must have shape"),
        ({"out": torch.zeros(3, 8, 64, dtype=torch.float16)}, "out must be"),
        ({"kv_cache": torch.zeros(9, 2, 2, 24, 64, dtype=torch.bfloat16)}, "block_size is 24"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 64, dtype=torch.float16)}, "kv_cache must be"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 72, dtype=torch.bfloat16)}, "kv_cache must have shape"),
        ({"block_tables": torch.zeros(3, 5, dtype=torch.int64)}, "block_tables must be"),
        ({"block_tables": torch.zeros(2, 5, dtype=torch.int32)}, "block_tables must have shape"),
        ({"context_lens": torch.zeros(3, dtype=torch.int64)}, "context_lens must be"),
        ({"workspace": allocate_workspace(2, 8, 2, 64, "cpu")}, "room for 2"),
        ({"workspace": allocate_workspace(4, 8, 2, 128, "cpu")}, "acc must have shape"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.nan}, "scale is nan"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], match: str
) -> None:
    fake = FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match=match):
        _launch(**changes)
    assert fake.launches == []


@pytest.mark.parametrize("head_dim", [8, 72, 144, 256])
def test_head_dims_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    fake = FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        paged_attention_decode(**_arguments(head_dim=head_dim))  # type: ignore[arg-type]
    assert fake.launches == []


def test_a_workspace_has_its_limits() -> None:
    for rows in (0, MAX_ROWS + 1):
        with pytest.raises(ValueError, match="max_rows"):
            allocate_workspace(rows, 8, 2, 64, "cpu")
    with pytest.raises(ValueError, match="9 query heads on 1 kv heads"):
        allocate_workspace(4, 9, 1, 64, "cpu")
