"""Descriptions of tensors for the copy engine of compute capability 9.0 (photon/bulk_copy.cuh).

A tensor map is passed to a kernel by value, and holds an address: a captured graph keeps it as it keeps
pointers. Equal ones are made once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels.launcher import TensorMap

_MAX_KEPT = 4096
_MAX_BOX = 256


def tensor_map(
    tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """Of a 16-bit tensor's memory as `sizes` elements, innermost first, in any order and with overlaps.

    `strides` are those of all but the innermost, in elements. A copy brings a `box` in the order of the
    dimensions, 64 innermost elements to a row, in the 128-byte swizzle; zeros from outside of the tensor.
    Raises RuntimeError for what the driver refuses.
    """
    assert len(sizes) == len(box) == len(strides) + 1
    assert max(box) <= _MAX_BOX
    return _encode(tensor.data_ptr(), tensor.dtype, sizes, strides, box)


@lru_cache(_MAX_KEPT)
def _encode(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    from cuda.bindings import driver

    types = {
        torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    result, made = driver.cuTensorMapEncodeTiled(
        types[dtype],
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * dtype.itemsize) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(result) != 0:
        raise RuntimeError(f"tensor map of {sizes}, strides {strides}, box {box}: {result!r}")
    return np.void(np.array([int(word) for word in made.opaque], np.uint64).tobytes())
