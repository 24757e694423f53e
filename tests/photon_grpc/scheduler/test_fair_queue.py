"""A fair share of the engine for each tenant: who is charged for what, who is lifted, and the bound.

Service is counted from the plans that the runner was given, not from the scheduler's counters.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import SequenceOutput, Submit
from photon_grpc.scheduler import fair_queue
from photon_grpc.scheduler.fair_queue import FairQueue
from photon_grpc.scheduler.output import SchedulerOutput
from photon_grpc.scheduler.policy import rank
from photon_grpc.scheduler.request import Request, RequestStatus
from photon_grpc.scheduler.scheduler import Scheduler
from tests.photon_grpc.scheduler.test_kv_cache_manager import sequence
from tests.support.builders import (
    RecordingRunner,
    engine_request,
    live_requests,
    run_to_end,
    scripted_core,
)

PROMPT = tuple(range(10, 20))


def submit(core: EngineCore, key: int, tenant: str, prompt: Sequence[int] = PROMPT, **values: Any) -> None:
    core.submit(Submit(key, engine_request(tuple(prompt), tenant=tenant, **values)))


def counters(core: EngineCore) -> dict[str, float]:
    return core.scheduler._waiting.counters()


def order_of(outputs: list[SequenceOutput]) -> list[int]:
    return [output.key for output in outputs if output.is_last]


def one_at_a_time(**values: Any) -> EngineCore:
    return scripted_core(max_num_seqs=1, max_num_batched_tokens=64, prefix_caching=False, **values)


# --- turns ----------------------------------------------------------------------------------------


def test_a_tenant_that_came_first_with_much_does_not_hold_up_another() -> None:
    core = one_at_a_time()
    for key in range(1, 6):
        submit(core, key, "a", arrival_time=1000.0)
    submit(core, 10, "b", arrival_time=1001.0)
    submit(core, 11, "b", arrival_time=1001.0)
    assert order_of(run_to_end(core)) == [1, 10, 2, 11, 3, 4, 5]


def test_priority_counts_inside_a_tenant_and_not_between_tenants() -> None:
    core = one_at_a_time()
    submit(core, 1, "a", priority=0)
    submit(core, 2, "a", priority=5)
    submit(core, 3, "b", priority=0)
    submit(core, 4, "b", priority=9)
    assert order_of(run_to_end(core)) == [4, 2, 1, 3]


def test_a_tenant_of_three_shares_is_served_three_times_as_much() -> None:
    core = one_at_a_time()
    keys = itertools.count(1)
    for _ in range(40):
        submit(core, next(keys), "light", weight=1.0)
        submit(core, next(keys), "heavy", weight=3.0)
    ended: list[int] = []
    while len(ended) < 40:
        ended.extend(order_of(list(core.step().outputs)))
    assert sum(key % 2 == 0 for key in ended) == 30


def test_long_requests_count_for_what_they_are() -> None:
    """Equal shares are of tokens, not of requests."""
    core = one_at_a_time(num_blocks=64)
    keys = itertools.count(1)
    for _ in range(20):
        submit(core, next(keys), "long", range(10, 49), max_tokens=2)
    for _ in range(80):
        submit(core, next(keys), "short", range(10, 19), max_tokens=2)
    ended: list[int] = []
    while len(ended) < 50:
        ended.extend(order_of(list(core.step().outputs)))
    assert sum(key <= 20 for key in ended) == 10


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 9)), min_size=1, max_size=30))
def test_one_tenant_is_served_by_rank(calls: list[tuple[float, int]]) -> None:
    queue = FairQueue([])
    requests = [
        sequence(number, PROMPT, arrival_time=arrival, priority=priority)
        for number, (arrival, priority) in enumerate(calls, start=1)
    ]
    for request in requests:
        queue.arrive(rank(request, 30.0), request)
    served = []
    while len(queue):
        queue.settle()
        first = queue.first()
        queue.remove(rank(first, 30.0), first)
        served.append(first)
    assert served == sorted(requests, key=lambda request: rank(request, 30.0))


# --- lifts ----------------------------------------------------------------------------------------


def test_time_in_which_a_tenant_asked_for_nothing_is_no_credit() -> None:
    core = one_at_a_time()
    submit(core, 20, "c", arrival_time=999.0)
    for key in range(1, 9):
        submit(core, key, "a", arrival_time=1000.0)
    ended: list[int] = []
    while len(ended) < 5:
        ended.extend(order_of(list(core.step().outputs)))
    for key in range(11, 15):
        submit(core, key, "b", arrival_time=1001.0)
    assert counters(core)["b"] == counters(core)["a"] > 0
    ended = order_of(run_to_end(core))
    assert ended == [5, 11, 6, 12, 7, 13, 8, 14]


def test_what_runs_while_another_waits_is_a_debt() -> None:
    """The tenant that becomes backlogged while its sequences run has been charged for them."""
    core = scripted_core(max_num_seqs=2, num_blocks=64, prefix_caching=False)
    submit(core, 1, "a", max_tokens=30)
    submit(core, 2, "a", max_tokens=30)
    core.step()
    submit(core, 3, "b")
    assert counters(core) == {"b": 0.0}
    for _ in range(5):
        core.step()
    submit(core, 4, "a", arrival_time=0.0)
    assert counters(core) == {"a": 10.0, "b": 0.0}


def test_who_asks_for_less_is_lifted_while_its_last_request_runs() -> None:
    core = scripted_core(max_num_seqs=2, num_blocks=64, prefix_caching=False)
    submit(core, 1, "a", max_tokens=30)
    for key in range(2, 6):
        submit(core, key, "b", range(10, 30), max_tokens=1)
    for _ in range(3):
        core.step()
    # `a` was given ten tokens of prompt and two more, `b` its third prompt of twenty.
    assert counters(core) == {"b": 60.0}
    submit(core, 6, "a")
    assert counters(core) == {"a": 60.0, "b": 60.0}


def test_contention_begins_anew_when_nobody_waits() -> None:
    core = scripted_core(max_num_seqs=2, num_blocks=64, prefix_caching=False)
    submit(core, 1, "a", max_tokens=30)
    submit(core, 2, "b", max_tokens=10)
    for _ in range(5):
        core.step()
    submit(core, 3, "b")
    submit(core, 4, "a")
    assert counters(core) == {"a": 0.0, "b": 0.0}


def test_tenants_are_forgotten_when_it_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_MANY_TENANTS", 8)
    core = one_at_a_time()
    submit(core, 1, "always")
    for key in range(2, 100):
        submit(core, key, "always")
        submit(core, 1000 + key, f"once-{key}")
        for _ in range(8):
            core.step()
    # One that has just been served may owe something yet.
    assert len(core.scheduler._waiting._accounts) <= 10
    run_to_end(core)


# --- charges --------------------------------------------------------------------------------------


def test_a_cached_prefix_costs_nothing() -> None:
    core = scripted_core(max_num_seqs=1, block_size=4)
    prompt = tuple(range(10, 26))
    submit(core, 1, "a", prompt, max_tokens=1)
    run_to_end(core)
    for key in (2, 3):
        submit(core, key, "a", prompt, max_tokens=1)
        submit(core, 10 + key, "b", prompt, max_tokens=1, bypass_prefix_cache=True)
    core.step()
    core.step()
    assert counters(core) == {"a": 4.0, "b": 16.0}


def test_what_is_computed_again_after_a_preemption_is_not_charged_again() -> None:
    core = scripted_core(num_blocks=8, block_size=4, max_num_seqs=2, prefix_caching=False)
    submit(core, 1, "a", max_tokens=20)
    submit(core, 2, "a", max_tokens=20)
    core.step()
    # Each of these fills the pool.
    submit(core, 3, "a", range(10, 40), max_tokens=2, arrival_time=2000.0)
    submit(core, 4, "b", range(10, 40), max_tokens=2, arrival_time=2000.0)
    while {1, 2} & {request.key for request in live_requests(core).values()}:
        core.step()
    assert core.scheduler.stats().preemptions > 0
    # All outputs but the last of each, which nothing was computed from.
    assert counters(core)["a"] == 38.0


def test_a_preempted_sequence_keeps_its_place() -> None:
    """Its tenant is not lifted: what it had been given before is still the least."""
    preempted = sequence(1, PROMPT, tenant="a", arrival_time=5.0)
    running = [sequence(2, PROMPT, tenant="b", arrival_time=1.0), preempted]
    waiting = sequence(3, PROMPT, tenant="b", arrival_time=1.0)
    queue = FairQueue(running)
    for request in (*running, waiting):
        queue.arrive(rank(request, 30.0), request)
    for request in running:
        queue.remove(rank(request, 30.0), request)
        request.status = RequestStatus.RUNNING
    running[0].num_computed_tokens, preempted.num_computed_tokens = 10, 4
    queue.charge(preempted)
    running.remove(preempted)
    preempted.status, preempted.num_computed_tokens = RequestStatus.PREEMPTED, 0
    queue.resume(rank(preempted, 30.0), preempted)
    queue.check_invariants()
    queue.settle()
    assert queue.first() is preempted
    # Those that come now are another matter: their tenant asks for more than it had.
    newcomer = sequence(4, PROMPT, tenant="a", arrival_time=0.0)
    queue.arrive(rank(newcomer, 30.0), newcomer)
    assert queue.counters() == {"a": 10.0, "b": 10.0}


# --- caps -----------------------------------------------------------------------------------------


def capped(core: EngineCore, key: int, **values: Any) -> None:
    submit(core, key, "capped", **{"kv_share": 0.5, "weight": 4.0, "max_tokens": 2, **values})


def running(core: EngineCore) -> set[int]:
    return {r.key for r in live_requests(core).values() if r.status is RequestStatus.RUNNING}


def test_a_tenant_at_its_cap_passes_its_turn_while_others_wait() -> None:
    """16 blocks of 4; each sequence of ten tokens holds three."""
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=8, prefix_caching=False)
    for key in range(1, 6):
        capped(core, key)
    submit(core, 10, "other", arrival_time=2000.0)
    submit(core, 11, "other", arrival_time=2000.0)
    core.step()
    # Two of the capped hold six of their eight blocks; the third enters when nobody else waits.
    assert running(core) == {1, 2, 10, 11, 3}
    assert order_of(run_to_end(core))[:2] == [1, 2]


def test_a_tenant_alone_has_the_whole_pool() -> None:
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=8, prefix_caching=False)
    for key in range(1, 6):
        capped(core, key)
    core.step()
    assert running(core) == {1, 2, 3, 4, 5}


def test_a_sequence_larger_than_the_cap_runs_when_its_tenant_holds_nothing() -> None:
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=8, prefix_caching=False)
    capped(core, 1, prompt=range(10, 50))
    capped(core, 2, prompt=range(10, 50))
    for key in range(10, 30):
        submit(core, key, "other", PROMPT[:3], max_tokens=2, arrival_time=2000.0)
    order = order_of(run_to_end(core))
    assert len(order) == 22
    assert order.index(2) < 21, "starved by its cap"


def test_caps_of_all_leave_no_place_empty() -> None:
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=8, prefix_caching=False)
    for key in range(1, 4):
        submit(core, key, "a", kv_share=0.2)
        submit(core, 10 + key, "b", kv_share=0.2)
    core.step()
    assert len(running(core)) == 5


def test_turns_that_were_passed_are_no_credit() -> None:
    core = scripted_core(num_blocks=16, block_size=4, max_num_seqs=2, prefix_caching=False)
    capped(core, 1, max_tokens=30, kv_share=0.1)
    capped(core, 2, kv_share=0.1)
    for key in range(10, 20):
        submit(core, key, "other", max_tokens=2)
    for _ in range(10):
        core.step()
    assert running(core) >= {1}
    # Passed again and again, it has as much on its counter as the other had at its latest turn.
    assert counters(core)["other"] - counters(core)["capped"] <= 11
    assert counters(core)["capped"] > 30


# --- the bound ------------------------------------------------------------------------------------

calls = st.builds(
    dict,
    tenant=st.sampled_from("abc"),
    length=st.integers(1, 24),
    max_tokens=st.integers(1, 12),
    priority=st.integers(0, 9),
    after=st.integers(0, 3),
)


class Bookkeeper:
    """What the plans say that each tenant was given, and what must be true of it after each step."""

    def __init__(self, core: EngineCore) -> None:
        assert isinstance(core.runner, RecordingRunner)
        self.core = core
        core.scheduler.schedule = self.schedule  # type: ignore[method-assign]
        self.runner = core.runner
        self.given: dict[str, float] = defaultdict(float)
        self.computed: dict[int, int] = {}
        self.charged: dict[int, int] = defaultdict(int)
        self.requests: dict[int, Request] = {}
        # The most that a tenant's sequences in the batch could still be charged for.
        self.largest: dict[str, float] = defaultdict(float)
        # By pair of tenants that have stayed backlogged: least and greatest difference.
        self.differences: dict[tuple[str, str], tuple[float, float]] = {}
        self.num_plans = 0

    def step(self) -> list[SequenceOutput]:
        self.requests |= live_requests(self.core)
        self.watch()
        outputs = self.core.step().outputs
        self.core.scheduler.check_invariants()
        for plan in self.runner.plans[self.num_plans :]:
            for new in plan.new:
                self.computed[new.seq_id] = new.num_computed_tokens
                self.charged[new.seq_id] = max(self.charged[new.seq_id], new.num_computed_tokens)
            in_batch = {row.seq_id for row in plan.rows} | {
                r.seq_id for r in live_requests(self.core).values() if r.status is RequestStatus.RUNNING
            }
            left: dict[str, float] = defaultdict(float)
            for request in map(self.requests.__getitem__, in_batch):
                most = request.num_prompt_tokens + request.max_tokens - self.charged[request.seq_id]
                left[request.tenant] += most / request.weight
            for tenant, amount in left.items():
                self.largest[tenant] = max(self.largest[tenant], amount)
            for row in plan.rows:
                self.computed[row.seq_id] += row.num_tokens
                more = self.computed[row.seq_id] - self.charged[row.seq_id]
                if more > 0:
                    self.charged[row.seq_id] += more
                    request = self.requests[row.seq_id]
                    self.given[request.tenant] += more / request.weight
        self.num_plans = len(self.runner.plans)
        self.watch()
        return list(outputs)

    def watch(self) -> None:
        backlogged = {
            r.tenant for r in live_requests(self.core).values() if r.status is RequestStatus.WAITING
        }
        pairs = set(itertools.combinations(sorted(backlogged), 2))
        for pair in set(self.differences) - pairs:
            del self.differences[pair]
        for one, other in pairs:
            difference = self.given[one] - self.given[other]
            low, high = self.differences.get((one, other), (difference, difference))
            low, high = min(low, difference), max(high, difference)
            self.differences[one, other] = (low, high)
            assert high - low <= self.largest[one] + self.largest[other] + 1e-6, "over the bound"

    def schedule(self, now: float) -> SchedulerOutput:
        """Plan a step; whoever's turn it is after that waits for a reason."""
        scheduler = self.core.scheduler
        num_preemptions = scheduler.stats().preemptions
        plan = Scheduler.schedule(scheduler, now)
        if not scheduler.num_waiting or scheduler.stats().preemptions > num_preemptions:
            return plan
        scheduler._waiting.settle()
        first = scheduler._waiting.first()
        assert (
            scheduler.num_running >= scheduler._max_num_seqs
            or plan.num_tokens >= scheduler._max_num_batched_tokens
            or first.num_pending_tokens
            or not scheduler.kv.fits(scheduler.kv.find_prefix(first), len(first.token_ids))
        ), "it could have entered"
        return plan


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(calls, min_size=5, max_size=60),
    weights=st.tuples(*[st.sampled_from((0.5, 1.0, 2.0, 3.0))] * 3),
    num_blocks=st.integers(9, 40),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(6, 40),
    in_flight=st.integers(1, 2),
    prefix_caching=st.booleans(),
)
def test_the_service_of_two_backlogged_tenants_stays_within_the_bound(
    calls: list[dict[str, Any]],
    weights: tuple[float, float, float],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    in_flight: int,
    prefix_caching: bool,
) -> None:
    core = scripted_core(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_in_flight=in_flight,
        prefix_caching=prefix_caching,
    )
    weight_of = dict(zip("abc", weights, strict=True))
    books = Bookkeeper(core)
    num_ended = 0
    for key, call in enumerate(calls, start=1):
        submit(
            core,
            key,
            call["tenant"],
            (call["length"] % 3 + 2,) * call["length"],
            max_tokens=call["max_tokens"],
            priority=call["priority"],
            arrival_time=1000.0 + key,
            weight=weight_of[call["tenant"]],
            eos_token_ids=(),
        )
        for _ in range(call["after"]):
            num_ended += sum(output.is_last for output in books.step())
    for _ in range(5000):
        if not core.has_work:
            break
        num_ended += sum(output.is_last for output in books.step())
    assert num_ended == len(calls), "somebody starves"


def test_a_flood_does_not_starve_another_tenant() -> None:
    """Four calls of a flood come in each step; the other tenant waits for one of them, not for all."""
    core = one_at_a_time()
    keys = itertools.count(100)
    for _ in range(20):
        submit(core, next(keys), "flood", priority=9)
    served: list[int] = []
    for number in range(1, 11):
        submit(core, number, "other")
        ended: list[int] = []
        while number not in ended:
            for _ in range(4):
                submit(core, next(keys), "flood", priority=9)
            ended.extend(order_of(list(core.step().outputs)))
        served.append(len(ended))
    assert max(served) <= 3
