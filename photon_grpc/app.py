"""The composition root: Options -> a running service -> an exit code.

The one place that knows every room. Objects are wired here, in the order in which a request meets
them, and taken down in the opposite one.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import uvloop

import photon_grpc
from photon_grpc.engine.client import AsyncEngine
from photon_grpc.engine.host import Progress
from photon_grpc.engine.messages import EngineReady
from photon_grpc.engine.process import EngineProcess, SpawnedChild
from photon_grpc.engine.thread import EngineThread
from photon_grpc.engine.watchdog import LATE_S, STDERR, longest_step_s
from photon_grpc.engine_place import engine_setup, has_own_process, model_folder
from photon_grpc.errors import PhotonError
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.generator import Generator
from photon_grpc.frontend.text_pool import TextPool
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import Options
from photon_grpc.processes.collector import paused_collector, quiet_collector
from photon_grpc.server.server import BoundPorts, Server
from photon_grpc.stages import Stages, process_begun
from photon_grpc.telemetry.call_record import CallRecord
from photon_grpc.telemetry.logging import flush_logs, num_dropped_records
from photon_grpc.telemetry.loop_lag import LoopLag
from photon_grpc.telemetry.metrics import Metrics, MetricsServer
from photon_grpc.turns import WAKES_PER_TURN

if TYPE_CHECKING:
    from photon_grpc.telemetry.otlp import OtlpExport

_log = structlog.get_logger(__name__)

_ENGINE_STOP_S = 10.0
# One that is dead has nothing to finish, and its thread or process may hang; one that loads cannot be
# interrupted where it is a thread, and ends with the process.
_IDLE_ENGINE_STOP_S = 2.0
# From the engine's death to the end of the process at the latest, even if it hangs on the way.
_LEAVE_S = 20.0
_GUARD_INTERVAL_S = 1.0
# Where the number of acceptors is left to us.
_MIN_CORES, _CORES_PER_ACCEPTOR, _MOST_ACCEPTORS = 8, 4, 4
# Readers that are woken in a turn of the loop where calls are accepted elsewhere.
_WAKES_BESIDE_ACCEPTORS = 128


@dataclass(frozen=True, slots=True)
class RunningService:
    """Where a service that answers can be reached, and what it serves."""

    ports: BoundPorts
    metrics_port: int | None
    engine: EngineReady


def num_acceptors(options: Options) -> int:
    """How many processes take the public listener's connections; 0 where the event loop does it itself.

    A message costs the loop several times as much inside grpc as outside of it, which is too much for what
    a GPU sends and no matter for what a CPU does. Never more than there may be connections: each has its
    share of those.
    """
    server = options.server
    if server.acceptors:
        return max(0, min(server.acceptors, server.max_connections))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < _MIN_CORES or not has_own_process(options):
        return 0
    return min(cores // _CORES_PER_ACCEPTOR, _MOST_ACCEPTORS, server.max_connections)


def wakes_per_turn(options: Options) -> int:
    """How many readers of streams are woken in one turn of the event loop."""
    return _WAKES_BESIDE_ACCEPTORS if num_acceptors(options) else WAKES_PER_TURN


class InferenceStack:
    """Engine and front door, without a transport; the event loop's half of the house.

    Raises ConfigError or ModelLoadError when the model folder is not there.
    """

    def __init__(
        self,
        options: Options,
        *,
        on_stopped: Callable[[PhotonError | None], None],
        metrics: Metrics,
        field_root: str = "spec.",
        progress: Progress | None = None,
        spawned_engine: SpawnedChild | None = None,
        spare_torch: bool = False,
    ) -> None:
        """`spawned_engine` is of `engine_place.early_engine`. With `spare_torch` nothing in this process but
        the engine has a use for torch.
        """
        setup = engine_setup(options)
        self._folder = model_folder(options.model)
        self.has_own_process = has_own_process(options)
        self._spare_torch = spare_torch or self.has_own_process
        self._text_pool = TextPool(options.server.text_threads)
        self.engine = AsyncEngine(
            setup.runner_factory,
            setup.scheduler_options,
            setup.cache_options,
            options.limits,
            on_step=metrics.observe_step,
            on_iteration=metrics.observe_iteration,
            on_stopped=on_stopped,
            on_progress=progress,
            make_host=(
                partial(EngineProcess, step_timeout_s=options.engine.step_timeout_s, spawned=spawned_engine)
                if self.has_own_process
                else partial(EngineThread, step_timeout_s=options.engine.step_timeout_s)
            ),
            wakes_per_turn=wakes_per_turn(options),
        )
        metrics.watch_engine(self.engine.heartbeat_age, self.engine.num_unread_tokens)
        if self.has_own_process:
            metrics.watch_engine_process(lambda: self.engine.process_id)
        self._metrics = metrics
        self._cache_options = options.cache
        self.generator = Generator(
            self.engine,
            options.limits,
            self._text_pool,
            metrics=metrics,
            tenants=options.tenants,
            field_root=field_root,
        )

    async def start(self, on_text_loaded: Callable[[], None] | None = None) -> EngineReady:
        """Load tokenizer and model and warm up. Raises StartupError.

        `on_text_loaded` is called where there is nothing more to do in this process but to wait for another.
        """
        if self.has_own_process:
            # Side by side: the two processes need nothing of each other, and only the engine's imports torch.
            starting = self.engine.start()
            loading = asyncio.ensure_future(self._load_tokenizer())
            if on_text_loaded is not None:
                loading.add_done_callback(lambda _: on_text_loaded())
            tokenizer, ready = await asyncio.gather(loading, starting)
        else:
            tokenizer = await self._load_tokenizer()
            ready = await self.engine.start()
        self._metrics.set_cache_config(
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            prefix_caching=self._cache_options.prefix_caching,
        )
        self.generator.activate(tokenizer, ChatRenderer(tokenizer))
        return ready

    async def _load_tokenizer(self) -> Tokenizer:
        load = partial(Tokenizer.load, self._folder, spare_torch=self._spare_torch)
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, load)

    async def stop(self, timeout_s: float = _ENGINE_STOP_S) -> bool:
        """End every request and the engine; False if it had to be given up after `timeout_s`."""
        stopped = await self.engine.stop(timeout_s)
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        return stopped


async def serve(
    options: Options,
    *,
    ready: Callable[[RunningService], None] | None = None,
    progress: Progress | None = None,
    spawned_engine: SpawnedChild | None = None,
    begun: float | None = None,
) -> int:
    """Run the service until SIGTERM, SIGINT or the engine's death; the exit code.

    0 after a drain, 1 when the engine died. `ready` is called once the service answers. `spawned_engine` is
    of `engine_place.early_engine` with the same options, `begun` the monotonic moment that its start is
    counted from. Raises StartupError, with nothing left running, when it never comes to that.
    """
    stages = Stages(begun)
    stages.ended("process")
    leave = asyncio.Event()
    died: list[PhotonError] = []
    metrics = Metrics(photon_grpc.__version__)

    def engine_stopped(error: PhotonError | None) -> None:
        if error is not None:
            died.append(error)
            server.set_dead()
        leave.set()

    stack = InferenceStack(
        options,
        on_stopped=engine_stopped,
        metrics=metrics,
        progress=progress,
        spawned_engine=spawned_engine,
        spare_torch=True,
    )
    otlp: OtlpExport | None = None
    observers: list[Callable[[CallRecord], None]] = [metrics.observe_call]
    if options.telemetry.otlp_endpoint:
        # Imported for those alone who want it.
        from photon_grpc.telemetry.call_trace import CallTrace
        from photon_grpc.telemetry.otlp import OtlpExport

        otlp = OtlpExport(options.telemetry.otlp_endpoint, photon_grpc.__version__)
        metrics.watch_spans(otlp.num_dropped_spans)
        place = options.server
        observers.append(CallTrace(otlp.tracers, otlp.meters, address=place.host, port=place.port).observe)
    server = Server(
        stack.generator,
        options,
        call_observers=observers,
        certificate_observer=metrics,
        num_acceptors=num_acceptors(options),
        on_acceptor_death=metrics.observe_acceptor_died,
    )
    if num_acceptors(options):
        metrics.watch_acceptors(lambda: server.acceptor_process_ids)
    lag = LoopLag()
    metrics.watch_loop(lag.seconds)
    metrics.watch_log(num_dropped_records)
    lag.start()
    exposition: MetricsServer | None = None
    guard: asyncio.Task[None] | None = None
    engine: EngineReady | None = None
    starting: asyncio.Future[EngineReady] | None = None
    _on_signals(leave, server)
    try:
        if stack.has_own_process:
            # What takes longest comes first, and the listeners come up beside it.
            starting = asyncio.ensure_future(stack.start(quiet_collector))
            await asyncio.sleep(0)
        ports = await server.start()
        stages.ended("listeners")
        if options.server.metrics_port >= 0:
            exposition = MetricsServer(metrics, options.server.metrics_host, options.server.metrics_port)
        starting = starting or asyncio.ensure_future(stack.start())
        engine = await _ready_or_left(starting, leave, died)
        if engine is not None:
            quiet_collector()
            server.set_serving()
            stages.ended("engine")
            _log.info(
                "serving",
                model=engine.model.name,
                port=ports.public,
                kv_tokens=engine.num_blocks * engine.block_size,
                seconds=stages.total_s,
                stages=stages.seconds(),
            )
            guard = asyncio.create_task(_guard(stack.engine, options.engine.step_timeout_s))
            if ready is not None:
                ready(RunningService(ports, exposition.port if exposition else None, engine))
            await leave.wait()
        if died:
            _log.error("engine died, leaving", error=str(died[0]))
            _end_within(_LEAVE_S)
            await server.stop()
        else:
            await server.drain()
    finally:
        if starting is not None:
            _abandon(starting)
        if guard is not None:
            guard.cancel()
        _end_within(_LEAVE_S)
        await server.stop()
        has_work = engine is not None and not died
        stopped = await stack.stop(_ENGINE_STOP_S if has_work else _IDLE_ENGINE_STOP_S)
        faulthandler.cancel_dump_traceback_later()
        if exposition is not None:
            exposition.close()
        lag.stop()
        if otlp is not None:
            await asyncio.get_running_loop().run_in_executor(None, otlp.close)
    return 1 if died or (has_work and not stopped) else 0


async def _guard(engine: AsyncEngine, step_timeout_s: float) -> None:
    """Hold engine and event loop to their word for as long as the service runs.

    An engine that says nothing for longer than a full step may take is dead, also if its own watchdog
    cannot say so: its process may be frozen. A loop that does not come round ends the process.
    """
    if not step_timeout_s:
        return
    limit_s = longest_step_s(step_timeout_s) + LATE_S
    while True:
        _end_within(limit_s)
        await asyncio.sleep(_GUARD_INTERVAL_S)
        engine.check_heartbeat(limit_s)


def _end_within(seconds: float) -> None:
    """Write every stack and end the process with 1 after `seconds`; in place of what was set before."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


async def _ready_or_left(
    starting: asyncio.Future[EngineReady], leave: asyncio.Event, died: list[PhotonError]
) -> EngineReady | None:
    """What the stack's start brings; None if a signal came first. Raises StartupError."""
    leaving = asyncio.ensure_future(leave.wait())
    try:
        await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
        # An engine that failed to start also sets `leave`; what `start` raises says more.
        return await starting if starting.done() or died else None
    finally:
        leaving.cancel()


def _abandon(starting: asyncio.Future[EngineReady]) -> None:
    """Wait for it no longer, whatever came of it: there may be an error that says more."""
    starting.cancel()
    if starting.done() and not starting.cancelled():
        starting.exception()


def _on_signals(leave: asyncio.Event, server: Server) -> None:
    """The first signal begins the drain, the second cuts its waits short."""

    def signalled(name: str) -> None:
        _log.info("signal", name=name, again=leave.is_set())
        if leave.is_set():
            server.hurry()
        leave.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, number.name)


def run(
    options: Options,
    *,
    ready: Callable[[RunningService], None] | None = None,
    progress: Progress | None = None,
    spawned_engine: SpawnedChild | None = None,
) -> int:
    """`serve` on a new uvloop event loop; the exit code. Raises StartupError."""
    with paused_collector():
        code: int = uvloop.run(
            serve(
                options,
                ready=ready,
                progress=progress,
                spawned_engine=spawned_engine,
                begun=process_begun(),
            )
        )
    if code:
        # The interpreter's own end can hang too, on a device that does; on one that is lost it aborts.
        _end_within(_LEAVE_S)
        atexit.register(_end_now, code)
    return code


def _end_now(code: int) -> None:
    """End the process without letting go of anything: what holds on to a device may only fail."""
    flush_logs()
    sys.stdout.flush()
    os._exit(code)
