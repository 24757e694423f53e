"""Whether a generation may join the queue, and how long that queue is in seconds.

The queue itself is the scheduler's; here are its bounds and what is measured of it. A call that is
refused here has cost a few comparisons, and nothing of it has reached the engine. Only generations are
counted: health checks and questions about the model never meet a full queue. Event loop only; the clock is
passed in, so that everything can be tried in virtual time.

Tenants share the room. One that has the queue to itself may fill it. Once it is full, a tenant may have as
much in it as its weight is of the weights of those who have something there, itself included; one that
has nothing there may always have one request. The queue is then over its bounds, never by more than
`engine.client.MOST_OVER`, until those who have more than their share have come down to it. Nobody is put
out of the queue again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from photon_grpc.engine.client import MOST_OVER
from photon_grpc.engine.messages import Deadlines, EngineStats
from photon_grpc.errors import DeadlineTooShortError, DeadlineUnreachableError, OverloadedError
from photon_grpc.options import LimitOptions

__all__ = ["Admission", "BoundedEngine", "Fastest", "Throughput", "Ticket"]

# Shorter spans hold too few steps to say anything.
_MIN_SPAN_S = 0.1
# What lies this far back counts a third.
_MEMORY_S = 5.0
_SMOOTHING = 0.1
# Nothing has been measured yet: long enough to be measured meanwhile.
_UNKNOWN_WAIT_S = 1.0
_MAX_WAIT_S = 3600.0
# Fewer may all have come at a bad moment.
_MIN_OBSERVATIONS = 5
_NO_DEADLINES = Deadlines()


class BoundedEngine(Protocol):
    """The part of the engine's client that admission looks at; `engine.client.AsyncEngine` has it."""

    @property
    def num_live_completions(self) -> int:
        """Submitted completions that have not ended."""

    @property
    def max_num_seqs(self) -> int:
        """Completions that run at the same time."""

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""


class Throughput:
    """Tokens per second of a busy engine, prompts and outputs together.

    An engine with free places says nothing of what it could do, so only spans that begin and end with
    sequences waiting count; and a span lasts until tokens have come, since one step may be longer than the
    time between two looks. The mean is weighted by time: how often somebody looks does not matter.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._since: tuple[float, int] | None = None

    @property
    def per_second(self) -> float | None:
        """None before the engine has been busy for long enough."""
        return self._rate

    def observe(self, now: float, num_tokens: int, *, is_busy: bool) -> None:
        """`num_tokens` have been computed in all by `now` (monotonic seconds)."""
        if not is_busy:
            self._since = None
        elif self._since is None:
            self._since = (now, num_tokens)
        elif (span := now - self._since[0]) >= _MIN_SPAN_S and num_tokens > self._since[1]:
            latest = (num_tokens - self._since[1]) / span
            share = 1.0 if self._rate is None else -math.expm1(-span / _MEMORY_S)
            self._rate = latest if self._rate is None else self._rate + share * (latest - self._rate)
            self._since = (now, num_tokens)


class Fastest:
    """The least time that prompts have taken from their first step to their first token, by length.

    What no idle server could do is refused for good, so the estimate is a bound from below: the fastest of
    at least five prompts of about this length, or of any shorter ones; nothing is drawn out to lengths
    that were not seen.
    """

    def __init__(self) -> None:
        # By the length's number of bits: how many, and the least seconds.
        self._seen: dict[int, tuple[int, float]] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A prompt of `num_tokens` took `seconds`."""
        count, least = self._seen.get(num_tokens.bit_length(), (0, math.inf))
        self._seen[num_tokens.bit_length()] = (count + 1, min(least, seconds))

    def seconds(self, num_tokens: int) -> float:
        """A prompt of `num_tokens` takes at least this; 0 when nothing is known."""
        bits = num_tokens.bit_length()
        known = (
            least
            for length, (count, least) in self._seen.items()
            if length <= bits and count >= _MIN_OBSERVATIONS
        )
        return max(known, default=0.0)


@dataclass(slots=True, eq=False)
class _Queue:
    """What one tenant has admitted whose first token has not come."""

    weight: float
    completions: int = 0
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request until its stream is left; use inside `with`, or `close` it."""

    _admission: Admission
    num_completions: int
    prompt_tokens: int
    tenant: str
    num_output_tokens: int = 0
    """All completions together; set by whoever reads the outputs."""
    is_queued: bool = True
    _is_closed: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, prefill_s: float | None = None) -> None:
        """No longer in the queue: the first token came `prefill_s` after the first step, or never will."""
        if self.is_queued:
            self.is_queued = False
            self._admission.dequeued(self, prefill_s)

    def close(self) -> None:
        """Give the place back. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self.start()
            self._admission.left(self)


class Admission:
    """The bounds of the queue and the estimate of what waiting in it takes."""

    def __init__(self, engine: BoundedEngine, limits: LimitOptions, *, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._throughput = Throughput()
        self._fastest = Fastest()
        # Of admitted requests whose first token has not come.
        self._queued_tokens = 0
        self._queued_completions = 0
        self._queues: dict[str, _Queue] = {}
        self._output_tokens: float | None = None

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of admitted requests whose first token has not come."""
        return self._queued_tokens

    def check(self, tenant: str = "", weight: float = 1.0) -> None:
        """Refuse what no request of the tenant could pass now; cheap, for use before text work.

        Raises OverloadedError.
        """
        self._measure()
        self._check_room(tenant, weight, 1, 0)

    def enter(
        self,
        prompt_tokens: int,
        num_completions: int = 1,
        deadlines: Deadlines = _NO_DEADLINES,
        *,
        tenant: str = "",
        weight: float = 1.0,
    ) -> Ticket:
        """Take a request of `num_completions` with a prompt of `prompt_tokens` each.

        Raises OverloadedError when the queue has no room for it, DeadlineUnreachableError when it would
        wait there for too long, DeadlineTooShortError when no queue could be short enough; it then holds
        nothing.
        """
        self._measure()
        num_tokens = prompt_tokens * num_completions
        self._check_room(tenant, weight, num_completions, num_tokens)
        self._check_deadlines(tenant, weight, prompt_tokens, deadlines)
        ticket = Ticket(self, num_completions, prompt_tokens, tenant)
        self._queued_tokens += num_tokens
        self._queued_completions += num_completions
        queue = self._queues.setdefault(tenant, _Queue(weight))
        # The latest word on the tenant's weight counts for all that it has waiting.
        queue.weight = weight
        queue.completions += num_completions
        queue.tokens += num_tokens
        return ticket

    def queue_wait(self) -> float | None:
        """`estimated_wait` behind everything that waits, measured up to now."""
        self._measure()
        return self.estimated_wait()

    def estimated_wait(self, tenant: str | None = None, weight: float = 1.0) -> float | None:
        """Seconds until a request that came now would get a place; None when nothing is known yet.

        Places become free as fast as work is done, so a request waits for as much work as stands before
        it: as many completions, of the size of the queued prompts and of what outputs have been lately.
        Before a request of `tenant` stand that tenant's own, and of the others' no more than their weights
        entitle them to meanwhile; before one of nobody in particular stands everything.
        """
        engine = self._engine
        num_waiting = max(engine.num_live_completions - engine.max_num_seqs, engine.stats.waiting)
        if engine.num_live_completions < engine.max_num_seqs and not engine.stats.waiting:
            return 0.0
        rate = self._throughput.per_second
        if rate is None:
            return None
        prompt = self._queued_tokens / self._queued_completions if self._queued_completions else 0.0
        output = self._output_tokens or 0.0
        if tenant is None or not self._queues:
            work = (num_waiting + 1) * (prompt + output)
        else:
            work = self._work_before(tenant, weight, num_waiting / self._queued_completions, output)
        return min(work / rate, _MAX_WAIT_S)

    def _work_before(self, tenant: str, weight: float, waiting_share: float, output: float) -> float:
        """Tokens before a request of `tenant` has a place. Of all that is queued `waiting_share` waits;
        the rest is in the batch, its first token under way."""
        own = self._queues.get(tenant)
        if own is None:
            # What frees a place is one completion of whatever size they are.
            mine = self._queued_tokens / self._queued_completions + output
        else:
            mine = (own.completions * waiting_share + 1) * (own.tokens / own.completions + output)
        others = (
            min(
                waiting_share * (queue.tokens + queue.completions * output),
                mine * queue.weight / weight,
            )
            for name, queue in self._queues.items()
            if name != tenant
        )
        return mine + sum(others)

    def _measure(self) -> None:
        stats, places = self._engine.stats, self._engine.max_num_seqs
        # A full batch does as much as one behind which others wait.
        is_busy = stats.waiting > 0 or 0 < places <= stats.running
        self._throughput.observe(
            self._clock(), stats.prompt_tokens + stats.generation_tokens, is_busy=is_busy
        )

    def _check_room(self, tenant: str, weight: float, num_completions: int, num_tokens: int) -> None:
        # An empty engine or queue takes any request: one that is larger than the bound could never come
        # otherwise.
        engine, limits = self._engine, self._limits
        own = self._queues.get(tenant, _Queue(weight))
        num_queued = engine.num_live_completions + num_completions - engine.max_num_seqs
        if engine.num_live_completions and num_queued > limits.max_queued_requests:
            num_own = own.completions + num_completions if own.completions else 0
            if not self._has_share(tenant, weight, num_queued, num_own, limits.max_queued_requests):
                raise self._overloaded("the queue is full", tenant, weight)
        num_queued = self._queued_tokens + num_tokens
        if self._queued_tokens and num_queued > limits.max_queued_tokens:
            num_own = own.tokens + num_tokens if own.completions else 0
            if not self._has_share(tenant, weight, num_queued, num_own, limits.max_queued_tokens):
                raise self._overloaded("the queue holds as many prompt tokens as it may", tenant, weight)

    def _has_share(self, tenant: str, weight: float, num_queued: int, num_own: int, bound: int) -> bool:
        """Whether a tenant may add to a full queue: `num_queued` would be in it, `num_own` the tenant's,
        0 if it had nothing there."""
        others = sum(queue.weight for name, queue in self._queues.items() if name != tenant)
        # Without others the queue is the tenant's own, and full is full.
        return (
            others > 0 and num_queued <= MOST_OVER * bound and num_own <= bound * weight / (weight + others)
        )

    def _check_deadlines(self, tenant: str, weight: float, prompt_tokens: int, clocks: Deadlines) -> None:
        now = self._clock()
        to_start = _time_left(now, clocks.start_by)
        to_first_token = _time_left(now, clocks.first_token_by, clocks.end_by)
        if min(to_start, to_first_token) <= 0:
            return  # the engine tells which clock it was that has run out already
        alone = self._fastest.seconds(prompt_tokens)
        if alone > to_first_token:
            raise DeadlineTooShortError(alone)
        wait = self.estimated_wait(tenant, weight)
        if wait is not None and (wait > to_start or wait + alone > to_first_token):
            raise DeadlineUnreachableError(wait)

    def _overloaded(self, message: str, tenant: str, weight: float) -> OverloadedError:
        wait = self.estimated_wait(tenant, weight)
        return OverloadedError(message, retry_after_s=_UNKNOWN_WAIT_S if wait is None else wait)

    # --- from tickets ---------------------------------------------------------------------------

    def dequeued(self, ticket: Ticket, prefill_s: float | None) -> None:
        """`ticket` no longer waits; called by the ticket, once."""
        # While others wait a prompt shares its steps with them.
        if prefill_s is not None and not self._engine.stats.waiting:
            self._fastest.observe(ticket.prompt_tokens, prefill_s)
        num_tokens = ticket.prompt_tokens * ticket.num_completions
        self._queued_tokens -= num_tokens
        self._queued_completions -= ticket.num_completions
        queue = self._queues[ticket.tenant]
        queue.tokens -= num_tokens
        queue.completions -= ticket.num_completions
        if not queue.completions:
            del self._queues[ticket.tenant]

    def left(self, ticket: Ticket) -> None:
        """`ticket` is closed; called by the ticket, once."""
        if ticket.num_output_tokens:
            latest = ticket.num_output_tokens / ticket.num_completions
            before = latest if self._output_tokens is None else self._output_tokens
            self._output_tokens = before + _SMOOTHING * (latest - before)


def _time_left(now: float, *moments: float | None) -> float:
    """Seconds until the first of `moments`; infinite when there is none."""
    return min((moment for moment in moments if moment is not None), default=math.inf) - now
