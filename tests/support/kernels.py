"""What every kernel's test needs: poisoned, fenced memory, tolerances in ulps, a launcher that records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.launcher import Variant

STORAGE = (torch.bfloat16, torch.float16)
ALL_TYPES = (*STORAGE, torch.float32)

_BAND_BYTES = 4096
_SENTINEL = 0x5A


class Fenced:
    """Device tensors filled with NaN, each between two bands of bytes that nobody may touch."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._buffers: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """NaN all over, or for integers the most negative number."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        # A whole line of padding keeps the tensor itself on 16 bytes.
        buffer = torch.full((2 * _BAND_BYTES + num_bytes,), _SENTINEL, dtype=torch.uint8, device=self._device)
        self._buffers.append((buffer, num_bytes))
        tensor = buffer[_BAND_BYTES : _BAND_BYTES + num_bytes].view(dtype).view(shape)
        tensor.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min)
        return tensor

    def copy(self, values: Tensor) -> Tensor:
        """`values` on the device, fenced: reads past the end meet sentinels."""
        tensor = self.empty(*values.shape, dtype=values.dtype)
        tensor.copy_(values)
        return tensor

    def check(self) -> None:
        """Every band is as it was."""
        torch.cuda.synchronize()
        for buffer, num_bytes in self._buffers:
            for band in (buffer[:_BAND_BYTES], buffer[_BAND_BYTES + num_bytes :]):
                assert bool((band == _SENTINEL).all()), "a kernel wrote outside of its buffer"


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values on the CPU, already rounded to the storage type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_ulps(actual: Tensor, exact: Tensor, most: int = 2, floor: float = 1e-30) -> None:
    """99.9 % of the elements within 1 ulp of the rounded oracle, all within `most`.

    In float32, where an ulp is small against the error of a sum, within 1e-5 of the value instead. `floor`
    is the size below which a difference does not matter.
    """
    actual, exact = actual.detach().cpu(), exact.double().cpu()
    assert actual.shape == exact.shape
    assert not bool(actual.isnan().any()), "an element was not written, or is not a number"
    error = (actual.double() - exact.to(actual.dtype).double()).abs()
    if actual.dtype is torch.float32:
        assert bool((error <= 1e-5 * exact.abs() + max(floor, 1e-7)).all()), float(error.max())
        return
    eps = torch.finfo(actual.dtype).eps
    # Of the binade that the value lies in; below the normal numbers it stays the same.
    _, exponent = torch.frexp(exact.abs().clamp(min=torch.finfo(actual.dtype).tiny))
    ulp = torch.ldexp(torch.full_like(exact, eps), exponent - 1).clamp(min=floor)
    ulps = error / ulp
    assert float(ulps.max() if ulps.numel() else 0.0) <= most, float(ulps.max())
    assert float((ulps > 1.0).double().mean() if ulps.numel() else 0.0) <= 1e-3


def assert_repeatable(run: Callable[[], Tensor]) -> Tensor:
    """Two runs give the same bits; the result of one."""
    first, second = run().clone(), run().clone()
    bits = torch.uint8
    assert torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))
    return first


@dataclass
class RecordedLaunch:
    variant: Variant
    shared_bytes: int
    grid: tuple[int, int, int]
    num_threads: int
    arguments: tuple[Any, ...]


@dataclass
class FakeLauncher:
    """In the place of `launcher.load`: checks arguments as a kernel does and launches nothing."""

    launches: list[RecordedLaunch] = field(default_factory=list)
    device: launcher.Device = field(
        default_factory=lambda: launcher.Device(0, "none", (9, 0), 132, 227 << 10)
    )

    def install(self, patch: pytest.MonkeyPatch) -> FakeLauncher:
        patch.setattr(launcher, "load", self.load)
        patch.setattr(launcher, "require_cuda", lambda: self.device)
        return self

    def load(self, variant: Variant, shared_bytes: int = 0) -> Callable[..., None]:
        def launch(grid: tuple[int, int, int], num_threads: int, *arguments: Any) -> None:
            assert tuple(map(type, arguments)) == variant.spec.parameters
            assert 0 < num_threads <= variant.spec.max_threads
            self.launches.append(RecordedLaunch(variant, shared_bytes, grid, num_threads, arguments))

        launch.device = self.device  # type: ignore[attr-defined]  # as a Kernel has it
        return launch
