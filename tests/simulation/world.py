"""The world around one engine in virtual time: callers, readers, an operator, and a clock that jumps.

The engine's own loop runs, on the simulator's thread. Its inbox is what turns control round: when the
engine asks for messages, the world goes on until there is one, and when a step is over, everything
that was due meanwhile happens. No thread, no waiting, no chance: a scenario runs the same every time.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import structlog

from photon_grpc.engine import loop
from photon_grpc.engine.client import MOST_OVER, AsyncEngine, RequestStream
from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.messages import (
    Deadlines,
    EngineMessage,
    EngineRequest,
    EngineStopped,
    FailureKind,
    LoopMessage,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
)
from photon_grpc.engine.watchdog import StepWatchdog
from photon_grpc.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    OverloadedError,
    PhotonError,
)
from photon_grpc.options import KVCacheOptions, LimitOptions, SchedulerOptions
from tests.simulation.judge import Completion, Judge
from tests.simulation.runner import CheckingRunner, DeviceLostError
from tests.simulation.scenario import Call, Event, Happening, Leave, Scenario, State, Way
from tests.support.builders import FakeClock, sampling

MAX_STEPS = 5000
_serve = loop._serve


class _Host:
    """Implements `engine.host.EngineHost`: the engine's loop, run by whoever calls `run`, in `world`.

    Remembers what ended it.
    """

    writing_share = 0.5
    process_id = None

    def __init__(
        self,
        world: World,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
    ) -> None:
        self.core: EngineCore | None = None
        self.fault: BaseException | None = None
        self.deliver_to_loop = deliver
        self._world = world
        self._setup = (runner_factory, scheduler_options, cache_options)

    def start(self) -> None:
        """Nothing: `run` is called when the world is ready."""

    def post(self, message: EngineMessage) -> None:
        self._world.put(message)

    def join(self, timeout_s: float) -> bool:
        return True

    def run(self, clock: Callable[[], float]) -> None:
        with patch.object(loop, "_serve", self._serve):
            loop.run_engine(*self._setup, self._world, self._world.deliver, clock=clock)

    def _serve(self, core: EngineCore, inbox: loop.Inbox, deliver: Deliver, watchdog: StepWatchdog) -> None:
        self.core = core
        try:
            _serve(core, inbox, deliver, watchdog)
        except BaseException as fault:
            self.fault = fault
            raise


class _Inline:
    """In place of an event loop: what the engine hands over happens at once."""

    @staticmethod
    def is_closed() -> bool:
        return False

    @staticmethod
    def call_soon_threadsafe(callback: Callable[..., object], *arguments: Any) -> None:
        callback(*arguments)


class _Caller:
    """The reader of one stream. Compares what it reads with what left the engine."""

    def __init__(self, call: Call, stream: RequestStream, completions: list[Completion]) -> None:
        self.call = call
        self.stream = stream
        self.completions = completions
        self.leave: Leave | None = call.leave
        # Last outputs that were read.
        self.num_last = 0
        self._pieces: list[SequenceOutput] = []

    def read(self) -> None:
        """Take what is there, without waiting."""
        reading = self.stream.read()
        try:
            reading.send(None)
        except StopIteration as done:
            self._pieces.extend(done.value)
            self.num_last += sum(piece.is_last for piece in done.value)
        else:
            reading.close()

    def check(self) -> None:
        """Everything that left the engine was read, once, in order, each completion to its one end."""
        for completion in self.completions:
            pieces = [piece for piece in self._pieces if piece.index == completion.index]
            if completion.is_live:
                continue
            pieces = pieces[: 1 + next(i for i, piece in enumerate(pieces) if piece.is_last)]
            assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids
            assert completion.last is not None
            assert pieces[-1].finish == completion.last.finish
            assert pieces[-1].failure == completion.last.failure

    def check_dead(self, failure: FailureKind) -> None:
        """One failure, last of all, stands for every completion that was open when the engine stopped."""
        num_ended = sum(not completion.is_live for completion in self.completions)
        if num_ended == len(self.completions):
            assert self.num_last == num_ended
            return
        assert self.num_last == num_ended + 1, f"call {self.call.number} was not told that the engine stopped"
        assert self._pieces[-1].failure is failure


class World:
    """One scenario from its first call to the engine's end. `run` raises what goes wrong."""

    def __init__(self, scenario: Scenario, trace: list[str] | None = None) -> None:
        self._scenario = scenario
        self._clock = FakeClock(0.0)
        self._runner = CheckingRunner(scenario, {call.number: call for call in scenario.calls}, self._clock)
        self._judge = Judge(scenario, self._runner, self._clock, trace)
        self._limits = LimitOptions(max_queued_requests=scenario.max_queued)
        scheduler = SchedulerOptions(
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            mixed_chunk_tokens=scenario.mixed_chunk_tokens,
            priority_boost_s=scenario.priority_boost_s,
        )
        cache = KVCacheOptions(prefix_caching=scenario.prefix_caching)
        self._engine = AsyncEngine(
            lambda progress: self._runner,
            scheduler,
            cache,
            self._limits,
            on_step=lambda stats: None,
            on_stopped=self._hear_stopped,
            make_host=self._make_host,
        )
        self._messages: deque[EngineMessage] = deque()
        # The engine has acted on messages since its books were last checked.
        self._has_handed_in = False
        things: list[Call | Event] = [*scenario.calls, *scenario.events]
        self._due = [(thing.at, number, thing) for number, thing in enumerate(things)]
        heapq.heapify(self._due)
        # The call that is being submitted, and what the judge has made of it.
        self._submitting: Call | None = None
        self._submitted: list[Completion] = []
        self._callers: dict[int, _Caller] = {}
        self._open_ids: set[tuple[str, str]] = set()
        self.num_steps = 0
        self._is_draining = False
        # What the scenario has led to: ends, refusals, states in which calls were left, happenings.
        self.reached: set[object] = set()
        self._stopped: list[EngineStopped] = []
        self._heard: list[PhotonError | None] = []

    def _make_host(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
    ) -> _Host:
        self._host = _Host(self, runner_factory, scheduler_options, cache_options, deliver)
        return self._host

    async def run(self) -> None:
        """Run to the end. Raises AssertionError, or whatever the engine raised, where something is wrong."""
        starting = asyncio.ensure_future(self._engine.start())
        await asyncio.sleep(0)
        self._engine._loop = _Inline()  # type: ignore[assignment]
        with structlog.testing.capture_logs() as logs:
            self._host.run(self._clock)
        self._raise_fault()
        await starting
        self._check_end({str(entry["event"]) for entry in logs})

    # --- the engine's inbox ---------------------------------------------------------------------

    def put(self, message: EngineMessage) -> None:
        """A message for the engine."""
        if isinstance(message, Submit):
            assert self._submitting is not None
            self._submitted = self._judge.submitted(message.key, self._submitting)
        self._messages.append(message)

    def take(self, *, wait: bool) -> Iterator[EngineMessage]:
        """With `wait` the engine is idle; else it asks before each step."""
        if wait:
            self._go_on()
            yield self._hand_in()
        while True:
            if self._has_handed_in:
                self._check_books()
            if not self._messages:
                break
            yield self._hand_in()
        self._judge.step_begins()

    def _go_on(self) -> None:
        """Let the world go on until something reaches the engine."""
        self._judge.idle()
        assert not self._core.scheduler._ended_in_flight, "results are awaited that never come"
        kv = self._core.scheduler.kv
        assert kv.num_free_blocks == kv.pool.num_blocks, "an idle engine holds blocks"
        while not self._messages:
            if self._due:
                self._clock.now = max(self._clock.now, self._due[0][0])
                self._happen_due()
            else:
                self._messages.append(Shutdown())

    def _hand_in(self) -> EngineMessage:
        self._has_handed_in = True
        message = self._messages.popleft()
        self._judge.handed_in(message)
        return message

    @property
    def _core(self) -> EngineCore:
        assert self._host.core is not None
        return self._host.core

    def _check_books(self) -> None:
        self._core.scheduler.check_invariants()
        self._has_handed_in = False

    # --- what comes from the engine -------------------------------------------------------------

    def deliver(self, message: LoopMessage) -> None:
        """Let the judge see it, the client, and everybody who acts on it."""
        if self._is_broken:
            return
        assert not self._stopped, "something came after the end of the engine"
        if isinstance(message, StepOutputs):
            self._judge.stepped(message)
            self._check_books()
        elif isinstance(message, EngineStopped):
            self._stopped.append(message)
        self._host.deliver_to_loop(message)
        if isinstance(message, StepOutputs):
            self.num_steps += 1
            assert self.num_steps <= MAX_STEPS, "the engine never gets done"
            self._callers_act()
            self._happen_due()

    @property
    def _is_broken(self) -> bool:
        return self._host.fault is not None and not isinstance(self._host.fault, DeviceLostError)

    def _raise_fault(self) -> None:
        if self._host.fault is not None and self._is_broken:
            raise self._host.fault

    def _hear_stopped(self, error: PhotonError | None) -> None:
        self._heard.append(error)

    # --- callers --------------------------------------------------------------------------------

    def _callers_act(self) -> None:
        for caller in list(self._callers.values()):
            if self.num_steps % caller.call.read_every == 0:
                caller.read()
            if caller.num_last == caller.call.n:
                caller.check()
                self._close(caller)
            elif caller.leave is not None and self._is_in(caller, caller.leave):
                leave, caller.leave = caller.leave, None
                self.reached |= {leave.state, leave.way}
                self._leave(caller, leave.way)

    def _is_in(self, caller: _Caller, leave: Leave) -> bool:
        completion = caller.completions[-1]
        if not completion.is_live or len(completion.token_ids) < leave.tokens:
            return False
        row = None if completion.seq_id is None else self._runner.rows.get(completion.seq_id)
        match leave.state:
            case State.QUEUED:
                return completion.first_launch is None
            case State.MID_CHUNK:
                return row is not None and row.num_outputs == 0
            case State.DECODING:
                return row is not None and bool(completion.token_ids)
            case State.PREEMPTED:
                return row is None and completion.num_preemptions > 0
            case State.IN_FLIGHT:
                return completion.seq_id in self._runner.uncollected

    def _leave(self, caller: _Caller, way: Way) -> None:
        self._judge.note(f"call {caller.call.number} is left: {way.name}")
        match way:
            case Way.CLOSE:
                self._close(caller)
            case Way.ONE_COMPLETION:
                caller.stream.abort_index(caller.call.n - 1)
            case Way.OPERATOR:
                assert self._engine.abort(caller.call.request_id, caller.call.tenant) == 1

    def _close(self, caller: _Caller) -> None:
        caller.stream.close()
        for completion in caller.completions:
            completion.is_left = True
        self._open_ids.discard((caller.call.tenant, caller.call.request_id))
        del self._callers[caller.call.number]

    # --- what happens when its time has come ----------------------------------------------------

    def _happen_due(self) -> None:
        while self._due and self._due[0][0] <= self._clock.now:
            _, _, thing = heapq.heappop(self._due)
            if isinstance(thing, Call):
                self._submit(thing)
            else:
                self._happen(thing)

    def _happen(self, event: Event) -> None:
        self.reached.add(event.what)
        self._judge.note(f"{event.what.name} {event.seconds or ''}")
        match event.what:
            case Happening.JUMP:
                self._clock.advance(event.seconds)
            case Happening.JUMP_TO_DEADLINE:
                self._clock.now = self._judge.next_deadline()
            case Happening.ABORT_ALL:
                assert self._engine.abort_all() == len(self._callers)
            case Happening.DRAIN:
                self._is_draining = True
                self._engine.drain()
            case Happening.SHUTDOWN:
                self._is_draining = True
                self._engine.drain()
                self._host.post(Shutdown())

    def _submit(self, call: Call) -> None:
        expected = self._expected_refusal(call)
        refusal: type[PhotonError] | None = None
        self._submitting = call
        try:
            stream = self._engine.submit(call.request_id, _engine_request(call))
        except PhotonError as error:
            refusal = type(error)
        self._submitting = None
        assert refusal is expected, f"call {call.number}: refused with {refusal}, expected {expected}"
        if refusal is not None:
            self.reached.add(refusal)
            self._judge.note(f"call {call.number} is refused: {refusal.__name__}")
            return
        self._open_ids.add((call.tenant, call.request_id))
        self._callers[call.number] = _Caller(call, stream, self._submitted)

    def _expected_refusal(self, call: Call) -> type[PhotonError] | None:
        num_live = len(self._judge.live)
        room = self._scenario.max_num_seqs + MOST_OVER * self._scenario.max_queued
        if self._stopped:
            return EngineDeadError
        if self._is_draining:
            return EngineDrainingError
        if num_live and num_live + 1 > room:
            return OverloadedError
        if (call.tenant, call.request_id) in self._open_ids:
            return DuplicateRequestError
        if num_live and num_live + call.n > room:
            return OverloadedError
        return None

    # --- the end --------------------------------------------------------------------------------

    def _check_end(self, logged: set[str]) -> None:
        crashed = self._host.fault is not None
        assert len(self._stopped) == 1, "the end of the engine was not told exactly once"
        assert self._heard == [self._stopped[0].error]
        assert isinstance(self._stopped[0].error, EngineDeadError) == crashed
        assert self._runner.num_closed == 1
        assert ("engine_died" in logged) == crashed
        assert ("runner_not_closed" in logged) == self._scenario.close_fails
        if not crashed:
            assert self._core.scheduler.kv.pool.num_used == 0, "the engine ended with blocks held"
            assert not any(completion.handed_in for completion in self._judge.live)
        self.reached |= self._judge.reached
        if crashed and self._scenario.crash is not None:
            self.reached.add(self._scenario.crash[0])
        failure = FailureKind.ENGINE_DEAD if crashed else FailureKind.DRAINING
        for caller in list(self._callers.values()):
            caller.read()
            caller.check()
            caller.check_dead(failure)
            self._close(caller)
        assert self._engine.num_live_requests == 0
        while self._due:
            self._clock.now = max(self._clock.now, self._due[0][0])
            self._happen_due()
        assert not self._callers


def _engine_request(call: Call) -> EngineRequest:
    clocks = (call.start_within, call.first_token_within, call.end_within, call.finish_within)
    return EngineRequest(
        prompt_token_ids=call.prompt,
        sampling=sampling(n=call.n, seed=call.number),
        max_tokens=call.max_tokens,
        min_tokens=call.min_tokens,
        stop_token_ids=call.stop_ids,
        eos_token_ids=call.eos_ids,
        arrival_time=call.at,
        length_finish=call.length_finish,
        priority=call.priority,
        deadlines=Deadlines(*(None if within is None else call.at + within for within in clocks)),
        top_logprobs=call.top_logprobs,
        prompt_top_logprobs=call.prompt_top_logprobs,
        cache_salt=call.salt,
        tenant=call.tenant,
        weight=call.weight,
        kv_share=call.kv_share,
        bypass_prefix_cache=call.bypass_prefix_cache,
    )
