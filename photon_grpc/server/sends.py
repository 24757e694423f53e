"""Sends of grpc.aio that give back what they hold, whatever becomes of their call.

grpc frees the bytes and the operations of a send behind the `await` for its end
(https://github.com/grpc/grpc/issues/43360). A call that is cancelled meanwhile, or whose client has left,
ends that `await` by an exception, and they stay for good: 240 bytes for a small message. Here the coroutine
of a send always goes on to its end, and whoever waits for it is told of a failure only behind that place.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, Generic, TypeVar

import grpc

_Result = TypeVar("_Result")
_Callback = Callable[[Any], object]


def send(work: Coroutine[Any, None, _Result]) -> Awaitable[_Result]:
    """To be awaited in place of `work`, a coroutine of a `grpc.aio.ServicerContext` that sends something.

    To cancel this does not cancel `work`, which ends when grpc is done with what it sends: at the latest with
    the call. Raises what `work` raises: InternalError of grpc.aio for a client that has left.
    """
    return _Send(work)


def send_by(context: Any, work: Coroutine[Any, None, _Result]) -> Awaitable[_Result]:
    """To be awaited in place of `work` of a call's context: as `send` where the context is grpc's own.

    One that stands in for it, for a call that an acceptor has, holds nothing, and has a `flush`.
    """
    return work if hasattr(context, "flush") else _Send(work)


class _Send(Generic[_Result]):
    """For a task, a future: it hands the task's callback to the future that `work` waits for, so that nothing
    comes between, and only a cancellation is kept from that."""

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "_error", "_future", "_work")

    def __init__(self, work: Coroutine[Any, None, _Result]) -> None:
        self._work = work
        self._error: BaseException | None = None

    def __await__(self) -> Generator[Any, None, _Result]:
        try:
            future = self._work.send(None)
        except StopIteration as end:
            result: _Result = end.value
            return result
        assert isinstance(future, asyncio.Future), "grpc waits for something else than a batch"
        self._future = future
        future.set_exception = self._fail  # type: ignore[method-assign, assignment]  # see `_fail`
        self._asyncio_future_blocking = True
        try:
            yield self
        except BaseException:
            if future.done():
                self._end_unheard(future)
            else:
                future.add_done_callback(self._end_unheard)
            raise
        return self._end()

    def _fail(self, error: BaseException) -> None:
        """What grpc calls where a batch has failed, and the only thing that it does with the error."""
        self._error = error
        self._future.set_result(None)

    def _end(self) -> _Result:
        # It leads back here: what has ended would wait for the garbage collector.
        del self._future.set_exception
        error, self._error = self._error, None
        try:
            self._work.send(None)
        except StopIteration as end:
            if error is None:
                result: _Result = end.value
                return result
            raise error from None
        except BaseException:
            if error is None:
                raise
            # What the coroutine made of a success that was none is of no interest.
            raise error from None
        finally:
            del error
        raise AssertionError("grpc waits for a second batch")

    def _end_unheard(self, _: asyncio.Future[None]) -> None:
        """Whoever waited has gone, and with it the call: no error of it is anybody's."""
        try:
            self._end()
        except (grpc.aio.BaseError, asyncio.CancelledError):
            return

    # --- as a task sees it ----------------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(self, callback: _Callback, *, context: Context | None = None) -> None:
        self._callback, self._context = callback, context
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any = None) -> bool:
        """Wake the task by a cancellation, and leave the batch to itself."""
        if self._future.done():
            return False
        self._future.remove_done_callback(self._callback)
        cancelled = self._future.get_loop().create_future()
        cancelled.add_done_callback(self._callback, context=self._context)
        return cancelled.cancel(msg)
