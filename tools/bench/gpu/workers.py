"""Runs engine cases in worker processes: a fault costs its own row, the rest goes on in a new process."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench.gpu.cases import Case, Plan
from tools.bench.gpu.worker import Job
from tools.bench.report import ROOT

__all__ = ["Outcome", "run_cases"]

# From the start of the process to an engine that stands: imports, weights, kernels, graphs.
_BUILD_S = 300.0
_CASE_S = 180.0
_ENDING_S = 30.0
_ERROR_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: a result, or the error in its place."""

    case: Case
    result: dict[str, Any] | None = None
    error: str = ""


class _Worker:
    """One process, its lines and its standard error."""

    def __init__(self, job: Job) -> None:
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.gpu.worker", job.to_json()],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def next_line(self, timeout_s: float) -> dict[str, Any]:
        """The next line; an `error` in its place when the process is late or dead."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            return {"error": f"nothing came for {timeout_s:g} s\n{self._told()}"}
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        return {"error": f"the process ended with {code}\n{self._told()}"}

    def _told(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()[-_ERROR_CHARS:]

    def end(self) -> None:
        """Wait for the process, or end it."""
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()


def run_cases(
    plan: Plan,
    model: str,
    cases: Sequence[Case],
    progress: Callable[[str], None],
    start: Callable[[Job], Any] = _Worker,
) -> Iterator[Outcome]:
    """Outcomes in the order of `cases`, as they come. An engine that does not stand fails all of them."""
    left = list(cases)
    while left:
        progress(f"{model}: loading")
        worker = start(Job(plan, model, tuple(left)))
        try:
            standing = worker.next_line(_BUILD_S)
            if "error" in standing:
                yield from (Outcome(case, error=f"no engine: {standing['error']}") for case in left)
                return
            while left:
                progress(left[0].label)
                line = worker.next_line(_CASE_S)
                case = left.pop(0)
                if "error" in line:
                    yield Outcome(case, error=line["error"])
                    break
                yield Outcome(case, {**line["result"], "engine": standing["result"]})
        finally:
            worker.end()
