"""What a fault must not leave behind in a server: requests, blocks, tasks, descriptors, memory.

Taken before a fault and checked after it; all that is checked is seen from outside the process (GetLoad,
WatchState, its log, /proc), but for the census of a scripted server.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from photon_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.support.server_process import ServerProcess

# For what a client's end starts in the server: keepalive, closing sockets, the engine's next step.
_SETTLE_S = 45.0
# Pools of threads and of memory grow with the load that they have seen, a few times, and then no more.
_SPARE_THREADS = 12
_SPARE_BYTES = 48 << 20
STORM_BYTES = 192 << 20
_CENSUS = re.compile(r"^census (\{.*\})$", re.M)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

READY = control_pb2.WatchStateResponse.STATE_READY


@dataclass(frozen=True)
class Footprint:
    """What a process holds. Without a census, of a server that is not scripted, the last two are empty."""

    descriptors: int
    threads: int
    resident_bytes: int
    tasks: Mapping[str, int] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)

    def excess(self, baseline: Footprint, spare_bytes: int = _SPARE_BYTES) -> list[str]:
        """What is above `baseline`, in words."""
        found = []
        if self.descriptors > baseline.descriptors:
            found.append(f"{self.descriptors} descriptors, {baseline.descriptors} before")
        if self.threads > baseline.threads + _SPARE_THREADS:
            found.append(f"{self.threads} threads, {baseline.threads} before")
        if self.resident_bytes > baseline.resident_bytes + spare_bytes:
            grown = (self.resident_bytes - baseline.resident_bytes) >> 20
            found.append(f"{grown} MiB more resident")
        leaked = Counter(self.tasks) - Counter(baseline.tasks)
        found += [f"{count} more tasks of {name}" for name, count in leaked.items()]
        found += [f"{count} live {name}" for name, count in self.objects.items() if count]
        return found


class Aftermath:
    """The baseline of a server that serves and is idle, and the check against it.

    The first calls make caches, threads and arenas, so a few are made before the baseline is taken.
    """

    def __init__(self, server: ServerProcess, channel: grpc.Channel | None = None) -> None:
        """`channel`, which is closed, is for servers that take no plaintext."""
        self.server = server
        with channel or grpc.insecure_channel(server.address) as opened:
            _warm_up(inference_pb2_grpc.InferenceServiceStub(opened))
        server.wait_until_idle()
        self._skipped = len(finished_calls(server.log))
        self._baseline = self._when_settled(lambda footprint: not any(footprint.objects.values()))

    def check(
        self,
        codes: Mapping[str, str | Collection[str]] | None = None,
        *,
        state: int | None = READY,
        spare_bytes: int = _SPARE_BYTES,
    ) -> None:
        """Wait until the server is as it was, and fail with what it kept.

        `codes` says, by request id, the one status (or the allowed ones) in which each call must have ended;
        calls of other ids may have ended in any, once. `state` None: it takes no questions any more.
        `spare_bytes` of memory may stay with the allocator: more where thousands of calls may have been live
        at a time.
        """
        server = self.server
        server.wait_until_idle()
        load = server.load()
        assert load.total_kv_blocks > 0
        assert load.used_kv_blocks == load.running == load.queued == load.queued_uncached_tokens == 0
        if state is not None:
            assert state_of(server) == state
        self._when_settled(lambda footprint: not footprint.excess(self._baseline, spare_bytes))
        self.check_codes(codes or {})

    def check_codes(self, codes: Mapping[str, str | Collection[str]]) -> None:
        """Every call since the baseline has one status in the log, that of `codes` where it is named."""
        deadline = time.monotonic() + _SETTLE_S
        while missing := codes.keys() - {call["request_id"] for call in self.finished_calls()}:
            assert time.monotonic() < deadline, f"no status of {sorted(missing)[:5]}\n{self._log_tail()}"
            time.sleep(0.05)
        calls = self.finished_calls()
        generations = [call for call in calls if call["method"].endswith("Generate")]
        counted = Counter(call["request_id"] for call in generations)
        ended: dict[str, list[str]] = {}
        for call in generations:
            ended.setdefault(call["request_id"], []).append(call["code"])
        for request_id, expected in codes.items():
            allowed = {expected} if isinstance(expected, str) else set(expected)
            assert counted[request_id] == 1, f"{request_id} ended {ended[request_id]}"
            assert ended[request_id][0] in allowed, f"{request_id} ended {ended[request_id]}, not {allowed}"
        # The client's leaving is nobody's error, and no fault of a client is the server's.
        assert not [call for call in calls if call["code"] == "CANCELLED" and call.get("reason")]
        faults = [line for line in records(self.server.log) if line["level"] not in ("info", "warning")]
        assert not faults, faults[:3]

    def finished_calls(self) -> list[dict[str, Any]]:
        """The log's lines of calls that ended since the baseline."""
        return finished_calls(self.server.log)[self._skipped :]

    def _when_settled(self, is_settled: Any) -> Footprint:
        deadline = time.monotonic() + _SETTLE_S
        while not is_settled(footprint := footprint_of(self.server)):
            if time.monotonic() > deadline:
                raise AssertionError(f"{footprint.excess(self._baseline)}\n{self._log_tail()}")
            time.sleep(0.1)
        return footprint

    def _log(self) -> str:
        return self.server.log.read_text()

    def _log_tail(self) -> str:
        lines = (line for line in self._log().splitlines() if not line.startswith("census"))
        return "\n".join(lines)[-4000:]


def footprint_of(server: ServerProcess) -> Footprint:
    """What the server's process holds now."""
    census = census_of(server) if server.is_scripted else {}
    proc = Path("/proc") / str(server.process.pid)
    return Footprint(
        descriptors=len(list((proc / "fd").iterdir())),
        threads=len(list((proc / "task").iterdir())),
        resident_bytes=int((proc / "statm").read_text().split()[1]) * _PAGE_BYTES,
        tasks=census.get("tasks", {}),
        objects=census.get("objects", {}),
    )


def census_of(server: ServerProcess) -> dict[str, Any]:
    """Inside a scripted server: `tasks` by their coroutine, `objects` of single calls by their class, and the
    number of calls `stalled` in a write."""
    seen = len(_CENSUS.findall(server.log.read_text()))
    server.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + _SETTLE_S
    while len(found := _CENSUS.findall(server.log.read_text())) <= seen:
        assert time.monotonic() < deadline, f"no census\n{server.log.read_text()[-4000:]}"
        assert server.process.poll() is None
        time.sleep(0.02)
    census: dict[str, Any] = json.loads(found[-1])
    return census


def finished_calls(log: Path) -> list[dict[str, Any]]:
    """One entry for each call that the server has handled to its end."""
    return [record for record in records(log) if record["event"] == "call finished"]


def records(log: Path) -> list[dict[str, Any]]:
    """All lines of a server's log that are records: one may be half written, where room was short."""
    lines = log.read_text().rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def state_of(server: ServerProcess) -> int:
    """The state that WatchState says first."""
    with grpc.insecure_channel(server.admin) as channel:
        watch = control_pb2_grpc.ControlServiceStub(channel).WatchState(
            control_pb2.WatchStateRequest(), timeout=30
        )
        state: int = next(watch).state
        watch.cancel()
        return state


def _warm_up(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
    for text in ("a", "b " * 2000):
        spec = inference_pb2.GenerationSpec(text=text, truncate_input_tokens=4)
        spec.stop.max_tokens, spec.stop.ignore_eos = 4, True
        list(stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec), timeout=60))
    call = stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec), timeout=60)
    next(call)
    call.cancel()
