"""The heap of a process that serves, below Python: glibc's malloc."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

# Of glibc's malloc.h.
_M_ARENA_MAX = -8
# What malloc reads of it before a program begins; there is no call for it later.
_TUNABLES = "GLIBC_TUNABLES"
_TCACHE_COUNT = "glibc.malloc.tcache_count"


def share_one_heap() -> bool:
    """Have all threads of this process, of which there is only one yet, allocate from one heap.

    With a heap for each thread, what one allocates and another frees leaves holes in all of them. For a
    process whose threads take turns anyway. False where malloc is not glibc's, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, 1))


def without_thread_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose threads keep nothing that they freed for themselves.

    Of each size up to 1 KB a thread would keep seven blocks, which count as in use: wherever they lie, what
    was freed around them cannot be joined. With 20 threads that hand blocks to one another the holes go on
    growing for hours. A choice that `environment` has made already stays; another malloc does not look at it.
    """
    tunables = environment.get(_TUNABLES, "")
    if _TCACHE_COUNT in tunables:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, (tunables, f"{_TCACHE_COUNT}=0")))}
