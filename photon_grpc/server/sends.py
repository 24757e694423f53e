"""Sends of grpc.aio that give back what they hold, whatever becomes of their call.

grpc frees the bytes and the operations of a send behind the `await` for its end
(https://github.com/grpc/grpc/issues/43360). A call that is cancelled meanwhile, or whose client has left,
ends that `await` by an exception, and they stay for good: 240 bytes for a small message. Here the coroutine
of a send always goes on to its end, and whoever waits for it is told of a failure only behind that place.
A read that a handler asks for is as good as a send: 96 bytes. The one that grpc does before a handler that
takes a single request runs is out of reach, so no handler is registered as such.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from functools import partial
from typing import Any, Generic, TypeVar

import grpc

_NO_REQUEST = "the method takes one request, and the call has ended without one"

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


async def read_request(context: Any) -> bytes:
    """The only request of a call, not parsed, for a handler that grpc takes for one of many requests.

    Raises CancelledError where the client leaves before it has sent one. One that ends its side without is
    told so, as gRPC has it (doc/statuscodes.md, "request cardinality violation"): AbortError of grpc.aio.
    With a handler for a single request grpc would leave it without an answer.
    """
    try:
        request: bytes = await send(context.read())
        if request is grpc.aio.EOF:
            await send(context.abort(grpc.StatusCode.UNIMPLEMENTED, _NO_REQUEST))
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    return request


class _Send(Generic[_Result]):
    """For a task, a future: it hands the task's callback to the future that `work` waits for, so that nothing
    comes between, and only a cancellation is kept from that."""

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_error",
        "_future",
        "_is_cancelled",
        "_work",
    )

    def __init__(self, work: Coroutine[Any, None, _Result]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._is_cancelled = False

    def __await__(self) -> Generator[Any, None, _Result]:
        try:
            waited = self._work.send(None)
            if isinstance(waited, asyncio.Future):
                yield from self._wait_apart(waited)
                waited = self._go_on()
        except StopIteration as end:
            result: _Result = end.value
            return result
        # A send of grpc.aio 1.84 waits once, for a batch. Whatever another one does, it does as if alone.
        return (yield from _finish(self._work, waited))

    def _wait_apart(self, future: asyncio.Future[None]) -> Generator[Any, None, None]:
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

    def _fail(self, error: BaseException) -> None:
        """What grpc calls where a batch has failed, and the only thing that it does with the error."""
        self._error = error
        self._future.set_result(None)

    def _go_on(self) -> Any:
        """Behind the batch: what `work` waits for next. Raises what it ends with: StopIteration if well."""
        # It leads back here: what has ended would wait for the garbage collector.
        del self._future.set_exception
        error, self._error = self._error, None
        try:
            waited = self._work.send(None)
            if error is None:
                return waited
            self._work.close()
            raise error
        except BaseException as ended:
            # What the coroutine made of a success that was none is of no interest.
            if error is None or ended is error:
                raise
            raise error from None
        finally:
            del error

    def _end_unheard(self, _: asyncio.Future[None]) -> None:
        """Whoever waited has gone, and with it the call: no error of it is anybody's."""
        try:
            self._go_on()
        except (StopIteration, grpc.aio.BaseError, asyncio.CancelledError):
            return
        self._work.close()

    # --- as a task sees it ----------------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(self, callback: _Callback, *, context: Context | None = None) -> None:
        self._callback, self._context = callback, context
        self._future.add_done_callback(callback, context=context)

    def cancel(self, msg: Any = None) -> bool:
        """Wake the task by a cancellation, and leave the batch to itself.

        False where the task is to be woken already, as a future answers: it takes note of the rest itself.
        """
        if self._is_cancelled or self._future.done():
            return False
        self._is_cancelled = True
        self._future.remove_done_callback(self._callback)
        cancelled = self._future.get_loop().create_future()
        cancelled.add_done_callback(self._callback, context=self._context)
        return cancelled.cancel(msg)


def _finish(work: Coroutine[Any, None, _Result], waited: Any) -> Generator[Any, None, _Result]:
    """The rest of a coroutine that waits for `waited`, as its own `await`."""
    while True:
        try:
            yield waited
        except BaseException as error:  # noqa: BLE001 - thrown on into `work`
            go_on = partial(work.throw, error)
        else:
            go_on = partial(work.send, None)
        try:
            waited = go_on()
        except StopIteration as end:
            result: _Result = end.value
            return result
