"""The engine thread: an inbox, a loop, one hand-off per step, one fatal path.

The runner is built here, by the factory it is given, so that model, cache and device handles belong to
this thread from the start. The inbox needs no bound of its own: the client admits a bounded number of
live requests, and each brings one Submit and at most one Abort per completion and one for the whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import structlog

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.messages import (
    Abort,
    EngineMessage,
    EngineReady,
    EngineStopped,
    FailureKind,
    LoopMessage,
    Shutdown,
    Submit,
)
from photon_grpc.errors import EngineDeadError, PhotonError
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner

_log = structlog.get_logger(__name__)


class EngineThread:
    """Runs an EngineCore until Shutdown or a fault. `deliver` is called on this thread and must not block.

    `clock` is monotonic seconds: the one that the deadlines of requests are given on.
    """

    def __init__(
        self,
        runner_factory: Callable[[], Runner],
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Callable[[LoopMessage], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner_factory = runner_factory
        self._scheduler_options = scheduler_options
        self._cache_options = cache_options
        self._deliver = deliver
        self._clock = clock
        self._inbox: SimpleQueue[EngineMessage] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="photon-engine", daemon=True)

    def start(self) -> None:
        """Begin to build the runner; EngineReady or EngineStopped follows."""
        self._thread.start()

    def post(self, message: EngineMessage) -> None:
        """Put a message into the inbox; acts before the next step is planned. From any thread."""
        self._inbox.put(message)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False if the thread is still alive after `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        error: PhotonError | None = None
        runner: Runner | None = None
        try:
            runner = self._runner_factory()
            self._deliver(EngineReady(runner.model, runner.num_blocks, runner.block_size))
            self._serve(EngineCore(runner, self._scheduler_options, self._cache_options, clock=self._clock))
        except PhotonError as raised:
            error = raised
        except BaseException:  # noqa: BLE001 - the one fatal path; logged, told to every stream
            # Model and cache are in an unknown state: nothing may be computed with them any more.
            _log.exception("engine_died")
            error = EngineDeadError()
        finally:
            # Every stream waits for this, so a device that fails once more must not keep it from coming.
            try:
                if runner is not None:
                    runner.close()
            except Exception:  # noqa: BLE001 - logged; the fault that ended the loop is the one to tell
                _log.exception("runner_not_closed")
            finally:
                self._deliver(EngineStopped(error))

    def _serve(self, core: EngineCore) -> None:
        while True:
            if not core.has_work and self._handle(core, self._inbox.get()):
                return
            while True:
                try:
                    message = self._inbox.get_nowait()
                except Empty:
                    break
                if self._handle(core, message):
                    return
            self._deliver(core.step())

    def _handle(self, core: EngineCore, message: EngineMessage) -> bool:
        """Act on one message; True when the thread is to end."""
        match message:
            case Submit():
                core.submit(message)
            case Abort():
                core.abort(message)
            case Shutdown():
                core.abort_all(FailureKind.DRAINING)
                self._deliver(core.flush())
                return True
        return False
