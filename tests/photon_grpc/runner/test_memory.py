"""Errors that say that there was no memory, as torch, numpy and Python raise them, and others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from photon_grpc.runner.memory import OUT_OF_MEMORY_TYPES, is_out_of_memory


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(1 << 55, dtype=torch.int8),
        lambda: torch.zeros(8, 8).expand(1 << 30, 8, 8).contiguous(),
        lambda: np.empty(1 << 58),
        lambda: bytearray(1 << 60),
        pytest.param(lambda: torch.empty(1 << 50, dtype=torch.int8, device="cuda"), marks=pytest.mark.gpu),
    ],
)
def test_real_ones(work: Callable[[], object]) -> None:
    with pytest.raises(OUT_OF_MEMORY_TYPES) as caught:
        work()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RecursionError("maximum recursion depth exceeded"),
        ValueError("can't allocate memory"),
    ],
)
def test_others(error: Exception) -> None:
    assert not is_out_of_memory(error)
