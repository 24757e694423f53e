"""The engine on a thread of this process, which shares the interpreter lock with the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.loop import run_engine
from photon_grpc.engine.messages import EngineMessage
from photon_grpc.options import KVCacheOptions, SchedulerOptions


class EngineThread:
    """Implements `engine.host.EngineHost`. `deliver` is called on this thread and must not block.

    A step that hangs by `step_timeout_s` is given up: EngineStopped comes on the watchdog's thread, and this
    one is left behind.
    """

    # While the loop holds the interpreter lock no step is planned.
    writing_share = 0.5

    def __init__(
        self,
        runner_factory: RunnerFactory,
        scheduler_options: SchedulerOptions,
        cache_options: KVCacheOptions,
        deliver: Deliver,
        *,
        step_timeout_s: float = 0.0,
    ) -> None:
        self._inbox = _QueueInbox()
        self._thread = threading.Thread(
            target=run_engine,
            args=(runner_factory, scheduler_options, cache_options, self._inbox, deliver),
            kwargs={"step_timeout_s": step_timeout_s},
            name="photon-engine",
            daemon=True,
        )

    @property
    def process_id(self) -> None:
        """None: the engine shares our process."""
        return

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


class _QueueInbox:
    """Implements `engine.loop.Inbox`."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[EngineMessage] = SimpleQueue()

    def put(self, message: EngineMessage) -> None:
        self._queue.put(message)

    def take(self, *, wait: bool) -> Iterator[EngineMessage]:
        if wait:
            yield self._queue.get()
        while True:
            try:
                yield self._queue.get_nowait()
            except Empty:
                return
