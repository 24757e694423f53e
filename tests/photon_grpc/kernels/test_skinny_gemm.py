"""Products of up to 128 tokens on the GPU against float64; cuts of weights and refusals anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import linear_output
from photon_grpc.kernels.launcher import Device
from photon_grpc.kernels.linear_output import LinearOutput
from photon_grpc.kernels.rmsnorm import rms_norm
from photon_grpc.kernels.skinny_gemm import (
    MAX_TOKENS,
    SKINNY_GEMM,
    TOKEN_TILES,
    Tiling,
    num_stages,
    skinny_gemm,
    tiling,
    token_tile,
)
from tests.support.kernels import STORAGE, FakeLauncher, Fenced, randn

TOKENS = (1, 9, 15, 16, 17, 31, 32, 33, 35, 48, 63, 64, 65, 96, 100, 127, 128)
# All numbers in one type, and one for every tile in the other and by wgmma: each tile is a compilation.
STORE_ROWS_CASES = [
    *((torch.bfloat16, False, tokens) for tokens in TOKENS),
    *((torch.float16, False, tokens) for tokens in (9, 48, 127)),
    *((torch.bfloat16, True, tokens) for tokens in (9, 31, 48, 63, 96, 127)),
]
NUM_POSITIONS = 1000
BLOCK_SIZE = 16

# One for every way to cut a weight, with tails in n and in k.
SHAPES = {
    (2048, 2048): Tiling(64, 4),
    (3072, 2048): Tiling(64, 4),
    (2048, 8192): Tiling(128, 8),
    (4096, 4096): Tiling(128, 4),
    (8192, 2048): Tiling(128, 2),
    (16384, 2048): Tiling(128, 1),
    (9728, 896): Tiling(64, 1),
    (37888, 1024): Tiling(64, 1),
    (6144, 1024): Tiling(64, 2),
    (896, 4864): Tiling(64, 8),
    (1152, 896): Tiling(64, 4),
    (24, 8): Tiling(64, 1),
    (136, 200): Tiling(64, 1),
    (1000, 1096): Tiling(64, 8),
    (8, 4104): Tiling(64, 8),
}


def weight_of(n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(n, k, device="cuda", generator=generator) / k**0.5).to(dtype)


def inside(memory: Fenced, values: Tensor, rows: int = 3, columns: int = 8) -> Tensor:
    """`values` in the corner of a larger tensor that is NaN elsewhere."""
    around = memory.empty(values.shape[0] + rows, values.shape[1] + columns, dtype=values.dtype)
    around[: values.shape[0], : values.shape[1]] = values
    return around[: values.shape[0], : values.shape[1]]


def poisoned(memory: Fenced, tokens: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaN all over, with rows after the last token's, and the part that is to be written."""
    around = memory.empty(tokens + 3, -(-n // 8) * 8 + 8, dtype=dtype)
    return around, around[:tokens, :n]


@dataclass
class Products:
    """x and a weight with their products in float64, and what the order of a sum may change of those."""

    x: Tensor
    weight: Tensor
    exact: Tensor = field(init=False)
    slack: Tensor = field(init=False)

    def __post_init__(self) -> None:
        wide, weight = self.x.double(), self.weight.double()
        self.exact = wide @ weight.t()
        self.slack = 1e-5 * (wide.abs() @ weight.abs().t())


def products(memory: Fenced, tokens: int, n: int, k: int, dtype: torch.dtype) -> Products:
    x = inside(memory, randn(tokens, k, dtype=dtype).cuda())
    return Products(x, weight_of(n, k, dtype))


def assert_close(actual: Tensor, exact: Tensor, slack: Tensor) -> None:
    """Within `slack` before the one rounding to the type of the result."""
    assert actual.shape == exact.shape
    assert not bool(actual.isnan().any()), "an element was not written, or is not a number"
    allowed = slack
    if actual.dtype is not torch.float32:
        _, exponent = torch.frexp(exact.abs() + slack)
        smallest = torch.finfo(actual.dtype).tiny
        ulp = torch.ldexp(torch.full_like(exact, torch.finfo(actual.dtype).eps), exponent - 1)
        allowed = slack + 0.501 * ulp.clamp(min=smallest * torch.finfo(actual.dtype).eps)
    excess = (actual.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), float(excess.max())


def launch_twice(run: Callable[[], Tensor]) -> Tensor:
    first, second = run(), run()
    assert torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    return first


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "warpgroup", "tokens"), STORE_ROWS_CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_store_rows(shape: tuple[int, int], warpgroup: bool, dtype: torch.dtype, tokens: int) -> None:
    n, k = shape
    memory = Fenced()
    given = products(memory, tokens, n, k, dtype)
    bias = memory.copy(randn(n, dtype=dtype, seed=2))

    def run() -> Tensor:
        around, out = poisoned(memory, tokens, n, dtype)
        skinny_gemm(linear_output.store_rows(out, bias), given.x, given.weight, warpgroup=warpgroup)
        assert bool(around[tokens:].isnan().all())
        assert bool(around[:, n:].isnan().all())
        return out

    assert_close(launch_twice(run), given.exact + bias.double(), given.slack)
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 35, 64, 100, 128])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(2048, 2048), (2048, 8192), (896, 4864), (16384, 2048), (136, 200)], ids=str
)
def test_add_rows(shape: tuple[int, int], with_bias: bool, tokens: int) -> None:
    n, k = shape
    memory = Fenced()
    given = products(memory, tokens, n, k, torch.bfloat16)
    before = randn(tokens, n, dtype=torch.float32, seed=3).cuda() * 10
    bias = memory.copy(randn(n, dtype=torch.bfloat16, seed=2)) if with_bias else None

    def run() -> Tensor:
        residual = memory.copy(before)
        skinny_gemm(linear_output.add_rows(residual, bias), given.x, given.weight)
        return residual

    exact = given.exact + before.double()
    if bias is not None:
        exact = exact + bias.double()
    assert_close(launch_twice(run), exact, given.slack + 2e-7 * exact.abs() + 2e-7 * before.abs())
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 48, 128])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    "shape", [(128256, 2048), (151936, 896), (1, 64), (15, 72), (17, 2048), (1001, 1032), (30, 8)], ids=str
)
def test_float_rows(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    n, k = shape
    memory = Fenced()
    given = products(memory, tokens, n, k, dtype)

    def run() -> Tensor:
        around, out = poisoned(memory, tokens, n, torch.float32)
        skinny_gemm(linear_output.float_rows(out), given.x, given.weight)
        assert bool(around[tokens:].isnan().all())
        assert bool(around[:, n:].isnan().all())
        return out

    assert_close(launch_twice(run), given.exact, given.slack)
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 96, 128])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(
    "shape", [(16384, 2048), (9728, 896), (4096, 1024), (6144, 1024), (48, 200)], ids=str
)
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    n, k = shape
    memory = Fenced()
    given = products(memory, tokens, n, k, dtype)

    def run() -> Tensor:
        around, out = poisoned(memory, tokens, n // 2, dtype)
        skinny_gemm(linear_output.silu_and_mul(out), given.x, given.weight)
        assert bool(around[tokens:].isnan().all())
        assert bool(around[:, n // 2 :].isnan().all())
        return out

    (gate, up), (gate_slack, up_slack) = (part.chunk(2, dim=1) for part in (given.exact, given.slack))
    activated = gate * torch.sigmoid(gate)
    # The activation's slope is below 1.1.
    slack = 1.1 * gate_slack * up.abs() + activated.abs() * up_slack + 1e-6 * (activated * up).abs()
    assert_close(launch_twice(run), activated * up, slack + 1.1 * gate_slack * up_slack)
    memory.check()


def angle_table(head_dim: int) -> Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(NUM_POSITIONS, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """[tokens, heads, head_dim] with the angles of each token [tokens, head_dim]."""
    half = heads.shape[-1] // 2
    angles = table.double()[:, None]
    product = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(
        angles[..., :half], angles[..., half:]
    )
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 35, 64, 100, 128])
@pytest.mark.parametrize("positions_type", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("heads", "k", "dtype"),
    [
        ((32, 8, 64), 2048, torch.bfloat16),
        ((32, 8, 128), 4096, torch.bfloat16),
        ((14, 2, 64), 896, torch.float16),
        ((28, 4, 128), 3584, torch.bfloat16),
        ((3, 1, 80), 320, torch.float16),
        ((4, 2, 16), 64, torch.bfloat16),
        ((112, 8, 128), 2048, torch.bfloat16),
    ],
    ids=str,
)
def test_rope_and_store(
    heads: tuple[int, int, int], k: int, dtype: torch.dtype, positions_type: torch.dtype, tokens: int
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    n = (num_heads + 2 * num_kv_heads) * head_dim
    memory = Fenced()
    given = products(memory, tokens, n, k, dtype)
    bias = memory.copy(randn(n, dtype=dtype, seed=2))
    generator = torch.Generator().manual_seed(tokens)
    positions = torch.randint(NUM_POSITIONS, (tokens,), generator=generator)
    num_blocks = 2 * tokens // BLOCK_SIZE + 2
    slots = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:tokens]
    slots[2::3] = -1
    table = angle_table(head_dim)
    caches: list[Tensor] = []

    def run() -> Tensor:
        around, out = poisoned(memory, tokens, num_heads * head_dim, dtype)
        cache = memory.empty(num_blocks, num_kv_heads, 2, BLOCK_SIZE, head_dim, dtype=dtype)
        output = linear_output.rope_and_store(
            out.unflatten(1, (num_heads, head_dim)),
            cache,
            memory.copy(table),
            memory.copy(positions.to(positions_type)),
            memory.copy(slots),
            bias,
        )
        skinny_gemm(output, given.x, given.weight)
        assert bool(around[tokens:].isnan().all())
        assert bool(around[:, num_heads * head_dim :].isnan().all())
        caches.append(cache)
        return out

    q = launch_twice(run).unflatten(1, (num_heads, head_dim))
    exact = (given.exact + bias.double()).unflatten(1, (-1, head_dim))
    slack = given.slack.unflatten(1, (-1, head_dim))
    rotated = num_heads + num_kv_heads
    # Each half gets a part of both, and the products of a rotation are rounded.
    both = (
        slack
        + slack.roll(head_dim // 2, dims=-1)
        + 2e-7 * (exact.abs() + exact.roll(head_dim // 2, -1).abs())
    )
    slack = torch.cat((both[:, :rotated], slack[:, rotated:]), dim=1)
    exact = torch.cat((rotate(exact[:, :rotated], table[positions].cuda()), exact[:, rotated:]), dim=1)
    assert_close(q, exact[:, :num_heads], slack[:, :num_heads])

    cache, again = caches
    assert torch.equal(cache.view(torch.uint8), again.view(torch.uint8))
    stored = slots >= 0
    blocks, offsets = slots[stored] // BLOCK_SIZE, slots[stored] % BLOCK_SIZE
    kv = cache[blocks.cuda(), :, :, offsets.cuda()].transpose(1, 2).flatten(1, 2)
    assert_close(kv, exact[stored.cuda(), num_heads:], slack[stored.cuda(), num_heads:])
    untouched = torch.ones(num_blocks, BLOCK_SIZE, dtype=torch.bool)
    untouched[blocks, offsets] = False
    assert bool(cache.transpose(1, 3)[untouched.cuda()].isnan().all())
    memory.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(2048, 2048), (2048, 8192), (16384, 2048), (896, 4864), (9728, 896)], ids=str
)
@pytest.mark.parametrize("warpgroup", [False, True])
def test_a_token_has_the_same_bits_in_any_company(shape: tuple[int, int], warpgroup: bool) -> None:
    """Alone and in batches of every size, which are other variants of the kernel."""
    n, k = shape
    x, weight = randn(MAX_TOKENS, k, dtype=torch.bfloat16).cuda(), weight_of(n, k, torch.bfloat16)

    def multiply(rows: Tensor) -> Tensor:
        out = torch.empty(rows.shape[0], n, device="cuda", dtype=torch.float32)
        skinny_gemm(linear_output.float_rows(out), rows, weight, warpgroup=warpgroup)
        return out

    together = multiply(x)
    for tokens in (1, 15, 16, 31, 40, 64, 65, 90, 127):
        assert torch.equal(multiply(x[:tokens]), together[:tokens])
        assert torch.equal(multiply(x[-tokens:]), together[-tokens:])
    for token in range(0, MAX_TOKENS, 5):
        alone = multiply(x[token : token + 1])
        assert torch.equal(alone[0], together[token])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 2048), (16384, 2048)], ids=str)
def test_nan_stays_in_its_token(shape: tuple[int, int]) -> None:
    n, k = shape
    x = randn(40, k, dtype=torch.bfloat16).cuda()
    x[7, 3] = float("nan")
    out = torch.empty(40, n, device="cuda", dtype=torch.bfloat16)
    skinny_gemm(linear_output.store_rows(out), x, weight_of(n, k, torch.bfloat16))
    assert out.isnan().all(1).nonzero().flatten().tolist() == [7]
    assert int(out.isnan().sum()) == n


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 35, 64, 128])
@pytest.mark.parametrize("warpgroup", [False, True])
def test_chain_in_a_graph(warpgroup: bool, tokens: int) -> None:
    """Overlapping launches that read what the one before wrote, and write what it read, many times over."""
    hidden, inner, layers = 2048, 8192, 3
    weights = [
        (
            weight_of(hidden, hidden, torch.bfloat16, seed=3 * i),
            weight_of(2 * inner, hidden, torch.bfloat16, seed=3 * i + 1),
            weight_of(hidden, inner, torch.bfloat16, seed=3 * i + 2),
        )
        for i in range(layers)
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
            made.append(lambda: skinny_gemm(output, rows, weight, warpgroup=warpgroup))

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


@pytest.mark.parametrize(("shape", "cut"), SHAPES.items(), ids=str)
def test_how_weights_are_cut(shape: tuple[int, int], cut: Tiling) -> None:
    assert tiling(*shape) == cut


def test_every_cut_fits_the_kernel() -> None:
    """Any CTA has some k, and its sums fit where its stages were. Two CTAs of a cluster fit into a
    multiprocessor, others fit into the smallest there is.
    """
    for n in (*range(8, 4096, 136), *range(4096, 160_000, 3912)):
        for k in (8, 64, 200, 896, 1024, 1536, 2048, 3584, 4096, 4864, 8192, 14336, 18944):
            cut = tiling(n, k)
            assert -(-k // 64) >= cut.cluster
            assert cut.cluster == 1 or k // cut.cluster >= 128
            for tokens in TOKEN_TILES:
                stage_bytes = (cut.rows + tokens) * 128
                shared_bytes = num_stages(cut.rows, tokens, cut.cluster) * stage_bytes
                assert num_stages(cut.rows, tokens, cut.cluster) >= 3
                assert shared_bytes + 1024 <= (114 if cut.cluster > 1 else 163) << 10
                assert cut.rows * tokens * 4 <= shared_bytes


@pytest.mark.parametrize("shape", [(3072, 2048), (2048, 8192), (128256, 2048), (28672, 4096), (37888, 3584)])
def test_every_multiprocessor_has_something_to_read(shape: tuple[int, int]) -> None:
    cut = tiling(*shape)
    assert -(-shape[0] // cut.rows) * cut.cluster >= 120


def test_the_tile_of_tokens_holds_them() -> None:
    for tokens in range(MAX_TOKENS + 1):
        size = token_tile(tokens)
        assert size >= tokens
        assert all(smaller < tokens for smaller in TOKEN_TILES if smaller < size)
    with pytest.raises(ValueError, match="129 tokens: there is room for 128"):
        token_tile(MAX_TOKENS + 1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    return FakeLauncher().install(monkeypatch)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("n", "k", "grid"),
    [(3072, 2048, (4, 48, 1)), (16384, 256, (1, 128, 1)), (100_000, 64, (1, 132, 1)), (8, 8, (1, 1, 1))],
)
def test_the_grid_covers_the_weight(fake: FakeLauncher, n: int, k: int, grid: tuple[int, int, int]) -> None:
    skinny_gemm(linear_output.store_rows(zeros(20, n)), zeros(20, k), zeros(n, k))
    (launch,) = fake.launches
    assert launch.grid == grid
    assert launch.num_threads == 128
    assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"]
    assert launch.variant.macros["PHOTON_TOKENS"] == 32


def test_there_are_no_clusters_before_compute_capability_9(fake: FakeLauncher) -> None:
    fake.device = Device(0, "none", (8, 0), 108, 163 << 10)
    skinny_gemm(linear_output.store_rows(zeros(20, 3072)), zeros(20, 2048), zeros(3072, 2048))
    (launch,) = fake.launches
    assert launch.variant.macros["PHOTON_CLUSTER"] == 1
    assert launch.grid == (1, 48, 1)


@pytest.mark.parametrize(("capability", "used"), [((8, 0), 0), ((9, 0), 1), ((10, 0), 0)])
def test_warpgroups_multiply_where_the_device_has_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], used: int
) -> None:
    fake = FakeLauncher(device=Device(0, "none", capability, 132, 227 << 10)).install(monkeypatch)
    output = linear_output.store_rows(zeros(20, 3072))
    skinny_gemm(output, zeros(20, 2048), zeros(3072, 2048), warpgroup=True)
    skinny_gemm(output, zeros(20, 2048), zeros(3072, 2048))
    assert [launch.variant.macros["PHOTON_WARPGROUP"] for launch in fake.launches] == [used, 0]


def test_the_variant_names_types_and_output(fake: FakeLauncher) -> None:
    weight, x = zeros(64 * 64, 256, dtype=torch.float16), zeros(100, 256, dtype=torch.float16)
    output = linear_output.rope_and_store(
        zeros(100, 32, 64, dtype=torch.float16),
        zeros(9, 16, 2, 16, 64, dtype=torch.float16),
        zeros(10, 64, dtype=torch.float32),
        zeros(100, dtype=torch.int32),
        zeros(100, dtype=torch.int64),
    )
    skinny_gemm(output, x, weight)
    (launch,) = fake.launches
    macros = dict(launch.variant.macros)
    assert macros.pop("PHOTON_STORAGE") == "f16"
    assert macros.pop("PHOTON_INDEX") == "int"
    assert macros.pop("PHOTON_OUTPUT") == "rope_and_store"
    assert macros.pop("PHOTON_TOKENS") == 128


def test_no_tokens_launch_nothing(fake: FakeLauncher) -> None:
    skinny_gemm(linear_output.store_rows(zeros(0, 64)), zeros(0, 128), zeros(64, 128))
    assert fake.launches == []


def test_what_the_kernel_cannot_do_is_refused(fake: FakeLauncher) -> None:
    x, weight, out = zeros(16, 64), zeros(32, 64), zeros(16, 32)
    cases = [
        (out, x.half(), weight, "x must be"),
        (out, zeros(15, 64), weight, "x must have shape"),
        (out, zeros(16, 72), weight, "x must have shape"),
        (out, zeros(16, 68)[:, :64], weight, "start on 16 bytes"),
        (out, zeros(64, 16).t(), weight, "rows of x must be contiguous"),
        (out, zeros(16, 60), zeros(32, 60), "multiples of 8"),
        (out, zeros(16, 0), zeros(32, 0), "no elements"),
        (out, x, zeros(40, 64), "weight must have shape"),
        (out, x.float(), weight.float(), "bfloat16 or float16"),
        (out.half(), x, weight, "out must be"),
        (zeros(129, 32), zeros(129, 64), weight, "129 tokens"),
    ]
    for bad_out, bad_x, bad_weight, message in cases:
        with pytest.raises(ValueError, match=message):
            skinny_gemm(linear_output.store_rows(bad_out), bad_x, bad_weight)
    assert fake.launches == []


def test_the_check_without_a_gpu_sees_every_cut_and_tile() -> None:
    checked = SKINNY_GEMM.checked
    cuts = {(macros["PHOTON_ROWS"], macros["PHOTON_CLUSTER"]) for macros in checked}
    assert {(cut.rows, cut.cluster) for cut in SHAPES.values()} <= cuts
    assert {macros["PHOTON_TOKENS"] for macros in checked} == set(TOKEN_TILES)
    assert len(checked) == len({tuple(macros.items()) for macros in checked})
