"""The engine in a process of its own, as the event loop sees it.

The event loop's process then needs neither torch nor the device, and the two share no interpreter lock.
What the child runs is `child.py`. Everything here happens on the event loop but `join`. A child that ends
without having said so is a dead engine.
"""

from __future__ import annotations

import structlog

from photon_grpc.engine.child import EngineSetup
from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.messages import EngineMessage, EngineReady, EngineStopped, LoopMessage, Shutdown
from photon_grpc.errors import EngineDeadError, StartupError
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.processes.parent import ChildProcess
from photon_grpc.processes.spawn import SpawnedChild, spawn

__all__ = ["EngineProcess", "SpawnedChild", "spawn_engine"]

_log = structlog.get_logger(__name__)

_CHILD = "photon_grpc.engine.child"
# The engine can begin with the prompts of so many calls; the loop takes a few milliseconds for them.
_MOST_POSTED = 8


def spawn_engine(setup: EngineSetup, ahead: SpawnedChild | None = None) -> SpawnedChild:
    """Begin an engine's process before there is an event loop to serve it. Raises StartupError.

    With `ahead`, which waits for a setup, it is that one.
    """
    try:
        if ahead is None:
            return spawn(_CHILD, (setup,))
        ahead.send((setup,))
        return ahead
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StartupError(f"the engine's process cannot start: {reason}") from error


class EngineProcess:
    """Implements `engine.host.EngineHost`. `deliver` is called on the event loop that `start` ran on."""

    # The rest is for calls that begin and end.
    writing_share = 0.85

    def __init__(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
        *,
        step_timeout_s: float = 0.0,
        spawned: SpawnedChild | None = None,
    ) -> None:
        """`spawned` is a process that was begun ahead with this very setup."""
        self._spawned = spawned
        self._setup = EngineSetup(runner_factory, scheduler_options, cache_options, step_timeout_s)
        self._deliver = deliver
        self._child = ChildProcess("engine", _CHILD, self._receive, self._on_end, most_posted=_MOST_POSTED)
        self._is_ready = False
        self._is_discarded = False
        self._has_stopped = False

    @property
    def process_id(self) -> int | None:
        """The child's; None before `start`, and once it is reaped, when the number may be another's."""
        return self._child.process_id

    def start(self) -> None:
        """Spawn the child where it was not; EngineReady or EngineStopped follows."""
        try:
            self._child.adopt(self._spawned or spawn_engine(self._setup))
        except StartupError as error:
            self._deliver(EngineStopped(error))

    def post(self, message: EngineMessage) -> None:
        """Send a message, together with whatever else this turn of the loop posts."""
        if isinstance(message, Shutdown) and not self._is_ready and self._child.process_id is not None:
            # It would hear of it when it has loaded a model for nobody.
            self._is_discarded = True
            self._child.kill()
            return
        self._child.post(message)

    def join(self, timeout_s: float) -> bool:
        """Wait for the child's end; False for one that had not ended after `timeout_s` and was killed."""
        return self._child.join(timeout_s)

    def _receive(self, messages: list[LoopMessage]) -> None:
        for message in messages:
            match message:
                case EngineReady():
                    self._is_ready = True
                case EngineStopped():
                    self._has_stopped = True
            self._deliver(message)

    def _on_end(self, error: Exception | None) -> None:
        """The child has closed its end: it is leaving as it said, or it has died."""
        if error is not None:
            _log.error("engine_process_not_understood", exc_info=error)
            self._child.kill()
        if self._has_stopped:
            return
        self._has_stopped = True
        if self._is_discarded:
            self._deliver(EngineStopped(None))
        else:
            _log.error("engine_process_died", pid=self.process_id)
            self._deliver(EngineStopped(EngineDeadError()))
