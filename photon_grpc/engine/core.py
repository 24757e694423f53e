"""One engine step, synchronously: messages in, outputs out.

Deterministic given its messages, the runner and the clock, so tests drive it without threads. Runs on
the engine thread; knows ids and numbers, no text and no grpc.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from photon_grpc.engine.messages import (
    Abort,
    AbortReason,
    EngineRequest,
    FailureKind,
    PlainTokens,
    SequenceOutput,
    StepOutputs,
    Submit,
)
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner, StepOutOfMemoryError
from photon_grpc.scheduler.kv_cache_manager import KVCacheManager
from photon_grpc.scheduler.output import SamplerSpec, SchedulerOutput
from photon_grpc.scheduler.prefix_cache import KEY_BYTES, scope_root
from photon_grpc.scheduler.request import Request
from photon_grpc.scheduler.scheduler import Scheduler

_log = structlog.get_logger(__name__)

_FAILURE_OF_ABORT = {
    AbortReason.CANCELLED: None,
    AbortReason.OPERATOR: FailureKind.OPERATOR_ABORT,
    AbortReason.DRAINING: FailureKind.DRAINING,
}


_NO_TOKENS = PlainTokens()

# Each failure halves the batch, so the largest one is down to a single sequence after nine. A device that
# has no memory for several of those either has none for any.
MAX_FAILURES = 16


class EngineCore:
    """Scheduler and runner together. `clock` is monotonic seconds."""

    def __init__(
        self,
        runner: Runner,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.runner = runner
        self._max_num_batched_tokens = (
            scheduler_options.max_num_batched_tokens or runner.model.max_num_batched_tokens
        )
        self.scheduler = Scheduler(
            KVCacheManager(runner.num_blocks, runner.block_size, prefix_caching=cache_options.prefix_caching),
            max_num_seqs=scheduler_options.max_num_seqs or runner.model.max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            priority_boost_s=scheduler_options.priority_boost_s,
            mixed_chunk_tokens=scheduler_options.mixed_chunk_tokens,
        )
        self._clock = clock
        self._in_flight: deque[SchedulerOutput] = deque()
        self._last_seq_id = 0
        # Of this engine's lifetime: the cache it names does not outlive it either.
        self._cache_key = os.urandom(KEY_BYTES)
        # Launches and collections in a row that found no memory.
        self._num_failures = 0

    @property
    def has_work(self) -> bool:
        """False when stepping would change nothing."""
        return self.scheduler.has_unfinished or bool(self._in_flight)

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of the largest step."""
        return self._max_num_batched_tokens

    @property
    def num_tokens_under_way(self) -> int:
        """Tokens of the steps that are not collected. May be read on any thread."""
        return sum(planned.num_tokens for planned in tuple(self._in_flight))

    def submit(self, message: Submit) -> None:
        """Turn a request into its `n` sequences."""
        request = message.request
        cache_root = scope_root(self._cache_key, request.tenant, request.cache_salt)
        for index in range(request.sampling.n):
            self._last_seq_id += 1
            self.scheduler.add(_sequence(self._last_seq_id, message.key, index, request, cache_root))

    def abort(self, message: Abort) -> None:
        """End sequences before the next step is planned; their blocks are free at once."""
        self.scheduler.abort(message.key, message.index, _FAILURE_OF_ABORT[message.reason], self._clock())

    def abort_all(self, failure: FailureKind) -> None:
        """End everything."""
        self.scheduler.abort_all(failure, self._clock())

    def flush_cache(self) -> int:
        """Make every cached prefix unfindable; the number of blocks that nobody holds and that had one."""
        return self.scheduler.kv.pool.forget_all()

    def step(self) -> StepOutputs:
        """Plan and launch one step; collect the oldest once the runner has enough under way.

        A step without memory is lost and its sequences come again, fewer at a time. Raises
        StepOutOfMemoryError where that does not help, and whatever else the runner raises: the state of
        model and cache is then unknown, and the caller must not step again.
        """
        started = self._clock()
        planned = self.scheduler.schedule(started)
        if not planned.is_empty:
            self._in_flight.append(planned)
            try:
                self.runner.launch(planned)
            except StepOutOfMemoryError as error:
                self._lose([self._in_flight.pop()], error)
                return self.flush()
        told: tuple[Sequence[SequenceOutput], PlainTokens] = ((), _NO_TOKENS)
        if self._in_flight and (planned.is_empty or len(self._in_flight) >= self.runner.max_in_flight):
            try:
                collected = self.runner.collect()
            except StepOutOfMemoryError as error:
                lost = list(self._in_flight)
                self._in_flight.clear()
                self._lose(lost, error)
                return self.flush()
            self._num_failures = 0
            expected = self._in_flight.popleft()
            assert collected.step == expected.step, "the runner returned another step than the oldest"
            told = self.scheduler.update(collected, self._clock())
        return self.flush(*told, num_tokens=planned.num_tokens, started=started)

    def _lose(self, lost: Sequence[SchedulerOutput], error: StepOutOfMemoryError) -> None:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            raise error
        rows, tokens = len(lost[0].rows), lost[0].num_tokens
        _log.warning("step_out_of_memory", step=lost[0].step, rows=rows, tokens=tokens, detail=str(error))
        self.scheduler.lose(lost, self._clock())

    def flush(
        self,
        news: Sequence[SequenceOutput] = (),
        tokens: PlainTokens = _NO_TOKENS,
        *,
        num_tokens: int = 0,
        started: float = 0.0,
    ) -> StepOutputs:
        """What is to be told now: what a step brought, sequences that ended outside one, and the figures.

        A step that planned `num_tokens` says so, and when it `started`.
        """
        now = self._clock()
        return StepOutputs(
            news=(*self.scheduler.take_ended(), *news),
            stats=self.scheduler.stats(),
            time=now,
            tokens=tokens,
            num_tokens=num_tokens,
            seconds=now - started if num_tokens else 0.0,
        )


def _sequence(seq_id: int, key: int, index: int, request: EngineRequest, cache_root: bytes) -> Request:
    return Request(
        seq_id=seq_id,
        key=key,
        index=index,
        prompt_token_ids=request.prompt_token_ids,
        sampler=SamplerSpec(
            sampling=request.sampling,
            index=index,
            min_tokens=request.min_tokens,
            banned_token_ids=tuple({*request.eos_token_ids, *request.stop_token_ids}),
            top_logprobs=request.top_logprobs,
            # The prompt is the same for all completions; the first one tells of it.
            prompt_top_logprobs=request.prompt_top_logprobs if index == 0 else None,
        ),
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        stop_token_ids=frozenset(request.stop_token_ids),
        eos_token_ids=frozenset(request.eos_token_ids),
        arrival_time=request.arrival_time,
        length_finish=request.length_finish,
        priority=request.priority,
        deadlines=request.deadlines,
        cache_root=cache_root,
        bypass_prefix_cache=request.bypass_prefix_cache,
        tenant=request.tenant,
        weight=request.weight,
        kv_share=request.kv_share,
    )
