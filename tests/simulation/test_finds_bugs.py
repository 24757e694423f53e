"""The simulation finds what it is for: each of these bugs is put in, and a seed has to fail.

The scheduler's own `check_invariants` is switched off meanwhile: what finds the bug is the runner that
remembers every slot, the judge, or an idle engine that holds a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from photon_grpc.engine import core as engine_core
from photon_grpc.engine.client import AsyncEngine, RequestStream
from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import Abort, SequenceOutput, Submit
from photon_grpc.scheduler import fair_queue, kv_cache_manager, scheduler
from photon_grpc.scheduler.block_pool import BlockPool
from photon_grpc.scheduler.fair_queue import FairQueue
from photon_grpc.scheduler.kv_cache_manager import KVCacheManager
from photon_grpc.scheduler.output import (
    FailureKind,
    ModelOutput,
    PlainTokens,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.scheduler.policy import Rank
from photon_grpc.scheduler.prefix_cache import extend_hashes, scope_root
from photon_grpc.scheduler.request import Deadlines, Request
from photon_grpc.scheduler.scheduler import Scheduler
from tests.simulation.simulate import Simulator

Patch = pytest.MonkeyPatch
MAX_SEEDS = 400


def a_freed_sequence_keeps_a_block(patch: Patch) -> None:
    free = KVCacheManager.free

    def leak(self: KVCacheManager, request: Request, *, forget: bool = False) -> None:
        if len(request.block_ids) > 2:
            request.block_ids.pop()
        free(self, request, forget=forget)

    patch.setattr(KVCacheManager, "free", leak)


def a_shared_block_is_not_counted(patch: Patch) -> None:
    share = BlockPool.share

    def uncounted(self: BlockPool, block_ids: Sequence[int]) -> None:
        share(self, block_ids)
        for block_id in block_ids:
            self._ref_counts[block_id] = 1

    patch.setattr(BlockPool, "share", uncounted)
    patch.setattr(BlockPool, "release", _release_without_check)


def _release_without_check(self: BlockPool, block_ids: Sequence[int]) -> None:
    for block_id in block_ids:
        self._ref_counts[block_id] = max(0, self._ref_counts[block_id] - 1)
        if self._ref_counts[block_id] == 0:
            self._free[block_id] = None


def prefixes_are_found_across_salts(patch: Patch) -> None:
    patch.setattr(engine_core, "scope_root", lambda key, tenant, cache_salt: scope_root(key, tenant, ""))


def prefixes_are_found_across_tenants(patch: Patch) -> None:
    patch.setattr(engine_core, "scope_root", lambda key, tenant, cache_salt: scope_root(key, "", cache_salt))


def an_id_is_taken_for_all_tenants(patch: Patch) -> None:
    check = AsyncEngine.check_duplicate

    def for_all(self: AsyncEngine, tenant: str, request_id: str) -> None:
        for name in "abc":
            check(self, name, request_id)

    patch.setattr(AsyncEngine, "check_duplicate", for_all)


def a_block_s_name_forgets_what_came_before(patch: Patch) -> None:
    def unchained(hashes: list[bytes], root: bytes, token_ids: Sequence[int], size: int, count: int) -> None:
        for number in range(len(hashes), count):
            alone: list[bytes] = []
            extend_hashes(alone, root, token_ids[number * size :], size, 1)
            hashes.extend(alone)

    patch.setattr(kv_cache_manager, "extend_hashes", unchained)


def a_reused_block_keeps_its_name(patch: Patch) -> None:
    patch.setattr(BlockPool, "forget", lambda self, block_id: None)


def a_prefix_may_cover_the_whole_prompt(patch: Patch) -> None:
    find_prefix = KVCacheManager.find_prefix

    def whole(self: KVCacheManager, request: Request) -> list[int]:
        request.token_ids.append(0)
        try:
            return find_prefix(self, request)
        finally:
            request.token_ids.pop()

    patch.setattr(KVCacheManager, "find_prefix", whole)


def a_table_is_one_block_short_at_a_boundary(patch: Patch) -> None:
    def floor(self: KVCacheManager, num_tokens: int) -> int:
        return max(1, num_tokens // self.block_size)

    patch.setattr(KVCacheManager, "blocks_for", floor)


def a_table_is_one_block_long_at_a_boundary(patch: Patch) -> None:
    def next_block(self: KVCacheManager, num_tokens: int) -> int:
        return min(num_tokens // self.block_size + 1, self.pool.num_blocks)

    patch.setattr(KVCacheManager, "blocks_for", next_block)


def a_bypass_is_ignored(patch: Patch) -> None:
    submit = EngineCore.submit

    def with_cache(self: EngineCore, message: Submit) -> None:
        submit(self, Submit(message.key, replace(message.request, bypass_prefix_cache=False)))

    patch.setattr(EngineCore, "submit", with_cache)


def a_faulty_row_s_blocks_stay_known(patch: Patch) -> None:
    patch.setattr(KVCacheManager, "forget", lambda self, request: None)


def a_fault_is_taken_for_a_token(patch: Patch) -> None:
    update = Scheduler.update

    def blind(self: Scheduler, output: ModelOutput, now: float) -> tuple[list[SequenceOutput], PlainTokens]:
        return update(self, replace(output, faults={}), now)

    patch.setattr(Scheduler, "update", blind)


def an_abort_is_told_twice(patch: Patch) -> None:
    patch.setattr(Scheduler, "take_ended", lambda self: list(self._ended))


def an_abort_is_never_told(patch: Patch) -> None:
    take_ended = Scheduler.take_ended

    def silent(self: Scheduler) -> list[SequenceOutput]:
        return [output for output in take_ended(self) if output.finish is None]

    patch.setattr(Scheduler, "take_ended", silent)


def an_abort_of_one_completion_ends_all(patch: Patch) -> None:
    abort = EngineCore.abort
    patch.setattr(EngineCore, "abort", lambda self, message: abort(self, replace(message, index=None)))


def an_abort_waits_for_the_first_token(patch: Patch) -> None:
    abort = EngineCore.abort

    def late(self: EngineCore, message: Abort) -> None:
        if any(r.first_token_time for r in self.scheduler._live.values() if r.key == message.key):
            abort(self, message)

    patch.setattr(EngineCore, "abort", late)


def a_clock_is_ignored(name: str) -> Callable[[Patch], None]:
    def ignored(patch: Patch) -> None:
        submit = EngineCore.submit

        def without(self: EngineCore, message: Submit) -> None:
            deadlines: Deadlines = replace(message.request.deadlines, **{name: None})
            submit(self, Submit(message.key, replace(message.request, deadlines=deadlines)))

        patch.setattr(EngineCore, "submit", without)

    ignored.__name__ = f"{name}_is_ignored"
    return ignored


def the_queue_time_includes_the_first_token(patch: Patch) -> None:
    submit = EngineCore.submit

    def mixed(self: EngineCore, message: Submit) -> None:
        clocks = message.request.deadlines
        deadlines = replace(clocks, first_token_by=clocks.start_by, start_by=clocks.first_token_by)
        submit(self, Submit(message.key, replace(message.request, deadlines=deadlines)))

    patch.setattr(EngineCore, "submit", mixed)


def priority_is_ignored(patch: Patch) -> None:
    patch.setattr(scheduler, "rank", lambda request, boost_s: (request.arrival_time, request.seq_id))


def slack_is_ignored(patch: Patch) -> None:
    def without_clocks(request: Request, boost_s: float) -> Rank:
        return (request.arrival_time - request.priority * boost_s, request.seq_id)

    patch.setattr(scheduler, "rank", without_clocks)


def the_youngest_go_first(patch: Patch) -> None:
    def youngest(request: Request, boost_s: float) -> Rank:
        return (-request.arrival_time, -request.seq_id)

    patch.setattr(scheduler, "rank", youngest)


def tenants_take_no_turns(patch: Patch) -> None:
    patch.setattr(fair_queue, "_turn", lambda account: account.waiting.first_rank())


def weights_are_ignored(patch: Patch) -> None:
    submit = EngineCore.submit

    def equal(self: EngineCore, message: Submit) -> None:
        submit(self, Submit(message.key, replace(message.request, weight=1.0)))

    patch.setattr(EngineCore, "submit", equal)


def outputs_cost_nothing(patch: Patch) -> None:
    charge = FairQueue.charge

    def prompt_alone(self: FairQueue, request: Request) -> None:
        if request.num_computed_tokens <= request.num_prompt_tokens:
            charge(self, request)

    patch.setattr(FairQueue, "charge", prompt_alone)


def what_is_computed_again_is_charged_again(patch: Patch) -> None:
    resume = FairQueue.resume

    def forgetful(self: FairQueue, position: Rank, request: Request) -> None:
        request.num_charged_tokens = 0
        resume(self, position, request)

    patch.setattr(FairQueue, "resume", forgetful)


def a_tenant_that_was_idle_is_not_lifted(patch: Patch) -> None:
    patch.setattr(FairQueue, "_least", lambda self: 0.0)


def a_tenant_that_still_runs_is_not_lifted(patch: Patch) -> None:
    arrive = FairQueue.arrive

    def only_idle(self: FairQueue, position: Rank, request: Request) -> None:
        account = self._accounts.get(request.tenant)
        before = account.counter if account is not None and account.num_live else None
        arrive(self, position, request)
        if before is not None and self._accounts[request.tenant].num_new == 1 and len(self._backlogged) > 1:
            self._accounts[request.tenant].counter = before

    patch.setattr(FairQueue, "arrive", only_idle)


def a_preempted_sequence_s_tenant_is_lifted(patch: Patch) -> None:
    resume = FairQueue.resume

    def lifting(self: FairQueue, position: Rank, request: Request) -> None:
        account = self._accounts[request.tenant]
        if not account.waiting and self._backlogged:
            self._settle()
            account.counter = max(account.counter, self._least())
        resume(self, position, request)

    patch.setattr(FairQueue, "resume", lifting)


def caps_are_ignored(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_over_cap", lambda self, request: False)


def a_tenant_that_holds_nothing_passes(patch: Patch) -> None:
    def strict(self: Scheduler, request: Request) -> bool:
        held = sum(len(r.block_ids) for r in self._running if r.tenant == request.tenant)
        needed = self.kv.blocks_for(len(request.token_ids))
        return held + needed > request.kv_share * self.kv.pool.num_blocks

    patch.setattr(Scheduler, "_is_over_cap", strict)


def a_turn_that_was_passed_is_a_credit(patch: Patch) -> None:
    patch.setattr(FairQueue, "enter", FairQueue.remove)


def nobody_enters_a_running_batch(patch: Patch) -> None:
    fits = KVCacheManager.fits

    def when_idle(self: KVCacheManager, prefix: list[int], num_tokens: int) -> bool:
        return self.pool.num_used == 0 and fits(self, prefix, num_tokens)

    patch.setattr(KVCacheManager, "fits", when_idle)


def tokens_under_way_do_not_count_towards_max_tokens(patch: Patch) -> None:
    plan_row = Scheduler._plan_row

    def endless(self: Scheduler, request: Request, num_tokens: int) -> ScheduledSequence:
        row = plan_row(self, request, num_tokens)
        if request.steady_until:
            request.steady_until = self.kv.num_slots(request)
        return row

    patch.setattr(Scheduler, "_plan_row", endless)


def tokens_under_way_are_planned_again(patch: Patch) -> None:
    patch.setattr(Request, "num_tokens", property(lambda self: len(self.token_ids)))


def other_rows_pass_for_the_same(patch: Patch) -> None:
    schedule = Scheduler.schedule

    def hasty(self: Scheduler, now: float) -> SchedulerOutput:
        return replace(schedule(self, now), same_rows=True)

    patch.setattr(Scheduler, "schedule", hasty)


def min_tokens_is_ignored(patch: Patch) -> None:
    add = Scheduler.add

    def eager(self: Scheduler, request: Request) -> None:
        request.min_tokens = 0
        add(self, request)

    patch.setattr(Scheduler, "add", eager)


def a_stream_is_not_told_of_a_dead_engine(patch: Patch) -> None:
    patch.setattr(RequestStream, "fail", lambda self, failure: None)


def a_shutdown_forgets_who_waits(patch: Patch) -> None:
    def only_running(self: Scheduler, failure: FailureKind, now: float) -> None:
        for request in list(self._running):
            self.abort(request.key, request.index, failure, now)

    patch.setattr(Scheduler, "abort_all", only_running)


def what_a_lost_step_was_to_compute_stays_known(patch: Patch) -> None:
    patch.setattr(KVCacheManager, "forget_from", lambda self, request, position: None)


def a_batch_without_memory_comes_back_whole(patch: Patch) -> None:
    lose = Scheduler.lose

    def undaunted(self: Scheduler, lost: Sequence[SchedulerOutput], now: float) -> None:
        lose(self, lost, now)
        self._num_places = self._max_num_seqs

    patch.setattr(Scheduler, "lose", undaunted)


def the_tokens_of_a_lost_step_are_still_awaited(patch: Patch) -> None:
    lose = Scheduler.lose

    def waiting(self: Scheduler, lost: Sequence[SchedulerOutput], now: float) -> None:
        for row in lost[0].rows:
            if row.sample and row.seq_id in self._live:
                self._live[row.seq_id].num_pending_tokens += 1
        lose(self, lost, now)

    patch.setattr(Scheduler, "lose", waiting)


def the_runner_is_told_to_remove_what_it_has_forgotten(patch: Patch) -> None:
    lose = Scheduler.lose

    def telling(self: Scheduler, lost: Sequence[SchedulerOutput], now: float) -> None:
        lose(self, lost, now)
        self._removed.extend(row.seq_id for row in lost[0].rows)

    patch.setattr(Scheduler, "lose", telling)


BUGS = [
    a_freed_sequence_keeps_a_block,
    a_shared_block_is_not_counted,
    prefixes_are_found_across_salts,
    prefixes_are_found_across_tenants,
    an_id_is_taken_for_all_tenants,
    a_block_s_name_forgets_what_came_before,
    a_reused_block_keeps_its_name,
    a_prefix_may_cover_the_whole_prompt,
    a_table_is_one_block_short_at_a_boundary,
    a_table_is_one_block_long_at_a_boundary,
    a_bypass_is_ignored,
    a_faulty_row_s_blocks_stay_known,
    a_fault_is_taken_for_a_token,
    an_abort_is_told_twice,
    an_abort_is_never_told,
    an_abort_of_one_completion_ends_all,
    an_abort_waits_for_the_first_token,
    a_clock_is_ignored("start_by"),
    a_clock_is_ignored("first_token_by"),
    a_clock_is_ignored("end_by"),
    a_clock_is_ignored("finish_by"),
    the_queue_time_includes_the_first_token,
    priority_is_ignored,
    slack_is_ignored,
    the_youngest_go_first,
    tenants_take_no_turns,
    weights_are_ignored,
    outputs_cost_nothing,
    what_is_computed_again_is_charged_again,
    a_tenant_that_was_idle_is_not_lifted,
    a_tenant_that_still_runs_is_not_lifted,
    a_preempted_sequence_s_tenant_is_lifted,
    caps_are_ignored,
    a_tenant_that_holds_nothing_passes,
    a_turn_that_was_passed_is_a_credit,
    nobody_enters_a_running_batch,
    tokens_under_way_do_not_count_towards_max_tokens,
    tokens_under_way_are_planned_again,
    other_rows_pass_for_the_same,
    min_tokens_is_ignored,
    a_stream_is_not_told_of_a_dead_engine,
    a_shutdown_forgets_who_waits,
    what_a_lost_step_was_to_compute_stays_known,
    a_batch_without_memory_comes_back_whole,
    the_tokens_of_a_lost_step_are_still_awaited,
    the_runner_is_told_to_remove_what_it_has_forgotten,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_seed_fails(bug: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "check_invariants", lambda self: None)
    bug(monkeypatch)
    with Simulator() as simulator:
        report = next(simulator.failures(range(MAX_SEEDS)), None)
    assert report is not None, f"{MAX_SEEDS} seeds found nothing"
    assert report.command in str(report)
    print(report)
