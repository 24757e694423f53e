"""The order in which a device works, as the runner sees it: enqueue, capture, wait for a mark.

`CudaStream` is torch's current stream. Tests have a stream that does nothing until it is waited for, so
that whatever relies on work being done earlier fails without a GPU. Engine thread.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
"""Reads and writes device memory, and pinned host memory, when its turn comes; waits for nothing."""


class Mark(Protocol):
    """A place in the order of a stream."""

    def set(self) -> None:
        """Behind everything that has been enqueued."""

    def wait(self) -> None:
        """Until the stream has come to where it was last set; not at all where it never was."""


class Stream(Protocol):
    """Runs enqueued work in order, while the host goes on."""

    def run(self, work: Work) -> None:
        """Enqueue `work`."""

    def capture(self, work: Work) -> Work:
        """`work` as one piece: what it enqueues, with the same addresses. Runs nothing yet.

        Every kernel in it has run before. What it allocates is void once another piece has run.
        """

    def mark(self) -> Mark:
        """A new mark, not set."""

    def host_buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Zeros on the host that the device can copy from and to while the host goes on."""


class CudaStream:
    """torch's current stream at the time of making, which has to stay the current one.

    Captures share one memory pool, since they run one after the other.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        work()

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with _no_collection():
            # Other threads may use the device meanwhile. Not `torch.cuda.graph`, which empties the
            # allocator's cache before every capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def mark(self) -> Mark:
        return _CudaMark()

    def host_buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)


class _CudaMark:
    def __init__(self) -> None:
        # The wait sleeps, and without the interpreter lock: the next step is under way already.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # not annotated

    def set(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


def engine_stream() -> None:
    """Make a stream of its own this thread's current one; the default stream cannot be captured."""
    current = torch.cuda.current_stream()
    if current == torch.cuda.default_stream():
        own = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # not annotated in torch
        own.wait_stream(current)
        torch.cuda.set_stream(own)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A graph that the collector finds must not be destroyed while another is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
