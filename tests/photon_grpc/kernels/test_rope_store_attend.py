"""Attention that finishes q, k and v itself on the GPU, against the launches apart and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import paged_attention_decode as module
from photon_grpc.kernels.paged_attention_decode import (
    CHUNK_TOKENS,
    allocate_workspace,
    max_splits,
    rope_store_attend,
)
from tests.support.kernels import FakeLauncher
from tests.support.paged_attention import Shape, make_rows
from tests.support.raw_heads import RawStep, newest_slots

F16 = torch.float16
QWEN_600M = Shape(8, 2, 128, 16)
QWEN_4B = Shape(8, 4, 128, 32)

# Every group, every number of lanes to a head, heads that lanes are left over of, and both types.
SHAPES = (
    QWEN_600M,
    QWEN_4B,
    Shape(8, 2, 128, 16, F16),
    Shape(8, 5, 128, 16),
    Shape(8, 8, 128, 16),
    Shape(8, 1, 128, 32, F16),
    Shape(4, 3, 80, 16),
    Shape(2, 6, 96, 16, F16),
    Shape(5, 2, 112, 32),
    Shape(8, 1, 64, 16),
    Shape(2, 7, 64, 16, F16),
    Shape(4, 4, 32, 16),
    Shape(3, 2, 48, 64),
    Shape(1, 1, 16, 16),
)
LENS = (1, 2, 0, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 130)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_results_and_cache_have_the_bits_of_the_launches_apart(shape: Shape, normed: bool) -> None:
    step = RawStep(make_rows(shape, LENS, "cuda"), normed)
    out, cache = step.apart()
    for reads_early in (False, True, True):
        found, stored = step.together(reads_early=reads_early)
        assert torch.equal(bits(found), bits(out))
        assert torch.equal(bits(stored), bits(cache)), "also: no slot but the newest tokens' is written"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_against_float64(shape: Shape, normed: bool) -> None:
    step = RawStep(make_rows(shape, LENS, "cuda", seed=1), normed, seed=4)
    found, _ = step.together()
    step.check(found)


@pytest.mark.gpu
@pytest.mark.parametrize("sharers", [8, 4, 2, 1])
@pytest.mark.parametrize("shape", [QWEN_600M, QWEN_4B], ids=str)
def test_teams_of_any_size_with_several_items(
    shape: Shape, sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "num_sharers", lambda *_: sharers)
    growth = max_splits(shape.num_kv_heads) * CHUNK_TOKENS
    lens = (*LENS, 4097, growth, growth + 1, growth + 300, *range(1, 1200, 7))
    step = RawStep(make_rows(shape, lens, "cuda", seed=2))
    out, cache = step.apart()
    for reads_early in (False, True):
        found, stored = step.together(reads_early=reads_early)
        assert torch.equal(bits(found), bits(out))
        assert torch.equal(bits(stored), bits(cache))


@pytest.mark.gpu
def test_a_row_that_is_stored_nowhere_sees_its_token_all_the_same() -> None:
    step = RawStep(make_rows(QWEN_600M, (300, 17, 64), "cuda"))
    expected, cache = step.together()
    step.slots[1] = -1

    found, stored = step.together()

    assert torch.equal(bits(found), bits(expected))
    changed = (bits(stored) != bits(cache)).view(stored.shape)
    assert int(changed.any(-1).sum()) == 2 * QWEN_600M.num_kv_heads
    assert bool(stored[changed].isnan().all())


@pytest.mark.gpu
def test_a_captured_launch_waits_for_its_heads_and_follows_the_lengths() -> None:
    """The kernel before each launch writes qkv, another every time, over NaN; rows grow and fall idle."""
    shape = QWEN_600M
    batches = [
        RawStep(make_rows(shape, lens, "cuda", seed=seed), seed=seed)
        for seed, lens in enumerate(((190, 1, 0, 600), (33, 513, 5000, 2), (0, 0, 16, 0)))
    ]
    expected = [batch.together() for batch in batches]
    width = max(batch.block_tables.shape[1] for batch in batches)
    blocks = max(batch.cache.shape[0] for batch in batches)
    live = batches[1]
    source = torch.zeros_like(live.qkv)
    live.cache = torch.full((blocks, *live.cache.shape[1:]), torch.nan, dtype=shape.dtype, device="cuda")
    live.block_tables = torch.zeros(4, width, dtype=torch.int32, device="cuda")
    slots, positions, lens = live.slots.clone(), live.positions.clone(), live.context_lens.clone()
    live.slots, live.positions, live.context_lens = slots, positions, lens
    originals = [
        (batch.host_qkv.cuda(), newest_slots(batch.rows).cuda(), batch.host_positions.cuda())
        for batch in batches
    ]

    def run() -> None:
        for _ in range(3):
            live.qkv.fill_(torch.nan)
            live.qkv.copy_(source)
            live.launch(reads_early=True)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        for batch, (qkv, new_slots, new_positions), (out, cache) in zip(
            batches, originals, expected, strict=True
        ):
            source.copy_(qkv)
            slots.copy_(new_slots)
            positions.copy_(new_positions)
            lens.copy_(batch.rows.context_lens)
            live.block_tables[:, : batch.rows.block_tables.shape[1]] = batch.rows.block_tables
            live.cache[: cache.shape[0]] = batch.rows.kv_cache
            live.out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(bits(live.out), bits(out))
            assert torch.equal(bits(live.cache[: cache.shape[0]]), bits(cache))
    live.memory.check()
    assert not live.workspace.counters.any()


# --- what needs no device -----------------------------------------------------------------------


def _arguments() -> dict[str, object]:
    qkv = torch.zeros(3, 8 + 2 * 2, 64, dtype=torch.bfloat16)
    weight = torch.ones(64, dtype=torch.bfloat16)
    return {
        "out": torch.zeros(3, 8, 64, dtype=torch.bfloat16),
        "workspace": allocate_workspace(4, 8, 2, 64, "cpu"),
        "qkv": qkv,
        "kv_cache": torch.zeros(9, 2, 2, 16, 64, dtype=torch.bfloat16),
        "norms": (weight, weight.clone()),
        "eps": 1e-6,
        "table": torch.zeros(99, 64),
        "positions": torch.zeros(3, dtype=torch.int64),
        "slot_mapping": torch.zeros(3, dtype=torch.int64),
        "block_tables": torch.zeros(3, 5, dtype=torch.int32),
        "context_lens": torch.zeros(3, dtype=torch.int32),
        "scale": 0.125,
    }


def _launch(**changes: object) -> dict[str, object]:
    arguments = {**_arguments(), **changes}
    rope_store_attend(**arguments)  # type: ignore[arg-type]
    return arguments


def test_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    given = _launch(reads_early=True)
    launch = fake.launches[0]
    addresses = [given[name].data_ptr() for name in ("table", "positions", "slot_mapping")]  # type: ignore[attr-defined]
    norms = [weight.data_ptr() for weight in given["norms"]]  # type: ignore[attr-defined]
    assert list(launch.arguments[8:13]) == [*norms, *addresses]
    rows, stride, row_stride, _, reads_early, eps = launch.arguments[13:]
    assert (rows, stride, row_stride, reads_early) == (3, 5, 12 * 64, 1)
    assert eps == pytest.approx(1e-6)
    assert launch.variant.macros["PHOTON_HEADS"] == "raw"
    assert launch.variant.macros["PHOTON_GROUP"] == 4


def test_it_is_for_rows_whose_items_have_a_team_each(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLauncher().install(monkeypatch)
    shape = (8, 2, 128)
    rows = (1, 2, 3, 4, 16, 64, 128, 256)
    assert [module.can_finish(count, *shape, 16_384) for count in rows] == [True, True] + [False] * 6
    # As many rows as attention has in one go, where none can have a second split.
    assert [module.can_finish(count, *shape, 512) for count in rows] == [True] * 7 + [False]
    assert [module.can_finish(count, *shape, 513) for count in rows] == [True] * 4 + [False] * 4


def test_without_a_norm_there_are_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    _launch(norms=None)
    assert fake.launches[0].arguments[8:10] == (0, 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qkv": torch.zeros(3, 12, 64)}, "float32"),
        ({"qkv": torch.zeros(3, 11, 64, dtype=torch.bfloat16)}, "7 query heads on 2 kv heads"),
        ({"norms": (torch.ones(64), torch.ones(64))}, "norm weight must be"),
        ({"norms": (torch.ones(32, dtype=torch.bfloat16),) * 2}, "norm weight must have shape"),
        ({"table": torch.zeros(99, 64, dtype=torch.bfloat16)}, "table must be"),
        ({"table": torch.zeros(99, 32)}, "table must have shape"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions must be"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions must have shape"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int32)}, "slot_mapping must be"),
        ({"out": torch.zeros(3, 12, 64, dtype=torch.bfloat16)}, "out must have shape"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], match: str
) -> None:
    fake = FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match=match):
        _launch(**changes)
    assert fake.launches == []
