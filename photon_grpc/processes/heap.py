"""The heap of a process that serves, below Python: glibc's malloc."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_ARENA_MAX = -8


def share_one_heap() -> bool:
    """Have all threads of this process, of which there is only one yet, allocate from one heap.

    With a heap for each thread, what one allocates and another frees leaves holes in all of them. For a
    process whose threads take turns anyway. False where malloc is not glibc's, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 1))
