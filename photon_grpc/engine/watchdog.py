"""A step that does not return: found, shown and ended.

A device can hang, and a thread that waits for it can be neither interrupted nor joined. So a second thread
looks at how long the step under way has taken. Past its budget every stack is written to standard error,
and whoever owns the engine is told, once, and gives it up. A step that holds the interpreter lock stops
this thread too; for that there is faulthandler's timer, which needs no lock and ends the process.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

_log = structlog.get_logger(__name__)

STDERR = 2
# A full step may take so many times as long as one of a single token: a prefill is no hang.
_FULL_STEP_FACTOR = 4
_MAX_LOOK_S = 1.0
# Threads and loops come late on a busy machine; only what never comes is to be ended without a word.
LATE_S = 5.0


def step_budget_s(step_timeout_s: float, num_tokens: int, full_step_tokens: int) -> float:
    """How long a step of `num_tokens` may take, where the largest has `full_step_tokens`."""
    share = min(num_tokens / full_step_tokens, 1.0)
    return step_timeout_s * (1 + (_FULL_STEP_FACTOR - 1) * share)


def longest_step_s(step_timeout_s: float) -> float:
    """The budget of a full step."""
    return step_timeout_s * _FULL_STEP_FACTOR


class StepWatchdog:
    """Watches steps while it is entered; with a timeout of 0 it does nothing.

    `num_tokens` says how many tokens are under way; it and `on_hang` are called on the watchdog's thread.
    With `owns_process` a hang that keeps even this thread from running ends the process.
    """

    def __init__(
        self,
        step_timeout_s: float,
        full_step_tokens: int,
        num_tokens: Callable[[], int],
        on_hang: Callable[[], None],
        *,
        owns_process: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_timeout_s = step_timeout_s
        self._full_step_tokens = full_step_tokens
        self._num_tokens = num_tokens
        self._on_hang = on_hang
        self._owns_process = owns_process
        self._clock = clock
        # Written by the engine, read by the watchdog: the moment at which the step under way began.
        self._since: float | None = None
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._step_timeout_s:
            self._thread = threading.Thread(target=self._watch, name="photon-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()

    def step_begins(self) -> None:
        """The engine goes into a step."""
        self._since = self._clock()

    def step_ended(self) -> None:
        """The engine has come back."""
        self._since = None

    def is_hung(self) -> bool:
        """Whether the step under way is over its budget."""
        since = self._since
        if since is None:
            return False
        budget_s = step_budget_s(self._step_timeout_s, self._num_tokens(), self._full_step_tokens)
        return self._clock() - since > budget_s

    def _watch(self) -> None:
        look_s = min(self._step_timeout_s / 4, _MAX_LOOK_S)
        try:
            while not self._left.wait(look_s):
                if self._owns_process:
                    limit_s = longest_step_s(self._step_timeout_s) + LATE_S
                    faulthandler.dump_traceback_later(limit_s, exit=True, file=STDERR)
                if self.is_hung():
                    _log.error("step_hangs", tokens=self._num_tokens(), timeout_s=self._step_timeout_s)
                    faulthandler.dump_traceback(file=STDERR)
                    self._on_hang()
                    return
        finally:
            if self._owns_process:
                faulthandler.cancel_dump_traceback_later()
