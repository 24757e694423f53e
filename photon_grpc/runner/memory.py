"""Which errors of torch, numpy and Python say that there was no memory, and nothing else.

The device and what it holds are then as they were before the allocation; a step can be tried again with
less in it.
"""

from __future__ import annotations

import torch

# torch's allocator for the CPU has no exception of its own.
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"

__all__ = ["OUT_OF_MEMORY_TYPES", "is_out_of_memory"]

OUT_OF_MEMORY_TYPES = (MemoryError, RuntimeError)
"""What `is_out_of_memory` can be true of."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was no memory. Errors of the device that it reports late do not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and _CPU_ALLOCATOR in str(error)
