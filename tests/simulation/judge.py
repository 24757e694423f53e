"""What must be true of everything that leaves the engine, judged without the scheduler's own books.

The judge knows the scenario, what was handed in and when, what the runner saw, and the clock. From
these alone it follows what each output may be, who had to be in the batch, and who had to have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from photon_grpc.engine.messages import (
    Abort,
    AbortReason,
    EngineMessage,
    EngineStats,
    FailureKind,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
)
from photon_grpc.scheduler.output import SchedulerOutput, SequenceTimings
from photon_grpc.types import Finish, FinishReason
from tests.simulation.fairness import FairShares, Service
from tests.simulation.oracle import logprobs_of
from tests.simulation.runner import CheckingRunner, Row
from tests.simulation.scenario import Call, CrashPoint, Scenario
from tests.support.builders import FakeClock

_END_OF_ABORT: dict[AbortReason, FailureKind | FinishReason] = {
    AbortReason.CANCELLED: FinishReason.ABORTED,
    AbortReason.OPERATOR: FailureKind.OPERATOR_ABORT,
    AbortReason.DRAINING: FailureKind.DRAINING,
}


def outputs_of(message: StepOutputs) -> Iterator[SequenceOutput]:
    """Everything that a step tells, in order: the one place that knows the shape of StepOutputs."""
    yield from message.outputs


@dataclass(eq=False)
class Completion:
    """One completion of a call, as it is seen from outside. `rank`: smaller is served first."""

    call: Call
    index: int
    rank: tuple[float, int, int]
    handed_in: bool = False
    token_ids: list[int] = field(default_factory=list)
    last: SequenceOutput | None = None
    seq_id: int | None = None
    first_launch: float | None = None
    first_token: float | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    has_told_prompt_logprobs: bool = False
    # Nobody reads it any more; it must have ended by the next step.
    is_left: bool = False
    # How it was ended by a message; it must have ended so by the next step.
    ended_by_message: FailureKind | FinishReason | None = None
    service: Service = field(init=False)

    def __post_init__(self) -> None:
        self.service = Service(self.call, self.rank)

    @property
    def is_live(self) -> bool:
        return self.last is None

    def passed(self, within: float | None, now: float) -> bool:
        """True when the clock that allows `within` seconds from the call's arrival has run out."""
        return within is not None and self.call.at + within <= now

    def __str__(self) -> str:
        return f"call {self.call.number}.{self.index}"


class Judge:
    """Raises AssertionError at the first thing that cannot be."""

    def __init__(
        self, scenario: Scenario, runner: CheckingRunner, clock: FakeClock, trace: list[str] | None
    ) -> None:
        self._scenario = scenario
        self._runner = runner
        self._clock = clock
        self._trace = trace
        runner.on_launch = self._launched
        runner.on_lost = self._lost
        self.completions: dict[tuple[int, int], Completion] = {}
        self._of_call: dict[tuple[int, int], Completion] = {}
        self._of_seq_id: dict[int, Completion] = {}
        # In the order of submission.
        self.live: dict[Completion, None] = {}
        self._num_submitted = 0
        self._is_shutting_down = False
        self._step_began = clock()
        self._pending_before: set[int] = set()
        self._num_collected_before = 0
        self._num_outputs_before: dict[Completion, int] = {}
        self._plan: SchedulerOutput | None = None
        self._removed: list[Row] = []
        self._remained: list[Row] = []
        # Of the steps that this one lost for lack of memory: where, the plans, and who was in the batch.
        self._lost_at: CrashPoint | None = None
        self._lost_plans: list[SchedulerOutput] = []
        self._lost_rows: list[Row] = []
        # Places in the batch; fewer after a lack of memory.
        self._num_places = scenario.max_num_seqs
        # Completions whose end the results of the step brought, not a message and not a clock.
        self._ended_by_results: set[Completion] = set()
        # How completions ended, and whether they were pushed out or began with shared blocks before.
        self.reached: set[object] = set()
        self._num_tokens = 0
        self._num_prompt_tokens = 0
        self._num_hits = 0
        self._num_faults = 0
        self._num_lost = 0
        self._shares = FairShares()

    # --- what goes in ---------------------------------------------------------------------------

    def submitted(self, key: int, call: Call) -> list[Completion]:
        """The engine's client took a call, under this key."""
        self._num_submitted += 1
        boost_s = self._scenario.priority_boost_s
        # Half a step of priority, or less with a clock that ends the call badly before.
        clocks = (call.start_within, call.first_token_within, call.end_within)
        due_at = min((call.at + boost_s / 2, *(call.at + within for within in clocks if within is not None)))
        served_at = max(due_at, call.at) - call.priority * boost_s
        found = []
        for index in range(call.n):
            completion = Completion(call, index, (served_at, self._num_submitted, index))
            self.completions[key, index] = completion
            self._of_call[call.number, index] = completion
            self.live[completion] = None
            found.append(completion)
        return found

    def handed_in(self, message: EngineMessage) -> None:
        """The engine takes a message out of its inbox, and acts on it before anything else."""
        match message:
            case Submit(key, request):
                self.note(f"submit {self.completions[key, 0].call}")
                if self._shares.arrives(request.tenant, self._backlogged()):
                    self.reached.add("lifted")
                for index in range(request.sampling.n):
                    self.completions[key, index].handed_in = True
            case Abort(key, index, reason):
                for completion in self._live_of(key):
                    if index in (None, completion.index):
                        self.note(f"abort {completion}, {reason.name}")
                        self._end_by_message(completion, _END_OF_ABORT[reason])
            case Shutdown():
                self.note("shutdown")
                self._is_shutting_down = True
                self._begin()
                for completion in self.live:
                    if completion.handed_in:
                        self._end_by_message(completion, FailureKind.DRAINING)
        self._shares.check_bound(self._backlogged(with_caps=False))

    def _backlogged(self, *, with_caps: bool = True) -> set[str]:
        """Tenants with a completion that waits and has never been in the batch."""
        return {
            completion.call.tenant
            for completion in self.live
            if completion.handed_in
            and completion.seq_id is None
            and completion.ended_by_message is None
            and (with_caps or completion.call.kv_share == 1)
        }

    def _live_of(self, key: int) -> list[Completion]:
        found = (self.completions.get((key, index)) for index in range(8))
        return [c for c in found if c is not None and c.is_live]

    @staticmethod
    def _end_by_message(completion: Completion, end: FailureKind | FinishReason) -> None:
        if completion.ended_by_message is None:
            completion.ended_by_message = end

    def step_begins(self) -> None:
        """The inbox is empty; the next step is planned at this moment."""
        self._begin()
        self._pending_before = self._runner.uncollected
        self._num_collected_before = self._runner.num_collected
        self._num_outputs_before = {completion: len(completion.token_ids) for completion in self.live}

    def _begin(self) -> None:
        self._step_began = self._clock()
        self._plan = None
        self._removed = []
        self._remained = []
        self._lost_at = None
        self._lost_plans = []
        self._lost_rows = []
        self._ended_by_results.clear()

    # --- what the runner is told ----------------------------------------------------------------

    def _launched(self, plan: SchedulerOutput) -> None:
        self._plan = plan
        rows = self._runner.rows
        removed = set(plan.removed)
        self._removed = [rows[seq_id] for seq_id in plan.removed if seq_id in rows]
        self._remained = [row for row in rows.values() if row.seq_id not in removed]
        if self._trace is not None:
            self._note_plan(plan)
        for new in plan.new:
            number, index = new.sampler.sampling.seed, new.sampler.index
            completion = self._of_call[number, index]
            assert completion.is_live, f"{completion} has ended and enters the batch"
            assert list(new.token_ids[new.num_prompt_tokens :]) == completion.token_ids, (
                f"{completion} resumes with other tokens than it has told"
            )
            if completion.seq_id is None:
                completion.seq_id = new.seq_id
                completion.first_launch = self._clock()
                completion.num_cached = new.num_computed_tokens
                self._of_seq_id[new.seq_id] = completion
                self._num_prompt_tokens += len(completion.call.prompt)
                self._num_hits += new.num_computed_tokens
            assert completion.seq_id == new.seq_id
        planned = {row.seq_id for row in plan.rows}
        for row in self._remained:
            if row.remaining == 1 and row.wants_another_token:
                assert row.seq_id in planned, f"{self._of(row)} waits for one token and has no row"
        waiting_rows = [row for row in self._remained if row.wants_another_token]
        if waiting_rows:
            head = min(waiting_rows, key=lambda row: self._of(row).rank)
            assert head.seq_id in planned, f"{self._of(head)} is first in the batch and does not advance"

    def _lost(self, point: CrashPoint, plans: list[SchedulerOutput]) -> None:
        self.note(f"  no memory to {point.name.lower()}: lost {[plan.step for plan in plans]}")
        self.reached.add(("lost", point))
        self._num_lost += len(plans)
        self._lost_at = point
        self._lost_plans = plans
        self._lost_rows = list(self._runner.rows.values())

    def _of(self, row: Row) -> Completion:
        return self._of_seq_id[row.seq_id]

    # --- what comes out -------------------------------------------------------------------------

    def stepped(self, message: StepOutputs) -> None:
        """A step's outputs, or those of the last flush."""
        assert message.time == self._clock(), "the heartbeat is not now"
        num_outputs = num_ended = 0
        for output in outputs_of(message):
            num_outputs += 1
            num_ended += output.is_last
            assert self._lost_at is None or not output.token_ids, "a token of a lost step"
            completion = self.completions[output.key, output.index]
            self._take(completion, output)
        self._check_clocks()
        # Each end gives a place back: those of messages and clocks before the step was planned.
        self._give_places(num_ended - len(self._ended_by_results))
        if self._lost_at is None:
            self._check_order()
            self._give_places(len(self._ended_by_results))
        else:
            self._check_lost()
            self._num_places = max(1, len(self._lost_plans[0].rows) // 2)
        self._check_stats(message.stats)
        has_moved = self._plan is not None or self._runner.num_collected > self._num_collected_before
        assert has_moved or num_outputs or self._is_shutting_down or not self.live, (
            "there is work, and a step neither launched, nor collected, nor ended anything"
        )

    def _give_places(self, count: int) -> None:
        self._num_places = min(self._scenario.max_num_seqs, self._num_places + count)

    def _take(self, completion: Completion, output: SequenceOutput) -> None:
        call, now = completion.call, self._clock()
        if self._trace is not None:
            self._note_output(completion, output)
        assert completion.is_live, f"{completion}: something came after the last output"
        assert completion.handed_in
        alone = call.alone[completion.index]
        position = len(completion.token_ids)
        completion.token_ids.extend(output.token_ids)
        self._num_tokens += len(output.token_ids)
        assert (
            tuple(completion.token_ids[position:]) == alone.token_ids[position:][: len(output.token_ids)]
        ), f"{completion}: other tokens than alone: {completion.token_ids} against {alone.token_ids}"
        for told in range(position, len(completion.token_ids)):
            assert (completion.index, told) not in call.faults, f"{completion}: a token of a faulty row"
        expected = () if call.top_logprobs is None else output.token_ids
        assert output.logprobs == tuple(logprobs_of(t, call.top_logprobs or 0) for t in expected)
        is_first = position == 0 and bool(output.token_ids)
        if is_first:
            completion.first_token = now
        self._check_prompt_logprobs(completion, output, is_first)
        assert output.timings is not None or not (is_first or output.is_last), "the clocks are not told"
        if output.timings is not None:
            self._check_timings(completion, output, output.timings)
            assert output.cached_prompt_tokens == completion.num_cached, "another number of cached tokens"
        if output.is_last:
            completion.last = output
            del self.live[completion]
            self._check_ending(completion, output)

    def _check_prompt_logprobs(self, completion: Completion, output: SequenceOutput, is_first: bool) -> None:
        top = completion.call.prompt_top_logprobs if completion.index == 0 else None
        prompt = completion.call.prompt
        whole = () if top is None else tuple(logprobs_of(token, top) for token in prompt[1:])
        told = output.prompt_logprobs
        if is_first:
            assert told == whole, f"{completion}: prompt log-probabilities {told} instead of {whole}"
        else:
            assert told == whole[: len(told)]
            assert not told or (output.is_last and not completion.token_ids)

    def _check_timings(
        self, completion: Completion, output: SequenceOutput, timings: SequenceTimings
    ) -> None:
        assert timings.arrival == completion.call.at
        assert timings.started == completion.first_launch
        assert timings.first_token == completion.first_token
        assert (timings.end is not None) == output.is_last
        assert timings.end in (None, self._step_began, self._clock())
        # The runner hears of a preemption with the next step that has rows.
        assert 0 <= timings.preemptions - completion.num_preemptions <= 1

    def _check_ending(self, completion: Completion, output: SequenceOutput) -> None:
        call, began = completion.call, self._step_began
        assert (output.finish is None) != (output.failure is None)
        end = output.finish.reason if output.finish is not None else output.failure
        self.reached.add(end)
        if completion.num_preemptions:
            self.reached.add((end, "preempted"))
        if completion.num_cached:
            self.reached.add((end, "shared"))
        by_message = completion.ended_by_message
        assert by_message in (None, end), f"{completion}: ended by {by_message}, says {end}"
        alone = call.alone[completion.index]
        match end:
            case FinishReason.EOS | FinishReason.STOP | FinishReason.MAX_TOKENS | FinishReason.CONTEXT_LIMIT:
                assert tuple(completion.token_ids) == alone.token_ids, f"{completion} ended early or late"
                assert output.finish == alone.finish
                self._ended_by_results.add(completion)
                return
            case FinishReason.ABORTED | FailureKind.OPERATOR_ABORT | FailureKind.DRAINING:
                assert by_message == end, f"{completion}: nobody asked for {end}"
                assert output.finish in (None, Finish(FinishReason.ABORTED))
            case FinishReason.TIME_LIMIT:
                assert completion.passed(call.finish_within, began)
                assert output.finish == Finish(FinishReason.TIME_LIMIT)
            case FailureKind.MAX_DURATION:
                assert completion.passed(call.end_within, began)
            case FailureKind.FIRST_TOKEN_TIMEOUT:
                assert completion.passed(call.first_token_within, began)
                assert not completion.token_ids
            case FailureKind.QUEUE_TIMEOUT:
                assert completion.passed(call.start_within, began)
                assert completion.first_launch is None
            case FailureKind.REQUEST_FAULT:
                assert (completion.index, len(completion.token_ids)) in call.faults
                self._num_faults += 1
                self._ended_by_results.add(completion)
            case FailureKind.OUT_OF_MEMORY:
                lost = {row.seq_id for plan in self._lost_plans for row in plan.rows}
                assert completion.seq_id in lost, f"{completion} had no part in a lack of memory"
                if self._lost_at is CrashPoint.LAUNCH:
                    assert len(self._lost_rows) == 1, f"{completion} was not alone in the batch"
                self._ended_by_results.add(completion)
            case other:
                raise AssertionError(f"{completion}: an end that the engine has no reason for: {other}")
        assert len(completion.token_ids) < len(alone.token_ids), f"{completion} had all its tokens"

    def _check_clocks(self) -> None:
        """Whose time was up when the step was planned has ended with it; so has who was aborted before."""
        began = self._step_began
        for completion in self.live:
            if not completion.handed_in:
                continue
            call = completion.call
            assert completion.ended_by_message is None, f"{completion} outlives its abort"
            assert not completion.is_left, f"{completion} outlives its caller"
            assert not completion.passed(call.end_within, began), f"{completion} outlives end_by"
            assert not completion.passed(call.finish_within, began), f"{completion} outlives finish_by"
            if not completion.token_ids or completion.first_token == self._clock():
                had_none = completion.first_token is None or completion.first_token > began
                late = had_none and completion.passed(call.first_token_within, began)
                assert not late, f"{completion} outlives first_token_by"
            waits = completion.first_launch is None
            assert not (waits and completion.passed(call.start_within, began)), (
                f"{completion} outlives start_by"
            )

    def _check_lost(self) -> None:
        """Of a lost step nobody has anything, and whoever was in the batch starts anew. It was planned like
        any other, and what it planned was charged."""
        self._check_preempted()
        if self._plan is not None:
            rows = {row.seq_id: row for row in self._lost_rows}
            self._check_turns(self._plan, self._waiting_besides(rows), rows)
        self._shares.check_bound(self._backlogged(with_caps=False))
        batch = [self._of(row) for row in self._lost_rows]
        if self._lost_at is CrashPoint.LAUNCH and len(batch) == 1:
            assert batch == list(self._ended_by_results), f"{batch[0]} alone has no memory, and does not fail"
        for completion in batch:
            completion.num_preemptions += completion.is_live

    def _check_preempted(self) -> bool:
        has_preempted = False
        for row in self._removed:
            completion = self._of(row)
            if completion.is_live or completion in self._ended_by_results:
                # Its end, if there was one, came after the plan that removed it: it was pushed out.
                has_preempted = True
                completion.num_preemptions += 1
                for other in self._remained:
                    assert completion.rank > self._of(other).rank, (
                        f"{completion} was preempted before {self._of(other)}, which ranks behind it"
                    )
        return has_preempted

    def _check_order(self) -> None:
        """A fair share and then rank decide who enters, rank who is pushed out, and nobody waits whom the
        step had room for."""
        rows, plan = self._runner.rows, self._plan
        has_preempted = self._check_preempted()
        assert plan is None or len(rows) <= self._num_places, "more sequences than there are places"
        waiting = self._waiting_besides(rows)
        if plan is not None:
            self._check_turns(plan, waiting, rows)
        self._shares.check_bound(self._backlogged(with_caps=False))
        if not waiting:
            return
        if plan is None and any(completion.call.kv_share < 1 for completion in waiting.values()):
            # Who holds how many blocks is not known: the runner has not heard of who has left.
            return
        head = waiting[self._shares.first(waiting, self._over_cap(waiting, rows.values()))]
        # In a step without rows, a row that could have had one was pushed out, and the runner has not heard.
        is_unseen = plan is None and any(row.wants_another_token for row in rows.values())
        num_known = len(head.call.prompt) + len(head.token_ids)
        num_blocks = (num_known + self._scenario.block_size - 1) // self._scenario.block_size
        has_room = (
            not has_preempted
            and not is_unseen
            and head.seq_id not in self._pending_before
            and len(rows) < self._num_places
            and self._has_room_for_prompts(plan)
            and num_blocks <= self._runner.num_free_blocks
        )
        assert not has_room, f"{head} waits, and the step had room for it"

    def _has_room_for_prompts(self, plan: SchedulerOutput | None) -> bool:
        """Whether one more token of a prompt was sure to fit into the step."""
        if plan is None:
            return True
        new_ids = {new.seq_id for new in plan.new}
        num_prompt_tokens = sum(
            row.num_tokens
            for row in plan.rows
            # A lone token is of a prompt where nothing is sampled behind it, or where it begins.
            if row.num_tokens > 1 or not row.sample or row.seq_id in new_ids
        )
        if 0 < self._scenario.mixed_chunk_tokens <= num_prompt_tokens:
            return False
        return plan.num_tokens < self._scenario.max_num_batched_tokens

    def _waiting_besides(self, rows: Mapping[int, Row]) -> dict[Service, Completion]:
        """Who was there when the step was planned, and is not in the batch, by service."""
        # Whoever the step's results ended was still there.
        inside = (*(c for c in self.live if c.handed_in), *self._ended_by_results)
        return {c.service: c for c in inside if c.seq_id is None or c.seq_id not in rows}

    def _check_turns(
        self, plan: SchedulerOutput, waiting: dict[Service, Completion], rows: Mapping[int, Row]
    ) -> None:
        """Whoever entered did so when it was its turn, those left in `waiting` considered; `rows` are the
        batch of the plan."""
        shares = self._shares
        shares.in_batch(self._of(row).service for row in rows.values())
        num_tokens = {row.seq_id: row.num_tokens for row in plan.rows}
        entered = [(self._of_seq_id[new.seq_id], new) for new in plan.new]
        for completion, new in entered:
            shares.enters(completion.service, new.num_computed_tokens)
        # Those that were in the batch come first.
        new_ids = {new.seq_id for new in plan.new}
        for seq_id in num_tokens.keys() - new_ids:
            shares.planned(self._of_seq_id[seq_id].service, num_tokens[seq_id])
        for number, (completion, new) in enumerate(entered):
            others = {other.service: other for other, _ in entered[number:]}
            late = {other.seq_id for other in others.values()}
            inside = [row for row in rows.values() if row.seq_id not in late]
            candidates = waiting | others
            first = shares.first(candidates, self._over_cap(candidates, inside))
            assert first is completion.service, (
                f"{completion} enters in the turn of call {first.call.number}: {dict(shares.counters)}"
            )
            del candidates[first]
            if any(service.rank < first.rank for service in candidates):
                self.reached.add("a fair share before rank")
            if shares.takes_turn(first, candidates):
                self.reached.add("a turn was passed")
            shares.planned(completion.service, num_tokens[new.seq_id])

    def _over_cap(
        self, candidates: dict[Service, Completion], inside: Iterable[Row]
    ) -> Callable[[Service], bool]:
        """Who would have to pass with these rows in the batch."""
        held = Counter[str]()
        for row in inside:
            held[row.call.tenant] += len(row.block_ids)
        num_tenants = len({service.call.tenant for service in candidates})

        def is_over(service: Service) -> bool:
            call, completion = service.call, candidates[service]
            num_known = len(call.prompt) + self._num_outputs_before[completion]
            num_blocks = -(-num_known // self._scenario.block_size)
            has_cap = call.kv_share < 1 and num_tenants > 1 and held[call.tenant] > 0
            return has_cap and held[call.tenant] + num_blocks > call.kv_share * self._scenario.num_blocks

        return is_over

    def _check_stats(self, stats: EngineStats) -> None:
        num_inside = sum(c.handed_in for c in self.live)
        assert stats.running + stats.waiting == num_inside, "live sequences are miscounted"
        assert stats.generation_tokens == self._num_tokens, "generated tokens are miscounted"
        assert stats.prompt_tokens == self._num_prompt_tokens
        assert stats.prefix_queries == self._num_prompt_tokens
        assert stats.prefix_hits == self._num_hits
        assert stats.faults == self._num_faults
        assert stats.lost_steps == self._num_lost
        assert stats.kv_blocks_total == self._scenario.num_blocks
        if not num_inside:
            assert stats.kv_blocks_used == stats.kv_slots_used == stats.waiting_tokens == 0, "a block leaked"

    def idle(self) -> None:
        """The engine waits for a message because it has nothing to do."""
        for completion in self.live:
            assert not completion.handed_in, f"{completion} never ended"
        assert not self._runner.uncollected, "an idle engine has a step under way"

    def next_deadline(self) -> float:
        """The moment at which the next clock of a live call runs out; now, where there is none."""
        now = self._clock()
        calls = [completion.call for completion in self.live]
        clocks = [
            call.at + within
            for call in calls
            for within in (call.start_within, call.first_token_within, call.end_within, call.finish_within)
            if within is not None
        ]
        return min((moment for moment in clocks if moment > now), default=now)

    # --- the trace ------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add a line to the trace, where one is kept."""
        if self._trace is not None:
            self._trace.append(f"{self._clock():12.4f}  {text}")

    def _note_plan(self, plan: SchedulerOutput) -> None:
        names = {seq_id: str(c)[5:] for seq_id, c in self._of_seq_id.items()}
        for new in plan.new:
            number, index = new.sampler.sampling.seed, new.sampler.index
            names[new.seq_id] = f"{number}.{index}"
            blocks = list(new.block_ids)
            self.note(
                f"    {number}.{index} enters: {len(new.token_ids)} tokens known, "
                f"{new.num_computed_tokens} cached, blocks {blocks}"
            )
        if plan.removed:
            self.note(f"    leave: {' '.join(names.get(s, f'#{s}') for s in plan.removed)}")
        rows = [
            f"{names.get(r.seq_id, f'#{r.seq_id}')} +{r.num_tokens}{'*' if r.sample else ''}"
            f"{list(plan.new_block_ids.get(r.seq_id, ())) or ''}"
            for r in plan.rows
        ]
        self.note(f"  step {plan.step}: {'  '.join(rows)}")

    def _note_output(self, completion: Completion, output: SequenceOutput) -> None:
        end = output.finish.reason.name if output.finish else output.failure.name if output.failure else ""
        self.note(f"  -> {str(completion)[5:]} {list(output.token_ids)} {end}")
