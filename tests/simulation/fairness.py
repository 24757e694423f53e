"""What each tenant was given, from the plans alone, and what follows for whose turn it is.

Written from the rules that `photon_grpc.scheduler.fair_queue` states, without its books: every token is
charged when a plan has it, and nothing is put off. Weights of scenarios are powers of two, so that the
figures are exact and a tie is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations

from tests.simulation.scenario import Call


@dataclass(eq=False)
class Service:
    """How far a completion has been computed, and for how much of that its tenant was charged."""

    call: Call
    rank: tuple[float, int, int]
    num_computed: int = 0
    num_charged: int = 0

    @property
    def most(self) -> float:
        """What its tenant can still be charged for."""
        return (len(self.call.prompt) + self.call.max_tokens - self.num_charged) / self.call.weight


@dataclass(eq=False)
class FairShares:
    """The counters of all tenants, and the bound on their differences."""

    # Tokens over weight since contention began, or since the tenant was lifted.
    counters: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # The same since the beginning, never lifted.
    given: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # The most that each tenant's completions in the batch could be charged for at any moment.
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # Of pairs that have stayed backlogged: the least and the greatest difference in `given`.
    differences: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def arrives(self, tenant: str, backlogged: set[str]) -> bool:
        """A completion of `tenant` is handed in; these were backlogged before. True if it was lifted."""
        if not backlogged:
            self.counters.clear()
        elif tenant not in backlogged:
            least = min(self.counters[other] for other in backlogged)
            if self.counters[tenant] < least:
                self.counters[tenant] = least
                return True
        return False

    def enters(self, service: Service, num_cached: int) -> None:
        """It is in the batch, for the first time or again; its first tokens need not be computed."""
        service.num_computed = num_cached
        service.num_charged = max(service.num_charged, num_cached)

    def planned(self, service: Service, num_tokens: int) -> None:
        """The plan has a row of so many of its tokens."""
        service.num_computed += num_tokens
        more = max(0, service.num_computed - service.num_charged) / service.call.weight
        service.num_charged = max(service.num_charged, service.num_computed)
        self.counters[service.call.tenant] += more
        self.given[service.call.tenant] += more

    def turn(self, service: Service) -> tuple[float, tuple[float, int, int]]:
        """Smaller comes first, among the first of each tenant."""
        return self.counters[service.call.tenant], service.rank

    def first(self, waiting: Iterable[Service], is_over_cap: Callable[[Service], bool]) -> Service:
        """Whose turn it is; there must be somebody. Tenants over their caps pass, unless all would."""
        order = self._heads(waiting)
        return next((service for service in order if not is_over_cap(service)), order[0])

    def takes_turn(self, service: Service, waiting: Iterable[Service]) -> bool:
        """`service`, not in `waiting`, is `first`: whoever passed keeps no lower counter. True if any did."""
        passed = [other for other in self._heads(waiting) if self.turn(other) < self.turn(service)]
        counter = self.counters[service.call.tenant]
        for other in passed:
            self.counters[other.call.tenant] = max(self.counters[other.call.tenant], counter)
        return any(other.call.tenant != service.call.tenant for other in passed)

    def _heads(self, waiting: Iterable[Service]) -> list[Service]:
        """The first of each tenant, in the order of their turns."""
        heads: dict[str, Service] = {}
        for service in waiting:
            tenant = service.call.tenant
            if tenant not in heads or service.rank < heads[tenant].rank:
                heads[tenant] = service
        return sorted(heads.values(), key=self.turn)

    def in_batch(self, services: Iterable[Service]) -> None:
        """These are in the batch of the step that is being planned, and not yet charged for it."""
        most: dict[str, float] = defaultdict(float)
        for service in services:
            most[service.call.tenant] += service.most
        for tenant, amount in most.items():
            self.largest[tenant] = max(self.largest[tenant], amount)

    def check_bound(self, backlogged: set[str]) -> None:
        """Two tenants that stay backlogged are given as much as each other, but for what is in the batch.

        `backlogged` are those without a cap.
        """
        pairs = set(combinations(sorted(backlogged), 2))
        for pair in set(self.differences) - pairs:
            del self.differences[pair]
        for one, other in pairs:
            difference = self.given[one] - self.given[other]
            low, high = self.differences.get((one, other), (difference, difference))
            low, high = self.differences[one, other] = min(low, difference), max(high, difference)
            bound = self.largest[one] + self.largest[other]
            assert high - low <= bound, f"{one} and {other} drift apart by {high - low}, more than {bound}"
