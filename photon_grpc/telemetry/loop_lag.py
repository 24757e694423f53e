"""How late the event loop runs what is due: one timer that looks how late it is itself.

A loop that is held up holds up every stream, and no other figure says so: steps go on, tokens wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["LoopLag"]

_PERIOD_S = 0.1
# Longer than the usual scrape interval, so that no hold-up falls between two scrapes.
_WINDOW_S = 30.0


class LoopLag:
    """Measures from `start` to `stop`, both on the loop; `seconds` may be read on any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lags = [0.0] * round(_WINDOW_S / _PERIOD_S)
        self._turn = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure the running loop."""
        self._schedule()

    def stop(self) -> None:
        """Measure no more; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def seconds(self) -> float:
        """The worst lag of the last 30 seconds, that of a loop which is held up right now included."""
        overdue = self._clock() - self._due if self._timer is not None else 0.0
        return max(overdue, *self._lags)

    def _schedule(self) -> None:
        self._due = self._clock() + _PERIOD_S
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self._look)

    def _look(self) -> None:
        self._lags[self._turn % len(self._lags)] = max(0.0, self._clock() - self._due)
        self._turn += 1
        self._schedule()
