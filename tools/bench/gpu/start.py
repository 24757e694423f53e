"""From the command line to SERVING: `photon-grpc serve`, as a user starts it, on random weights.

The time ends with the line that the command prints once the model answers. Nothing is read from disk but
libraries and kernels: what a checkpoint adds is its size over the disk's speed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools.bench.gpu.cases import Case, Plan
from tools.bench.gpu.workers import Outcome
from tools.bench.random_models import servable_folder
from tools.bench.report import ROOT

__all__ = ["run_cases"]

_START_S = 300.0
_STOP_S = 30.0
_ERROR_CHARS = 4000


def run_cases(
    plan: Plan, model: str, cases: Sequence[Case], progress: Callable[[str], None]
) -> Iterator[Outcome]:
    """One start per case, one after the other."""
    with servable_folder(model) as folder:
        for case in cases:
            progress(case.label)
            try:
                yield Outcome(case, {"serving_after_s": start_once(_command(plan, folder))})
            except RuntimeError as error:
                yield Outcome(case, error=str(error))


def _command(plan: Plan, folder: Path) -> list[str]:
    own = [
        "model.load_format=random",
        "server.port=0",
        "server.admin_port=-1",
        "server.drain_propagation_s=0",
    ]
    own += ["cache.kv_cache_memory_bytes=512MiB"] if plan.backend != "cuda" else []
    settings = [part for setting in (*own, *plan.settings) for part in ("--set", setting)]
    return [
        *(sys.executable, "-m", "photon_grpc", "serve", "--model", str(folder)),
        *("--backend", plan.backend, "--dtype", plan.dtype),
        *settings,
    ]


def start_once(command: Sequence[str]) -> float:
    """Seconds from the start of the process to its first line. Raises RuntimeError with what it logged."""
    with tempfile.TemporaryFile(mode="w+") as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        late = threading.Timer(_START_S, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            took = time.perf_counter() - begun
        finally:
            late.cancel()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if not line:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read()[-_ERROR_CHARS:]}")
    return took
