"""Turns of the event loop, shared between those who write and the calls that come. Event loop only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

# Where calls are accepted on the same loop.
WAKES_PER_TURN = 16


class Sleeper(Protocol):
    """Who sleeps until it is its turn to write."""

    is_urgent: bool

    def wake(self) -> None: ...


_Sleeper = TypeVar("_Sleeper", bound=Sleeper)


class Waker(Generic[_Sleeper]):
    """Wakes whoever is to write a message, a few in each turn of the event loop.

    A turn takes as long as all the messages that are written in it. A call that comes goes through five or
    six turns inside grpc.aio before the next can be accepted, one after the other: with a hundred messages
    to a turn that were 10 ms for each call.
    """

    def __init__(self, wakes_per_turn: int = WAKES_PER_TURN) -> None:
        self._wakes_per_turn = wakes_per_turn
        # By key: who is slower than what there is to write waits here once.
        self._urgent: OrderedDict[int, _Sleeper] = OrderedDict()
        self._others: OrderedDict[int, _Sleeper] = OrderedDict()
        self._is_scheduled = False

    def add(self, key: int, sleeper: _Sleeper) -> None:
        """Have `sleeper` woken, after those that wait already; an urgent one before the rest."""
        (self._urgent if sleeper.is_urgent else self._others)[key] = sleeper

    def forget(self, key: int) -> None:
        """It need not be woken any more."""
        self._urgent.pop(key, None)
        self._others.pop(key, None)

    def start(self) -> None:
        """Begin, unless it is under way."""
        if not self._is_scheduled:
            self._wake_some()

    def _wake_some(self) -> None:
        for _ in range(self._wakes_per_turn):
            waiting = self._urgent or self._others
            if not waiting:
                break
            _, sleeper = waiting.popitem(last=False)
            sleeper.wake()
        self._is_scheduled = bool(self._urgent or self._others)
        if self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._wake_some)
