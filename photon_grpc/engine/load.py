"""How fast an engine is: what it brought in the last seconds, and how long a newcomer would wait.

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
    that is less; None before. `estimated_queue_wait_s` is for one sequence that came now, None where there
    is nothing to go by: all places are taken and no sequence has ended of late.
    """

    stats: EngineStats
    output_tokens_per_second: float | None = None
    estimated_queue_wait_s: float | None = None


class Throughput:
    """Tokens and ended sequences per second over the last ten seconds, counted from `start`."""

    def __init__(self, start: float) -> None:
        self._num_ended = 0
        self._num_tokens = 0
        # (moment, tokens so far, sequences ended so far); the first is the base of what is read.
        self._samples: deque[tuple[float, int, int]] = deque([(start, 0, 0)])

    def observe(self, time: float, num_tokens: int, num_ended: int) -> None:
        """A step ended at `time`: `num_tokens` generated so far, `num_ended` sequences ended in it."""
        self._num_tokens = num_tokens
        self._num_ended += num_ended
        if time - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((time, num_tokens, self._num_ended))
            self._drop_before(time - WINDOW_S)

    def rates(self, now: float) -> tuple[float, float] | None:
        """(tokens, ended sequences) per second at `now`; None when no time has passed."""
        self._drop_before(now - WINDOW_S)
        since, num_tokens, num_ended = self._samples[0]
        seconds = min(now - since, WINDOW_S)
        if seconds <= 0:
            return None
        return (self._num_tokens - num_tokens) / seconds, (self._num_ended - num_ended) / seconds

    def _drop_before(self, moment: float) -> None:
        # The last sample before the window stays: nothing is known to have come between it and the next.
        while len(self._samples) > 1 and self._samples[1][0] <= moment:
            self._samples.popleft()


def load_of(stats: EngineStats, rates: tuple[float, float] | None, max_num_seqs: int) -> EngineLoad:
    """What `stats` and the rates of `Throughput` say of an engine that runs `max_num_seqs` at a time.

    A sequence that ends makes room for one that waits, so those ahead over those that end per second is
    how long a newcomer waits.
    """
    if rates is None:
        return EngineLoad(stats)
    tokens_per_second, ended_per_second = rates
    num_ahead = stats.waiting + 1 if stats.waiting else max(0, stats.running + 1 - max_num_seqs)
    wait: float | None = None
    if num_ahead == 0:
        wait = 0.0
    elif ended_per_second > 0:
        wait = num_ahead / ended_per_second
    return EngineLoad(stats, tokens_per_second, wait)
