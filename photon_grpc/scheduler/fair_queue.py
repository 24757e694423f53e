"""Whose turn it is to enter the batch: a fair share of the engine for each tenant that waits.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Each
tenant has a counter of the tokens that were computed for it, divided by its weight, and the tenant with
the least counter is served next. The rules in full, to which the judge of the simulation is held as well:

Charge. A tenant is charged for every token of its sequences that a step plans to compute, of prompts and
of outputs alike, over the sequence's weight. Tokens found in the prefix cache cost nothing. What is
computed again after a preemption is not charged again: it was the pool that ran short, and the caller
gets nothing for it. So a position of a sequence is charged once, the first time that it is computed.

Backlogged is a tenant while a sequence of its waits that has never been in the batch. Sequences that run,
or wait again because they were preempted, do not make it so.

Contention begins when a sequence arrives and no tenant is backlogged: every counter is 0 then. While
nobody had to wait, nobody took anything from anybody.

Lift. A tenant that is not backlogged when a sequence of its arrives, while others are, begins with the
least counter of those others, unless its own is higher: time in which it asked for less is no credit, and
what its running sequences were given since contention began is a debt. This happens when the sequence
arrives, between two steps, and nowhere else: not when a sequence is preempted, which keeps the place that
its tenant had, and not when a tenant's last sequence has ended.

Turn. Of the tenants with a sequence that waits, for the first time or again, the one with the least
counter comes first, with its sequence of the smallest rank; of equal counters the smallest rank counts.

Cap. While others wait a tenant passes its turn if with the sequence that would enter it held more than its
share of the KV blocks, unless it holds none, or all that wait would have to pass. When somebody else takes
the turn instead, the counters of those who passed become those of whoever took it, if they were lower: a
turn that a tenant could not take is no credit.

Bound. Let U be the most that a tenant's sequences in the batch can still be charged for: prompt and
`max_tokens` less what was charged, over the weight, summed up, at any moment. While two tenants are
backlogged their counters differ by no more than the larger U, since whoever takes a turn has the least
counter, and until its next turn is charged for what it has in the batch and no more. The weighted service
of two tenants over a time in which both stay backlogged therefore differs by no more than U of the one and
U of the other together; of tenants that are not held back by a cap. And nobody starves: the counter of a
tenant that waits stands still, those of the others rise.

With one tenant this is a queue by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from photon_grpc.scheduler.policy import Rank
from photon_grpc.scheduler.ranked_queue import RankedQueue
from photon_grpc.scheduler.request import Request, RequestStatus

# Tenants that are remembered before those among them are forgotten whom it makes no difference to.
_MANY_TENANTS = 1024


class _Account:
    """The books of one tenant."""

    __slots__ = ("counter", "num_live", "num_new", "waiting")

    def __init__(self) -> None:
        self.counter = 0.0
        self.num_live = 0
        # Of those that wait: never in the batch.
        self.num_new = 0
        self.waiting = RankedQueue()


class FairQueue:
    """Sequences that wait, those of each tenant by rank, and what every tenant has been given.

    Charging is put off until a counter is looked at: a sequence that goes on decoding costs nothing here.
    """

    def __init__(self, running: Iterable[Request]) -> None:
        """`running` is looked through, whenever counters matter, for what there is to charge."""
        self._running = running
        self._accounts: dict[str, _Account] = {}
        # Of these alone it can be somebody's turn.
        self._waiting: dict[str, _Account] = {}
        self._backlogged: dict[str, _Account] = {}
        # Those who would have come before `first`, but for their caps.
        self._passing: list[_Account] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        """All that wait, in no order."""
        return (request for account in self._waiting.values() for request in account.waiting)

    def arrive(self, position: Rank, request: Request) -> None:
        """A new sequence: its tenant is lifted if that is due, and it waits."""
        account = self._open(request.tenant)
        account.num_live += 1
        if not account.num_new:
            if not self._backlogged:
                self._begin_contention()
            elif len(self._accounts) > 1:
                self._settle()
                account.counter = max(account.counter, self._least())
            self._backlogged[request.tenant] = account
        account.num_new += 1
        self._push(position, request)

    def resume(self, position: Rank, request: Request) -> None:
        """A sequence that was preempted waits again; it must have been charged."""
        assert request.status is RequestStatus.PREEMPTED
        self._push(position, request)

    def enter(self, position: Rank, request: Request) -> None:
        """The sequence that `first` named takes its turn."""
        counter = self._accounts[request.tenant].counter
        for account in self._passing:
            account.counter = max(account.counter, counter)
        self.remove(position, request)

    def remove(self, position: Rank, request: Request) -> None:
        """A sequence no longer waits."""
        account = self._accounts[request.tenant]
        account.waiting.remove(position)
        self._num_waiting -= 1
        if not account.waiting:
            del self._waiting[request.tenant]
        if request.status is RequestStatus.WAITING:
            account.num_new -= 1
            if not account.num_new:
                del self._backlogged[request.tenant]

    def end(self, request: Request) -> None:
        """A sequence has ended; if it was in the batch, it must have been charged."""
        self._accounts[request.tenant].num_live -= 1

    def first(self, is_over_cap: Callable[[Request], bool] = lambda request: False) -> Request:
        """Whose turn it is; there must be somebody. Only the batch as of the last `settle` counts.

        `is_over_cap` says of a sequence whether its tenant would hold too many blocks with it.
        """
        self._passing = []
        if len(self._waiting) == 1:
            (account,) = self._waiting.values()
            return account.waiting.first()
        best = min(self._waiting.values(), key=_turn)
        first = best.waiting.first()
        if first.kv_share < 1 and is_over_cap(first):
            for account in sorted(self._waiting.values(), key=_turn):
                other = account.waiting.first()
                if other.kv_share == 1 or not is_over_cap(other):
                    return other
                self._passing.append(account)
            self._passing = []
        return first

    def earliest_arrival(self) -> float | None:
        """Of the first in rank of every tenant; None where nobody waits."""
        firsts = (account.waiting.first().arrival_time for account in self._waiting.values())
        return min(firsts, default=None)

    def settle(self) -> None:
        """Charge for everything planned so far, if it can make a difference to whose turn it is."""
        if len(self._waiting) > 1:
            self._settle()

    def charge(self, request: Request) -> None:
        """Charge for what was planned of a sequence of the batch since it was last charged."""
        num_tokens = request.num_computed_tokens - request.num_charged_tokens
        if num_tokens > 0:
            request.num_charged_tokens = request.num_computed_tokens
            self._accounts[request.tenant].counter += num_tokens / request.weight

    def counters(self) -> dict[str, float]:
        """Tokens over weight that each backlogged tenant has been given since contention began."""
        self._settle()
        return {tenant: account.counter for tenant, account in self._backlogged.items()}

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not balance. For tests."""
        assert self._num_waiting == sum(len(account.waiting) for account in self._accounts.values())
        for tenant, account in self._accounts.items():
            waiting = list(account.waiting)
            assert all(request.tenant == tenant for request in waiting)
            assert account.num_live == len(waiting) + sum(r.tenant == tenant for r in self._running)
            assert account.num_new == sum(r.status is RequestStatus.WAITING for r in waiting)
            assert (tenant in self._backlogged) == bool(account.num_new)
            assert (tenant in self._waiting) == bool(waiting)

    # --- books ----------------------------------------------------------------------------------

    def _open(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= _MANY_TENANTS:
                self._forget_some()
            account = self._accounts[tenant] = _Account()
            if len(self._accounts) == 2:
                # A tenant that had the engine to itself was never charged.
                self._reset()
        return account

    def _forget_some(self) -> None:
        # Whoever comes back below the least counter would be lifted to it.
        self._settle()
        least = self._least()
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.num_live or account.counter > least
        }

    def _begin_contention(self) -> None:
        self._accounts = {tenant: account for tenant, account in self._accounts.items() if account.num_live}
        if len(self._accounts) > 1:
            self._reset()

    def _reset(self) -> None:
        for request in self._running:
            request.num_charged_tokens = max(request.num_charged_tokens, request.num_computed_tokens)
        for account in self._accounts.values():
            account.counter = 0.0

    def _settle(self) -> None:
        for request in self._running:
            self.charge(request)

    def _least(self) -> float:
        return min((account.counter for account in self._backlogged.values()), default=0.0)

    def _push(self, position: Rank, request: Request) -> None:
        account = self._accounts[request.tenant]
        account.waiting.add(position, request)
        self._waiting[request.tenant] = account
        self._num_waiting += 1


def _turn(account: _Account) -> tuple[float, Rank]:
    return account.counter, account.waiting.first_rank()
