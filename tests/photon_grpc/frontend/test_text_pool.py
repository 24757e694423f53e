"""The pool of text threads, with work that raises and threads that die."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import NoReturn

import pytest

from photon_grpc.errors import InternalError
from photon_grpc.frontend.text_pool import TextPool

NUM_THREADS = 3
PATIENCE_S = 30.0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "photon-text"]


@pytest.fixture
def pool() -> Iterator[TextPool]:
    # Those of a test before may still be at their last work.
    wait_for_none()
    pool = TextPool(NUM_THREADS)
    assert not threads(), "before there is work"
    assert pool.submit(int).result(PATIENCE_S) == 0
    yield pool
    pool.shutdown()
    wait_for_none()


def wait_for_none() -> None:
    for thread in threads():
        thread.join(PATIENCE_S)
    assert not threads()


def fail(error: BaseException) -> NoReturn:
    raise error


def kill(thread: threading.Thread) -> None:
    """Let a thread die of an error that comes from nothing it does."""
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )


def test_work_is_done_by_all_threads_at_once(pool: TextPool) -> None:
    together = threading.Barrier(NUM_THREADS)
    futures = [pool.submit(together.wait, PATIENCE_S) for _ in range(NUM_THREADS)]
    assert sorted(future.result(PATIENCE_S) for future in futures) == [0, 1, 2]
    assert pool.submit(int, "ff", base=16).result(PATIENCE_S) == 255


def test_fault_08_what_work_raises_is_its_caller_s(pool: TextPool) -> None:
    with pytest.raises(ValueError, match="no"):
        pool.submit(fail, ValueError("no")).result(PATIENCE_S)
    for error in (SystemExit(3), KeyboardInterrupt(), BaseException("a panic")):
        with pytest.raises(InternalError) as caught:
            pool.submit(fail, error).result(PATIENCE_S)
        assert caught.value.__cause__ is error
    assert len(threads()) == NUM_THREADS


def test_fault_08_threads_that_die_are_replaced_and_no_work_is_lost(pool: TextPool) -> None:
    for _ in range(3):
        dying = threads()
        for thread in dying:
            kill(thread)
        # Asleep in the queue, they die with what comes first.
        futures = [pool.submit(lambda number=number: number) for number in range(10 * NUM_THREADS)]
        assert [future.result(PATIENCE_S) for future in futures] == list(range(10 * NUM_THREADS))
        for thread in dying:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert len(threads()) == NUM_THREADS


def test_shutting_down_cancels_what_nobody_has_begun(pool: TextPool) -> None:
    begun, go_on = threading.Barrier(NUM_THREADS + 1), threading.Event()

    def hold() -> bool:
        begun.wait(PATIENCE_S)
        return go_on.wait(PATIENCE_S)

    running = [pool.submit(hold) for _ in range(NUM_THREADS)]
    begun.wait(PATIENCE_S)
    waiting = pool.submit(int)
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE_S)
    go_on.set()
    assert all(future.result(PATIENCE_S) for future in running)
    with pytest.raises(RuntimeError):
        pool.submit(int)
