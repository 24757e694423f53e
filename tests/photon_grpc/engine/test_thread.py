"""The engine thread from outside: what it delivers, in which order, and that it never goes silently."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from photon_grpc.engine.messages import (
    Abort,
    EngineReady,
    EngineStopped,
    FailureKind,
    LoopMessage,
    Shutdown,
    StepOutputs,
    Submit,
)
from photon_grpc.engine.thread import EngineThread
from photon_grpc.errors import EngineDeadError, ModelLoadError
from photon_grpc.options import KVCacheOptions, SchedulerOptions
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from tests.support.builders import RecordingRunner, engine_request, model_info

PROMPT = tuple(range(10, 20))


class Mailbox:
    """What the thread delivered."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[LoopMessage] = SimpleQueue()

    def put(self, message: LoopMessage) -> None:
        self._queue.put(message)

    def get(self) -> LoopMessage:
        return self._queue.get(timeout=10)

    def is_empty(self) -> bool:
        return self._queue.empty()

    def until_stopped(self) -> tuple[list[StepOutputs], EngineStopped]:
        steps: list[StepOutputs] = []
        while True:
            match self.get():
                case EngineStopped() as stopped:
                    return steps, stopped
                case StepOutputs() as step:
                    steps.append(step)
                case EngineReady():
                    raise AssertionError("ready twice")


@contextmanager
def engine(factory: Callable[[], Runner]) -> Iterator[tuple[EngineThread, Mailbox]]:
    mailbox = Mailbox()
    thread = EngineThread(
        lambda progress: factory(), SchedulerOptions(max_num_seqs=8), KVCacheOptions(), mailbox.put
    )
    thread.start()
    try:
        yield thread, mailbox
    finally:
        thread.post(Shutdown())
        assert thread.join(10), "the thread hangs"


def scripted(**overrides: Any) -> Callable[[], RecordingRunner]:
    return lambda: RecordingRunner(model_info(), **overrides)


def test_ready_tokens_shutdown() -> None:
    with engine(scripted(num_blocks=99, block_size=8)) as (thread, mailbox):
        ready = mailbox.get()
        assert ready == EngineReady(model_info(), 99, 8)
        thread.post(Submit(5, engine_request(PROMPT, 3)))
        tokens: list[int] = []
        while len(tokens) < 3:
            step = mailbox.get()
            assert isinstance(step, StepOutputs)
            for output in step.outputs:
                assert output.key == 5
                tokens.extend(output.token_ids)
        assert tokens == [10, 11, 12]
        thread.post(Shutdown())
        _, stopped = mailbox.until_stopped()
        assert stopped.error is None


def test_shutdown_ends_every_request_with_a_status_and_nothing_follows() -> None:
    runner = ScriptedRunner(model_info(), step_s=0.001)
    with engine(lambda: runner) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 400, n=2)))
        thread.post(Submit(2, engine_request(PROMPT, 400)))
        thread.post(Shutdown())
        thread.post(Submit(3, engine_request(PROMPT, 400)))
        steps, stopped = mailbox.until_stopped()
        ends = [(o.key, o.index, o.failure) for step in steps for o in step.outputs if o.is_last]
        assert sorted(ends, key=str) == [
            (key, i, FailureKind.DRAINING) for key, i in ((1, 0), (1, 1), (2, 0))
        ]
        assert stopped.error is None
        assert steps[-1].stats.kv_blocks_used == 0
    assert mailbox.is_empty()


def test_an_idle_engine_blocks_and_takes_no_step() -> None:
    runners: list[RecordingRunner] = []

    def factory() -> RecordingRunner:
        runners.append(scripted()())
        return runners[0]

    with engine(factory) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 3)))
        while not any(o.is_last for o in mailbox.get().outputs):  # type: ignore[union-attr]  # steps only
            pass
        # Each turn of the loop hands something over, so a busy loop would have filled the mailbox.
        time.sleep(0.05)
        assert mailbox.is_empty()
        assert len(runners[0].plans) == 3


def test_one_hand_off_per_step() -> None:
    with engine(scripted()) as (thread, mailbox):
        mailbox.get()
        for key in range(1, 5):
            thread.post(Submit(key, engine_request((key + 1,) * 3, 6)))
        ended = 0
        last_step = 0
        while ended < 4:
            step = mailbox.get()
            assert isinstance(step, StepOutputs)
            assert step.stats.steps == last_step + 1, "a step was handed over twice or not at all"
            last_step = step.stats.steps
            ended += sum(output.is_last for output in step.outputs)


def test_an_abort_frees_the_blocks_before_the_next_step() -> None:
    with engine(scripted(step_s=0.001)) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 400)))
        mailbox.get()
        thread.post(Abort(1))
        while True:
            step = mailbox.get()
            assert isinstance(step, StepOutputs)
            if any(output.is_last for output in step.outputs):
                assert step.stats.kv_blocks_used == 0
                break
        thread.post(Abort(1))
        late = mailbox.get()
        assert isinstance(late, StepOutputs)
        assert late.outputs == ()


def test_a_start_that_fails_is_told_as_it_is() -> None:
    def broken() -> Runner:
        raise ModelLoadError("model.safetensors: lm_head.weight has the wrong shape")

    with engine(broken) as (_, mailbox):
        stopped = mailbox.get()
        assert isinstance(stopped, EngineStopped)
        assert isinstance(stopped.error, ModelLoadError)
        assert "lm_head.weight" in stopped.error.message


def test_a_start_that_fails_in_an_unforeseen_way_is_told_without_its_words() -> None:
    def broken() -> Runner:
        raise MemoryError("secret detail")

    with engine(broken) as (_, mailbox):
        stopped = mailbox.get()
        assert isinstance(stopped, EngineStopped)
        assert isinstance(stopped.error, EngineDeadError)
        assert "secret" not in str(stopped.error)


def test_fault_02_a_broken_step_ends_the_thread_and_closes_the_runner() -> None:
    closed: list[bool] = []

    class Breaking(ScriptedRunner):
        def close(self) -> None:
            closed.append(True)
            super().close()

    with engine(lambda: Breaking(model_info(), crash_at_step=2)) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 8)))
        steps, stopped = mailbox.until_stopped()
        assert len(steps) == 1
        assert isinstance(stopped.error, EngineDeadError)
        assert closed == [True]
        assert thread.join(10)


def test_fault_04_a_runner_that_cannot_even_be_closed_does_not_hide_the_end() -> None:
    class Stuck(ScriptedRunner):
        def close(self) -> None:
            raise RuntimeError("the device is gone")

    with engine(lambda: Stuck(model_info(), crash_at_step=1)) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 8)))
        _, stopped = mailbox.until_stopped()
        assert isinstance(stopped.error, EngineDeadError)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
@pytest.mark.parametrize("method", ["launch", "collect"])
def test_fault_07_a_thread_that_dies_of_anything_says_so(method: str, error: type[BaseException]) -> None:
    class Dying(ScriptedRunner):
        pass

    def die(*_: object) -> None:
        raise error

    setattr(Dying, method, die)
    with engine(lambda: Dying(model_info())) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 8)))
        steps, stopped = mailbox.until_stopped()
        assert steps == []
        assert isinstance(stopped.error, EngineDeadError)
        assert thread.join(10)
        assert mailbox.is_empty()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_runner_is_built_and_used_on_one_thread(in_flight: int) -> None:
    threads: set[str] = set()

    class Watching(ScriptedRunner):
        def __init__(self) -> None:
            threads.add(threading.current_thread().name)
            super().__init__(model_info(), max_in_flight=in_flight)

        def launch(self, output: Any) -> None:
            threads.add(threading.current_thread().name)
            super().launch(output)

        def close(self) -> None:
            threads.add(threading.current_thread().name)

    with engine(Watching) as (thread, mailbox):
        mailbox.get()
        thread.post(Submit(1, engine_request(PROMPT, 2)))
        mailbox.get()
        thread.post(Shutdown())
        mailbox.until_stopped()
    assert threads == {"photon-engine"}
