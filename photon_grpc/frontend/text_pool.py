"""Threads for text that would hold up the event loop: as many as there were, whatever becomes of one.

The pool of the standard library goes on with one thread less when one dies, and without any keeps its
callers waiting for ever. Here the caller of what was being done is told, and another thread takes over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, Queue
from typing import Any, TypeVar

import structlog

from photon_grpc.errors import InternalError

__all__ = ["TextPool"]

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class TextPool(Executor):
    """`num_threads` daemon threads, from the first work on. `submit` may be called on any thread."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        # None ends a thread.
        self._queue: Queue[tuple[Future[Any], Callable[[], Any]] | None] = Queue()
        self._closed = False
        # A service that does not come to be leaves no threads behind.
        self._to_start = num_threads
        self._lock = threading.Lock()

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Have `fn` called. What is no Exception comes as an InternalError with it as its cause."""
        if self._closed:
            raise RuntimeError("the pool is shut down")
        with self._lock:
            while self._to_start:
                self._start()
                self._to_start -= 1
        future: Future[_T] = Future()
        self._queue.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; `wait` is for nothing, since threads that work end by themselves."""
        self._closed = True
        while cancel_futures:
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
            if item is not None:
                item[0].cancel()
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _start(self) -> None:
        threading.Thread(target=self._run, name="photon-text", daemon=True).start()

    def _run(self) -> None:
        future: Future[Any] | None = None
        try:
            while (item := self._queue.get()) is not None:
                future, work = item
                if future.set_running_or_notify_cancel():
                    _do(work, future)
                del item, work
                future = None
        except BaseException as error:  # noqa: BLE001 - logged; another thread takes over
            _log.error("text_thread_died", error=type(error).__name__)
            if future is not None and not future.done():
                future.set_exception(InternalError())
            # Also where the pool has been shut down: its share of what ends threads is still in the queue.
            self._start()


def _do(work: Callable[[], _T], future: Future[_T]) -> None:
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - the caller's
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - the caller's; as it is, it might end the event loop
        internal = InternalError()
        internal.__cause__ = error
        future.set_exception(internal)
    else:
        future.set_result(result)
