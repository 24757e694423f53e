"""The engine as the event loop sees it: submit, read, abort.

Everything here runs on the loop; the one way in from the engine's host is `call_soon_threadsafe`, once
per step. A stream never blocks the engine: what arrives while its reader is busy waits in one list.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from photon_grpc.engine.host import HostFactory, Progress, RunnerFactory
from photon_grpc.engine.load import EngineLoad, Throughput
from photon_grpc.engine.messages import (
    Abort,
    AbortReason,
    CacheFlushed,
    EngineReady,
    EngineRequest,
    EngineStats,
    EngineStopped,
    FailureKind,
    FlushCache,
    LoadProgress,
    LoopMessage,
    PlainTokens,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
)
from photon_grpc.engine.pacing import Pace, Rows
from photon_grpc.engine.thread import EngineThread
from photon_grpc.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    EngineStartingError,
    FirstTokenTimeoutError,
    InvalidRequestError,
    MaxDurationError,
    OperatorAbortError,
    OutOfMemoryError,
    OverloadedError,
    PhotonError,
    QueueTimeoutError,
    RequestFaultError,
    RequestNotFoundError,
)
from photon_grpc.options import KVCacheOptions, LimitOptions, SchedulerOptions
from photon_grpc.turns import WAKES_PER_TURN, Waker

_log = structlog.get_logger(__name__)

# A full queue may be so many times as long as its bound, so that each tenant still gets its share of it.
MOST_OVER = 2

_ERROR_OF_FAILURE: dict[FailureKind, Callable[[], PhotonError]] = {
    FailureKind.QUEUE_TIMEOUT: QueueTimeoutError,
    FailureKind.FIRST_TOKEN_TIMEOUT: FirstTokenTimeoutError,
    FailureKind.MAX_DURATION: MaxDurationError,
    FailureKind.REQUEST_FAULT: RequestFaultError,
    FailureKind.OUT_OF_MEMORY: OutOfMemoryError,
    FailureKind.OPERATOR_ABORT: OperatorAbortError,
    FailureKind.DRAINING: EngineDrainingError,
    FailureKind.ENGINE_DEAD: EngineDeadError,
}


def error_of(failure: FailureKind) -> PhotonError:
    """The error that a caller gets for an engine's failure."""
    return _ERROR_OF_FAILURE[failure]()


Take = Callable[[tuple[int, ...]], bool]
"""Takes plain tokens in place of a stream's reader, or leaves them where they are: False."""


class RequestStream:
    """The outputs of one submitted request. Use inside `with`: leaving early aborts what still runs."""

    def __init__(
        self, engine: AsyncEngine, key: int, tenant: str, request_id: str, num_completions: int
    ) -> None:
        self.tenant = tenant
        self.request_id = request_id
        self._engine = engine
        self._key = key
        self._num_open = num_completions
        self._pending: list[SequenceOutput] = []
        # Of `_pending` alone.
        self._num_pending_tokens = 0
        # By index, the plain tokens that came behind what is pending. The lists stay: see `plain_tokens`.
        self._plain: dict[int, list[int]] = {}
        self._last_pending = False
        # The reader must not be kept waiting: for the first outputs, and for an end.
        self.is_urgent = True
        # Between its turns a reader sleeps whatever has come: see `wake`.
        self._is_due = True
        self._waiter: asyncio.Future[None] | None = None
        self._wake_at = 1.0
        self._closed = False
        # See `offer`; with it, the list that plain tokens wait in.
        self._take: Take | None = None
        self._offered: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that have come and are not read yet. May be read on any thread."""
        return self._num_pending_tokens + sum(map(len, tuple(self._plain.values())))

    async def read(self) -> list[SequenceOutput]:
        """Everything new, in order; waits until there is something, and for its turn. One reader at a time.

        Plain tokens that wait together make one output of each completion.
        """
        if not self._has(1):
            await self.wait(1)
        self._merge_plain()
        pending, self._pending = self._pending, []
        self._num_pending_tokens = 0
        self._last_pending = False
        self.is_urgent = self._is_due = False
        self._engine.count_message()
        return pending

    async def wait(self, num_tokens: float, timeout_s: float | None = None) -> None:
        """Return once it is this reader's turn and `num_tokens` are unread, some completion has ended, or
        `timeout_s` has passed."""
        while not self._has(num_tokens):
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiter = waiter
            self._wake_at = num_tokens
            timer = loop.call_later(timeout_s, _wake, waiter) if timeout_s is not None else None
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
            if timer is not None:
                return

    def _has(self, num_tokens: float) -> bool:
        """Whether a reader who wants so many tokens need not wait."""
        if self._last_pending:
            return True
        if num_tokens <= 1 and any(self._plain.values()):
            return self._is_due
        return self._is_due and self.num_pending_tokens >= num_tokens

    def abort_index(self, index: int) -> None:
        """End one completion; its last output still comes."""
        self._engine.post(Abort(self._key, index))

    def close(self) -> None:
        """Forget the request, aborting what is unfinished. Synchronous and idempotent."""
        if self._closed:
            return
        self._closed = True
        # It leads back here: the whole call would wait for the garbage collector.
        self._take = None
        self._engine.forget(self._key, self)
        if self._num_open:
            self._engine.post(Abort(self._key))

    def push(self, output: SequenceOutput) -> None:
        """Take an output without waking the reader; called by the engine client on the loop."""
        if output.is_last:
            self._num_open -= 1
            self._last_pending = True
            self.is_urgent = True
        self._merge_plain()
        self._pending.append(output)
        self._num_pending_tokens += len(output.token_ids)

    def plain_tokens(self, index: int) -> list[int]:
        """Where to append each output of a completion that is one token and nothing else.

        It is the same list for as long as the stream lives, so whoever appends in every step has to look
        for it once.
        """
        return self._plain.setdefault(index, [])

    def _merge_plain(self) -> None:
        for index, token_ids in self._plain.items():
            if token_ids:
                self._pending.append(SequenceOutput(self._key, index, tuple(token_ids)))
                self._num_pending_tokens += len(token_ids)
                token_ids.clear()

    def wake(self) -> None:
        """It is the reader's turn: let it go on if what it waits for is there, or as soon as it asks.

        Without turns a reader that has written would find new tokens whenever the loop is slower than the
        engine, and write again at once: all of the loop's time would go to ever shorter messages.
        """
        self._is_due = True
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._take is not None and not self._pending:
            self._offer(self._take, waiter)
        elif self._has(self._wake_at):
            waiter.set_result(None)

    def offer(self, take: Take) -> None:
        """Offer plain tokens to `take` first, at the turns of a reader that waits for any, so that its task
        is not woken for them. For a stream of one completion.

        What `take` raises, the reader is told in its place.
        """
        assert self._num_open <= 1
        self._take, self._offered = take, self.plain_tokens(0)

    def resume(self) -> None:
        """What was offered may be offered again, if its turn has come."""
        if self._is_due:
            self.wake()

    def _offer(self, take: Take, waiter: asyncio.Future[None]) -> None:
        offered = self._offered
        if not offered:
            return
        try:
            if not take(tuple(offered)):
                return
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - some of Rust are no Exception
            waiter.set_exception(error)
        offered.clear()
        self._is_due = False
        self._engine.count_message()

    def fail(self, failure: FailureKind) -> None:
        """End everything that is still open with `failure`."""
        if self._num_open:
            self._num_open = 1
            self.push(SequenceOutput(key=self._key, index=0, failure=failure))
            self.wake()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class AsyncEngine:
    """Owns the engine's host and every live RequestStream.

    `on_step` hears each snapshot, `on_iteration` the tokens and seconds of each step that computed,
    `on_stopped` the end of the engine, `on_progress` how loading goes on; all on the loop. Of the readers of
    its streams `wakes_per_turn` are woken in a turn of the loop.
    """

    def __init__(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        limits: LimitOptions,
        *,
        on_step: Callable[[EngineStats], None],
        on_stopped: Callable[[PhotonError | None], None],
        on_iteration: Callable[[int, float], None] | None = None,
        on_progress: Progress | None = None,
        make_host: HostFactory = EngineThread,
        wakes_per_turn: int = WAKES_PER_TURN,
    ) -> None:
        self._max_num_seqs = scheduler_options.max_num_seqs
        self._max_queued = limits.max_queued_requests
        self._on_step = on_step
        self._on_iteration = on_iteration
        self._on_stopped = on_stopped
        self._on_progress = on_progress
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host = make_host(runner_factory, scheduler_options, cache_options, self._deliver_from_host)
        self._ready: asyncio.Future[EngineReady] | None = None
        self._stopped: asyncio.Event | None = None
        self._info: EngineReady | None = None
        self._streams: dict[int, RequestStream] = {}
        # By tenant and request_id: an id is unique among its tenant's live requests, and only there.
        self._keys: dict[tuple[str, str], int] = {}
        self._last_key = 0
        self._num_live = 0
        self._pace = Pace(self._host.writing_share)
        # Streams whose readers may have to be woken: those of the latest columns, and others.
        self._rows: Rows[RequestStream] | None = None
        self._unwoken: dict[int, RequestStream] = {}
        self._waker: Waker[RequestStream] = Waker(wakes_per_turn)
        self._stats = EngineStats()
        self._throughput = Throughput(time.monotonic())
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._last_ticket = 0
        self._flushes: dict[int, asyncio.Future[int]] = {}
        self._heartbeat = 0.0
        # Since when there is work, where no step has been made since.
        self._dead = False
        self._draining = False

    def start(self) -> asyncio.Future[EngineReady]:
        """Begin to build the runner where the engine runs; what comes of it, a StartupError maybe."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._stopped = asyncio.Event()
        self._host.start()
        return self._ready

    @property
    def info(self) -> EngineReady:
        """What runs. Raises EngineStartingError before it is known."""
        if self._info is None:
            raise EngineStartingError
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        return self._stats

    def load(self, now: float) -> EngineLoad:
        """The latest snapshot, and how fast it is at `now` (monotonic seconds).

        How long a newcomer waits is for `frontend.admission` to say.
        """
        return EngineLoad(self._stats, self._throughput.rate(now) if self._info is not None else None)

    @property
    def heartbeat(self) -> float:
        """Monotonic moment of the latest step, or of the first request after idleness if that is later."""
        return self._heartbeat

    def heartbeat_age(self) -> float:
        """Seconds for which the engine has had work and made no step; 0 for one that has nothing to do.

        May be read on any thread.
        """
        return max(0.0, time.monotonic() - self._heartbeat) if self._num_live else 0.0

    def num_unread_tokens(self) -> int:
        """Tokens that the readers of all live streams have not taken yet. May be read on any thread."""
        # The copy is one operation of the interpreter, the sum is not: this is read on other threads.
        return sum(stream.num_pending_tokens for stream in tuple(self._streams.values()))

    def check_heartbeat(self, limit_s: float) -> None:
        """Give the engine up if there is work and it has been silent for `limit_s`, whatever became of it."""
        silent_s = self.heartbeat_age()
        if not self._dead and silent_s > limit_s:
            _log.error("engine_silent", seconds=round(silent_s, 1), live=self._num_live)
            self._engine_stopped(EngineDeadError())

    @property
    def process_id(self) -> int | None:
        """The process that the engine has to itself; None where it shares ours, and while there is none."""
        return self._host.process_id

    @property
    def num_live_requests(self) -> int:
        """Submitted requests whose streams are not closed."""
        return len(self._streams)

    @property
    def num_live_completions(self) -> int:
        """Submitted completions whose ends the engine has not told."""
        return self._num_live

    @property
    def max_num_seqs(self) -> int:
        """Completions that run at the same time; 0 before the engine has said so."""
        return self._max_num_seqs

    def check_admission(self) -> None:
        """Raise what `submit` would raise whatever the request is."""
        self.check_state()
        self._check_room(1)

    def check_state(self) -> None:
        """Raise EngineDeadError, EngineDrainingError or EngineStartingError unless requests are taken."""
        if self._dead:
            raise EngineDeadError
        if self._draining:
            raise EngineDrainingError
        if self._info is None:
            raise EngineStartingError

    def _check_room(self, num_completions: int) -> None:
        # What bounds the inbox; `frontend.admission` refuses earlier, and knows when to come back. An idle
        # engine takes any request: one that is larger than the queue could never come otherwise.
        most = self._max_num_seqs + MOST_OVER * self._max_queued
        if self._num_live and self._num_live + num_completions > most:
            raise OverloadedError("the queue is full", retry_after_s=1.0)

    def submit(self, request_id: str, request: EngineRequest) -> RequestStream:
        """Hand a checked request to the engine.

        Raises DuplicateRequestError for an id that is live for the request's tenant, OverloadedError,
        EngineStartingError, EngineDrainingError or EngineDeadError.
        """
        self.check_admission()
        self.check_duplicate(request.tenant, request_id)
        self._check_room(request.sampling.n)
        self._last_key += 1
        key = self._last_key
        stream = RequestStream(self, key, request.tenant, request_id, request.sampling.n)
        self._streams[key] = stream
        self._keys[request.tenant, request_id] = key
        self._pace.num_calls += 1
        if not self._num_live:
            self._heartbeat = time.monotonic()
        self._num_live += request.sampling.n
        self._host.post(Submit(key, request))
        return stream

    def check_duplicate(self, tenant: str, request_id: str) -> None:
        """Raise DuplicateRequestError while a stream of this id is open for this tenant."""
        if (tenant, request_id) in self._keys:
            raise DuplicateRequestError(request_id)

    def abort(self, request_id: str, tenant: str = "") -> int:
        """End a live request for an operator; without a tenant, whosoever it is.

        Raises RequestNotFoundError, and InvalidRequestError for an id that several tenants use at the
        moment where none is named.
        """
        # An operator's question: looking at every live request is cheaper than a second table.
        keys = [
            key
            for (owner, live_id), key in self._keys.items()
            if live_id == request_id and (not tenant or owner == tenant)
        ]
        if not keys:
            raise RequestNotFoundError(request_id)
        if len(keys) > 1:
            raise InvalidRequestError.ambiguous_id()
        self.post(Abort(keys[0], reason=AbortReason.OPERATOR))
        return 1

    def abort_all(self, tenant: str = "") -> int:
        """End every live request for an operator, or every one of a tenant; the number ended."""
        keys = [key for key, stream in self._streams.items() if not tenant or stream.tenant == tenant]
        for key in keys:
            self.post(Abort(key, reason=AbortReason.OPERATOR))
        return len(keys)

    async def flush_cache(self, *, wait_idle: bool) -> int:
        """Forget every cached prefix; the number of blocks that nobody holds and that kept one.

        With `wait_idle` waits until no request lives, for as long as the caller cares to. Raises
        EngineStartingError, EngineDrainingError or EngineDeadError.
        """
        self.check_state()
        loop = asyncio.get_running_loop()
        while wait_idle and self._num_live:
            waiter = loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter
            self.check_state()
        self._last_ticket += 1
        ticket = self._last_ticket
        answer: asyncio.Future[int] = loop.create_future()
        self._flushes[ticket] = answer
        self._host.post(FlushCache(ticket))
        try:
            return await answer
        finally:
            del self._flushes[ticket]

    def drain(self) -> None:
        """Refuse new requests from now on; live ones go on."""
        self._draining = True

    async def stop(self, timeout_s: float = 10.0) -> bool:
        """End every request and the engine; False if it did not end by itself within `timeout_s`."""
        self._draining = True
        if self._stopped is None:
            return True
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout_s
        self._host.post(Shutdown())
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout_s)
        except TimeoutError:
            if self._info is None:
                _log.warning("engine_left_loading")
            else:
                _log.error("engine_did_not_stop", timeout_s=timeout_s)
        return await loop.run_in_executor(None, self._host.join, max(0.0, give_up_at - loop.time()))

    def post(self, message: Abort) -> None:
        """Send an abort to the engine; harmless once it has ended."""
        self._host.post(message)

    def count_message(self) -> None:
        """A reader has taken something, which becomes a message."""
        self._pace.num_messages += 1

    def forget(self, key: int, stream: RequestStream) -> None:
        """Drop a stream that has just been closed; late outputs of it are ignored."""
        del self._streams[key]
        self._pace.num_calls += 1
        if self._rows is not None and key in self._rows.streams:
            self._leave_rows(self._rows)
        self._unwoken.pop(key, None)
        self._waker.forget(key)
        del self._keys[stream.tenant, stream.request_id]

    # --- from the engine ------------------------------------------------------------------------

    def _deliver_from_host(self, message: LoopMessage) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, message)

    def _deliver(self, message: LoopMessage) -> None:
        if self._dead:
            return  # an engine that was given up, and that comes back after all
        match message:
            case StepOutputs():
                self._deliver_step(message)
            case LoadProgress(done, total):
                if self._on_progress is not None:
                    self._on_progress(done, total)
            case EngineReady():
                self._info = message
                self._max_num_seqs = self._max_num_seqs or message.model.max_num_seqs
                self._throughput = Throughput(time.monotonic())
                # Nothing has run yet, and the size of the pool is already true.
                self._stats = EngineStats(kv_blocks_total=message.num_blocks, block_size=message.block_size)
                self._on_step(self._stats)
                assert self._ready is not None
                if not self._ready.done():
                    self._ready.set_result(message)
            case CacheFlushed(ticket, blocks_freed):
                answer = self._flushes.get(ticket)
                if answer is not None and not answer.done():
                    answer.set_result(blocks_freed)
            case EngineStopped(error):
                self._engine_stopped(error)

    def _deliver_step(self, message: StepOutputs) -> None:
        self._stats = message.stats
        self._heartbeat = message.time
        self._on_step(message.stats)
        if message.num_tokens and self._on_iteration is not None:
            self._on_iteration(message.num_tokens, message.seconds)
        pace, streams, waker = self._pace, self._streams, self._waker
        # Those that wait for a place in the batch have nothing to write.
        pace.step(message.time, min(len(streams), message.stats.running))
        unwoken = self._unwoken
        num_ended = 0
        for output in message.news:
            if output.is_last:
                num_ended += 1
            stream = streams.get(output.key)
            if stream is None:
                continue
            stream.push(output)
            if stream.is_urgent:
                waker.add(output.key, stream)
            else:
                unwoken[output.key] = stream
        if message.tokens.keys:
            self._rows_of(message.tokens).push(message.tokens.token_ids)
        self._num_live -= num_ended
        self._throughput.observe(message.time, message.stats.generation_tokens)
        if num_ended and not self._num_live:
            self._wake_idle_waiters()
        # Also those whose tokens came in an earlier step: a sequence may pause after any token.
        for key in pace.due(unwoken):
            waker.add(key, unwoken.pop(key))
        if self._rows is not None:
            for key, stream in self._rows.due(pace):
                waker.add(key, stream)
        waker.start()

    def _rows_of(self, tokens: PlainTokens) -> Rows[RequestStream]:
        rows = self._rows
        if rows is None or rows.keys != tokens.keys or rows.indices != tokens.indices:
            if rows is not None:
                self._leave_rows(rows)
            rows = self._rows = Rows(tokens, self._streams)
        return rows

    def _leave_rows(self, rows: Rows[RequestStream]) -> None:
        """Their tokens may not have been told of yet, and perhaps none will follow for a while."""
        self._unwoken.update(rows.streams)
        self._rows = None

    def _wake_idle_waiters(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            _wake(waiter)

    def _engine_stopped(self, error: PhotonError | None) -> None:
        assert self._ready is not None
        assert self._stopped is not None
        self._dead = True
        if not self._ready.done():
            self._ready.set_exception(error or EngineDeadError())
        for stream in list(self._streams.values()):
            stream.fail(FailureKind.DRAINING if error is None else FailureKind.ENGINE_DEAD)
        self._num_live = 0
        self._wake_idle_waiters()
        for answer in self._flushes.values():
            if not answer.done():
                answer.set_exception(EngineDrainingError() if error is None else EngineDeadError())
        self._stopped.set()
        self._on_stopped(error)
