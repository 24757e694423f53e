"""Sequences in the order of their rank."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from photon_grpc.scheduler.policy import Rank
from photon_grpc.scheduler.request import Request


class RankedQueue:
    """Requests sorted by rank; insertion and removal by binary search."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In the order of rank. The last ones may be removed meanwhile, and then do not come."""
        return iter(self._requests)

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._requests)

    def add(self, position: Rank, request: Request) -> None:
        """Put `request`, which is of this rank, where it belongs."""
        index = bisect.bisect_left(self._ranks, position)
        self._ranks.insert(index, position)
        self._requests.insert(index, request)

    def remove(self, position: Rank) -> None:
        """Take out the request of this rank."""
        index = bisect.bisect_left(self._ranks, position)
        assert self._ranks[index] == position
        del self._ranks[index]
        del self._requests[index]

    def first(self) -> Request:
        """The request of the smallest rank."""
        return self._requests[0]

    def first_rank(self) -> Rank:
        """The smallest rank."""
        return self._ranks[0]

    def last(self) -> Request:
        """The request of the largest rank."""
        return self._requests[-1]
