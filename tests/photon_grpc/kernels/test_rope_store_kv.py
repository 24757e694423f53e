"""Rotation, q/k norm and the cache write on the GPU against float64; what is refused, anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels.rope_store_kv import qk_norm_rope, rope, rope_store_kv, store_kv
from tests.support.kernels import ALL_TYPES, FakeLauncher, Fenced, assert_repeatable, assert_ulps, randn
from tests.support.rotary import CANCELLED, EPS, Case, angle_table, rotated

SHAPES = [(32, 8, 64), (8, 2, 64), (14, 2, 64), (24, 8, 128), (16, 8, 128), (28, 4, 128), (32, 32, 128)]
SHAPES += [(1, 1, 16), (3, 3, 80), (6, 2, 96), (4, 1, 256), (2, 1, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 257])
@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_store_kv(dtype: torch.dtype, tokens: int, shape: tuple[int, int, int], normed: bool) -> None:
    case = Case(tokens, *shape, block_size=32 if tokens == 9 else 16, dtype=dtype)
    head_dim = case.head_dim
    memory = Fenced()
    qkv, table = memory.copy(case.qkv), memory.copy(case.table)
    positions, slots = memory.copy(case.positions), memory.copy(case.slots)
    weights = (randn(head_dim, dtype=dtype, seed=5), randn(head_dim, dtype=dtype, seed=6))
    norms = (memory.copy(weights[0]), memory.copy(weights[1])) if normed else None
    q, k, v = case.parts()
    q_weight, k_weight = weights if normed else (None, None)
    caches: list[Tensor] = []

    def run() -> Tensor:
        q_out = memory.empty(*q.shape, dtype=dtype)
        caches.append(memory.empty(*case.cache_shape, dtype=dtype))
        rope_store_kv(q_out, caches[-1], qkv, norms, EPS, table, positions, slots)
        return q_out

    found = assert_repeatable(run)
    assert_ulps(found, rotated(q, q_weight, case.table, case.positions), floor=CANCELLED)
    for cache in caches:
        case.check_cache(cache, rotated(k, k_weight, case.table, case.positions), v)
    memory.check()
    assert torch.equal(qkv.cpu(), case.qkv)


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_in_place_and_with_either_index(index_type: torch.dtype) -> None:
    """As the model calls it: q stays where it is, and no other head of the row changes."""
    case = Case(37, 8, 2, 64, 16, torch.bfloat16)
    qkv = case.qkv.cuda()
    cache = torch.full(case.cache_shape, float("nan"), device="cuda", dtype=torch.bfloat16)
    rope_store_kv(
        qkv[:, :8],
        cache,
        qkv,
        None,
        EPS,
        case.table.cuda(),
        case.positions.to("cuda", index_type),
        case.slots.cuda(),
    )
    q, k, v = case.parts()
    assert_ulps(qkv[:, :8], rotated(q, None, case.table, case.positions), floor=4e-6)
    assert torch.equal(qkv[:, 8:].cpu(), case.qkv[:, 8:])
    case.check_cache(cache, rotated(k, None, case.table, case.positions), v)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rope_alone(head_dim: int) -> None:
    x, table = randn(50, 12, head_dim, dtype=torch.bfloat16), angle_table(head_dim)
    positions = torch.arange(50) * 97
    weight = randn(head_dim, dtype=torch.bfloat16, seed=3)
    plain, normed = x.cuda(), x.cuda()
    rope(plain, table.cuda(), positions.cuda())
    qk_norm_rope(normed, weight.cuda(), EPS, table.cuda(), positions.cuda())

    assert_ulps(plain, rotated(x, None, table, positions), floor=4e-6)
    assert_ulps(normed, rotated(x, weight, table, positions), floor=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_positions_up_to_128k(index_type: torch.dtype) -> None:
    num_positions, head_dim = 131_072, 128
    frequencies = 500_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    positions = torch.tensor([0, 32_767, 32_768, 65_535, 131_071])
    x = randn(5, 4, head_dim, dtype=torch.bfloat16)
    on_device = x.cuda()
    rope(on_device, table.cuda(), positions.to("cuda", index_type))
    assert_ulps(on_device, rotated(x, None, table, positions), floor=CANCELLED)


@pytest.mark.gpu
def test_store_kv() -> None:
    case = Case(41, 0, 4, 128, 16, torch.float16)
    cache = torch.full(case.cache_shape, float("nan"), device="cuda", dtype=torch.float16)
    kv = case.qkv.view(41, 2, 4, 128)
    store_kv(cache, kv.cuda(), case.slots.cuda())
    case.check_cache(cache, kv[:, 0].double(), kv[:, 1])


@pytest.mark.gpu
def test_a_cache_past_two_to_the_31_elements() -> None:
    num_blocks = (1 << 31) // (8 * 2 * 16 * 128) + 3
    cache = torch.zeros(num_blocks, 8, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    qkv = torch.ones(1, 24, 128, device="cuda", dtype=torch.bfloat16)
    slot = torch.tensor([num_blocks * 16 - 1], device="cuda")
    rope_store_kv(
        qkv[:, :8],
        cache,
        qkv,
        None,
        EPS,
        angle_table(128).cuda(),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        slot,
    )
    assert torch.equal(cache[-1, :, :, -1], torch.ones_like(cache[-1, :, :, -1]))
    assert float(cache.sum(dtype=torch.float32)) == 8 * 2 * 128


def test_threads_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    for head_dim, lanes, ctas in ((16, 1, 1), (64, 4, 1), (80, 8, 2), (128, 8, 2), (512, 32, 6)):
        cache = torch.zeros(3, 6, 2, 16, head_dim)
        qkv = torch.zeros(5, 24, head_dim)
        rope_store_kv(
            qkv[:, :12],
            cache,
            qkv,
            None,
            EPS,
            torch.zeros(9, head_dim),
            torch.zeros(5, dtype=torch.int64),
            torch.zeros(5, dtype=torch.int64),
        )
        launch = fake.launches[-1]
        assert launch.grid == (5, ctas, 1)
        assert launch.arguments[8:15] == (12, 6, head_dim, 16, lanes, 24 * head_dim, 24 * head_dim)


def test_what_the_kernel_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    cache, table = torch.zeros(3, 2, 2, 16, 64), torch.zeros(9, 64)
    qkv = torch.zeros(5, 8, 64)
    positions = slots = torch.zeros(5, dtype=torch.int64)
    q = qkv[:, :4]

    def refuse(message: str, **changes: Tensor) -> None:
        given = {"q": q, "cache": cache, "qkv": qkv, "table": table, "positions": positions, "slots": slots}
        given |= changes
        with pytest.raises(ValueError, match=message):
            rope_store_kv(
                given["q"],
                given["cache"],
                given["qkv"],
                None,
                EPS,
                given["table"],
                given["positions"],
                given["slots"],
            )

    refuse("qkv must have shape", qkv=torch.zeros(5, 9, 64))
    refuse("q_out must be", q=q.half())
    refuse("kv_cache must be contiguous", cache=torch.zeros(3, 2, 2, 16, 128)[..., :64])
    refuse("table must be torch.float32", table=table.half())
    refuse("positions must have shape", positions=torch.zeros(4, dtype=torch.int64))
    refuse("slot_mapping must be torch.int64", slots=torch.zeros(5, dtype=torch.int32))
    refuse(
        "head_dim is 72",
        q=torch.zeros(5, 4, 72),
        qkv=torch.zeros(5, 8, 72),
        cache=torch.zeros(3, 2, 2, 16, 72),
        table=torch.zeros(9, 72),
    )
    with pytest.raises(ValueError, match="norm weight must have shape"):
        rope_store_kv(q, cache, qkv, (torch.zeros(64), torch.zeros(32)), EPS, table, positions, slots)
    assert fake.launches == []
