"""Continuous batching: which tokens of which sequences are computed in the next step.

The rules, in order of importance:

1. Running sequences go first, in the order of their rank; waiting ones are admitted with what is left
   of the token budget. Every running sequence that needs a single token gets it before a long prefill
   takes the rest of the budget, so a prefill never stalls a decode, and what a step has of prompts
   beside decodes is bounded (`mixed_steps.py`), so that it holds none up for long.
2. When blocks run out, the running sequence of the lowest rank is preempted: its blocks are freed and
   it is computed again later from its tokens, which nobody has to send again. Since ranks never change
   and the first in rank can always preempt all others, someone always finishes.
3. Admission is strictly in the order of `FairQueue`: a fair share for each tenant, and by rank inside a
   tenant. Whoever does not fit waits, and all behind it wait too, so that a long prompt cannot starve
   behind short ones.
4. A step for which the device had no memory is lost (`lose`): its sequences are computed again, half as
   many at a time at first. Only one that finds no memory alone fails.

Pure and synchronous: no clock of its own (`now` is passed in), no torch, no threads. `schedule` may be
called again before the step it planned is collected; progress is counted when a step is planned.

Between two steps of a device there is little time, so a sequence that goes on decoding costs a comparison
and two counts when a step is planned (`Request.steady_until`), and a comparison and one row of columns
when its token comes (`Request.plain_until`). Everything else about it is looked at when one of the two
is reached; the outcome is the same as if it were looked at in every step.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from photon_grpc.scheduler.fair_queue import FairQueue
from photon_grpc.scheduler.kv_cache_manager import KVCacheManager
from photon_grpc.scheduler.mixed_steps import MixedSteps
from photon_grpc.scheduler.output import (
    FailureKind,
    ModelOutput,
    NewSequence,
    PlainTokens,
    ScheduledSequence,
    SchedulerOutput,
    SchedulerStats,
    SequenceOutput,
)
from photon_grpc.scheduler.policy import Rank, rank
from photon_grpc.scheduler.ranked_queue import RankedQueue
from photon_grpc.scheduler.request import Request, RequestStatus
from photon_grpc.types import Finish, FinishReason, TokenLogprobs

_MANY_TIMERS = 1024


class Scheduler:
    """Owns every live sequence from `add` to its last output."""

    def __init__(
        self,
        kv: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        priority_boost_s: float,
        mixed_chunk_tokens: int = 0,
    ) -> None:
        """`mixed_chunk_tokens` is the `chunk_tokens` of `MixedSteps`."""
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs, or decodes starve")
        self.kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._priority_boost_s = priority_boost_s
        self._mixed_steps = MixedSteps(mixed_chunk_tokens)
        self._live: dict[int, Request] = {}
        self._by_key: dict[int, dict[int, Request]] = {}
        self._running = RankedQueue()
        self._waiting = FairQueue(self._running)
        self._removed: list[int] = []
        # Ended with tokens under way: if these turn out to be faulty, so are the blocks they left cached.
        self._ended_in_flight: dict[int, Request] = {}
        # (moment, seq_id); entries of sequences that have ended are dropped when they come up.
        self._timers: list[tuple[float, int]] = []
        self._ended: list[SequenceOutput] = []
        # Of the latest step; most steps of a busy batch are the same rows again.
        self._rows: tuple[ScheduledSequence, ...] = ()
        # Whether the latest step left a sequence of the batch in the middle of its prompt.
        self._is_prefilling = False
        self._step = 0
        self._waiting_tokens = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._preemptions = 0
        self._faults = 0
        self._lost_steps = 0
        # Places in the batch: fewer than `max_num_seqs` after the device ran out of memory.
        self._num_places = max_num_seqs

    @property
    def has_unfinished(self) -> bool:
        """True while any sequence lives."""
        return bool(self._live)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place, preempted ones included."""
        return len(self._waiting)

    # --- requests in and out -------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a new sequence. The validator has made sure that it fits into an empty pool."""
        assert request.seq_id not in self._live
        assert self.kv.blocks_for(request.num_prompt_tokens + request.max_tokens) <= self.kv.pool.num_blocks
        self._live[request.seq_id] = request
        self._by_key.setdefault(request.key, {})[request.index] = request
        self._waiting.arrive(self._rank(request), request)
        self._waiting_tokens += len(request.token_ids)
        clocks = request.deadlines
        for moment in (clocks.start_by, clocks.first_token_by, clocks.end_by, clocks.finish_by):
            if moment is not None:
                heapq.heappush(self._timers, (moment, request.seq_id))

    def abort(self, key: int, index: int | None, failure: FailureKind | None, now: float) -> None:
        """End the sequences of a request, or one of them, at once; unknown ones have ended already."""
        group = self._by_key.get(key, {})
        for request in [r for i, r in group.items() if index is None or i == index]:
            if failure is None:
                self._end(request, now, finish=Finish(FinishReason.ABORTED))
            else:
                self._end(request, now, failure=failure)

    def abort_all(self, failure: FailureKind, now: float) -> None:
        """End every live sequence."""
        for request in list(self._live.values()):
            self._end(request, now, failure=failure)

    def take_ended(self) -> list[SequenceOutput]:
        """Last outputs that came about outside `update`: aborts and clocks that ran out."""
        ended, self._ended = self._ended, []
        return ended

    # --- planning a step ------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Plan the next step and count its tokens as computed.

        Invariant: a sequence that is preempted in this call has no row in the step it returns.
        """
        self._expire(now)
        planned: list[ScheduledSequence] = []
        new_block_ids: dict[int, tuple[int, ...]] = {}
        budget, most_prompt = self._max_num_batched_tokens, self._most_prompt_tokens()
        budget, prompt_budget, preempted_any = self._schedule_running(
            planned, new_block_ids, budget, most_prompt
        )
        new: list[NewSequence] = []
        if self._waiting and not preempted_any:
            budget, prompt_budget = self._admit_waiting(new, planned, budget, prompt_budget, now)
        if budget > 0 and prompt_budget > 0:
            self._mixed_steps.had_room(now)
        if not planned:
            # Nothing is launched, so nobody would hear of the removals: the next step tells them.
            return SchedulerOutput(step=self._step, removed=(), new=(), rows=(), num_tokens=0)
        removed, self._removed = tuple(self._removed), []
        self._step += 1
        rows = tuple(planned)
        same_rows = not new and not removed and rows == self._rows
        if not same_rows:
            self._rows = rows
        return SchedulerOutput(
            step=self._step,
            removed=removed,
            new=tuple(new),
            rows=self._rows,
            num_tokens=self._max_num_batched_tokens - budget,
            new_block_ids=new_block_ids,
            same_rows=same_rows,
        )

    def _most_prompt_tokens(self) -> int:
        """What the next step may have of prompts; looked at closely only where somebody waits for it."""
        most = self._max_num_batched_tokens
        if not self._mixed_steps.chunk_tokens:
            return most
        num_places = self._num_places - len(self._running)
        if not self._is_prefilling and not (self._waiting and num_places > 0):
            return most
        pool = self.kv.pool
        # Those for whom there are no blocks wait for something else; how many that are is an estimate.
        num_admissible = min(len(self._waiting), num_places)
        if num_admissible > 0:
            mean_tokens = max(1, self._waiting_tokens // len(self._waiting))
            num_admissible = min(num_admissible, pool.num_free // self.kv.blocks_for(mean_tokens))
        return self._mixed_steps.limit(
            most, self._running, max(0, num_admissible), self._waiting.earliest_arrival()
        )

    def _schedule_running(
        self,
        rows: list[ScheduledSequence],
        new_block_ids: dict[int, tuple[int, ...]],
        budget: int,
        prompt_budget: int,
    ) -> tuple[int, int, bool]:
        """What is left of both budgets, and whether anybody was preempted."""
        self._is_prefilling = False
        num_steady = 0
        preempted_any = False
        for request in self._running:
            num_computed = request.num_computed_tokens
            if num_computed < request.steady_until:
                request.num_computed_tokens = num_computed + 1
                request.num_pending_tokens += 1
                rows.append(request.decode_row)
                num_steady += 1
                continue
            num_known = request.num_tokens
            if num_known >= request.num_tokens_at_most:
                continue
            num_tokens = num_known - num_computed
            if num_tokens > 1:
                num_wanted = num_tokens
                num_tokens = min(
                    num_tokens, prompt_budget, budget - num_steady - self._count_decodes_behind(request)
                )
                self._is_prefilling |= num_tokens < num_wanted
                if num_tokens <= 0:
                    continue
                prompt_budget -= num_tokens
            new_blocks = self.kv.extend(request, num_tokens)
            while new_blocks is None:
                victim = self._running.last()
                self._preempt(victim)
                preempted_any = True
                if victim is request:
                    break
                new_blocks = self.kv.extend(request, num_tokens)
            if new_blocks is None:
                break
            if new_blocks:
                new_block_ids[request.seq_id] = tuple(new_blocks)
            rows.append(self._plan_row(request, num_tokens))
            budget -= num_tokens
        self.kv.count_advanced(num_steady)
        return budget - num_steady, prompt_budget, preempted_any

    def _count_decodes_behind(self, request: Request) -> int:
        """Running sequences of a lower rank that want a single token; the budget has room for all of them."""
        count = 0
        for other in reversed(self._running):
            if other is request:
                break
            if other.num_computed_tokens < other.steady_until or (
                other.num_tokens - other.num_computed_tokens == 1 and other.wants_another_token
            ):
                count += 1
        return count

    def _admit_waiting(
        self,
        new: list[NewSequence],
        rows: list[ScheduledSequence],
        budget: int,
        prompt_budget: int,
        now: float,
    ) -> tuple[int, int]:
        """What is left of both budgets."""
        self._waiting.settle()
        while (
            len(self._waiting) and len(self._running) < self._num_places and budget > 0 and prompt_budget > 0
        ):
            request = self._waiting.first(self._is_over_cap)
            if request.num_pending_tokens:
                break
            prefix = self.kv.find_prefix(request)
            if not self.kv.fits(prefix, len(request.token_ids)):
                break
            self._waiting.enter(self._rank(request), request)
            self._waiting_tokens -= len(request.token_ids)
            self._count_prefix(request, len(prefix) * self.kv.block_size)
            self.kv.adopt_prefix(request, prefix)
            # What others have computed costs its tenant nothing.
            request.num_charged_tokens = max(request.num_charged_tokens, request.num_computed_tokens)
            num_wanted = request.num_tokens - request.num_computed_tokens
            num_tokens = min(num_wanted, budget, prompt_budget)
            self._is_prefilling |= num_tokens < num_wanted
            num_computed = request.num_computed_tokens
            new_blocks = self.kv.extend(request, num_tokens)
            assert new_blocks is not None, "fits() has just said so"
            request.status = RequestStatus.RUNNING
            request.has_news = True
            # The prompt is computed from its beginning: a step that is still under way from before a
            # preemption must not add to its log-probabilities.
            request.admitted_step = self._step + 1
            request.prompt_logprobs.clear()
            if request.started_time is None:
                request.started_time = now
            self._running.add(self._rank(request), request)
            new.append(
                NewSequence(
                    seq_id=request.seq_id,
                    token_ids=tuple(request.token_ids),
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_computed_tokens=num_computed,
                    block_ids=tuple(request.block_ids),
                    sampler=request.sampler,
                )
            )
            rows.append(self._plan_row(request, num_tokens))
            self._waiting.charge(request)
            budget -= num_tokens
            prompt_budget -= num_tokens
        return budget, prompt_budget

    def _is_over_cap(self, request: Request) -> bool:
        """Whether its tenant, which holds blocks already, would with `request` hold more than its share."""
        held = sum(len(other.block_ids) for other in self._running if other.tenant == request.tenant)
        needed = self.kv.blocks_for(len(request.token_ids))
        return held > 0 and held + needed > request.kv_share * self.kv.pool.num_blocks

    def _plan_row(self, request: Request, num_tokens: int) -> ScheduledSequence:
        self.kv.advance(request, num_tokens)
        if request.num_computed_tokens < request.num_tokens:
            return ScheduledSequence(request.seq_id, num_tokens, sample=False)
        # From here on the sequence decodes: the token that this step samples is all that the next computes.
        request.num_pending_tokens += 1
        num_slots, last = self.kv.num_slots(request), request.num_tokens_at_most - 1
        request.steady_until = num_slots if num_slots < last else last
        return (
            request.decode_row
            if num_tokens == 1
            else ScheduledSequence(request.seq_id, num_tokens, sample=True)
        )

    def _count_prefix(self, request: Request, num_hits: int) -> None:
        # A resumed sequence finds its own blocks again; that says nothing about sharing.
        if request.num_preemptions == 0:
            self._prefix_queries += request.num_prompt_tokens
            self._prefix_hits += num_hits
            self._prompt_tokens += request.num_prompt_tokens
            request.num_cached_prompt_tokens = num_hits

    def _preempt(self, request: Request) -> None:
        self._running.remove(self._rank(request))
        self._removed.append(request.seq_id)
        self._waiting.charge(request)
        self.kv.free(request)
        request.steady_until = request.plain_until = 0
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._preemptions += 1
        self._waiting.resume(self._rank(request), request)
        self._waiting_tokens += len(request.token_ids)

    # --- results --------------------------------------------------------------------------------

    def update(self, output: ModelOutput, now: float) -> tuple[list[SequenceOutput], PlainTokens]:
        """Take the tokens of a step; what is new for each sequence, and which have ended.

        Results for sequences that ended since the step was planned are dropped, but for the news that
        their blocks cannot be trusted.
        """
        news: list[SequenceOutput] = []
        keys: list[int] = []
        indices: list[int] = []
        plain: list[int] = []
        live = self._live
        for seq_id in output.faults:
            if (request := live.get(seq_id)) is not None:
                request.plain_until = 0
        for seq_id, entries in output.prompt_logprobs.items():
            request = live.get(seq_id)
            if request is None or request.first_token_time is not None:
                continue
            if output.step >= request.admitted_step:
                request.prompt_logprobs.extend(entries)
        for seq_id, token_ids in zip(output.seq_ids, output.token_ids, strict=True):
            request = live.get(seq_id)
            if request is None:
                self._drop_late(seq_id, is_faulty=seq_id in output.faults)
                continue
            request.num_pending_tokens -= 1
            known = request.token_ids
            if (
                len(known) < request.plain_until
                and len(token_ids) == 1
                and token_ids[0] not in request.ending_token_ids
            ):
                known.append(token_ids[0])
                keys.append(request.key)
                indices.append(request.index)
                plain.append(token_ids[0])
            elif seq_id in output.faults:
                self._faults += 1
                news.append(self._finish_output(request, now, failure=FailureKind.REQUEST_FAULT))
                self._remove(request, forget_blocks=True)
            else:
                news.append(self._accept(request, token_ids, output, now))
        self._generation_tokens += len(plain)
        return news, PlainTokens(tuple(keys), tuple(indices), tuple(plain))

    def lose(self, lost: Sequence[SchedulerOutput], now: float) -> None:
        """Steps under way, the newest last, bring nothing: no memory; the runner knows no sequence any more.

        Whoever runs waits again, to be computed from its tokens. Half as many as the first of `lost` had rows
        may come back, one more for every sequence that ends. A sequence that ran alone ends with
        OUT_OF_MEMORY.
        """
        num_lost: Counter[int] = Counter()
        is_all_running = True
        for row in (row for plan in lost for row in plan.rows):
            request = self._live.get(row.seq_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                is_all_running = False
            num_lost[row.seq_id] += row.num_tokens
            if row.sample and request is not None:
                request.num_pending_tokens -= 1
            elif row.sample:
                self._drop_late(row.seq_id, is_faulty=True)
        running = list(self._running)
        for request in running:
            if request.seq_id in num_lost:
                self.kv.forget_from(request, max(0, request.num_computed_tokens - num_lost[request.seq_id]))
        if not is_all_running:
            # Which blocks those have named that left meanwhile is no longer known.
            self.kv.pool.forget_all()
        if len(running) == 1 and running[0].seq_id in num_lost:
            self._end(running.pop(), now, failure=FailureKind.OUT_OF_MEMORY)
        # The first in rank last, so that its blocks are the last to be reused.
        for request in reversed(running):
            self._preempt(request)
        self._removed.clear()
        self._lost_steps += len(lost)
        self._num_places = max(1, len(lost[0].rows) // 2)

    def _drop_late(self, seq_id: int, *, is_faulty: bool) -> None:
        request = self._ended_in_flight.get(seq_id)
        if request is None:
            return
        if is_faulty:
            self.kv.forget(request)
        request.num_pending_tokens -= 1
        if not request.num_pending_tokens:
            del self._ended_in_flight[seq_id]

    def _accept(
        self, request: Request, token_ids: tuple[int, ...], output: ModelOutput, now: float
    ) -> SequenceOutput:
        accepted = 0
        finish: Finish | None = None
        for token_id in token_ids:
            request.token_ids.append(token_id)
            accepted += 1
            finish = self._finish_after(request, token_id)
            if finish is not None:
                break
        if accepted != 1:
            # It was planned for one token; what is to be computed next has to be counted anew.
            request.steady_until = 0
        self._generation_tokens += accepted
        if request.status is RequestStatus.PREEMPTED:
            self._waiting_tokens += accepted
        logprobs = output.logprobs.get(request.seq_id, ())[:accepted]
        if request.first_token_time is None:
            request.first_token_time = now
            request.has_news = True
        if finish is not None:
            last = self._finish_output(
                request, now, finish=finish, token_ids=token_ids[:accepted], logprobs=logprobs
            )
            self._remove(request)
            return last
        if not request.has_news:
            return SequenceOutput(request.key, request.index, token_ids[:accepted], logprobs)
        request.has_news = False
        if request.status is RequestStatus.RUNNING and request.sampler.top_logprobs is None:
            request.plain_until = request.num_tokens_at_most - 1
        prompt_logprobs = tuple(request.prompt_logprobs)
        request.prompt_logprobs.clear()
        return SequenceOutput(
            key=request.key,
            index=request.index,
            token_ids=token_ids[:accepted],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            cached_prompt_tokens=request.num_cached_prompt_tokens,
            timings=request.timings(None),
        )

    @staticmethod
    def _finish_after(request: Request, token_id: int) -> Finish | None:
        num_outputs = request.num_output_tokens
        if num_outputs >= request.min_tokens:
            if token_id in request.eos_token_ids:
                return Finish(FinishReason.EOS, eos_token_id=token_id)
            if token_id in request.stop_token_ids:
                return Finish(FinishReason.STOP, stop_token_id=token_id)
        if num_outputs >= request.max_tokens:
            return Finish(request.length_finish)
        return None

    # --- endings --------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        if len(self._timers) > _MANY_TIMERS + 8 * len(self._live):
            # Most requests end long before their clocks, whose entries would stay for minutes.
            self._timers = [timer for timer in self._timers if timer[1] in self._live]
            heapq.heapify(self._timers)
        while self._timers and self._timers[0][0] <= now:
            _, seq_id = heapq.heappop(self._timers)
            request = self._live.get(seq_id)
            if request is None:
                continue
            clocks = request.deadlines
            if _passed(clocks.end_by, now):
                self._end(request, now, failure=FailureKind.MAX_DURATION)
            elif _passed(clocks.finish_by, now):
                self._end(request, now, finish=Finish(FinishReason.TIME_LIMIT))
            elif request.first_token_time is None and _passed(clocks.first_token_by, now):
                self._end(request, now, failure=FailureKind.FIRST_TOKEN_TIMEOUT)
            elif request.started_time is None and _passed(clocks.start_by, now):
                self._end(request, now, failure=FailureKind.QUEUE_TIMEOUT)

    def _end(
        self,
        request: Request,
        now: float,
        *,
        finish: Finish | None = None,
        failure: FailureKind | None = None,
    ) -> None:
        self._ended.append(self._finish_output(request, now, finish=finish, failure=failure))
        self._remove(request)

    @staticmethod
    def _finish_output(
        request: Request,
        now: float,
        *,
        finish: Finish | None = None,
        failure: FailureKind | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> SequenceOutput:
        return SequenceOutput(
            key=request.key,
            index=request.index,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=tuple(request.prompt_logprobs),
            finish=finish,
            failure=failure,
            cached_prompt_tokens=request.num_cached_prompt_tokens,
            timings=request.timings(now),
        )

    def _remove(self, request: Request, *, forget_blocks: bool = False) -> None:
        if request.status is RequestStatus.RUNNING:
            self._running.remove(self._rank(request))
            self._removed.append(request.seq_id)
            self._waiting.charge(request)
        else:
            self._dequeue(request)
        self._waiting.end(request)
        self.kv.free(request, forget=forget_blocks)
        request.status = RequestStatus.FINISHED
        if self._num_places < self._max_num_seqs:
            self._num_places += 1
        if request.num_pending_tokens:
            self._ended_in_flight[request.seq_id] = request
        del self._live[request.seq_id]
        group = self._by_key[request.key]
        del group[request.index]
        if not group:
            del self._by_key[request.key]

    # --- books ----------------------------------------------------------------------------------

    def _rank(self, request: Request) -> Rank:
        return rank(request, self._priority_boost_s)

    def _dequeue(self, request: Request) -> None:
        self._waiting.remove(self._rank(request), request)
        self._waiting_tokens -= len(request.token_ids)

    def stats(self) -> SchedulerStats:
        """Gauges and counters as of now."""
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            kv_blocks_used=self.kv.pool.num_used,
            kv_blocks_total=self.kv.pool.num_blocks,
            kv_slots_used=self.kv.num_slots_used,
            block_size=self.kv.block_size,
            steps=self._step,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            faults=self._faults,
            lost_steps=self._lost_steps,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not balance. For tests; O(blocks + sequences)."""
        running = list(self._running)
        waiting = list(self._waiting)
        assert {r.seq_id for r in running} | {r.seq_id for r in waiting} == set(self._live)
        assert len(running) + len(waiting) == len(self._live)
        assert all(r.status is RequestStatus.RUNNING for r in running)
        assert all(r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) for r in waiting)
        assert all(not r.block_ids and r.num_computed_tokens == 0 for r in waiting)
        assert len(running) <= self._num_places <= self._max_num_seqs
        ranks = [self._rank(r) for r in running]
        assert ranks == sorted(ranks)
        self._waiting.check_invariants()
        assert self._waiting_tokens == sum(len(r.token_ids) for r in waiting)
        for request in running:
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert request.num_output_tokens <= request.max_tokens
            if request.num_computed_tokens < request.steady_until:
                assert request.num_tokens - request.num_computed_tokens == 1
                assert request.wants_another_token
                assert request.num_computed_tokens < self.kv.num_slots(request)
            if len(request.token_ids) < request.plain_until:
                assert request.num_output_tokens + 1 < request.max_tokens
                assert not request.has_news
                assert not request.prompt_logprobs
                assert request.sampler.top_logprobs is None
        assert all(r.steady_until == r.plain_until == 0 for r in waiting)
        assert all(r.decode_row == ScheduledSequence(r.seq_id, 1, True) for r in self._live.values())
        assert all(r.num_pending_tokens > 0 for r in self._ended_in_flight.values())
        self.kv.check_invariants(running)


def _passed(moment: float | None, now: float) -> bool:
    return moment is not None and moment <= now
