"""Causal attention of new tokens on the GPU against float64; what is refused, anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels import paged_attention_prefill as module
from photon_grpc.kernels.paged_attention_prefill import (
    PAGED_ATTENTION_PREFILL,
    PAGED_ATTENTION_PREFILL_WGMMA,
    WGMMA_TILINGS,
    paged_attention_prefill,
)
from tests.support.kernels import FakeLauncher, Fenced, randn
from tests.support.paged_attention import Rows, Shape, assert_close, attend, make_rows

F16 = torch.float16

LLAMA_1B = Shape(8, 4, 64, 16)
LLAMA_8B = Shape(8, 4, 128, 32)

SHAPES = (
    LLAMA_1B,
    Shape(8, 4, 64, 32, F16),
    LLAMA_8B,
    Shape(8, 3, 128, 16),
    Shape(2, 7, 64, 16, F16),
    Shape(4, 7, 128, 16, F16),
    Shape(32, 1, 128, 16),
    Shape(1, 8, 128, 32),
    Shape(4, 2, 80, 16),
    Shape(1, 1, 16, 16),
    Shape(2, 6, 96, 16),
    Shape(2, 5, 48, 16),
    Shape(1, 16, 64, 64),
)


class Prefill:
    """Buffers for launches over some rows, of which the last `query_lens` tokens are new."""

    def __init__(self, rows: Rows, query_lens: tuple[int, ...], *, padding: int = 0, seed: int = 7) -> None:
        shape = self.shape = rows.shape
        self.rows = rows
        self.starts = (0, *accumulate(query_lens))
        self.memory = Fenced()
        tokens = self.starts[-1] + padding
        self.q = self.memory.copy(
            randn(tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype, seed=seed)
        )
        self.context_lens = self.memory.copy(rows.context_lens)
        self.block_tables = self.memory.copy(rows.block_tables)
        self.query_starts = self.memory.copy(torch.tensor(self.starts, dtype=torch.int32))
        self.out = self.memory.empty(*self.q.shape, dtype=shape.dtype)

    def launch(self) -> Tensor:
        paged_attention_prefill(
            self.out,
            self.q,
            self.rows.kv_cache,
            self.block_tables,
            self.context_lens,
            self.query_starts,
            self.shape.scale,
        )
        return self.out

    def run(self) -> Tensor:
        """The result of one launch into poisoned memory."""
        self.out.fill_(torch.nan)
        result = self.launch().clone()
        self.memory.check()
        return result

    def check(self, result: Tensor) -> None:
        q = self.q.cpu()
        for row, context in enumerate(self.rows.contexts):
            new = slice(self.starts[row], self.starts[row + 1])
            if new.start < new.stop:
                assert_close(result[new], attend(q[new], context, self.shape.scale), context)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_prefixes_and_single_tokens(shape: Shape) -> None:
    """Whole prompts, chunks behind a cached prefix, one token, no token: round the tiles' edges."""
    pairs = (
        *((n, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)),
        *((1, n) for n in (16, 64, 65, 500)),
        *((33, n) for n in (34, 96, 97, 500)),
        (0, 40),
        (200, 1000),
        (0, 0),
        (64, 128),
    )
    query_lens, lens = zip(*pairs, strict=True)
    rows = make_rows(shape, lens, "cuda")
    before = bits(rows.kv_cache).clone()
    prefill = Prefill(rows, query_lens, padding=3)

    first, second = prefill.run(), prefill.run()

    prefill.check(first)
    assert first[-3:].isnan().all(), "tokens of no row keep their output"
    assert torch.equal(bits(first), bits(second))
    assert torch.equal(bits(rows.kv_cache), before)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, Shape(2, 7, 64, 16, F16)], ids=str)
def test_the_kernel_of_every_architecture(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another one stands in for it on this GPU."""
    monkeypatch.setattr(module, "WGMMA_TILINGS", {})
    rows = make_rows(shape, (1, 64, 65, 300, 1000, 500), "cuda")
    prefill = Prefill(rows, (1, 64, 65, 300, 200, 1), padding=3)
    first, second = prefill.run(), prefill.run()
    prefill.check(first)
    assert torch.equal(bits(first), bits(second))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, Shape(2, 7, 64, 16, F16)], ids=str)
@pytest.mark.parametrize(("query_len", "context_len"), [(2048, 2048), (512, 4097), (1, 32768), (65, 32768)])
def test_long_contexts(shape: Shape, query_len: int, context_len: int) -> None:
    prefill = Prefill(make_rows(shape, (context_len,), "cuda"), (query_len,))
    first, second = prefill.run(), prefill.run()
    prefill.check(first)
    assert torch.equal(bits(first), bits(second))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 65, 256, 1100])
def test_any_number_of_rows(count: int) -> None:
    shape = Shape(2, 4, 64, 16)
    generator = torch.Generator().manual_seed(count)
    query_lens = torch.randint(0, 70, (count,), generator=generator).tolist()
    prefixes = torch.randint(0, 90, (count,), generator=generator).tolist()
    lens = tuple(new + old for new, old in zip(query_lens, prefixes, strict=True))
    prefill = Prefill(make_rows(shape, lens, "cuda", seed=count), (*query_lens,))
    prefill.check(prefill.run())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, Shape(2, 7, 64, 16, F16)], ids=str)
def test_a_token_depends_on_nothing_but_its_context(shape: Shape) -> None:
    """In a batch, alone, or in chunks of any size: the same bits."""
    query_lens, lens = (300, 5, 100), (300, 700, 357)
    rows = make_rows(shape, lens, "cuda")
    prefill = Prefill(rows, query_lens)
    together = prefill.run()
    for row, context_len in enumerate(lens):
        q = prefill.q[prefill.starts[row] : prefill.starts[row + 1]]
        expected = together[prefill.starts[row] : prefill.starts[row + 1]]
        for chunk in (query_lens[row], 77, 1):
            if chunk == 1 and query_lens[row] > 5:
                continue
            for start in range(0, query_lens[row], chunk):
                stop = min(start + chunk, query_lens[row])
                part = Prefill(rows.select(row), (stop - start,))
                part.q.copy_(q[start:stop])
                part.context_lens.fill_(context_len - query_lens[row] + stop)
                assert torch.equal(bits(part.run()), bits(expected[start:stop])), (row, start, stop)


@pytest.mark.gpu
def test_a_row_of_nothing_but_nan_spoils_no_other() -> None:
    rows = make_rows(LLAMA_1B, (300, 40, 200), "cuda")
    prefill = Prefill(rows, (100, 40, 200))
    clean = prefill.run()
    rows.kv_cache[rows.block_tables[1, : -(-40 // LLAMA_1B.block_size)].long()] = torch.nan

    spoilt = prefill.run()

    assert spoilt[100:140].isnan().all()
    for new in (slice(0, 100), slice(140, 340)):
        assert torch.equal(bits(spoilt[new]), bits(clean[new]))


@pytest.mark.gpu
def test_scores_far_apart_and_far_out() -> None:
    prefill = Prefill(make_rows(LLAMA_8B, (257, 500), "cuda"), (257, 64))
    prefill.q.mul_(64)
    prefill.check(prefill.run())


@pytest.mark.gpu
def test_query_tokens_may_lie_apart() -> None:
    shape = LLAMA_1B
    prefill = Prefill(make_rows(shape, (70, 300), "cuda"), (70, 33))
    expected = prefill.run()
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.full((103, heads, shape.head_dim), torch.nan, dtype=shape.dtype, device="cuda")
    qkv[:, : shape.num_heads] = prefill.q
    prefill.q = qkv[:, : shape.num_heads]
    assert torch.equal(bits(prefill.run()), bits(expected))


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths() -> None:
    rows = make_rows(LLAMA_1B, (200, 64, 90), "cuda")
    first, second = Prefill(rows, (100, 28, 0)), Prefill(rows, (1, 37, 90))
    expected = second.run()
    first.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.launch()

    first.query_starts.copy_(second.query_starts)
    first.out.fill_(torch.nan)
    graph.replay()

    # Both have the same 128 queries.
    assert torch.equal(bits(first.out), bits(expected))


@pytest.mark.gpu
def test_cache_of_more_than_2_to_the_31_elements() -> None:
    shape = LLAMA_8B
    per_block = 2 * shape.num_kv_heads * shape.block_size * shape.head_dim
    first_block = (1 << 31) // per_block
    rows = make_rows(shape, (300, 65), "cuda", first_block=first_block)
    assert rows.kv_cache.numel() > 1 << 31
    prefill = Prefill(rows, (100, 65))
    prefill.check(prefill.run())


# --- what needs no device -----------------------------------------------------------------------


def _arguments(
    tokens: int = 70, num_heads: int = 8, num_kv_heads: int = 2, head_dim: int = 64
) -> dict[str, object]:
    q = torch.zeros(tokens, num_heads, head_dim, dtype=torch.bfloat16)
    return {
        "out": torch.zeros_like(q),
        "q": q,
        "kv_cache": torch.zeros(9, num_kv_heads, 2, 16, head_dim, dtype=torch.bfloat16),
        "block_tables": torch.zeros(3, 5, dtype=torch.int32),
        "context_lens": torch.zeros(3, dtype=torch.int32),
        "query_starts": torch.zeros(4, dtype=torch.int32),
        "scale": 0.125,
    }


def _launch(**changes: object) -> None:
    paged_attention_prefill(**{**_arguments(), **changes})  # type: ignore[arg-type]


@dataclass
class Maps:
    """In the place of `tensor_map`, which needs a driver: keeps what was asked for."""

    asked: list[tuple[object, ...]] = field(default_factory=list)

    def tensor_map(self, *arguments: object) -> np.void:
        self.asked.append(arguments)
        return np.void(bytes(launcher.TENSOR_MAP_BYTES))


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Maps:
    fake = Maps()
    monkeypatch.setattr(module, "tensor_map", fake.tensor_map)
    return fake


def on_sm_80(fake: FakeLauncher) -> FakeLauncher:
    fake.device = launcher.Device(0, "none", (8, 0), 108, 163 << 10)
    return fake


def test_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = on_sm_80(FakeLauncher().install(monkeypatch))
    _launch()
    launch = fake.launches[0]
    assert launch.variant.spec is PAGED_ATTENTION_PREFILL
    # 280 queries of a kv head in tiles of 128, and one more tile for each row.
    assert launch.grid == (2 * (2 + 3), 1, 1)
    assert launch.num_threads == 256
    assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"] == 36864
    assert launch.arguments[-4:-1] == (3, 5, 512)
    assert launch.arguments[-1] == pytest.approx(0.125 * math.log2(math.e))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_launch_by_wgmma(monkeypatch: pytest.MonkeyPatch, maps: Maps, head_dim: int) -> None:
    fake = FakeLauncher().install(monkeypatch)
    arguments = _arguments(head_dim=head_dim)
    paged_attention_prefill(**arguments)  # type: ignore[arg-type]
    launch, tiling = fake.launches[0], WGMMA_TILINGS[head_dim]
    assert launch.variant.spec is PAGED_ATTENTION_PREFILL_WGMMA
    tile_tokens = 64 * tiling.warpgroups // 4
    # 70 tokens in tiles of so many, and one more tile for each row.
    num_items = 2 * (70 // tile_tokens + 3)
    assert launch.grid == (num_items, 1, 1)
    assert launch.num_threads == 128 * (tiling.warpgroups + 1)
    assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"]
    assert launch.arguments[4:7] == (3, 5, num_items)
    assert launch.arguments[7] == pytest.approx(0.125 * math.log2(math.e))
    q, kv_cache = arguments["q"], arguments["kv_cache"]
    assert isinstance(q, Tensor)
    assert isinstance(kv_cache, Tensor)
    assert maps.asked == [
        (q, (head_dim, 8, 70), (head_dim, 8 * head_dim), (64, 4, tile_tokens)),
        (kv_cache, (head_dim, 9 * 2 * 2 * 16), (head_dim,), (64, 16)),
    ]


def test_a_cta_takes_tile_after_tile(monkeypatch: pytest.MonkeyPatch, maps: Maps) -> None:
    fake = FakeLauncher().install(monkeypatch)
    paged_attention_prefill(**_arguments(tokens=8000))  # type: ignore[arg-type]
    launch = fake.launches[0]
    assert launch.grid == (132 * WGMMA_TILINGS[64].ctas, 1, 1)
    assert launch.arguments[6] > launch.grid[0]
    assert len(maps.asked) == 2


@pytest.mark.parametrize("head_dim", [48, 96])
def test_other_heads_take_the_kernel_of_every_architecture(
    monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    fake = FakeLauncher().install(monkeypatch)
    paged_attention_prefill(**_arguments(head_dim=head_dim))  # type: ignore[arg-type]
    assert fake.launches[0].variant.spec is PAGED_ATTENTION_PREFILL


def test_no_tokens_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    paged_attention_prefill(**_arguments(tokens=0))  # type: ignore[arg-type]
    assert fake.launches == []


@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
def test_there_are_ctas_for_every_tile(monkeypatch: pytest.MonkeyPatch, maps: Maps, group: int) -> None:
    fake = FakeLauncher().install(monkeypatch)
    for arch_tile, set_device in ((None, lambda: fake), (128, lambda: on_sm_80(fake))):
        set_device()
        for query_lens in ((70, 0, 0), (1, 1, 68), (32, 33, 5), (0, 0, 1)):
            fake.launches.clear()
            paged_attention_prefill(**_arguments(sum(query_lens), 2 * group, 2))  # type: ignore[arg-type]
            launch = fake.launches[0]
            if arch_tile is None:
                tile_tokens = WGMMA_TILINGS[64].tile_tokens(group)
                tiles = sum(-(-length // tile_tokens) for length in query_lens)
                assert launch.arguments[6] >= 2 * tiles
            else:
                tiles = sum(-(-length * group // arch_tile) for length in query_lens)
                assert launch.grid[0] >= 2 * tiles


def test_every_head_dim_here_is_compiled_without_a_gpu() -> None:
    checked = {macros["PHOTON_HEAD_DIM"] for macros in PAGED_ATTENTION_PREFILL.checked}
    assert checked >= {16, 64, 80, 96, 128}
    checked = {macros["PHOTON_HEAD_DIM"] for macros in PAGED_ATTENTION_PREFILL_WGMMA.checked}
    assert checked == set(WGMMA_TILINGS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": torch.zeros(70, 8, 64)}, "float32"),
        ({"q": torch.zeros(70, 7, 64, dtype=torch.bfloat16)}, "7 query heads cannot share 2 kv heads"),
        ({"q": torch.zeros(70, 1, 64, dtype=torch.bfloat16)}, "1 query heads cannot share 2 kv heads"),
        ({"q": torch.zeros(71, 8, 64, dtype=torch.bfloat16)}, "out must have shape"),
        ({"out": torch.zeros(70, 8, 64, dtype=torch.float16)}, "out must be"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 64, dtype=torch.float16)}, "kv_cache must be"),
        ({"block_tables": torch.zeros(3, 5, dtype=torch.int64)}, "block_tables must be"),
        ({"context_lens": torch.zeros(3, dtype=torch.int64)}, "context_lens must be"),
        ({"query_starts": torch.zeros(3, dtype=torch.int32)}, "query_starts must have shape"),
        ({"scale": -0.5}, "scale is -0.5"),
        ({"scale": math.inf}, "scale is inf"),
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
        paged_attention_prefill(**_arguments(head_dim=head_dim))  # type: ignore[arg-type]
    assert fake.launches == []
