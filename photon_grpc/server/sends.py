"""Sends of grpc.aio that give back what they hold, whatever becomes of their call.

grpc frees the bytes and the operations of a send behind the `await` for its end
(https://github.com/grpc/grpc/issues/43360). A call that is cancelled meanwhile, or whose client has left,
ends that `await` by an exception, and they stay for good: 240 bytes for a small message. Here the coroutine
of a send is run apart from the task of its call, to its end, and learns of a failure only behind that place.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def send(work: Coroutine[Any, None, _Result]) -> _Result:
    """Await `work`, a coroutine of a `grpc.aio.ServicerContext` that sends something.

    Begins at once. To cancel this does not cancel `work`, which ends when grpc is done with what it sends: at
    the latest with the call. Raises what `work` raises: InternalError of grpc.aio for a client that has left.
    """
    done: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
    _Send(work, done).go_on()
    try:
        return await done
    finally:
        # Its error leads to this frame, and this frame would lead to the error.
        del done


async def send_by(context: Any, work: Coroutine[Any, None, _Result]) -> _Result:
    """Await `work` of a call's context: as `send` does where the context is grpc's own.

    One that stands in for it, for a call that an acceptor has, holds nothing, and has a `flush`.
    """
    return await (work if hasattr(context, "flush") else send(work))


class _Send:
    """Runs a coroutine as a task does, but at once, and to its end."""

    __slots__ = ("_done", "_error", "_work")

    def __init__(self, work: Coroutine[Any, None, Any], done: asyncio.Future[Any]) -> None:
        self._work = work
        self._done = done
        self._error: BaseException | None = None

    def go_on(self, ended: asyncio.Future[None] | None = None) -> None:
        if ended is not None:
            # It leads back to the future, which would wait for the garbage collector.
            del ended.set_exception
        try:
            future = self._work.send(None)
        except StopIteration as end:
            self._end(end.value)
        except BaseException as error:  # noqa: BLE001 - it is for whoever awaits the send
            self._end(None, error)
        else:
            assert isinstance(future, asyncio.Future), "grpc waits for something else than a batch"
            # The only thing that grpc does with an exception is to set it here.
            future.set_exception = partial(self._fail, future)  # type: ignore[method-assign]
            future.add_done_callback(self.go_on)

    def _fail(self, future: asyncio.Future[None], error: BaseException) -> None:
        self._error = error
        future.set_result(None)

    def _end(self, value: Any, error: BaseException | None = None) -> None:
        # What the coroutine made of a success that was none is of no interest.
        error, self._error = self._error or error, None
        if self._done.cancelled():
            return
        if error is None:
            self._done.set_result(value)
        else:
            self._done.set_exception(error)
