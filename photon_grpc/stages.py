"""What a start spends its time on: stages that follow one another, each with its seconds.

For the log of whoever has to wait for it. Knows no stage by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


class Stages:
    """Stages of one thread, from the moment of making on, or from `begun` (monotonic seconds) before that."""

    def __init__(self, begun: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = self._last = clock() if begun is None else begun
        self._seconds: dict[str, float] = {}

    def ended(self, name: str) -> None:
        """Everything since the end of the stage before belongs to `name`."""
        now = self._clock()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds from the beginning to the end of the last stage."""
        return round(self._last - self._begun, 3)

    def seconds(self) -> dict[str, float]:
        """By stage, in order, to the millisecond."""
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}


def process_begun() -> float:
    """The monotonic moment at which this process began, to some 10 ms; now, where the system does not say."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        # Ticks since the machine was started, field 22 of proc(5); the first two stand before the bracket.
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return now
    # A sandbox may count from elsewhere.
    return now - age if 0 <= age <= now else now
