"""SchedulerOutput -> model -> tokens on a GPU, one step ahead of whoever reads the tokens.

A step is enqueued before the tokens of the one before it are known to the host: the device hands them on
to itself. Small steps, prefill or not, are captured graphs padded to a few shapes. Those that score a prompt
run kernel by kernel, in the same shapes: cuBLAS keeps something of every shape that it meets for good, and
prompts have any length. Larger steps run kernel by kernel on their own rows. The only wait is for a step's
tokens. Blocks that a sequence gives back may be another's in the next step: steps run in the order of their
launch, so whatever an older one still writes comes first.

The kernel that samples writes the tokens of a decode step to pinned memory of the host: a copy behind it and
the next graph behind that would each cost some microseconds of every step. The memory is that of the step's
turn among those that may be under way, and a graph has its address, so such a step is captured for each turn.

Built and used on the engine thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows
from photon_grpc.models.llama import DecoderModel
from photon_grpc.runner.base import StepOutOfMemoryError
from photon_grpc.runner.buckets import Buckets, StepKind, StepShape
from photon_grpc.runner.cuda_sampler import HostRows, WriteState
from photon_grpc.runner.device_batch import NO_SLOT, DeviceBatch, PrefillRow, Slots
from photon_grpc.runner.kv_cache import KVCache
from photon_grpc.runner.memory import OUT_OF_MEMORY_TYPES, is_out_of_memory
from photon_grpc.runner.prompt_scores import PromptScorer, num_scored, score_prompt
from photon_grpc.runner.sampler import NO_TOKEN
from photon_grpc.runner.stream import Mark, Stream, Work
from photon_grpc.runner.updates import ApplyUpdates, Updates
from photon_grpc.scheduler.output import (
    ModelOutput,
    NewSequence,
    RowFault,
    SamplerSpec,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.types import ModelInfo, TokenLogprobs

_log = structlog.get_logger(__name__)

# A first layer has no update to take in; the second does what all others do.
_DISTINCT_LAYERS = 2


class DeviceSampler(PromptScorer, Protocol):
    """What `CudaSampler` is to this runner; see there."""

    state: SamplingState
    row_slots: Tensor

    def add(
        self, seq_id: int, spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> None: ...

    def remove(self, seq_id: int) -> None: ...

    def clear(self) -> None: ...

    def slot(self, seq_id: int) -> int: ...

    def are_greedy(self, seq_ids: Sequence[int]) -> bool: ...

    def top_logprobs(self, seq_id: int) -> int | None: ...

    def launch(
        self, logits: Tensor, *, greedy: bool = False, logprobs: bool = False, told: Tensor | None = None
    ) -> None: ...

    def launch_best(self, best: Tensor, told: Tensor | None = None) -> None: ...

    def host_rows(self, buffer: Callable[..., Tensor]) -> HostRows: ...

    def copy_out(self, host: HostRows, num_rows: int, *, logprobs: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class StepKernels:
    """The two kernels that the runner launches itself; see the modules of their names."""

    apply_updates: ApplyUpdates
    step_inputs: Callable[[StepInputs, SequenceState, StepRows, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of a step, and how it is run; kept while the batch stays as it is."""

    kind: StepKind
    is_captured: bool
    is_padded: bool
    decode_ids: list[int]
    decode_slots: Slots
    prefills: tuple[PrefillRow, ...]
    sampled_ids: tuple[int, ...]
    sampled_rows: tuple[int, ...] | None
    """The row of each sampled sequence; None where they are the first ones."""
    logprobs: tuple[tuple[int, int, int], ...]
    """(seq_id, row, alternatives) of those that asked."""
    scored: bool
    """Whether prompts are scored, which waits for the device."""


@dataclass(slots=True)
class _Step:
    """One place for a step under way: its memory on the host, and what to read from it."""

    turn: int
    host: HostRows
    arrived: Mark
    number: int = 0
    rows: _Rows | None = None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


class CudaRunner:
    """Implements `runner.base.Runner`.

    With `capture` off every step runs kernel by kernel on its own rows alone: for a data type whose
    attention is driven from the host.
    """

    max_in_flight = 2

    def __init__(
        self,
        decoder: DecoderModel,
        model: ModelInfo,
        kv_cache: KVCache,
        make_sampler: Callable[[WriteState, int], DeviceSampler],
        *,
        kernels: StepKernels,
        stream: Stream,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        capture: bool = True,
    ) -> None:
        """`make_sampler(write, max_rows)` makes a sampler that changes its state through `write`."""
        self.model = model
        self.num_blocks = kv_cache.num_blocks
        self.block_size = kv_cache.block_size
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._kernels = kernels
        self._stream = stream
        self._buckets = Buckets(max_num_seqs, max_num_batched_tokens)
        self._capture = capture
        largest = self._buckets.largest
        self._updates = Updates(stream, kernels.apply_updates, kv_cache.device, self.max_in_flight)
        self._sampler = make_sampler(self._updates.write, largest.num_rows)
        self._batch = DeviceBatch(
            self._updates,
            self._sampler.state.last_token_ids,
            max_model_len=model.max_model_len,
            block_size=kv_cache.block_size,
            max_rows=largest.num_rows,
            max_tokens=max(max_num_batched_tokens, largest.num_tokens),
        )
        self._steps = [
            _Step(turn, self._sampler.host_rows(stream.host_buffer), stream.mark())
            for turn in range(self.max_in_flight)
        ]
        self._num_launched = 0
        self._in_flight: deque[_Step] = deque()
        # By the turn whose memory on the host they write; those that leave that to a copy serve every turn.
        self._graphs: dict[tuple[StepKind, int], Work] = {}
        # The rows that the device has been told of; None where it has to be told anew.
        self._rows: _Rows | None = None
        # (alternatives, prompt tokens) of those whose prompts are to be scored.
        self._to_score: dict[int, tuple[int, int]] = {}

    def prepare(self) -> None:
        """Capture every graph ahead of the first step, the largest first, each kernel having run once."""
        if not self._capture:
            return
        started = time.monotonic()
        with torch.inference_mode():
            for kind in self._buckets.kinds():
                self._capture_kind(kind)
        seconds = round(time.monotonic() - started, 2)
        _log.info("graphs captured", graphs=len(self._graphs), seconds=seconds)

    def launch(self, output: SchedulerOutput) -> None:
        """Enqueue one step; its tokens wait for `collect`."""
        assert len(self._in_flight) < self.max_in_flight, "more steps under way than allowed"
        turn = self._num_launched % self.max_in_flight
        step = self._steps[turn]
        step.number = output.step
        step.rows = None
        step.prompt_logprobs = {}
        try:
            with torch.inference_mode():
                self._updates.begin(turn)
                self._take_changes(output)
                if output.is_empty:
                    self._updates.send()
                else:
                    self._launch_rows(step, self._rows_of(output))
                step.arrived.set()
        except OUT_OF_MEMORY_TYPES as error:
            if not is_out_of_memory(error):
                raise
            # What has been enqueued of it still runs, and reads and writes the memory of this turn.
            step.arrived.set()
            step.arrived.wait()
            self._forget_sequences()
            raise StepOutOfMemoryError(str(error)) from error
        self._num_launched += 1
        self._in_flight.append(step)

    def collect(self) -> ModelOutput:
        """The oldest launched step, once its tokens have arrived."""
        step = self._in_flight[0]
        try:
            step.arrived.wait()
            output = self._output_of(step)
        except OUT_OF_MEMORY_TYPES as error:
            if not is_out_of_memory(error):
                raise
            self._drain()
            self._forget_sequences()
            raise StepOutOfMemoryError(str(error)) from error
        self._in_flight.popleft()
        return output

    @staticmethod
    def _output_of(step: _Step) -> ModelOutput:
        rows = step.rows
        if rows is None or not rows.sampled_ids:
            return ModelOutput(step.number, (), (), prompt_logprobs=step.prompt_logprobs)
        if rows.sampled_rows is None:
            tokens = step.host.tokens(len(rows.sampled_ids))
        else:
            every = step.host.tokens(rows.kind.shape.num_rows)
            tokens = [every[row] for row in rows.sampled_rows]
        faults: dict[int, RowFault] = {}
        if NO_TOKEN in tokens:
            faults = {
                seq_id: RowFault.NON_FINITE_LOGITS
                for seq_id, token_id in zip(rows.sampled_ids, tokens, strict=True)
                if token_id == NO_TOKEN
            }
        return ModelOutput(
            step=step.number,
            seq_ids=rows.sampled_ids,
            token_ids=tuple(zip(tokens, strict=True)),
            logprobs={
                seq_id: (step.host.logprobs(row, top),)
                for seq_id, row, top in rows.logprobs
                if seq_id not in faults
            },
            prompt_logprobs=step.prompt_logprobs,
            faults=faults,
        )

    def close(self) -> None:
        """Let the device finish, and let go of the graphs."""
        self._drain()
        self._graphs.clear()

    def _drain(self) -> None:
        for step in self._in_flight:
            step.arrived.wait()
        self._in_flight.clear()

    # --- the host's side of a step --------------------------------------------------------------

    def _forget_sequences(self) -> None:
        # Whoever enters again writes all of its state on the device anew.
        self._batch.clear()
        self._sampler.clear()
        self._to_score.clear()
        self._rows = None

    def _take_changes(self, output: SchedulerOutput) -> None:
        for seq_id in output.removed:
            self._batch.remove(seq_id)
            self._sampler.remove(seq_id)
            self._to_score.pop(seq_id, None)
        for new in output.new:
            self._add(new)
        for seq_id, block_ids in output.new_block_ids.items():
            self._batch.append_blocks(seq_id, block_ids)
        if output.removed or output.new:
            # A slot may have changed hands.
            self._rows = None

    def _add(self, new: NewSequence) -> None:
        self._sampler.add(new.seq_id, new.sampler, new.token_ids, new.num_prompt_tokens)
        self._batch.add(new, self._sampler.slot(new.seq_id))
        if new.sampler.prompt_top_logprobs is not None:
            self._to_score[new.seq_id] = (new.sampler.prompt_top_logprobs, new.num_prompt_tokens)

    def _rows_of(self, output: SchedulerOutput) -> _Rows:
        """The rows of a step: those of the last one, where the batch only went on decoding."""
        last = self._rows
        if output.same_rows and last is not None and not last.prefills:
            return last
        return self._arrange(output.rows, {new.seq_id for new in output.new})

    def _arrange(self, scheduled: Sequence[ScheduledSequence], new_ids: Set[int]) -> _Rows:
        # A lone token that is not the newest is the host's to bring. And a row that begins may share blocks
        # that others fill in this very step, which attention over decode rows does not wait for.
        is_decode = [row.num_tokens == 1 and row.sample and row.seq_id not in new_ids for row in scheduled]
        decode_ids = [row.seq_id for row, decodes in zip(scheduled, is_decode, strict=True) if decodes]
        prefills = tuple(
            PrefillRow(row.seq_id, row.num_tokens, row.sample)
            for row, decodes in zip(scheduled, is_decode, strict=True)
            if not decodes
        )
        num_prefill_tokens = sum(row.num_tokens for row in prefills)
        scored = any(self._num_scored(row) for row in prefills) if self._to_score else False
        exact = StepShape(len(decode_ids), len(prefills), num_prefill_tokens)
        shape = None
        if self._capture:
            shape = self._buckets.fit(exact.num_decodes, exact.num_prefills, exact.num_prefill_tokens)
        first_prefill = (shape or exact).num_decodes
        sampled_prefills = [(row.seq_id, first_prefill + i) for i, row in enumerate(prefills) if row.sample]
        sampled = [(seq_id, row) for row, seq_id in enumerate(decode_ids)] + sampled_prefills
        logprobs = tuple(
            (seq_id, row, top)
            for seq_id, row in sampled
            if (top := self._sampler.top_logprobs(seq_id)) is not None
        )
        sampled_ids = tuple(seq_id for seq_id, _ in sampled)
        needs = {"greedy": self._sampler.are_greedy(sampled_ids), "logprobs": bool(logprobs)}
        kind = StepKind(exact, **needs) if shape is None else self._buckets.kind(shape, **needs)
        return _Rows(
            kind=kind,
            is_captured=shape is not None and not scored,
            is_padded=shape is not None,
            decode_ids=decode_ids,
            decode_slots=self._batch.slots(decode_ids),
            prefills=prefills,
            sampled_ids=sampled_ids,
            sampled_rows=tuple(row for _, row in sampled) if sampled_prefills else None,
            logprobs=logprobs,
            scored=scored,
        )

    def _launch_rows(self, step: _Step, rows: _Rows) -> None:
        step.rows = rows
        kind = rows.kind
        graph = self._graph(kind, step) if rows.is_captured else None
        if rows is not self._rows:
            self._batch.set_rows(kind.shape, rows.decode_slots, rows.prefills)
            self._updates.write(self._sampler.row_slots, 0, self._sampled_slots(rows))
            self._rows = rows
        score = self._scorer(step, rows) if rows.scored else None
        self._updates.send()
        if graph is not None:
            self._stream.run(graph)
            self._advance(rows)
        else:
            self._advance(rows)
            lengths = _padded_lengths(kind.shape) if rows.is_padded else self._lengths(rows)
            sample = bool(rows.sampled_ids)
            self._stream.run(lambda: self._compute(kind, lengths, step, sample=sample, score=score))
        if rows.sampled_ids and not _tells_host(kind):
            num_rows, logprobs = kind.shape.num_rows, bool(rows.logprobs)
            self._stream.run(lambda: self._sampler.copy_out(step.host, num_rows, logprobs=logprobs))

    def _sampled_slots(self, rows: _Rows) -> Slots:
        slots = np.full(rows.kind.shape.num_rows, NO_SLOT, dtype=np.int32)
        slots[: len(rows.decode_slots)] = rows.decode_slots
        for i, row in enumerate(rows.prefills):
            if row.sample:
                slots[rows.kind.shape.num_decodes + i] = self._sampler.slot(row.seq_id)
        return slots

    def _advance(self, rows: _Rows) -> None:
        self._batch.advance(rows.decode_slots, 1)
        if rows.prefills:
            counts = np.array([row.num_tokens for row in rows.prefills])
            self._batch.advance(self._batch.slots([row.seq_id for row in rows.prefills]), counts)

    def _lengths(self, rows: _Rows) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Query starts and context lengths of a step on its own rows alone, which has been counted."""
        query_starts = list(range(len(rows.decode_ids) + 1))
        for row in rows.prefills:
            query_starts.append(query_starts[-1] + row.num_tokens)
        seq_ids = [*rows.decode_ids, *(row.seq_id for row in rows.prefills)]
        context_lens = self._batch.num_computed(self._batch.slots(seq_ids))
        return tuple(query_starts), tuple(context_lens.tolist())

    # --- prompts that are scored ----------------------------------------------------------------

    def _num_scored(self, row: PrefillRow) -> int:
        wanted = self._to_score.get(row.seq_id)
        if wanted is None:
            return 0
        return num_scored(row.num_tokens, self._batch.num_computed_tokens(row.seq_id), wanted[1])

    def _scorer(self, step: _Step, rows: _Rows) -> Callable[[Tensor], None]:
        """What is to be done with the hidden states of a step; made before the step is counted."""
        scored: list[tuple[int, int, int, Tensor]] = []
        first = rows.kind.shape.num_decodes
        for row in rows.prefills:
            count = self._num_scored(row)
            if count:
                start = self._batch.num_computed_tokens(row.seq_id) + 1
                targets = torch.from_numpy(self._batch.tokens(row.seq_id, start, start + count))
                scored.append((row.seq_id, first, self._to_score[row.seq_id][0], targets))
            first += row.num_tokens

        def score(hidden: Tensor) -> None:
            for seq_id, place, top, targets in scored:
                step.prompt_logprobs[seq_id] = score_prompt(
                    self._decoder,
                    self._sampler,
                    hidden[place : place + len(targets)],
                    targets.to(hidden.device),
                    top,
                    pads=True,
                )

        return score

    # --- the device's side ----------------------------------------------------------------------

    def _graph(self, kind: StepKind, step: _Step) -> Work:
        """The captured step of this kind in this turn; captured now where it was not."""
        place = (kind, step.turn if _tells_host(kind) else 0)
        if place not in self._graphs:
            self._capture_kind(kind)
        return self._graphs[place]

    def _capture_kind(self, kind: StepKind) -> None:
        """Capture a step of this kind for every turn.

        Each of its kernels has run before, for idle rows: those of a few layers are those of all.
        """
        lengths = _padded_lengths(kind.shape)

        def clear() -> None:
            self._batch.clear_rows()
            self._sampler.row_slots.fill_(NO_SLOT)

        self._rows = None
        steps = self._steps if _tells_host(kind) else self._steps[:1]
        self._stream.run(clear)
        self._stream.run(lambda: self._compute(kind, lengths, steps[0], num_layers=_DISTINCT_LAYERS))
        for step in steps:
            graph = self._stream.capture(partial(self._compute, kind, lengths, step))
            # The first replay brings the graph to the device.
            self._stream.run(graph)
            self._graphs[kind, step.turn] = graph

    def _compute(
        self,
        kind: StepKind,
        lengths: tuple[tuple[int, ...], tuple[int, ...]],
        step: _Step,
        *,
        sample: bool = True,
        score: Callable[[Tensor], None] | None = None,
        num_layers: int | None = None,
    ) -> None:
        """The whole of a step, from the slots of its rows to their tokens; in the first layers where told."""
        shape, batch = kind.shape, self._batch
        inputs = batch.inputs(shape)
        self._kernels.step_inputs(inputs, batch.state, batch.rows(shape), shape.num_decodes, batch.block_size)
        hidden = self._decoder.forward(
            inputs.token_ids,
            inputs.positions,
            self._kv_cache,
            batch.metadata(shape, *lengths),
            wanted=inputs.last_tokens if shape.num_prefills and score is None else None,
            num_layers=num_layers,
        )
        if score is not None:
            score(hidden)
            hidden = hidden.index_select(0, inputs.last_tokens)
        if not sample:
            return
        told = step.host.token_ids if _tells_host(kind) else None
        best = self._decoder.find_best_logits(hidden) if kind.greedy and not kind.logprobs else None
        if best is not None:
            self._sampler.launch_best(best, told)
            return
        logits = self._decoder.compute_logits(hidden)
        self._sampler.launch(logits, greedy=kind.greedy, logprobs=kind.logprobs, told=told)


def _tells_host(kind: StepKind) -> bool:
    """Whether the sampling kernel writes the tokens to the host itself: no copy holds up the next step.

    Log-probabilities are copied, and their kernel reads the tokens once more.
    """
    return not kind.logprobs


def _padded_lengths(shape: StepShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stand-ins for what the host does not know of a captured step, or need not: every row idle."""
    decodes = tuple(range(shape.num_decodes + 1))
    return decodes + decodes[-1:] * shape.num_prefills, (0,) * shape.num_rows
