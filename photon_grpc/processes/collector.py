"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Containers alive beyond those of the last look; a step of a full batch makes thousands for a moment.
_GC_THRESHOLD = 20_000


@contextmanager
def paused_collector() -> Iterator[None]:
    """No collection before `quiet_collector`: for a process that loads, and so makes what it keeps."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_imports() -> None:
    """Let no later collection walk what there is now, which nothing of this process lets go of."""
    gc.freeze()


def quiet_collector() -> None:
    """Keep the garbage collector from stopping streams; for a process that serves, once it is loaded.

    What start-up made lives as long as the process, and a full collection that walks it stops every
    stream for some 0.3 s. Reference counting frees nearly all that a request makes, so looking for
    cycles less often costs little memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 10, 10)
    gc.enable()
