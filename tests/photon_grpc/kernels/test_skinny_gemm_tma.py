"""Products by the copy engine and wgmma, on a GPU of compute capability 9.0 against float64; how weights are
cut, and what is refused, anywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import linear_output, skinny_gemm_tma
from photon_grpc.kernels.launcher import TENSOR_MAP_BYTES, Device, require_cuda
from photon_grpc.kernels.linear_output import LinearOutput
from photon_grpc.kernels.rmsnorm import rms_norm
from photon_grpc.kernels.skinny_gemm import MAX_TOKENS, TOKEN_TILES
from photon_grpc.kernels.skinny_gemm_tma import ARCH, SKINNY_GEMM_TMA, Cut, can_multiply, cut
from photon_grpc.kernels.skinny_gemm_tma import skinny_gemm_tma as multiply
from tests.support.kernels import FakeLauncher, Fenced, randn
from tests.support.linear import Case, Heads, check, make_weight

# All numbers in one type, and one for every tile in the other: each tile is a compilation.
TOKENS = [
    *((torch.bfloat16, tokens) for tokens in (1, 16, 17, 33, 48, 63, 64, 65, 100, 128)),
    *((torch.float16, tokens) for tokens in (9, 31, 48, 57, 90, 127)),
]
KINDS = ("store_rows", "float_rows", "add_rows", "silu_and_mul")
# Models' own, and tails in n, in k, and in the parts that CTAs take.
SIZES = (
    (2048, 2048),
    (2048, 8192),
    (4096, 4096),
    (16384, 2048),
    (9728, 896),
    (896, 4864),
    (1152, 896),
    (6144, 1024),
    (1024, 3072),
    (1008, 1096),
    (24576, 136),
    (7168, 1288),
    (3584, 2504),
    (5120, 3080),
    (4096, 2056),
    (144, 200),
    (32, 8),
    (16, 4104),
)
HEADS = (
    (Heads(32, 8, 64), 2048),
    (Heads(32, 8, 128), 4096),
    (Heads(14, 2, 64), 896),
    (Heads(28, 4, 128), 3584),
    (Heads(3, 1, 32), 328),
    (Heads(4, 2, 16), 64),
    (Heads(112, 8, 128), 2048),
    (Heads(176, 8, 128), 136),
    (Heads(368, 8, 64), 136),
    (Heads(40, 8, 128), 1288),
    (Heads(24, 8, 128), 3080),
    (Heads(32, 32, 128), 4096),
)


@pytest.fixture
def gpu() -> Device:
    device = require_cuda()
    if device.arch != ARCH:
        pytest.skip(f"{device.name} is {device.arch}, this is a kernel of {ARCH}")
    return device


def inside(memory: Fenced, values: Tensor) -> Tensor:
    """`values` in the corner of a larger tensor that is NaN elsewhere."""
    around = memory.empty(values.shape[0] + 3, values.shape[1] + 8, dtype=values.dtype)
    around[: values.shape[0], : values.shape[1]] = values
    return around[: values.shape[0], : values.shape[1]]


def run_case(case: Case, index: torch.dtype = torch.int64) -> None:
    memory = Fenced()
    x, weight = inside(memory, case.x), memory.copy(case.weight)
    check(case, lambda output: multiply(output, x, weight), index)
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tokens"), TOKENS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_products(gpu: Device, n: int, k: int, tokens: int, dtype: torch.dtype, kind: str) -> None:
    bias = randn(n, dtype=dtype, seed=4) if kind != "float_rows" and tokens % 2 else None
    run_case(Case(kind, randn(tokens, k, dtype=dtype, seed=2), make_weight(n, k, dtype), bias))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8, 15, 17, 24, 30, 1001, 50001])
def test_rows_that_fill_no_tile(gpu: Device, n: int) -> None:
    x, weight = randn(35, 1032, dtype=torch.bfloat16, seed=2), make_weight(n, 1032, torch.bfloat16)
    for kind in ("store_rows", "float_rows", "add_rows"):
        case = Case(kind, x, weight, None)
        if kind == "store_rows" and n % 8:
            continue
        run_case(case)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 16, 35, 64, 100, 128])
@pytest.mark.parametrize(("heads", "k"), HEADS, ids=str)
def test_heads_are_rotated_and_stored(
    gpu: Device, heads: Heads, k: int, tokens: int, index: torch.dtype
) -> None:
    dtype = torch.bfloat16 if tokens % 2 == 0 else torch.float16
    bias = randn(heads.n, dtype=dtype, seed=4)
    x, weight = randn(tokens, k, dtype=dtype, seed=2), make_weight(heads.n, k, dtype)
    run_case(Case("rope_and_store", x, weight, bias, heads), index)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2048, 8192), (16384, 2048), (896, 4864), (50000, 896)])
def test_a_token_has_the_same_bits_in_any_company(gpu: Device, n: int, k: int) -> None:
    """Alone and in batches of every size, which are other variants of the kernel."""
    x = randn(MAX_TOKENS, k, dtype=torch.bfloat16).cuda()
    weight = make_weight(n, k, torch.bfloat16).cuda()

    def product(rows: Tensor) -> Tensor:
        out = torch.empty(rows.shape[0], n, device="cuda")
        multiply(linear_output.float_rows(out), rows, weight)
        return out

    together = product(x)
    for tokens in (1, 15, 16, 31, 40, 64, 65, 90, 127):
        assert torch.equal(product(x[:tokens]), together[:tokens])
        assert torch.equal(product(x[-tokens:]), together[-tokens:])
    for token in range(0, MAX_TOKENS, 5):
        assert torch.equal(product(x[token : token + 1])[0], together[token])


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (16384, 2048)])
def test_nan_stays_in_its_token(gpu: Device, n: int, k: int) -> None:
    x = randn(40, k, dtype=torch.bfloat16).cuda()
    x[7, 3] = float("nan")
    out = torch.empty(40, n, device="cuda", dtype=torch.bfloat16)
    multiply(linear_output.store_rows(out), x, make_weight(n, k, torch.bfloat16).cuda())
    assert out.isnan().all(1).nonzero().flatten().tolist() == [7]
    assert int(out.isnan().sum()) == n


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 35, 64, 128])
def test_chain_in_a_graph(gpu: Device, tokens: int) -> None:
    """Overlapping launches that read what the one before wrote, and write what it read, many times over."""
    hidden, inner, layers = 2048, 8192, 3
    shapes = ((hidden, hidden), (2 * inner, hidden), (hidden, inner))
    weights = [
        [make_weight(*shape, torch.bfloat16, seed=3 * layer + i).cuda() for i, shape in enumerate(shapes)]
        for layer in range(layers)
    ]
    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    start = randn(tokens, hidden, dtype=torch.float32).cuda()
    residual = torch.empty_like(start)
    x = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    wide = torch.empty(tokens, inner, device="cuda", dtype=torch.bfloat16)
    logits = torch.empty(tokens, 2 * inner, device="cuda")

    def steps() -> list[Callable[[], object]]:
        made: list[Callable[[], object]] = [lambda: residual.copy_(start)]

        def product(output: LinearOutput, rows: Tensor, weight: Tensor) -> None:
            made.append(lambda: multiply(output, rows, weight))

        for o, gate_up, down in weights:
            made.append(lambda: rms_norm(x, residual, norm, 1e-5))
            product(linear_output.store_rows(y), x, o)
            product(linear_output.store_rows(x), y, o)
            product(linear_output.add_rows(residual), x, o)
            made.append(lambda: rms_norm(x, residual, norm, 1e-5))
            product(linear_output.silu_and_mul(wide), x, gate_up)
            product(linear_output.add_rows(residual), wide, down)
            product(linear_output.store_rows(x), wide, down)
        product(linear_output.float_rows(logits), x, weights[0][1])
        return made

    for step in steps():
        step()
        torch.cuda.synchronize()
    expected, expected_residual = logits.clone(), residual.clone()
    assert bool(expected.isfinite().all())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps():
            step()
    for _ in range(300):
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits, expected)
        assert torch.equal(residual, expected_residual)


# --- without a GPU ----------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def rope(tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> LinearOutput:
    return linear_output.rope_and_store(
        zeros(tokens, num_heads, head_dim),
        zeros(9, num_kv_heads, 2, 16, head_dim),
        zeros(10, head_dim, dtype=torch.float32),
        zeros(tokens, dtype=torch.int32),
        zeros(tokens, dtype=torch.int64),
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    def map_of(
        tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> object:
        maps.append((sizes, strides, box))
        return np.void(bytes(TENSOR_MAP_BYTES))

    maps.clear()
    monkeypatch.setattr(skinny_gemm_tma, "tensor_map", map_of)
    return FakeLauncher().install(monkeypatch)


maps: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []


def rows_of(
    sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], start: list[int]
) -> list[int]:
    """Rows of the weight in the order in which a box at `start` has them; k is the innermost size."""
    rows = [0]
    for size, stride, extent, first in reversed(list(zip(sizes[1:], strides, box[1:], start, strict=True))):
        assert stride % sizes[0] == 0
        places = range(first, first + extent)
        assert all(place < size for place in places)
        rows = [row + place * (stride // sizes[0]) for row in rows for place in places]
    return rows


def test_a_box_of_gates_and_ups_has_their_pairs_together(fake: FakeLauncher) -> None:
    multiply(linear_output.silu_and_mul(zeros(20, 512)), zeros(20, 128), zeros(1024, 128))
    (launch,) = fake.launches
    rows = int(launch.variant.macros["PHOTON_ROWS"])
    tile = 1
    taken = rows_of(*maps[1], [0, 0, tile * rows // 16, 0])
    pairs = [tile * rows // 2 + 8 * i + g for i in range(rows // 16) for g in range(8)]
    assert taken[::1] == [
        row
        for i in range(0, len(pairs), 8)
        for row in (*pairs[i : i + 8], *(p + 512 for p in pairs[i : i + 8]))
    ]


@pytest.mark.parametrize(("head_dim", "boxes"), [(64, 1), (128, 3)])
def test_a_tile_that_ends_inside_a_head_has_several_boxes(
    fake: FakeLauncher, head_dim: int, boxes: int
) -> None:
    num_heads = 24576 // head_dim - 16
    multiply(rope(20, num_heads, 8, head_dim), zeros(20, 128), zeros(24576, 128))
    (launch,) = fake.launches
    rows, box_rows = (int(launch.variant.macros[f"PHOTON_{name}"]) for name in ("ROWS", "BOX_ROWS"))
    assert (rows, rows // box_rows) == (192, boxes)
    tile, groups_of_head = 5, head_dim // 16
    taken = []
    for row in range(0, rows, box_rows):
        # As copy_weights of the kernel does.
        group = (tile * rows + row) // 16
        taken += rows_of(*maps[1], [0, 0, group % groups_of_head, group // groups_of_head])
    expected = []
    for first in range(tile * rows // 2, (tile + 1) * rows // 2, 8):
        for half in range(2):
            for pair in range(first, first + 8):
                head, dim = divmod(pair, head_dim // 2)
                expected.append(head * head_dim + half * head_dim // 2 + dim)
    assert taken == expected


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_a_box_of_heads_has_their_halves_together(fake: FakeLauncher, head_dim: int) -> None:
    num_heads = 2048 // head_dim
    multiply(rope(20, num_heads, num_heads // 2, head_dim), zeros(20, 128), zeros(2 * 2048, 128))
    (launch,) = fake.launches
    rows = int(launch.variant.macros["PHOTON_ROWS"])
    group = 3 * rows // 16
    taken = rows_of(*maps[1], [0, 0, group % (head_dim // 16), group // (head_dim // 16)])
    expected = []
    for i in range(rows // 16):
        for half in range(2):
            for g in range(8):
                pair = 8 * (group + i) + g
                head, dim = divmod(pair, head_dim // 2)
                expected.append(head * head_dim + half * head_dim // 2 + dim)
    assert taken == expected


@pytest.mark.parametrize(("head_dim", "possible"), [(16, True), (64, True), (80, False), (128, True)])
def test_heads_that_tiles_cut_unevenly_are_left_to_others(
    fake: FakeLauncher, head_dim: int, possible: bool
) -> None:
    output = rope(20, 4, 2, head_dim)
    assert can_multiply(output, zeros(8 * head_dim, 2048)) == possible
    if not possible:
        with pytest.raises(ValueError, match="heads of 80"):
            multiply(output, zeros(20, 2048), zeros(8 * head_dim, 2048))
        assert fake.launches == []


def test_every_cut_fits_the_kernel() -> None:
    """Some k for every CTA, a portable cluster, and room for all residents with three stages each."""
    for n in (*range(8, 4096, 136), *range(4096, 160_000, 3912)):
        for k in (8, 64, 200, 896, 1024, 1536, 2048, 3584, 4096, 4864, 8192, 14336, 18944):
            found = cut(n, k)
            assert found.cluster <= 8
            assert found.splits == 1 or k // found.splits >= 128
            for tokens in TOKEN_TILES:
                macros = skinny_gemm_tma._macros("bf16", "store_rows", found, tokens)
                assert int(macros["PHOTON_STAGES"]) >= 3
                assert found.residents * (int(macros["PHOTON_SHARED_BYTES"]) + 1024) <= 228 << 10
                assert tokens % (8 * found.sharers) == 0


def test_attention_has_room_beside_the_product_that_it_reads_behind(fake: FakeLauncher) -> None:
    """Two CTAs of q, k and v, one of attention, those of Llama 3.2 1B, and what the driver keeps of each."""
    for tokens in TOKEN_TILES:
        multiply(rope(tokens, 32, 8, 64), zeros(tokens, 2048), zeros(3072, 2048))
        launch = fake.launches[-1]
        # By the compiler's report it has 18,256 bytes.
        has_room = 2 * (launch.shared_bytes + 1024) + 18_256 + 1024 <= 228 << 10
        # With more tokens two or three stages would be left.
        assert has_room == (tokens <= 64)
        assert int(launch.variant.macros["PHOTON_STAGES"]) >= 3


def test_no_stage_without_something_to_fill_it(fake: FakeLauncher) -> None:
    for k, splits, blocks in ((2048, 4, 8), (1000, 4, 4), (520, 4, 3)):
        output, by = linear_output.store_rows(zeros(5, 2048)), Cut(64, splits, 1, 2)
        multiply(output, zeros(5, k), zeros(2048, k), by=by)
        assert fake.launches[-1].variant.macros["PHOTON_STAGES"] == blocks


def test_what_the_kernel_cannot_do_is_refused(fake: FakeLauncher) -> None:
    x, weight, out = zeros(16, 64), zeros(32, 64), zeros(16, 32)
    cases = [
        (out, x.half(), weight, "x must be"),
        (out, zeros(15, 64), weight, "x must have shape"),
        (out, zeros(16, 68)[:, :64], weight, "start on 16 bytes"),
        (out, zeros(16, 60), zeros(32, 60), "multiples of 8"),
        (out, zeros(16, 0), zeros(32, 0), "no elements"),
        (out, x.float(), weight.float(), "bfloat16 or float16"),
        (zeros(129, 32), zeros(129, 64), weight, "129 tokens"),
    ]
    for bad_out, bad_x, bad_weight, message in cases:
        with pytest.raises(ValueError, match=message):
            multiply(linear_output.store_rows(bad_out), bad_x, bad_weight)
    with pytest.raises(ValueError, match="eights"):
        multiply(linear_output.silu_and_mul(zeros(16, 16)[:, :12]), x, zeros(24, 64))
    assert fake.launches == []


def test_another_architecture_is_refused(fake: FakeLauncher) -> None:
    fake.device = Device(0, "none", (10, 0), 132, 227 << 10)
    with pytest.raises(ValueError, match="sm_90a"):
        multiply(linear_output.store_rows(zeros(20, 64)), zeros(20, 64), zeros(64, 64))


def test_no_tokens_launch_nothing(fake: FakeLauncher) -> None:
    multiply(linear_output.store_rows(zeros(0, 64)), zeros(0, 128), zeros(64, 128))
    assert fake.launches == []


def test_the_check_without_a_gpu_sees_every_cut_and_tile() -> None:
    checked = SKINNY_GEMM_TMA.checked
    names = ("PHOTON_ROWS", "PHOTON_SPLITS", "PHOTON_SHARERS", "PHOTON_RESIDENTS")
    seen = {tuple(macros[name] for name in names) for macros in checked}
    wanted = {cut(n, k) for n, k in SIZES} | {cut(heads.n, k) for heads, k in HEADS}
    assert {(one.rows, one.splits, one.sharers, one.residents) for one in wanted} <= seen
    assert {macros["PHOTON_TOKENS"] for macros in checked} == set(TOKEN_TILES)
    assert len(checked) == len({tuple(macros.items()) for macros in checked})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16384, 2048), Cut(128, 1, 2)),
        ((128256, 2048), Cut(128, 1, 2)),
        ((3072, 2048), Cut(64, 4, 1, 2)),
        ((2048, 2048), Cut(64, 5, 1, 2)),
        ((2048, 8192), Cut(128, 6, 1)),
        ((6144, 4096), Cut(128, 2, 2)),
        ((4096, 14336), Cut(128, 3, 1)),
        ((151936, 896), Cut(128, 1, 2)),
        ((3072, 8192), Cut(128, 4, 1)),
        ((4352, 8192), Cut(128, 3, 1)),
        ((28672, 4096), Cut(128, 1, 2)),
        ((22016, 4096), Cut(192, 1, 2)),
        ((17920, 1536), Cut(192, 1, 2)),
        ((37888, 3584), Cut(192, 1, 2)),
        ((7168, 5120), Cut(128, 2, 1)),
        ((4608, 3584), Cut(128, 3, 1)),
        ((3584, 18944), Cut(128, 4, 1)),
        ((5120, 13824), Cut(192, 4, 1)),
        ((12288, 4096), Cut(128, 1, 2)),
        ((9728, 896), Cut(128, 1, 2)),
        ((1024, 3072), Cut(64, 8, 1, 2)),
        ((7680, 896), Cut(64, 1, 2, 2)),
        ((24, 8), Cut(128, 1, 2)),
    ],
    ids=str,
)
def test_how_weights_are_cut(shape: tuple[int, int], expected: Cut) -> None:
    assert cut(*shape) == expected


@pytest.mark.parametrize(
    ("n", "k", "grid"),
    [
        (3072, 2048, (4, 48, 1)),
        (16384, 2048, (2, 64, 1)),
        (100_000, 64, (2, 66, 1)),
        (7680, 896, (2, 60, 1)),
        (8, 8, (2, 1, 1)),
    ],
)
def test_the_grid_covers_the_weight(fake: FakeLauncher, n: int, k: int, grid: tuple[int, int, int]) -> None:
    multiply(linear_output.store_rows(zeros(20, n)), zeros(20, k), zeros(n, k))
    (launch,) = fake.launches
    assert launch.grid == grid
    assert launch.num_threads == cut(n, k).threads
    assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"]
    assert launch.variant.macros["PHOTON_TOKENS"] == 32


def test_cuts_say_their_threads() -> None:
    assert [Cut(rows, 1, 1).threads for rows in (64, 128, 256)] == [160, 288, 544]
