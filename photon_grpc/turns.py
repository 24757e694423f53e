"""Turns of the event loop, shared between those who write and the calls that come. Event loop only."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, Protocol, TypeVar


class TurnLimits(NamedTuple):
    """How many are woken in one turn, and how many of these may be urgent."""

    wakes: int
    most_urgent: int


# Where calls are accepted on the same loop.
BESIDE_CALLS = TurnLimits(16, 16)


class Sleeper(Protocol):
    """Who sleeps until it is its turn to write."""

    is_urgent: bool

    def wake(self) -> None: ...


_Sleeper = TypeVar("_Sleeper", bound=Sleeper)


class Waker(Generic[_Sleeper]):
    """Wakes whoever is to write a message, a few in each turn of the event loop.

    A turn takes as long as all the messages that are written in it. A call that comes goes through five or
    six turns inside grpc.aio before the next can be accepted, one after the other: with a hundred messages
    to a turn that were 10 ms for each call. Whatever else there is to hear of waits for the end of the turn
    too: the tokens of the next step, and calls that come by way of acceptors. An urgent one takes many times
    as long as another, since mostly its call ends; where they may fill a turn, hundreds of ends let nobody
    else write for a tenth of a second.
    """

    def __init__(self, limits: TurnLimits = BESIDE_CALLS) -> None:
        self._limits = limits
        # By key: who is slower than what there is to write waits here once.
        self._urgent: OrderedDict[Hashable, _Sleeper] = OrderedDict()
        self._others: OrderedDict[Hashable, _Sleeper] = OrderedDict()
        self._is_scheduled = False

    def add(self, key: Hashable, sleeper: _Sleeper) -> None:
        """Have `sleeper` woken, after those that wait already; an urgent one before the rest."""
        (self._urgent if sleeper.is_urgent else self._others)[key] = sleeper

    def forget(self, key: Hashable) -> None:
        """It need not be woken any more."""
        self._urgent.pop(key, None)
        self._others.pop(key, None)

    def start(self) -> None:
        """Begin, unless it is under way."""
        if not self._is_scheduled:
            self._wake_some()

    def _wake_some(self) -> None:
        left, most_urgent = self._limits
        for waiting, most in ((self._urgent, most_urgent), (self._others, left)):
            for _ in range(min(most, left, len(waiting))):
                if not waiting:
                    break  # some that are woken have others forgotten
                left -= 1
                _, sleeper = waiting.popitem(last=False)
                sleeper.wake()
        self._is_scheduled = bool(self._urgent or self._others)
        if self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._wake_some)
