"""Products of a few tokens on the GPU against float64; what is refused and how it is launched, anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import linear_output
from photon_grpc.kernels.gemv import can_norm, gemv, normed_gemv
from photon_grpc.kernels.linear_output import LinearOutput
from tests.support.kernels import STORAGE, FakeLauncher, Fenced, randn
from tests.support.linear import Case, Heads, check, make_weight

EPS = 1e-5
TOKENS = (1, 2, 3, 5, 8, 9, 13, 16)
KINDS = ("store_rows", "float_rows", "add_rows", "silu_and_mul")
# Llama 3.2 1B, Qwen2.5 0.5B and 7B, and rows that fill no tile and no chunk.
SIZES = ((2048, 2048), (1152, 896), (896, 4864), (3584, 18944), (2048, 8192), (48, 200), (16, 8), (80, 1032))
HEADS = (Heads(32, 8, 64), Heads(14, 2, 64), Heads(4, 4, 128), Heads(3, 1, 80), Heads(1, 1, 16))


def product(
    kind: str,
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    heads: Heads | None = None,
) -> Case:
    return Case(
        kind,
        randn(tokens, k, dtype=dtype, seed=2),
        make_weight(n, k, dtype),
        randn(n, dtype=dtype, seed=4) if bias else None,
        heads,
    )


def run_plain(case: Case) -> None:
    memory = Fenced()
    x, weight = memory.copy(case.x), memory.copy(case.weight)
    check(case, lambda output: gemv(output, x, weight))
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str, dtype: torch.dtype, tokens: int, n: int, k: int) -> None:
    run_plain(product(kind, tokens, n, k, dtype, bias=kind != "float_rows" and tokens % 2 == 0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 6, 8, 11, 16])
def test_x_is_staged_where_a_cta_has_several_tiles(tokens: int) -> None:
    run_plain(product("silu_and_mul", tokens, 16384, 2048, torch.bfloat16))
    run_plain(product("float_rows", tokens, 50001, 512, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_heads_are_rotated_and_stored(tokens: int, heads: Heads, index: torch.dtype) -> None:
    case = product("rope_and_store", tokens, heads.n, 896, torch.bfloat16, bias=tokens % 2 == 1, heads=heads)
    x, weight = case.x.cuda(), case.weight.cuda()
    check(case, lambda output: gemv(output, x, weight), index)


def normed(residual: Tensor, norm: Tensor, kind: str, weight: Tensor, heads: Heads | None = None) -> Case:
    """The product of the norm, x rounded where the kernel rounds it."""
    wide = residual.double()
    scale = (wide.square().mean(-1) + EPS).rsqrt()
    if norm.dtype is torch.bfloat16:
        return Case(kind, (residual * norm.float()).to(norm.dtype), weight, None, heads, scale)
    x = (wide * scale[:, None] * norm.double()).to(norm.dtype)
    return Case(kind, x, weight, None, heads, torch.ones(len(x), dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [2048, 896, 4096, 200])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("kind", [*KINDS, "rope_and_store"])
def test_products_of_a_norm(kind: str, dtype: torch.dtype, tokens: int, k: int) -> None:
    heads = Heads(6, 2, 64) if kind == "rope_and_store" else None
    residual = randn(tokens, k, dtype=torch.float32, seed=5) * 20
    norm = randn(k, dtype=dtype, seed=6)
    case = normed(residual, norm, kind, make_weight(heads.n if heads else 640, k, dtype), heads)
    memory = Fenced()
    on_device = [memory.copy(tensor) for tensor in (residual, norm, case.weight)]
    check(case, lambda output: normed_gemv(output, on_device[0], on_device[1], EPS, on_device[2]))
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE)
def test_a_large_residual_does_not_overflow(dtype: torch.dtype) -> None:
    residual = randn(2, 2048, dtype=torch.float32) * 1e5
    norm, weight = randn(2048, dtype=dtype, seed=6), make_weight(256, 2048, dtype)
    on_device = [tensor.cuda() for tensor in (residual, norm, weight)]
    check(
        normed(residual, norm, "store_rows", weight),
        lambda output: normed_gemv(output, on_device[0], on_device[1], EPS, on_device[2]),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["direct", "normed"])
def test_a_token_alone_has_the_bits_of_the_token_in_a_batch(kind: str) -> None:
    weight, norm = make_weight(3072, 2048, torch.bfloat16).cuda(), randn(2048, dtype=torch.bfloat16).cuda()
    x = randn(16, 2048, dtype=torch.bfloat16, seed=3).cuda()

    def multiply(rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), 3072, dtype=torch.bfloat16, device="cuda")
        if kind == "normed":
            normed_gemv(linear_output.store_rows(out), rows.float(), norm, EPS, weight)
        else:
            gemv(linear_output.store_rows(out), rows, weight)
        return out

    together = multiply(x)
    if kind == "direct":
        assert torch.equal(multiply(x[3:11]), together[3:11])
        for row in range(16):
            assert torch.equal(multiply(x[row : row + 1])[0], together[row])
    else:
        # The warps that share a token's squares differ with the number of tokens, the sums hardly do.
        for row in range(16):
            torch.testing.assert_close(multiply(x[row : row + 1])[0], together[row], rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
def test_a_chain_in_a_graph_reads_what_the_kernel_before_wrote() -> None:
    # Every link overlaps with the next, which has its weights already and must wait for x.
    k, links = 2048, 24
    weights = [make_weight(k, k, torch.bfloat16, seed).cuda() for seed in range(links)]
    norm = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    residual = torch.empty(4, k, device="cuda")
    start = randn(4, k, dtype=torch.float32).cuda()
    x = torch.empty(4, k, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        residual.copy_(start)
        for first, second in zip(weights[::2], weights[1::2], strict=True):
            normed_gemv(linear_output.store_rows(x), residual, norm, EPS, first)
            gemv(linear_output.add_rows(residual), x, second)

    run()
    expected = residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(300):
        residual.fill_(float("nan"))
        x.fill_(float("nan"))
        graph.replay()
        assert torch.equal(residual, expected)


# --- without a GPU ----------------------------------------------------------------------------------------


def store(tokens: int = 2, n: int = 32) -> LinearOutput:
    return linear_output.store_rows(torch.zeros(tokens, n, dtype=torch.bfloat16))


def test_one_cta_per_multiprocessor_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = FakeLauncher().install(monkeypatch).launches
    x = torch.zeros(2, 1024, dtype=torch.bfloat16)
    for n in (32, 8192):
        gemv(store(n=n), x, torch.zeros(n, 1024, dtype=torch.bfloat16))
    assert [launch.grid for launch in launches] == [(2, 1, 1), (132, 1, 1)]
    assert [launch.variant.macros["PHOTON_INPUT"] for launch in launches] == ["direct", "staged"]
    for launch in launches:
        assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"]
        assert launch.shared_bytes + (8 << 10) > 114 << 10, "a second CTA would fit"


def test_up_to_four_tokens_in_the_rings_leave_room_for_more_early_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = FakeLauncher().install(monkeypatch).launches
    for tokens, n in ((1, 32), (4, 32), (5, 32), (8, 32), (1, 8192)):
        residual, x = torch.zeros(tokens, n), torch.zeros(tokens, 1024).bfloat16()
        gemv(linear_output.add_rows(residual), x, torch.zeros(n, 1024).bfloat16())
    assert [launch.variant.macros["PHOTON_EARLY"] for launch in launches] == [5, 5, 2, 2, 2]
    assert {launch.variant.macros["PHOTON_INPUT"] for launch in launches[:-1]} == {"direct"}


@pytest.mark.parametrize("k", [896, 2048, 3072, 4096, 5120])
def test_more_than_eight_tokens_have_a_variant_that_fits(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    launches = FakeLauncher().install(monkeypatch).launches
    for tokens in (8, 9, 16):
        gemv(store(tokens, 8192), torch.zeros(tokens, k).bfloat16(), torch.zeros(8192, k).bfloat16())
        gemv(store(tokens, 32), torch.zeros(tokens, k).bfloat16(), torch.zeros(32, k).bfloat16())
    assert [launch.variant.macros["PHOTON_TOKENS"] for launch in launches] == [8, 8, 16, 16, 16, 16]
    for launch in launches:
        assert 114 << 10 < launch.shared_bytes + (17 << 10) <= 227 << 10


def test_no_tokens_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = FakeLauncher().install(monkeypatch).launches
    gemv(store(0), torch.zeros(0, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16))
    assert not launches


@pytest.mark.parametrize(
    ("output", "x", "weight", "match"),
    [
        (store(17), torch.zeros(17, 64), torch.zeros(32, 64), "17 tokens"),
        (store(), torch.zeros(3, 64), torch.zeros(32, 64), "x must have shape"),
        (store(), torch.zeros(2, 64), torch.zeros(16, 64), "weight must have shape"),
        (store(), torch.zeros(2, 60), torch.zeros(32, 60), "multiples of 8"),
    ],
)
def test_refused(
    monkeypatch: pytest.MonkeyPatch, output: LinearOutput, x: Tensor, weight: Tensor, match: str
) -> None:
    FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match=match):
        gemv(output, x.bfloat16(), weight.bfloat16())


def test_float32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        gemv(linear_output.store_rows(torch.zeros(2, 32)), torch.zeros(2, 64), torch.zeros(32, 64))


def test_what_does_not_fit_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLauncher().install(monkeypatch)
    assert all(can_norm(tokens, 2048) for tokens in (1, 8, 9, 16))
    assert all(can_norm(tokens, 4096) for tokens in (1, 8, 9, 16))
    assert can_norm(8, 7168)
    assert not can_norm(9, 7168)
    assert not can_norm(1, 16384)
    assert not can_norm(17, 64)
    residual, norm = torch.zeros(1, 16384), torch.zeros(16384, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="do not fit"):
        normed_gemv(store(1), residual, norm, EPS, torch.zeros(32, 16384, dtype=torch.bfloat16))
