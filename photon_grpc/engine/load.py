"""How fast an engine is: what it brought in the last seconds.

Figures of the event loop, kept from the cumulative counts that arrive with each step: a step costs one
comparison, and a sample is kept a few times a second. Told the time; reads no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from photon_grpc.engine.messages import EngineStats

WINDOW_S = 10.0
_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot and what it comes to.

    `output_tokens_per_second` is a mean over the last ten seconds, or since the engine is ready where
    that is less; None before. `estimated_queue_wait_s` is for one sequence that came now and waited behind
    all others, None where there is nothing to go by: see `frontend.admission`.
    """

    stats: EngineStats
    output_tokens_per_second: float | None = None
    estimated_queue_wait_s: float | None = None


class Throughput:
    """Tokens per second over the last ten seconds, counted from `start`."""

    def __init__(self, start: float) -> None:
        self._num_tokens = 0
        # (moment, tokens so far); the first is the base of what is read.
        self._samples: deque[tuple[float, int]] = deque([(start, 0)])

    def observe(self, time: float, num_tokens: int) -> None:
        """A step ended at `time`: `num_tokens` generated so far."""
        self._num_tokens = num_tokens
        if time - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((time, num_tokens))
            self._drop_before(time - WINDOW_S)

    def rate(self, now: float) -> float | None:
        """Tokens per second at `now`; None when no time has passed."""
        self._drop_before(now - WINDOW_S)
        since, num_tokens = self._samples[0]
        seconds = min(now - since, WINDOW_S)
        return (self._num_tokens - num_tokens) / seconds if seconds > 0 else None

    def _drop_before(self, moment: float) -> None:
        # The last sample before the window stays: nothing is known to have come between it and the next.
        while len(self._samples) > 1 and self._samples[1][0] <= moment:
            self._samples.popleft()
