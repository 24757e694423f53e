"""A runner that trusts nobody: it remembers what every KV slot really holds and checks every read.

The key and value at a position depend on every token before it, so a slot is filled with a number that
stands for its whole past, the sharing scope included. Any wrong block, stale block, or block of another
scope shows as a wrong number.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from photon_grpc.runner.base import StepOutOfMemoryError
from photon_grpc.scheduler.output import (
    ModelOutput,
    NewSequence,
    RowFault,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.types import TokenLogprobs
from tests.simulation.oracle import logprobs_of, name_of, next_token
from tests.simulation.scenario import Call, CrashPoint, Scenario
from tests.support.builders import FakeClock, model_info

_SCRAMBLE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class DeviceLostError(Exception):
    """The device of a scenario that has a crash."""


@dataclass(slots=True)
class Row:
    """A sequence in the batch, from the runner's point of view."""

    seq_id: int
    call: Call
    index: int
    prompt_name: int
    token_ids: list[int]
    num_computed: int
    block_ids: list[int]
    # What the slot of each position must hold.
    past: list[int] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.call.prompt)

    @property
    def remaining(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def wants_another_token(self) -> bool:
        return self.num_outputs < self.call.max_tokens

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.past.append(_next_past(self.past[-1], token_id))


def _next_past(before: int, token_id: int) -> int:
    return ((before ^ (token_id + 1)) * _SCRAMBLE + 0x1234567) & _MASK


def _pasts(call: Call, token_ids: tuple[int, ...]) -> list[int]:
    past = int.from_bytes(f"{call.tenant} {call.salt}".encode(), "little")
    pasts = []
    for token_id in token_ids:
        past = _next_past(past, token_id)
        pasts.append(past)
    return pasts


class CheckingRunner:
    """Implements `runner.base.Runner` for the calls of one scenario. Time passes in `collect`."""

    def __init__(self, scenario: Scenario, calls: Mapping[int, Call], clock: FakeClock) -> None:
        self.model = model_info(eos_token_ids=())
        self.num_blocks = scenario.num_blocks
        self.block_size = scenario.block_size
        self.max_in_flight = scenario.max_in_flight
        self._scenario = scenario
        self._calls = calls
        self._clock = clock
        self._random = random.Random(~scenario.seed)
        self._content = [[0] * self.block_size for _ in range(self.num_blocks)]
        self._writer: dict[int, int] = {}
        self._holders: Counter[int] = Counter()
        # Sequences whose logits were not finite: nobody who is admitted later may read what they wrote.
        self._distrusted: set[int] = set()
        self._uncollected: deque[ModelOutput] = deque()
        # Of the same steps: what was planned, and the slots that were written.
        self._uncollected_plans: deque[SchedulerOutput] = deque()
        self._slots_written: deque[list[tuple[int, int]]] = deque()
        self._num_launched = 0
        self.num_collected = 0
        self.rows: dict[int, Row] = {}
        self.plan: SchedulerOutput | None = None
        self.num_closed = 0
        # Called with each plan before it is computed.
        self.on_launch: Callable[[SchedulerOutput], None] = lambda plan: None
        # Called with the steps that are lost for lack of memory, before the batch is forgotten.
        self.on_lost: Callable[[CrashPoint, list[SchedulerOutput]], None] = lambda point, plans: None

    @property
    def uncollected(self) -> set[int]:
        """Sequences that have a token under way."""
        return {seq_id for output in self._uncollected for seq_id in output.seq_ids}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no row of the batch holds."""
        return self.num_blocks - len(self._holders)

    # --- photon_grpc.runner.base.Runner ---------------------------------------------------------

    def launch(self, output: SchedulerOutput) -> None:
        """Check the plan, write, read, and sample."""
        self._num_launched += 1
        self._crash(CrashPoint.LAUNCH, self._num_launched)
        assert len(self._uncollected) < self.max_in_flight, "more steps under way than the runner takes"
        assert output.num_tokens == sum(row.num_tokens for row in output.rows), "num_tokens is not the sum"
        assert output.num_tokens <= self._scenario.max_num_batched_tokens, "over the token budget"
        if output.same_rows:
            assert self.plan is not None
            assert output.rows is self.plan.rows, "other rows than those of the step before"
            assert not output.new
            assert not output.removed
        self.on_launch(output)
        self.plan = output
        for seq_id in output.removed:
            row = self.rows.pop(seq_id, None)
            assert row is not None, f"sequence {seq_id} was removed and is not in the batch"
            self._holders.subtract(row.block_ids)
        self._holders += Counter()
        shared = {block_id for block_id, count in self._holders.items() if count > 1}
        for new in output.new:
            self._enter(new)
        for seq_id, block_ids in output.new_block_ids.items():
            assert seq_id in self.rows, f"sequence {seq_id} gets blocks and is not in the batch"
            self.rows[seq_id].block_ids.extend(block_ids)
            self._holders.update(block_ids)
        assert len(self.rows) <= self._scenario.max_num_seqs, "over max_num_seqs"
        scheduled = [(self._scheduled_row(planned), planned) for planned in output.rows]
        assert len({id(row) for row, _ in scheduled}) == len(scheduled), "a sequence has two rows"
        self._slots_written.append([])
        self._uncollected_plans.append(output)
        # Every layer writes all keys and values of a step before it reads any.
        for row, planned in scheduled:
            self._write(row, planned.num_tokens, shared)
        for row, _ in scheduled:
            self._read(row)
        for new in output.new:
            for block_id in new.block_ids[: new.num_computed_tokens // self.block_size]:
                assert self._writer[block_id] not in self._distrusted, "shares what a faulty row wrote"
        if (CrashPoint.LAUNCH, self._num_launched) in self._scenario.lacks:
            self._lose(CrashPoint.LAUNCH, 1)
        self._uncollected.append(self._sample(output.step, scheduled))

    def collect(self) -> ModelOutput:
        """The oldest step's tokens, after the time that it takes."""
        self.num_collected += 1
        self._clock.advance(self._scenario.step_s * self._random.choice((0.0, 0.5, 1.0, 1.0, 1.0, 3.0)))
        self._crash(CrashPoint.COLLECT, self.num_collected)
        if (CrashPoint.COLLECT, self.num_collected) in self._scenario.lacks:
            self._uncollected.clear()
            self._lose(CrashPoint.COLLECT, len(self._uncollected_plans))
        output = self._uncollected.popleft()
        self._uncollected_plans.popleft()
        self._slots_written.popleft()
        self._distrusted.update(output.faults)
        return output

    def close(self) -> None:
        """Count the calls; fail where the scenario says so."""
        self.num_closed += 1
        if self._scenario.close_fails:
            raise DeviceLostError

    # --- a step ---------------------------------------------------------------------------------

    def _crash(self, point: CrashPoint, moment: int) -> None:
        if self._scenario.crash == (point, moment):
            raise DeviceLostError

    def _lose(self, point: CrashPoint, num_steps: int) -> NoReturn:
        """The newest steps never happened, some of what they wrote did, and no sequence is known any more."""
        lost = [self._uncollected_plans.pop() for _ in range(num_steps)][::-1]
        for block_id, offset in (slot for _ in lost for slot in self._slots_written.pop()):
            if self._random.random() < 0.7:
                self._content[block_id][offset] = 0
        self.on_lost(point, lost)
        self.rows.clear()
        self._holders.clear()
        self.plan = None
        raise StepOutOfMemoryError("simulated lack of memory")

    def _enter(self, new: NewSequence) -> None:
        assert new.seq_id not in self.rows, f"sequence {new.seq_id} is in the batch already"
        call = self._calls[new.sampler.sampling.seed]
        assert new.token_ids[: new.num_prompt_tokens] == call.prompt, "another prompt"
        assert 0 <= new.num_computed_tokens < len(new.token_ids), "nothing is left to compute"
        assert new.num_computed_tokens % self.block_size == 0, "a prefix ends inside a block"
        if new.num_computed_tokens:
            assert self._scenario.prefix_caching, "a prefix hit with the prefix cache off"
            assert not call.bypass_prefix_cache, "a prefix hit for a call that bypasses the cache"
        spec = new.sampler
        assert spec.min_tokens == call.min_tokens
        assert set(spec.banned_token_ids) == {*call.eos_ids, *call.stop_ids}
        assert spec.top_logprobs == call.top_logprobs
        assert spec.prompt_top_logprobs == (call.prompt_top_logprobs if spec.index == 0 else None)
        assert spec.prompt_top_logprobs is None or new.num_computed_tokens == 0
        self.rows[new.seq_id] = Row(
            seq_id=new.seq_id,
            call=call,
            index=spec.index,
            prompt_name=name_of(call.prompt),
            token_ids=list(new.token_ids),
            num_computed=new.num_computed_tokens,
            block_ids=list(new.block_ids),
            past=_pasts(call, new.token_ids),
        )
        self._holders.update(new.block_ids)

    def _scheduled_row(self, planned: ScheduledSequence) -> Row:
        row = self.rows.get(planned.seq_id)
        assert row is not None, f"sequence {planned.seq_id} has a row and is not in the batch"
        end = row.num_computed + planned.num_tokens
        assert 0 < planned.num_tokens <= row.remaining, "computes tokens that nobody knows"
        assert planned.sample == (end == len(row.token_ids)), "samples elsewhere than at the last token"
        assert not planned.sample or row.wants_another_token, "samples past max_tokens"
        assert len(row.block_ids) * self.block_size >= end, "the block table is too short"
        assert (len(row.block_ids) - 1) * self.block_size < end, "a block that nothing is written to"
        assert len(set(row.block_ids)) == len(row.block_ids), "a block stands twice in a table"
        assert all(0 <= block_id < self.num_blocks for block_id in row.block_ids)
        return row

    def _write(self, row: Row, num_tokens: int, shared: set[int]) -> None:
        position, end = row.num_computed, row.num_computed + num_tokens
        while position < end:
            block_id = row.block_ids[position // self.block_size]
            assert block_id not in shared, f"writes into block {block_id}, which others read"
            offset = position % self.block_size
            count = min(self.block_size - offset, end - position)
            self._content[block_id][offset : offset + count] = row.past[position : position + count]
            self._slots_written[-1].extend((block_id, offset + n) for n in range(count))
            self._writer[block_id] = row.seq_id
            position += count
        row.num_computed = end

    def _read(self, row: Row) -> None:
        size = self.block_size
        for number, block_id in enumerate(row.block_ids):
            past = row.past[number * size : min((number + 1) * size, row.num_computed)]
            assert self._content[block_id][: len(past)] == past, (
                f"block {block_id} does not hold what sequence {row.seq_id} is to read at its block {number}"
            )

    def _sample(self, step: int, scheduled: list[tuple[Row, ScheduledSequence]]) -> ModelOutput:
        seq_ids: list[int] = []
        tokens: list[int] = []
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        faults: dict[int, RowFault] = {}
        for row, planned in scheduled:
            call, seq_id = row.call, row.seq_id
            first = row.num_computed - planned.num_tokens
            if call.prompt_top_logprobs is not None and row.index == 0 and first < len(call.prompt):
                told = call.prompt[first + 1 : row.num_computed + 1]
                top = call.prompt_top_logprobs
                prompt_logprobs[seq_id] = tuple(logprobs_of(token, top) for token in told)
            if not planned.sample:
                continue
            position = row.num_outputs
            token = next_token(
                row.prompt_name, row.index, position, call.min_tokens, (*call.eos_ids, *call.stop_ids)
            )
            if (row.index, position) in call.faults:
                faults[seq_id] = RowFault.NON_FINITE_LOGITS
            elif call.top_logprobs is not None:
                logprobs[seq_id] = (logprobs_of(token, call.top_logprobs),)
            row.append(token)
            seq_ids.append(seq_id)
            tokens.append(token)
        return _model_output(step, seq_ids, tokens, logprobs, prompt_logprobs, faults)


def _model_output(
    step: int,
    seq_ids: list[int],
    tokens: list[int],
    logprobs: dict[int, tuple[TokenLogprobs, ...]],
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]],
    faults: dict[int, RowFault],
) -> ModelOutput:
    """The one place that knows how a step's tokens are handed to the engine."""
    return ModelOutput(
        step, tuple(seq_ids), tuple((token,) for token in tokens), logprobs, prompt_logprobs, faults
    )
