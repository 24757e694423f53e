"""The server under load, in a process of its own: `python -m tools.bench.server_process SPEC`.

SPEC is a ServerSpec as JSON. With a model it runs `photon_grpc.app`, the same composition root as
`photon-grpc serve`. Without one it puts the same front door and the same gRPC server over a runner
that makes its tokens up, so that everything but the model is measured. Once it serves it prints one
line of JSON: the ports, and the ids by which CPU time is told apart: of its main thread, and of its engine's
thread or process.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import structlog
import uvloop

import photon_grpc
from photon_grpc import app, engine_place
from photon_grpc.engine.client import AsyncEngine
from photon_grpc.engine.process import EngineProcess
from photon_grpc.engine.thread import EngineThread
from photon_grpc.engine_place import has_own_process
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.generator import Generator
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import (
    EngineOptions,
    KVCacheOptions,
    ModelOptions,
    Options,
    SchedulerOptions,
    ServerOptions,
    TelemetryOptions,
)
from photon_grpc.processes.collector import quiet_collector
from photon_grpc.runner_factory import RunnerFactory
from photon_grpc.server.server import BoundPorts, Server
from photon_grpc.telemetry.logging import configure_logging
from photon_grpc.telemetry.metrics import Metrics
from photon_grpc.types import ModelInfo
from tools.bench.fault_runner import FaultPlan, FaultyFactory
from tools.bench.scripted_factory import Pace, ScriptedFactory
from tools.bench.settings import with_assignments
from tools.bench.soak_log import TASKS
from tools.make_tiny_model import write_tokenizer

SCRIPTED_VOCAB_SIZE = 512
_SCRIPTED_MODEL_LEN = 4096

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """`model` empty: the scripted runner, whose every step takes `step_s` asleep, or as `pace` says."""

    model: str = ""
    dtype: str = "auto"
    num_threads: int = 0
    step_s: float = 0.0
    pace: tuple[float, float, float, float] | None = None
    """Without a model: the fields of `scripted_factory.Pace`, in place of `step_s`."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    process: str = "auto"
    backend: str = "auto"
    load_format: str = "safetensors"
    kv_cache_memory_bytes: int = 512 << 20
    admin: bool = False
    """Whether the admin listener is there, on a free port."""
    settings: tuple[str, ...] = ()
    """`section.key=value`, on top of all others."""
    log_removals: bool = False
    """Without a model: whether the log tells when sequences were found to have left."""
    row_fault_rate: float = 0.0
    slow_step_rate: float = 0.0
    """How likely each step has a row that fails, or is slow; with a model only. Fixed by `fault_seed`."""
    fault_seed: int = 0
    tasks_interval_s: float = 0.0
    """How often the number of the event loop's tasks is logged; 0: never."""

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerSpec:
        """A spec that `to_json` wrote."""
        found = json.loads(text)
        pace = None if found["pace"] is None else tuple(found["pace"])
        return cls(**{**found, "settings": tuple(found["settings"]), "pace": pace})

    def options(self) -> Options:
        """A loopback server on a free port that logs as in production and leaves at once."""
        options = Options(
            model=ModelOptions(
                path=self.model, dtype=self.dtype, backend=self.backend, load_format=self.load_format
            ),
            cache=KVCacheOptions(kv_cache_memory_bytes=self.kv_cache_memory_bytes),
            scheduler=SchedulerOptions(
                max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens
            ),
            engine=EngineOptions(num_threads=self.num_threads, process=self.process),
            server=ServerOptions(
                port=0, admin_port=0 if self.admin else -1, drain_propagation_s=0.0, drain_max_s=5.0
            ),
            telemetry=TelemetryOptions(log_format="json"),
        )
        return with_assignments(options, self.settings)


def _announce(ports: BoundPorts) -> None:
    threads = [t.native_id for t in threading.enumerate() if t.name == "photon-engine"]
    children = {child.pid: " ".join(child.cmdline()) for child in psutil.Process().children()}
    engines = [pid for pid, line in children.items() if "photon_grpc.engine.child" in line]
    line = {
        "port": ports.public,
        "admin_port": ports.admin,
        "main_thread": threading.get_native_id(),
        "engine_thread": threads[0] if threads else None,
        "engine_process": engines[0] if engines else None,
        "acceptor_processes": [pid for pid in children if pid not in engines],
    }
    print(json.dumps(line), flush=True)


async def _log_tasks(interval_s: float) -> None:
    while True:
        _log.info(TASKS, moment=time.monotonic(), tasks=len(asyncio.all_tasks()))
        await asyncio.sleep(interval_s)


def _serve_model(spec: ServerSpec) -> int:
    """The composition root as it is, its runner wrapped where faults are wanted."""
    background: list[asyncio.Task[None]] = []

    def ready(service: app.RunningService) -> None:
        if spec.tasks_interval_s:
            background.append(asyncio.get_running_loop().create_task(_log_tasks(spec.tasks_interval_s)))
        _announce(service.ports)

    if spec.row_fault_rate or spec.slow_step_rate:
        plan = FaultPlan(spec.row_fault_rate, spec.slow_step_rate, spec.fault_seed)
        engine_place.RunnerFactory = lambda *arguments: FaultyFactory(RunnerFactory(*arguments), plan)
    return app.run(spec.options(), ready=ready)


async def _serve_scripted(spec: ServerSpec) -> int:
    options = spec.options()
    leave = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave.set)
    model = ModelInfo(
        name="scripted",
        fingerprint="scripted",
        vocab_size=SCRIPTED_VOCAB_SIZE,
        max_model_len=_SCRIPTED_MODEL_LEN,
        eos_token_ids=(1,),
    )
    metrics = Metrics(photon_grpc.__version__)
    with ThreadPoolExecutor(options.server.text_threads) as text_pool:
        engine = AsyncEngine(
            ScriptedFactory(
                model, spec.step_s, spec.log_removals, None if spec.pace is None else Pace(*spec.pace)
            ),
            options.scheduler,
            options.cache,
            options.limits,
            on_step=metrics.observe_step,
            on_stopped=lambda error: leave.set(),
            make_host=EngineProcess if has_own_process(options) else EngineThread,
            wakes_per_turn=app.wakes_per_turn(options),
        )
        generator = Generator(engine, options.limits, text_pool, metrics=metrics, tenants=options.tenants)
        server = Server(generator, options, num_acceptors=app.num_acceptors(options))
        ports = await server.start()
        await engine.start()
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), SCRIPTED_VOCAB_SIZE, add_bos=False)
            tokenizer = Tokenizer.load(folder)
        generator.activate(tokenizer, ChatRenderer(tokenizer))
        quiet_collector()
        server.set_serving()
        _announce(ports)
        await leave.wait()
        await server.drain()
        await engine.stop()
    return 0


def main() -> int:
    spec = ServerSpec.from_json(sys.argv[1])
    options = spec.options()
    configure_logging(options.telemetry)
    if not spec.model:
        code: int = uvloop.run(_serve_scripted(spec))
        return code
    return _serve_model(spec)


if __name__ == "__main__":
    sys.exit(main())
