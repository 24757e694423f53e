"""RMSNorm on the GPU, plain and with the residual added first; see cuda_kernels/rmsnorm.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer

_VEC = 8
_CHUNKS = 2
_WARP = 32

_CHECKED = tuple(
    {"PHOTON_STORAGE": storage, "PHOTON_RESIDUAL": residual}
    for storage, residual in (
        ("bf16", "bf16"),
        ("bf16", "f32"),
        ("f16", "f16"),
        ("f16", "f32"),
        ("f32", "f32"),
    )
)

RMS_NORM = KernelSpec(
    name="rms_norm",
    source="rmsnorm",
    parameters=(Pointer, Pointer, Pointer, np.int32, np.int64, np.float32),
    max_threads=1024,
    macros=("PHOTON_STORAGE", "PHOTON_RESIDUAL"),
    checked=_CHECKED,
    overlaps=True,
)
ADD_RMS_NORM = KernelSpec(
    name="add_rms_norm",
    source="rmsnorm",
    parameters=(Pointer, Pointer, Pointer, Pointer, np.int32, np.float32),
    max_threads=1024,
    macros=("PHOTON_STORAGE", "PHOTON_RESIDUAL"),
    checked=_CHECKED,
    # Float32 in and out holds twice the words; it serves to compare with, at 512 threads.
    max_registers=96,
    overlaps=True,
)
SPECS = (RMS_NORM, ADD_RMS_NORM)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = norm of each row of `x` [rows, hidden], times `weight` [hidden].

    `out` is contiguous and has `weight`'s type; `x` has it too, or float32, and its rows may lie apart.
    """
    rows, hidden = x.shape
    num_threads = _num_threads(hidden, weight.dtype)
    require("weight", weight, weight.dtype, hidden)
    require("out", out, weight.dtype, rows, hidden)
    stride = require_rows("x", x, _residual_type(x, weight), rows, hidden)
    kernel = launcher.load(
        RMS_NORM.variant(PHOTON_STORAGE=storage_name(weight.dtype), PHOTON_RESIDUAL=storage_name(x.dtype))
    )
    kernel(
        (rows, 1, 1),
        num_threads,
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        np.int32(hidden),
        np.int64(stride),
        np.float32(eps),
    )


def add_rms_norm(out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """residual += x, in place; out = norm of each row of the residual, times `weight` [hidden].

    All [rows, hidden] and contiguous. `out`, `x` and `weight` share one type; the residual has it too, or
    float32.
    """
    rows, hidden = x.shape
    num_threads = _num_threads(hidden, weight.dtype)
    require("weight", weight, weight.dtype, hidden)
    require("out", out, weight.dtype, rows, hidden)
    require("x", x, weight.dtype, rows, hidden)
    require("residual", residual, _residual_type(residual, weight), rows, hidden)
    kernel = launcher.load(
        ADD_RMS_NORM.variant(
            PHOTON_STORAGE=storage_name(weight.dtype), PHOTON_RESIDUAL=storage_name(residual.dtype)
        )
    )
    kernel(
        (rows, 1, 1),
        num_threads,
        out.data_ptr(),
        residual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        np.int32(hidden),
        np.float32(eps),
    )


def _residual_type(residual: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float32 if residual.dtype is torch.float32 else weight.dtype


def _num_threads(hidden: int, dtype: torch.dtype) -> int:
    """Whole warps that hold a row between them."""
    most = 512 if dtype is torch.float32 else 1024
    if hidden % _VEC or not 0 < hidden <= most * _CHUNKS * _VEC:
        raise ValueError(f"rows of {hidden} {dtype} values: not a multiple of {_VEC}, or too long")
    return -(-hidden // (_VEC * _CHUNKS * _WARP)) * _WARP
