"""Tensors as the GPU's tensor copy engine knows them; see cuda_kernels/include/photon/tensor_copy.cuh.

Knows addresses, sizes and strides, and no operation. A map is a kernel's argument by value, so that a
captured launch keeps its own. Engine thread.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from photon_grpc.errors import BackendUnavailableError

MAP_BYTES = 128
ROW_ELEMENTS = 64
"""16-bit elements of a row of a box, as it arrives in shared memory: 128 bytes."""

_ELEMENT_BYTES = 2
_MAX_BOX = 256
# As many as a model has of weights and of activations at a few sizes.
_MAPS = 4096


@lru_cache(maxsize=_MAPS)
def tensor_map(
    address: int, storage: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> np.void:
    """A map of `sizes` elements of 16 bits, the innermost first, of which boxes are copied.

    `strides` are elements between neighbours of each but the innermost dimension, multiples of 8; `address`
    is a multiple of 16. A box is ROW_ELEMENTS wide and arrives in rows of 128 bytes that are swizzled over
    blocks of eight. Nothing is read. Raises ValueError for what the engine cannot do,
    BackendUnavailableError where the driver refuses.
    """
    if len(strides) != len(sizes) - 1 or len(box) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes, {len(strides)} strides and a box of {len(box)}")
    if address % 16 or any(stride % 8 for stride in strides):
        raise ValueError(f"a tensor at {address} with strides {strides} is not aligned to 16 bytes")
    if box[0] != ROW_ELEMENTS or not all(0 < side <= _MAX_BOX for side in box) or min(sizes) <= 0:
        raise ValueError(f"no box {box} of a tensor of {sizes}")
    from cuda.bindings import driver

    kinds = {
        "bf16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "f16": driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    result, encoded = driver.cuTensorMapEncodeTiled(
        kinds[storage],
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * _ELEMENT_BYTES) for stride in strides],
        [driver.cuuint32_t(side) for side in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(result) != 0:
        raise BackendUnavailableError(f"backend cuda: no tensor map of {sizes}, {strides}, {box}: {result}")
    return np.void(np.array([int(word) for word in encoded.opaque], dtype=np.uint64).tobytes())
