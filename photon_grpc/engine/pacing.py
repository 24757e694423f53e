"""Which readers of streams are woken when, so that one event loop keeps up with the engine.

Nothing here reads a stream or waits: `engine.client` asks after every step. Event loop only.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from photon_grpc.engine.messages import PlainTokens

# What a message is taken to cost the event loop until that is measured.
_MESSAGE_S = 60e-6
# What it costs that a call begins, or ends, in messages.
_CALL_MESSAGES = 8
_MAX_TURN_S = 0.1
_SMOOTHING = 0.1
_GOLDEN_RATIO = 0.6180339887498949


class Reader(Protocol):
    """What `engine.client.RequestStream` is to those who hand it tokens."""

    def plain_tokens(self, index: int) -> list[int]: ...


_Reader = TypeVar("_Reader", bound=Reader)


class Pace:
    """How long a stream's reader sleeps, so that the loop keeps up with the engine.

    A message costs the event loop much more than the tokens in it. With few streams, or slow steps,
    every token is a message of its own; when one message per stream and step would take more than
    `share` of the time between steps, readers are woken in turns, each every `turn_s` seconds: a clock
    goes round once in that time, and each reader has its place on it, spread so that any stretch of it has
    its share of them (multiples of the golden ratio). A step wakes those whose places the clock has passed
    since the step before, which are all of them where that took a turn or more: it goes by time and
    not by steps, since one with prompts is as long as several without.

    What a message costs is measured: processor time of the loop's thread over messages, so it holds all that
    the loop does for them on the machine it is on. Calls that begin or end count as so many messages:
    a burst of them says nothing of what a message costs, and its first streams would sleep to its end.
    """

    def __init__(self, share: float, cpu_clock: Callable[[], float] = time.thread_time) -> None:
        self.turn_s = 0.0
        """Between two wakes of a reader, at least."""
        # Of the clock: turns, from a step to the next.
        self._from, self._to = 0.0, 1.0
        self.num_messages = 0
        """Counted by the readers, and taken back to zero by each step."""
        self.num_calls = 0
        """The same of calls that have begun or ended."""
        self._share = share
        self._cpu_clock = cpu_clock
        self._last_time: float | None = None
        self._last_cpu = 0.0
        # Both per step and smoothed; their quotient is the cost of a message.
        self._cpu_s = _MESSAGE_S
        self._messages = 1.0

    def step(self, time: float, num_streams: int) -> None:
        """Count a step that ended at `time` (monotonic seconds), where `num_streams` may have new tokens."""
        cpu = self._cpu_clock()
        if self._last_time is not None:
            self._cpu_s += _SMOOTHING * (cpu - self._last_cpu - self._cpu_s)
            num_messages = self.num_messages + _CALL_MESSAGES * self.num_calls
            self._messages += _SMOOTHING * (num_messages - self._messages)
            # An engine that was idle for long leaves next to no messages to divide by.
            message_s = self._cpu_s / max(self._messages, _SMOOTHING)
            self.turn_s = min(num_streams * message_s / self._share, _MAX_TURN_S)
            self.advance(time - self._last_time)
        self._last_time, self._last_cpu = time, cpu
        self.num_messages = self.num_calls = 0

    def advance(self, seconds: float) -> None:
        """Turn the clock by a step that took so long."""
        self._from = self._to - math.floor(self._to)
        self._to = self._from + (seconds / self.turn_s if seconds < self.turn_s else 1.0)

    def due(self, keys: Iterable[int]) -> list[int]:
        """Those of the streams `keys` whose readers are to be woken in this step."""
        stretches = self.stretches()
        return [key for key in keys if any(start <= place_of(key) < stop for start, stop in stretches)]

    def stretches(self) -> tuple[tuple[float, float], ...]:
        """What of the clock's face, from 0 to 1, the step has passed."""
        if self._to <= 1.0:
            return ((self._from, self._to),)
        return ((self._from, 1.0), (0.0, self._to - 1.0))


def place_of(key: int) -> float:
    """Where a reader's turn is on the clock."""
    return key * _GOLDEN_RATIO % 1.0


_nowhere: deque[int] = deque(maxlen=0)


class Rows(Generic[_Reader]):
    """The streams that the columns of a step go to, looked up once for as many steps as have the same rows.

    `streams` are by key. It knows nothing of streams that begin or end.
    """

    def __init__(self, tokens: PlainTokens, streams: dict[int, _Reader]) -> None:
        self.keys, self.indices = tokens.keys, tokens.indices
        self.streams: dict[int, _Reader] = {}
        # Bound methods: nothing else is as fast for each of hundreds of tokens a step.
        self._appends: list[Callable[[int], None]] = []
        for key, index in zip(tokens.keys, tokens.indices, strict=True):
            stream = streams.get(key)
            if stream is None:
                self._appends.append(_nowhere.append)
            else:
                self._appends.append(stream.plain_tokens(index).append)
                self.streams[key] = stream
        self._in_order = sorted(self.streams.items(), key=lambda row: place_of(row[0]))
        self._places = [place_of(key) for key, _ in self._in_order]

    def push(self, token_ids: Iterable[int]) -> None:
        """One token for each row."""
        for append, token_id in zip(self._appends, token_ids, strict=True):
            append(token_id)

    def due(self, pace: Pace) -> list[tuple[int, _Reader]]:
        """Those whose readers are to be woken; the same that `Pace.due` would name."""
        due: list[tuple[int, _Reader]] = []
        for start, stop in pace.stretches():
            due += self._in_order[bisect_left(self._places, start) : bisect_left(self._places, stop)]
        return due
