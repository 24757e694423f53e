"""Tensors as the GPU's tensor copy engine knows them; see cuda_kernels/include/photon/tensor_copy.cuh.

Knows addresses, sizes and strides, and no operation. A map is a kernel's argument by value and holds an
address: a captured launch keeps it as it keeps pointers. Equal ones are made once. Engine thread.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels.launcher import TensorMap

ROW_ELEMENTS = 64
"""16-bit elements of a row of a box, as it arrives in shared memory: 128 bytes."""

_MAX_BOX = 256
# Captured steps need none of them any more, and the others come back to those of the weights, some hundreds.
# Those of activations have addresses that may not come again; each takes 0.7 KB.
_MAX_KEPT = 1024


def tensor_map(
    tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """Of a 16-bit tensor's memory as `sizes` elements, the innermost first, of which boxes are copied.

    `strides` are those of all but the innermost dimension, in elements, multiples of 8; the tensor starts on
    16 bytes. A copy brings a `box`, ROW_ELEMENTS wide, in rows of 128 bytes that are swizzled over blocks of
    eight, with zeros from outside of the tensor. Raises ValueError for what the engine cannot do,
    RuntimeError for what the driver refuses.
    """
    address = tensor.data_ptr()
    if len(strides) != len(sizes) - 1 or len(box) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes, {len(strides)} strides and a box of {len(box)}")
    if address % 16 or any(stride % 8 for stride in strides):
        raise ValueError(f"a tensor at {address} with strides {strides} is not aligned to 16 bytes")
    if box[0] != ROW_ELEMENTS or not all(0 < side <= _MAX_BOX for side in box) or min(sizes) <= 0:
        raise ValueError(f"no box {box} of a tensor of {sizes}")
    return _encode(address, tensor.dtype, sizes, strides, box)


@lru_cache(maxsize=_MAX_KEPT)
def _encode(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    from cuda.bindings import driver

    kinds = {
        torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    result, encoded = driver.cuTensorMapEncodeTiled(
        kinds[dtype],
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * dtype.itemsize) for stride in strides],
        [driver.cuuint32_t(side) for side in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(result) != 0:
        raise RuntimeError(f"tensor map of {sizes}, strides {strides}, box {box}: {result!r}")
    return np.void(np.array([int(word) for word in encoded.opaque], dtype=np.uint64).tobytes())
