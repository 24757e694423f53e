"""The gated activation of an MLP on the GPU; see cuda_kernels/silu_and_mul.cu."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer

_VEC = 8
_THREADS = 256

SILU_AND_MUL = KernelSpec(
    name="silu_and_mul",
    source="silu_and_mul",
    parameters=(Pointer, Pointer, np.int32),
    max_threads=_THREADS,
    macros=("PHOTON_STORAGE",),
    checked=tuple({"PHOTON_STORAGE": storage} for storage in ("bf16", "f16", "f32")),
    overlaps=True,
)
SPECS = (SILU_AND_MUL,)


def silu_and_mul(out: Tensor, gate_up: Tensor) -> None:
    """out [tokens, inner] = silu(gate) * up, for `gate_up` [tokens, 2 * inner], gate first; contiguous."""
    tokens, inner = out.shape
    if inner % _VEC:
        raise ValueError(f"inner is {inner}, not a multiple of {_VEC}")
    require("out", out, out.dtype, tokens, inner)
    require("gate_up", gate_up, out.dtype, tokens, 2 * inner)
    kernel = launcher.load(SILU_AND_MUL.variant(PHOTON_STORAGE=storage_name(out.dtype)))
    grid = (tokens, -(-inner // (_VEC * _THREADS)), 1)
    kernel(grid, _THREADS, out.data_ptr(), gate_up.data_ptr(), np.int32(inner))
