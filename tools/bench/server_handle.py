"""Starts and stops a server process, and counts the CPU time it uses, by kind of thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from tools.bench.server_process import ServerSpec

__all__ = ["CpuTimes", "ServerHandle"]

_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """User and system seconds of the server.

    `process` is of all threads, living and ended, and of the engine's process and the acceptors where there
    are any. `event_loop` is the main thread, `engine` the engine's thread or process; `others` is the rest:
    gRPC's own threads, the text pool, and torch's workers where the engine is a thread.
    """

    process: float
    event_loop: float
    engine: float
    acceptors: float = 0.0

    @property
    def others(self) -> float:
        """What neither the event loop nor the engine nor an acceptor used."""
        return self.process - self.event_loop - self.engine - self.acceptors

    @property
    def front_end(self) -> float:
        """Everything but the engine."""
        return self.process - self.engine

    def __sub__(self, earlier: CpuTimes) -> CpuTimes:
        return CpuTimes(
            self.process - earlier.process,
            self.event_loop - earlier.event_loop,
            self.engine - earlier.engine,
            self.acceptors - earlier.acceptors,
        )


class ServerHandle:
    """A serving process inside a `with` block. Raises RuntimeError with its log if it does not serve."""

    def __init__(self, spec: ServerSpec, environment: Mapping[str, str] | None = None) -> None:
        """`environment` comes on top of this process's."""
        self._spec = spec
        self._environment = {**os.environ, **(environment or {})}
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by __exit__
        self._process: subprocess.Popen[str] | None = None
        self._main_thread = 0
        self._engine_thread: int | None = None
        self._engine_process: int | None = None
        self._acceptor_processes: list[int] = []
        self.address = ""
        self.admin_address: str | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.server_process", self._spec.to_json()],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(_STOP_S)
            self._log.seek(0)
            raise RuntimeError(f"the server did not start:\n{self._log.read()[-4000:]}")
        announced = json.loads(line)
        self._main_thread = announced["main_thread"]
        self._engine_thread = announced["engine_thread"]
        self._engine_process = announced["engine_process"]
        self._acceptor_processes = announced["acceptor_processes"]
        self.address = f"127.0.0.1:{announced['port']}"
        if announced["admin_port"] is not None:
            self.admin_address = f"127.0.0.1:{announced['admin_port']}"
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        assert self._process is not None
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def stop(self, timeout_s: float = _STOP_S) -> int:
        """Ask it to leave, kill it if it does not in time; its exit code. May be called twice."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def log_lines(self) -> Iterator[str]:
        """What the server has written on standard error; once it has stopped."""
        assert self._process is not None
        assert self._process.poll() is not None, "it shares the position in the file"
        self._log.seek(0)
        yield from self._log

    @property
    def pid(self) -> int:
        """Of the server process."""
        assert self._process is not None
        return self._process.pid

    def cpu_times(self) -> CpuTimes:
        """CPU time used so far; the kernel counts it in ticks of ten milliseconds."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        total = process.cpu_times()
        by_thread = {t.id: t.user_time + t.system_time for t in process.threads()}
        event_loop = by_thread[self._main_thread]
        acceptors = sum(map(_cpu_seconds, self._acceptor_processes))
        used = total.user + total.system + acceptors
        if self._engine_process is None:
            assert self._engine_thread is not None
            return CpuTimes(used, event_loop, by_thread[self._engine_thread], acceptors)
        engine = _cpu_seconds(self._engine_process)
        return CpuTimes(used + engine, event_loop, engine, acceptors)

    def memory_bytes(self) -> int:
        """Resident memory now, of engine and acceptors as well; what processes share counts for each."""
        assert self._process is not None
        engine = [self._engine_process] if self._engine_process else []
        pids = [self._process.pid, *engine, *self._acceptor_processes]
        return sum(int(psutil.Process(pid).memory_info().rss) for pid in pids)


def _cpu_seconds(pid: int) -> float:
    used = psutil.Process(pid).cpu_times()
    return used.user + used.system
