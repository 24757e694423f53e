"""What the operations require of tensors, before an address goes to a device that checks nothing.

A violation is a bug of the caller's: ValueError. Engine thread only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_INDEX_NAMES = {torch.int32: "int", torch.int64: "i64"}

# Of one access of the kernels.
_ALIGNMENT = 16


def storage_name(dtype: torch.dtype) -> str:
    """What photon/types.cuh calls `dtype`."""
    name = _TYPE_NAMES.get(dtype)
    if name is None:
        raise ValueError(f"no kernel stores {dtype}")
    return name


def index_name(dtype: torch.dtype) -> str:
    """What photon/types.cuh calls an integer type."""
    name = _INDEX_NAMES.get(dtype)
    if name is None:
        raise ValueError(f"an index is int32 or int64, not {dtype}")
    return name


def require(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """`tensor` has this type and shape, lies contiguous and starts on 16 bytes (or is empty)."""
    _require_type(name, tensor, dtype, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tuple(tensor.stride())}")
    if tensor.data_ptr() % _ALIGNMENT:
        raise ValueError(f"{name} must start on {_ALIGNMENT} bytes")


def require_index(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Like `require`, for what is read an element at a time: no alignment."""
    _require_type(name, tensor, dtype, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tuple(tensor.stride())}")


def require_rows(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Like `require`, but rows (dimension 0) may lie apart: elements from one to the next, on 16 bytes."""
    _require_type(name, tensor, dtype, shape)
    expected = 1
    for dimension in range(tensor.dim() - 1, 0, -1):
        if shape[dimension] != 1 and tensor.stride(dimension) != expected:
            raise ValueError(f"the rows of {name} must be contiguous; strides are {tuple(tensor.stride())}")
        expected *= shape[dimension]
    stride = tensor.stride(0) if shape[0] > 1 else expected
    if tensor.data_ptr() % _ALIGNMENT or stride * tensor.element_size() % _ALIGNMENT:
        raise ValueError(f"every row of {name} must start on {_ALIGNMENT} bytes")
    return stride


def _require_type(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
