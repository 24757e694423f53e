"""The composition root: Options -> a running service -> an exit code.

The one place that knows every room. Objects are wired here, in the order in which a request meets
them, and taken down in the opposite one.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop

import photon_grpc
from photon_grpc.engine.client import AsyncEngine
from photon_grpc.engine.messages import EngineReady
from photon_grpc.errors import ConfigError, ModelLoadError, PhotonError
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.generator import Generator
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import ModelOptions, Options
from photon_grpc.runner.base import Runner
from photon_grpc.server.server import BoundPorts, Server
from photon_grpc.telemetry.metrics import Metrics, MetricsServer

_log = structlog.get_logger(__name__)

_ENGINE_STOP_S = 10.0
_DEMO_MODEL = Path(__file__).parent / "demo_model"
# Containers alive beyond those of the last look; a step of a full batch makes thousands for a moment.
_GC_THRESHOLD = 20_000

Progress = Callable[[int, int], None]
"""`(bytes done, bytes in all)` while weights load; called on the engine thread."""


@dataclass(frozen=True, slots=True)
class RunningService:
    """Where a service that answers can be reached, and what it serves."""

    ports: BoundPorts
    metrics_port: int | None
    engine: EngineReady


def model_folder(options: ModelOptions) -> Path:
    """The folder of the model that the options name. Raises ConfigError or ModelLoadError."""
    if not options.path:
        raise ConfigError("model.path is empty: name a model folder, or `demo`")
    folder = _DEMO_MODEL if options.path == "demo" else Path(options.path)
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: no such folder")
    return folder


def runner_factory(options: Options, folder: Path, progress: Progress | None) -> Callable[[], Runner]:
    """What the engine thread calls to build its runner. The import waits until then: it is the slow one."""

    def build() -> Runner:
        from photon_grpc.runner.factory import build_runner

        return build_runner(folder, options, progress)

    return build


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
    ) -> None:
        self._folder = model_folder(options.model)
        self._text_pool = ThreadPoolExecutor(options.server.text_threads, thread_name_prefix="photon-text")
        self.engine = AsyncEngine(
            runner_factory(options, self._folder, progress),
            options.scheduler,
            options.cache,
            options.limits,
            on_step=metrics.observe_step,
            on_stopped=on_stopped,
        )
        self.generator = Generator(
            self.engine, options.limits, self._text_pool, metrics=metrics, field_root=field_root
        )

    async def start(self) -> EngineReady:
        """Load tokenizer and model and warm up. Raises StartupError."""
        loop = asyncio.get_running_loop()
        tokenizer = await loop.run_in_executor(self._text_pool, Tokenizer.load, self._folder)
        ready = await self.engine.start()
        self.generator.activate(tokenizer, ChatRenderer(tokenizer))
        return ready

    async def stop(self) -> bool:
        """End every request and the engine thread; False if the thread hangs."""
        stopped = await self.engine.stop(_ENGINE_STOP_S)
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        return stopped


async def serve(
    options: Options,
    *,
    ready: Callable[[RunningService], None] | None = None,
    progress: Progress | None = None,
) -> int:
    """Run the service until SIGTERM, SIGINT or the engine's death; the exit code.

    0 after a drain, 1 when the engine died. `ready` is called once the service answers. Raises
    StartupError, with nothing left running, when it never comes to that.
    """
    leave = asyncio.Event()
    died: list[PhotonError] = []
    metrics = Metrics(photon_grpc.__version__)

    def engine_stopped(error: PhotonError | None) -> None:
        if error is not None:
            died.append(error)
            server.set_dead()
        leave.set()

    stack = InferenceStack(options, on_stopped=engine_stopped, metrics=metrics, progress=progress)
    server = Server(stack.generator, options)
    exposition: MetricsServer | None = None
    _on_signals(leave, server)
    ports = await server.start()
    try:
        if options.server.metrics_port >= 0:
            exposition = MetricsServer(metrics, options.server.metrics_host, options.server.metrics_port)
        engine = await _start_or_leave(stack, leave, died)
        if engine is not None:
            quiet_collector()
            server.set_serving()
            _log.info(
                "serving",
                model=engine.model.name,
                port=ports.public,
                kv_tokens=engine.num_blocks * engine.block_size,
            )
            if ready is not None:
                ready(RunningService(ports, exposition.port if exposition else None, engine))
            await leave.wait()
        if died:
            _log.error("engine died, leaving", error=str(died[0]))
            await server.stop()
        else:
            await server.drain()
    finally:
        await server.stop()
        stopped = await stack.stop()
        if exposition is not None:
            exposition.close()
    return 1 if died or not stopped else 0


def quiet_collector() -> None:
    """Keep the garbage collector from stopping streams; for a process that serves, once it is loaded.

    What start-up made lives as long as the process, and a full collection that walks it stops every
    stream for some 0.3 s. Reference counting frees nearly all that a request makes, so looking for
    cycles less often costs little memory.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 10, 10)


async def _start_or_leave(
    stack: InferenceStack, leave: asyncio.Event, died: list[PhotonError]
) -> EngineReady | None:
    """Start the stack; None if a signal came first. Raises StartupError."""
    starting = asyncio.ensure_future(stack.start())
    leaving = asyncio.ensure_future(leave.wait())
    try:
        await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
        # An engine that failed to start also sets `leave`; what `start` raises says more.
        return await starting if starting.done() or died else None
    finally:
        leaving.cancel()
        starting.cancel()


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
) -> int:
    """`serve` on a new uvloop event loop; the exit code. Raises StartupError."""
    code: int = uvloop.run(serve(options, ready=ready, progress=progress))
    return code
