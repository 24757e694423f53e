"""The engine's loop: an inbox, one hand-off per step, one fatal path; the same in a thread and a process.

Everything here happens on the one thread that owns model, cache and device handles. The inbox needs no
bound of its own: the client admits a bounded number of live requests, and each brings one Submit and at
most one Abort per completion and one for the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from photon_grpc.engine.core import EngineCore
from photon_grpc.engine.host import Deliver, RunnerFactory
from photon_grpc.engine.messages import (
    Abort,
    CacheFlushed,
    EngineMessage,
    EngineReady,
    EngineStopped,
    FailureKind,
    FlushCache,
    LoadProgress,
    Shutdown,
    Submit,
)
from photon_grpc.engine.watchdog import StepWatchdog
from photon_grpc.errors import EngineDeadError, PhotonError
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner

_log = structlog.get_logger(__name__)


class Inbox(Protocol):
    """Where messages for the engine arrive."""

    def take(self, *, wait: bool) -> Iterable[EngineMessage]:
        """What has come since the last look, in order; with `wait` at least one message."""


def run_engine(
    runner_factory: RunnerFactory,
    scheduler_options: SchedulerOptions,
    cache_options: KVCacheOptions,
    inbox: Inbox,
    deliver: Deliver,
    *,
    step_timeout_s: float = 0.0,
    exit_process: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Build the runner and run an EngineCore until Shutdown or a fault; EngineStopped is the last delivery.

    `deliver` must not block. A step that hangs, by `step_timeout_s` and engine/watchdog.py, leads to
    `exit_process` where the process is the engine's; else EngineStopped is delivered on another thread,
    and whatever follows, should the step ever return, is to be ignored. `clock` is monotonic seconds: the
    one that the deadlines of requests are given on.
    """

    def give_up() -> None:
        deliver(EngineStopped(EngineDeadError()))

    error: PhotonError | None = None
    runner: Runner | None = None
    try:
        runner = runner_factory(lambda done, total: deliver(LoadProgress(done, total)))
        deliver(EngineReady(runner.model, runner.num_blocks, runner.block_size))
        core = EngineCore(runner, scheduler_options, cache_options, clock=clock)
        watchdog = StepWatchdog(
            step_timeout_s,
            core.max_num_batched_tokens,
            lambda: core.num_tokens_under_way,
            exit_process or give_up,
            owns_process=exit_process is not None,
        )
        with watchdog:
            _serve(core, inbox, deliver, watchdog)
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
            deliver(EngineStopped(error))


def _serve(core: EngineCore, inbox: Inbox, deliver: Deliver, watchdog: StepWatchdog) -> None:
    while True:
        for message in inbox.take(wait=not core.has_work):
            match message:
                case Submit():
                    core.submit(message)
                case Abort():
                    core.abort(message)
                case FlushCache(ticket):
                    deliver(CacheFlushed(ticket, core.flush_cache()))
                case Shutdown():
                    core.abort_all(FailureKind.DRAINING)
                    deliver(core.flush())
                    return
        watchdog.step_begins()
        outputs = core.step()
        watchdog.step_ended()
        deliver(outputs)
