"""The engine in a real process of its own: the same answers, no death unnoticed, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from photon_grpc.engine.client import AsyncEngine, RequestStream
from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.messages import EngineStats
from photon_grpc.engine.process import EngineProcess
from photon_grpc.errors import (
    BackendUnavailableError,
    EngineDeadError,
    EngineDrainingError,
    KernelCompileError,
    ModelLoadError,
    PhotonError,
    StartupError,
)
from photon_grpc.options import KVCacheOptions, LimitOptions, SchedulerOptions
from photon_grpc.runner.scripted import echo, logprobs_of
from tests.support.builders import engine_request, model_info
from tests.support.engine_factories import Refused, Scripted, broken, vanishing
from tests.support.engine_streams import read_all, until_idle
from tests.support.grpc_harness import until

PROMPT = tuple(range(10, 20))


class Engine:
    """An AsyncEngine, the process behind it, and what the engine told its owner."""

    def __init__(self, factory: RunnerFactory, max_num_seqs: int, max_queued: int) -> None:
        self.snapshots: list[EngineStats] = []
        self.stopped: list[PhotonError | None] = []
        self.progress: list[tuple[int, int]] = []
        self.hosts: list[EngineProcess] = []
        self.client = AsyncEngine(
            factory,
            SchedulerOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=4096),
            KVCacheOptions(),
            LimitOptions(max_queued_requests=max_queued),
            on_step=self.snapshots.append,
            on_stopped=self.stopped.append,
            on_progress=lambda done, total: self.progress.append((done, total)),
            make_host=self._make_host,
        )

    def _make_host(
        self, factory: RunnerFactory, scheduler: SchedulerOptions, cache: KVCacheOptions, deliver: Deliver
    ) -> EngineProcess:
        self.hosts.append(EngineProcess(factory, scheduler, cache, deliver))
        return self.hosts[0]

    @property
    def pid(self) -> int:
        # Known also when it is gone, which `process_id` is not.
        process = self.hosts[0]._child._process
        assert process is not None
        return process.pid

    def submit(self, request_id: str, *args: Any, **kwargs: Any) -> RequestStream:
        return self.client.submit(request_id, engine_request(*args, **kwargs))


@asynccontextmanager
async def engine(
    factory: RunnerFactory | None = None, *, max_num_seqs: int = 8, max_queued: int = 100
) -> AsyncIterator[Engine]:
    """A started engine. At the end no process and no descriptor of it is left."""
    before = descriptors()
    running = Engine(factory or Scripted(), max_num_seqs, max_queued)
    try:
        await running.client.start()
        yield running
    finally:
        await running.client.stop()
        assert is_gone(running.pid)
        # Fewer where something of an earlier test was collected meanwhile.
        assert descriptors() <= before


def descriptors() -> int:
    return psutil.Process().num_fds()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


# --- the same engine ------------------------------------------------------------------------------


async def test_streams_are_told_apart_and_the_end_is_orderly() -> None:
    async with engine() as running:
        assert running.client.info.model == model_info()
        assert running.progress == [(0, 100), (100, 100)]
        streams = {key: running.submit(f"r{key}", (key, key + 1), 40, n=2) for key in (20, 30, 40)}
        for key, stream in streams.items():
            with stream:
                tokens = await read_all(stream, 2)
            assert tokens == {i: [echo((key, key + 1), i, p) for p in range(40)] for i in range(2)}
        await until_idle(running.client)
        assert running.stopped == []
        assert await running.client.stop()
        assert running.stopped == [None]
        assert running.hosts[0].join(0)


async def test_its_process_is_known_for_as_long_as_there_is_one() -> None:
    fresh = Engine(Scripted(), 8, 100)
    assert fresh.client.process_id is None
    async with engine() as running:
        assert running.client.process_id == running.pid
        assert await running.client.stop()
        assert running.client.process_id is None


async def test_it_runs_in_another_process_without_the_event_loop_s_libraries() -> None:
    async with engine() as running:
        assert psutil.Process(running.pid).ppid() == os.getpid()
        maps = "\n".join(entry.path for entry in psutil.Process(running.pid).memory_maps())
        assert "python" in maps
        for library in ("grpc", "uvloop", "torch"):
            assert library not in maps, "a scripted runner needs none of them"


async def test_messages_larger_than_any_socket_buffer_cross_both_ways() -> None:
    factory = Scripted(model_info(max_model_len=200_000), num_blocks=16_000)
    prompt = tuple(n % 900 + 5 for n in range(100_000))
    async with engine(factory) as running:
        with running.submit("long", prompt, 3, prompt_top_logprobs=3) as stream:
            outputs = []
            while not (outputs and outputs[-1].is_last):
                outputs += await stream.read()
        assert outputs[0].prompt_logprobs == tuple(logprobs_of(token_id, 3) for token_id in prompt[1:])
        assert [t for o in outputs for t in o.token_ids] == list(prompt[:3])


async def test_thousands_of_requests_and_aborts_at_once() -> None:
    async with engine(Scripted(step_s=0.001), max_queued=5000) as running:
        streams = [running.submit(f"r{n}", PROMPT, 400) for n in range(4000)]
        await streams[0].read()
        for stream in streams:
            stream.close()
        await until_idle(running.client)
        assert running.client.num_live_requests == 0
        with running.submit("after", PROMPT, 3) as stream:
            assert await read_all(stream) == {0: [10, 11, 12]}


async def test_an_idle_engine_uses_no_time() -> None:
    async with engine() as running:
        with running.submit("a", PROMPT, 3) as stream:
            await read_all(stream)
        await until_idle(running.client)
        seen = len(running.snapshots)
        before = psutil.Process(running.pid).cpu_times()
        await asyncio.sleep(0.3)
        after = psutil.Process(running.pid).cpu_times()
        assert after.user + after.system - before.user - before.system < 0.05
        assert len(running.snapshots) == seen


# --- starting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ModelLoadError("model.safetensors: cut short"),
        BackendUnavailableError("no device"),
        KernelCompileError("rope.cu", "sm_90a", {"HEAD_DIM": 64}, "line 3: error"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_factory_is_the_error_of_the_start(error: StartupError) -> None:
    with pytest.raises(type(error)) as raised:
        async with engine(Refused(error)):
            pass
    assert raised.value.message == error.message
    assert vars(raised.value) == vars(error)


@pytest.mark.parametrize("factory", [broken, vanishing])
async def test_a_start_that_fails_in_no_foreseen_way_is_a_dead_engine(factory: RunnerFactory) -> None:
    with pytest.raises(EngineDeadError):
        async with engine(factory):
            pass


async def test_a_process_that_cannot_be_made_is_an_error_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    running = Engine(Scripted(), 8, 100)
    before = descriptors()
    with pytest.raises(StartupError, match="No such file"):
        await running.client.start()
    assert await running.client.stop()
    assert descriptors() <= before


async def test_stopping_while_it_loads_does_not_wait_for_the_model() -> None:
    running = Engine(Scripted(load_s=60), 8, 100)
    starting = asyncio.ensure_future(running.client.start())
    await until(lambda: running.progress)
    started = time.monotonic()
    assert await running.client.stop()
    assert time.monotonic() - started < 5
    assert is_gone(running.pid)
    assert running.stopped == [None]
    with pytest.raises(EngineDeadError):
        await starting


# --- the ends -------------------------------------------------------------------------------------


async def test_shutdown_ends_every_stream_as_draining() -> None:
    async with engine(Scripted(step_s=0.001)) as running:
        streams = [running.submit(f"r{n}", PROMPT, 400) for n in range(20)]
        await streams[0].read()
        assert await running.client.stop()
        for stream in streams:
            with pytest.raises(EngineDrainingError):
                await read_all(stream)
        assert running.stopped == [None]


async def test_fault_02_a_broken_step_ends_every_stream() -> None:
    async with engine(Scripted(crash_at_step=5)) as running:
        streams = [running.submit(f"r{n}", PROMPT, 400) for n in range(3)]
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await read_all(stream)
        assert [type(error) for error in running.stopped] == [EngineDeadError]


@pytest.mark.parametrize("state", ["stepping", "idle"])
async def test_fault_07_a_killed_process_is_noticed_at_once(state: str) -> None:
    async with engine(Scripted(step_s=0.001)) as running:
        streams = [running.submit(f"r{n}", PROMPT, 400) for n in range(20 if state == "stepping" else 0)]
        for stream in streams[:8]:
            await stream.read()
        os.kill(running.pid, signal.SIGKILL)
        await until(lambda: running.stopped, 2)
        assert [type(error) for error in running.stopped] == [EngineDeadError]
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await read_all(stream)
            stream.close()
        with pytest.raises(EngineDeadError):
            running.submit("late", PROMPT, 3)
        started = time.monotonic()
        assert await running.client.stop()
        assert time.monotonic() - started < 5


async def test_a_frozen_process_is_killed_when_its_time_to_stop_is_over() -> None:
    async with engine(Scripted(step_s=0.001)) as running:
        stream = running.submit("a", PROMPT, 400)
        await stream.read()
        os.kill(running.pid, signal.SIGSTOP)
        started = time.monotonic()
        assert not await running.client.stop(0.5)
        assert time.monotonic() - started < 5
        assert is_gone(running.pid)


async def test_the_signals_of_a_terminal_and_a_supervisor_are_the_parent_s() -> None:
    async with engine(Scripted(step_s=0.001)) as running:
        with running.submit("a", PROMPT, 200) as stream:
            await stream.read()
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(running.pid, number)
            await read_all(stream)
        assert await running.client.stop()
        assert running.stopped == [None]


_PARENT = """
import asyncio, os, sys
from photon_grpc.engine.process import EngineProcess
from photon_grpc.engine.messages import EngineReady, LoadProgress, Submit
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from tests.support.builders import engine_request
from tests.support.engine_factories import Scripted

async def main(state):
    def deliver(message):
        wanted = LoadProgress if state == "loading" else EngineReady
        if isinstance(message, wanted) and not told:
            told.append(True)
            if state != "idle":
                host.post(Submit(1, engine_request(tuple(range(10, 20)), 100_000)))
            # In one write, since the child has the same pipe.
            os.write(1, b"%d\\n" % host.process_id)
    told = []
    factory = Scripted(step_s=0.001, load_s=60 if state == "loading" else 0)
    host = EngineProcess(factory, SchedulerOptions(), KVCacheOptions(), deliver)
    host.start()
    await asyncio.sleep(600)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends after its step")
@pytest.mark.parametrize("state", ["loading", "idle", "stepping", "frozen"])
def test_a_killed_parent_leaves_no_process_behind(state: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, state], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        # The child may be quicker with the word that it loads.
        pid = int(next(line for line in parent.stdout if line != "loading\n"))
        child = psutil.Process(pid)
        if state == "frozen":
            os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
    # Whoever adopts the orphan reaps it in its own time.
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
