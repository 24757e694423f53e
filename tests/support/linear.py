"""Oracle and checks of products with few tokens: every output of photon/linear_output.cuh, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from photon_grpc.kernels import linear_output
from photon_grpc.kernels.linear_output import LinearOutput
from tests.support.kernels import Fenced, randn

BLOCK_SIZE = 16
NUM_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a q, k, v projection."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def n(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class Case:
    """One product: its operands on the CPU, x exactly as the kernel multiplies it."""

    kind: str
    x: Tensor
    """[tokens, k] of the storage type."""
    weight: Tensor
    bias: Tensor | None
    heads: Heads | None = None
    scale: Tensor | None = None
    """[tokens] float64: what the sums are multiplied with, where x is not final."""

    @property
    def sums(self) -> Tensor:
        """[tokens, n] float64, the bias counted in."""
        sums = self.x.double() @ self.weight.double().T
        if self.scale is not None:
            sums = sums * self.scale[:, None]
        return sums if self.bias is None else sums + self.bias.double()

    @property
    def magnitudes(self) -> Tensor:
        """[tokens, n] float64: sums of the absolute values, which rounding errors are measured by."""
        sums = self.x.double().abs() @ self.weight.double().abs().T
        return sums if self.scale is None else sums * self.scale[:, None]


def make_weight(n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Scaled so that results are of order one."""
    return (randn(n, k, dtype=torch.float32, seed=seed) / k**0.5).to(dtype)


def check(case: Case, run: Callable[[LinearOutput], None], index: torch.dtype = torch.int64) -> None:
    """Let `run` compute the case's output, twice, and compare with float64; NaN all around it."""
    first, second = _results(case, run, index), _results(case, run, index)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    for actual, (expected, magnitude) in zip(first, _expected(case), strict=True):
        assert not bool(actual.isnan().any()), "an element was not written, or is not a number"
        error = (actual.double() - expected).abs()
        eps = 0.0 if actual.dtype is torch.float32 else torch.finfo(actual.dtype).eps
        # The sum in float32, an operand that is rounded the other way, and the result's own rounding.
        allowed = 1e-5 * magnitude + 2e-4 * magnitude * (case.scale is not None) + eps * expected.abs() + 1e-6
        assert bool((error <= allowed).all()), float((error / allowed).max())


def _residual(tokens: int, n: int) -> Tensor:
    return randn(tokens, n, dtype=torch.float32, seed=7) * 3


def _places(tokens: int) -> tuple[Tensor, Tensor]:
    """Positions, and slots of which the second is none."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(NUM_POSITIONS, (tokens,), generator=generator)
    slots = torch.randperm(64 * BLOCK_SIZE, generator=generator)[:tokens]
    slots[1:2] = -1
    return positions, slots


def _table(head_dim: int) -> Tensor:
    angles = torch.outer(
        torch.arange(NUM_POSITIONS, dtype=torch.float64),
        10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
    )
    return torch.cat((angles.cos(), angles.sin()), -1).float()


def _results(case: Case, run: Callable[[LinearOutput], None], index: torch.dtype) -> list[Tensor]:
    memory = Fenced()
    tokens, n, dtype = case.x.shape[0], case.weight.shape[0], case.weight.dtype
    bias = None if case.bias is None else memory.copy(case.bias)
    match case.kind:
        case "store_rows":
            out = memory.empty(tokens, n, dtype=dtype)
            run(linear_output.store_rows(out, bias))
            results = [out]
        case "float_rows":
            out = memory.empty(tokens, n, dtype=torch.float32)
            run(linear_output.float_rows(out))
            results = [out]
        case "add_rows":
            out = memory.copy(_residual(tokens, n))
            run(linear_output.add_rows(out, bias))
            results = [out]
        case "silu_and_mul":
            out = memory.empty(tokens, n // 2, dtype=dtype)
            run(linear_output.silu_and_mul(out, bias))
            results = [out]
        case _:
            results = _rope_results(case, run, index, memory, bias)
    memory.check()
    return [result.cpu() for result in results]


def _rope_results(
    case: Case, run: Callable[[LinearOutput], None], index: torch.dtype, memory: Fenced, bias: Tensor | None
) -> list[Tensor]:
    heads, tokens, dtype = case.heads, case.x.shape[0], case.weight.dtype
    assert heads is not None
    q = memory.empty(tokens, heads.num_heads, heads.head_dim, dtype=dtype)
    cache = memory.empty(64, heads.num_kv_heads, 2, BLOCK_SIZE, heads.head_dim, dtype=dtype)
    positions, slots = _places(tokens)
    table = memory.copy(_table(heads.head_dim))
    run(
        linear_output.rope_and_store(
            q, cache, table, memory.copy(positions.to(index)), memory.copy(slots), bias
        )
    )
    stored = slots >= 0
    blocks, offsets = slots[stored].cuda() // BLOCK_SIZE, slots[stored].cuda() % BLOCK_SIZE
    written = cache[blocks, :, :, offsets].clone()
    # Whatever else was written would not be NaN any more.
    cache[blocks, :, :, offsets] = float("nan")
    assert bool(cache.isnan().all()), "a slot was written that belongs to no token"
    return [q, written]


def _expected(case: Case) -> list[tuple[Tensor, Tensor]]:
    sums, magnitudes = case.sums, case.magnitudes
    match case.kind:
        case "store_rows" | "float_rows":
            return [(sums, magnitudes)]
        case "add_rows":
            return [(_residual(*sums.shape).double() + sums, magnitudes + 3)]
        case "silu_and_mul":
            gate, up = sums.chunk(2, -1)
            gate_magnitude, up_magnitude = magnitudes.chunk(2, -1)
            magnitude = gate_magnitude * up.abs() + gate.abs() * up_magnitude + up_magnitude
            return [(torch.nn.functional.silu(gate) * up, magnitude)]
    return _expected_rope(case, sums, magnitudes)


def _expected_rope(case: Case, sums: Tensor, magnitudes: Tensor) -> list[tuple[Tensor, Tensor]]:
    heads = case.heads
    assert heads is not None
    positions, slots = _places(len(sums))
    cos, sin = _table(heads.head_dim).double()[positions][:, None].chunk(2, -1)
    wide = sums.view(len(sums), -1, heads.head_dim)
    size = magnitudes.view(wide.shape)
    turned = heads.num_heads + heads.num_kv_heads
    low, high = wide[:, :turned].chunk(2, -1)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    everything = torch.cat((rotated, wide[:, turned:]), 1)
    low_size, high_size = size.chunk(2, -1)
    sizes = torch.cat((low_size + high_size, low_size + high_size), -1)
    kv = everything[:, heads.num_heads :].unflatten(1, (2, heads.num_kv_heads)).transpose(1, 2)
    kv_sizes = sizes[:, heads.num_heads :].unflatten(1, (2, heads.num_kv_heads)).transpose(1, 2)
    stored = slots >= 0
    return [(everything[:, : heads.num_heads], sizes[:, : heads.num_heads]), (kv[stored], kv_sizes[stored])]
