"""Both products of a gated MLP and the activation against float64; what is refused, anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels import swiglu_gemm as module
from photon_grpc.kernels.rmsnorm import rms_norm
from photon_grpc.kernels.swiglu_gemm import can_multiply, is_faster, swiglu_gemm
from tests.support.kernels import STORAGE, FakeLauncher, Fenced, assert_repeatable, assert_ulps, randn


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """In float64, on the GPU."""
    gate, up = (x.cuda().double() @ weight.cuda().double().t()).chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


class Product:
    """Fenced buffers of one product, the weight's rows as large as a model's."""

    def __init__(self, tokens: int, inner: int, k: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.memory = Fenced()
        self.x = self.memory.copy(randn(tokens, k, dtype=dtype, seed=seed))
        self.weight = self.memory.copy((randn(2 * inner, k, dtype=torch.float32) * k**-0.5).to(dtype))
        self.out = self.memory.empty(tokens, inner, dtype=dtype)

    def run(self) -> Tensor:
        self.out.fill_(torch.nan)
        swiglu_gemm(self.out, self.x, self.weight)
        self.memory.check()
        return self.out


def needs_kernel() -> None:
    if not can_multiply(128):
        pytest.skip("a kernel for sm_90a")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inner", "k"),
    [
        *((tokens, 256, 512) for tokens in (1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 700)),
        (300, 128, 64),
        (130, 384, 72),
        (2100, 1024, 256),
        (4500, 2048, 320),
        (300, 8192, 2048),
    ],
)
def test_against_float64(tokens: int, inner: int, k: int, dtype: torch.dtype) -> None:
    needs_kernel()
    product = Product(tokens, inner, k, dtype)
    actual = assert_repeatable(product.run)
    # Sums in float32 stand behind: those that nearly cancel are off by more than an ulp of what is left.
    assert_ulps(actual, exact(product.x, product.weight), floor=2.0**-15 * (k / 512) ** 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_a_token_depends_on_nothing_but_itself(dtype: torch.dtype) -> None:
    needs_kernel()
    product = Product(600, 512, 256, dtype)
    together = product.run().clone()
    for start, stop in ((0, 1), (5, 6), (100, 400), (256, 600), (599, 600)):
        part = Product(stop - start, 512, 256, dtype)
        part.x.copy_(product.x[start:stop])
        assert torch.equal(part.run(), together[start:stop]), (start, stop)


@pytest.mark.gpu
def test_gates_far_out() -> None:
    """A gate whose exponential is infinite, or nothing."""
    needs_kernel()
    product = Product(64, 128, 64, torch.bfloat16)
    product.x.zero_()
    product.x[:, 0] = 1
    gates = torch.linspace(-300, 300, 128, device="cuda").to(torch.bfloat16)
    product.weight[:128, 0] = gates
    product.weight[128:, 0] = 1
    assert_ulps(product.run(), exact(product.x, product.weight), floor=1e-30)


@pytest.mark.gpu
def test_a_token_of_nan_spoils_no_other() -> None:
    needs_kernel()
    product = Product(200, 256, 128, torch.bfloat16)
    clean = product.run().clone()
    product.x[70] = torch.nan
    spoilt = product.run()
    assert spoilt[70].isnan().all()
    assert torch.equal(spoilt[:70], clean[:70])
    assert torch.equal(spoilt[71:], clean[71:])


@pytest.mark.gpu
def test_tokens_may_lie_apart() -> None:
    needs_kernel()
    product = Product(200, 256, 128, torch.bfloat16)
    expected = product.run().clone()
    apart = torch.full((200, 384), torch.nan, dtype=torch.bfloat16, device="cuda")
    apart[:, 128:256] = product.x
    product.x = apart[:, 128:256]
    assert torch.equal(product.run(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [129, 256, 700])
def test_chain_in_a_graph(tokens: int) -> None:
    """Launches that overlap, each of which reads what the one before wrote, and writes what that one read."""
    needs_kernel()
    size, layers = 512, 6
    weights = [
        (randn(2 * size, size, dtype=torch.float32, seed=seed) * size**-0.5).to(torch.bfloat16).cuda()
        for seed in range(layers)
    ]
    norm = torch.full((size,), 4.0, device="cuda", dtype=torch.bfloat16)
    start = randn(tokens, size, dtype=torch.bfloat16).cuda()
    x, y = torch.empty_like(start), torch.empty_like(start)

    def steps() -> list[Callable[[], object]]:
        made: list[Callable[[], object]] = [lambda: x.copy_(start)]
        for weight in weights:
            made.append(functools.partial(swiglu_gemm, y, x, weight))
            made.append(functools.partial(rms_norm, x, y, norm, 1e-5))
            made.append(functools.partial(swiglu_gemm, y, x, weight))
            made.append(functools.partial(swiglu_gemm, x, y, weight))
        return made

    for step in steps():
        step()
        torch.cuda.synchronize()
    expected = x.clone()
    assert bool(expected.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps():
            step()
    for _ in range(300):
        x.fill_(torch.nan)
        graph.replay()
        assert torch.equal(x, expected)


# --- what needs no device -----------------------------------------------------------------------


def _arguments(tokens: int = 300, inner: int = 256, k: int = 64) -> dict[str, Tensor]:
    dtype = torch.bfloat16
    return {
        "out": torch.zeros(tokens, inner, dtype=dtype),
        "x": torch.zeros(tokens, k, dtype=dtype),
        "weight": torch.zeros(2 * inner, k, dtype=dtype),
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The maps that were asked for, which need a driver."""
    maps: list[tuple[object, ...]] = []

    def tensor_map(*arguments: object) -> np.void:
        maps.append(arguments)
        return np.void(bytes(launcher.TENSOR_MAP_BYTES))

    monkeypatch.setattr(module, "tensor_map", tensor_map)
    return maps


def test_launch(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[object, ...]]) -> None:
    fake = FakeLauncher().install(monkeypatch)
    arguments = _arguments()
    swiglu_gemm(**arguments)
    launch = fake.launches[0]
    # Two tiles of 256 tokens times two of 128 outputs, and two CTAs for each.
    assert launch.grid == (8, 1, 1)
    assert launch.num_threads == 384
    assert launch.shared_bytes == launch.variant.macros["PHOTON_SHARED_BYTES"]
    assert launch.arguments[:3] == (300, 256, 64)
    assert asked == [
        (arguments["out"], (256, 300), (256,), (64, 64)),
        (arguments["x"], (64, 300), (64,), (64, 128)),
        (arguments["weight"], (64, 512), (64,), (64, 128)),
    ]


def test_there_are_no_more_ctas_than_multiprocessors(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[object, ...]]
) -> None:
    fake = FakeLauncher().install(monkeypatch)
    fake.device = launcher.Device(0, "none", (9, 0), 131, 227 << 10)
    swiglu_gemm(**_arguments(tokens=4096, inner=1024))
    assert fake.launches[0].grid == (130, 1, 1)
    assert len(asked) == 3


def test_no_tokens_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    swiglu_gemm(**_arguments(tokens=0))
    assert fake.launches == []


def test_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    assert can_multiply(14336)
    assert not can_multiply(8200)
    fake.device = launcher.Device(0, "none", (10, 0), 148, 227 << 10)
    assert not can_multiply(14336)


@pytest.mark.parametrize(
    ("tokens", "inner", "k", "expected"),
    [
        (128, 8192, 2048, False),
        # One round, half full and less.
        (144, 8192, 2048, True),
        (256, 8192, 2048, True),
        (224, 4864, 896, True),
        (160, 4864, 896, False),
        (256, 3072, 1024, False),
        # Two and three rounds, the last of them nearly full or nearly empty.
        (160, 14336, 4096, False),
        (192, 13824, 5120, True),
        (256, 14336, 4096, True),
        (256, 18944, 3584, True),
        (256, 8960, 1536, False),
        (256, 11008, 4096, False),
        # The activation of short rows is worth empty places.
        (512, 2560, 960, True),
        (512, 5632, 2048, False),
        (640, 5632, 2048, True),
        (320, 8192, 2048, False),
        (512, 8192, 2048, True),
        (520, 8192, 2048, False),
        (2048, 8192, 2048, True),
        (8192, 8192, 2048, True),
        (384, 14336, 4096, False),
        (512, 14336, 4096, True),
        (1024, 14336, 4096, True),
        (8192, 8200, 2048, False),
    ],
)
def test_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tokens: int, inner: int, k: int, *, expected: bool
) -> None:
    FakeLauncher().install(monkeypatch)
    assert is_faster(tokens, inner, k) is expected


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"out": torch.zeros(300, 256)}, "float32"),
        ({"out": torch.zeros(300, 200, dtype=torch.bfloat16)}, "no multiples of"),
        ({"weight": torch.zeros(512, 60, dtype=torch.bfloat16)}, "no multiples of"),
        ({"weight": torch.zeros(256, 64, dtype=torch.bfloat16)}, "weight must have shape"),
        ({"x": torch.zeros(300, 72, dtype=torch.bfloat16)}, "x must have shape"),
        ({"x": torch.zeros(300, 64, dtype=torch.float16)}, "x must be"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Tensor], match: str
) -> None:
    fake = FakeLauncher().install(monkeypatch)
    with pytest.raises(ValueError, match=match):
        swiglu_gemm(**{**_arguments(), **changes})
    assert fake.launches == []
