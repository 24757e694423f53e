"""A child of ours as its parent sees it: how it ends, and that none outlives its parent.

What the engine makes of that is tested with the engine, and of acceptors with those.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from photon_grpc.processes.parent import ChildProcess
from photon_grpc.processes.spawn import spawn
from tests.support.grpc_harness import until

MODULE = "tests.support.child_mains"


class Child:
    """A ChildProcess, and all that it told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.ends: list[Exception | None] = []
        self.process = ChildProcess("test", MODULE, self.messages.extend, self.ends.append)

    async def start(self, *first: Any) -> int:
        """Its process id, once it has begun."""
        self.process.start((first,))
        await until(lambda: self.messages)
        word, number, is_ours = self.messages.pop(0)
        assert (word, is_ours) == ("begun", True)
        assert number == self.process.process_id
        return int(number)


@pytest.fixture
async def child() -> Any:
    made = Child()
    yield made
    if made.process.process_id is not None:
        made.process.kill()
        await asyncio.to_thread(made.process.join, 30)


@pytest.fixture
def records() -> Iterator[list[Any]]:
    with capture_logs() as found:
        yield found


def descriptors() -> int:
    return psutil.Process().num_fds()


async def test_messages_go_both_ways_until_it_is_killed(child: Child, records: list[Any]) -> None:
    number = await child.start("echo")
    for message in ("a", b"\x00" * (1 << 20), ("nested", [1, 2])):
        child.process.post(message)
        await until(lambda: child.messages)
        assert child.messages.pop() == message
    child.process.kill()
    await until(lambda: child.ends)
    assert await asyncio.to_thread(child.process.join, 30)
    assert (child.ends, child.process.process_id) == ([None], None)
    assert not psutil.pid_exists(number)
    assert not records, "it was we who ended it"


@pytest.mark.parametrize(
    ("first", "code"), [(("exit", 0), 0), (("exit", 3), 3), (("die", signal.SIGSEGV.value), -signal.SIGSEGV)]
)
async def test_an_end_by_itself_is_noticed_at_once_and_logged_with_its_code(
    child: Child, records: list[Any], first: tuple[Any, ...], code: int
) -> None:
    number = await child.start(*first)
    await until(lambda: child.ends)
    assert child.ends == [None]
    child.process.post("to nobody")
    assert await asyncio.to_thread(child.process.join, 30)
    assert child.process.process_id is None
    ended = [record for record in records if record["event"] == "test_process_ended"]
    assert [(record["pid"], record["code"]) for record in ended] == ([(number, code)] if code else [])


async def test_one_that_does_not_end_in_time_is_killed(child: Child, records: list[Any]) -> None:
    number = await child.start("close_and_stay")
    await until(lambda: child.ends)
    assert child.process.process_id == number
    assert not await asyncio.to_thread(child.process.join, 0.05)
    assert not psutil.pid_exists(number)
    assert [record["event"] for record in records] == ["test_process_killed"]


async def test_what_cannot_be_understood_is_the_end_with_its_error(child: Child) -> None:
    # What it said before may have come together with that, and is then lost with it.
    child.process.start((("garble",),))
    await until(lambda: child.ends)
    (error,) = child.ends
    assert error is not None


async def test_signals_of_a_terminal_do_not_reach_it_whenever_they_come(child: Child) -> None:
    child.process.start((("echo",),))
    number = child.process.process_id
    assert number is not None
    deadline = time.monotonic() + 60
    # From before it has begun until it answers.
    while not child.messages:
        assert time.monotonic() < deadline
        for one in (signal.SIGINT, signal.SIGTERM):
            os.kill(number, one)
        await asyncio.sleep(0.01)
    child.messages.clear()
    for one in (signal.SIGINT, signal.SIGTERM):
        os.kill(number, one)
    child.process.post("well")
    await until(lambda: child.messages)
    assert (child.messages, child.ends) == (["well"], [])
    # The parent's own are as they were.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


async def test_one_that_cannot_be_spawned_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    child = Child()
    before = descriptors()
    with pytest.raises(FileNotFoundError):
        child.process.start((("echo",),))
    assert descriptors() == before
    assert child.process.process_id is None
    assert child.process.join(0)
    child.process.post("to nobody")
    assert (child.messages, child.ends) == ([], [])


async def test_one_that_was_spawned_before_there_was_a_loop_goes_on_with_it(child: Child) -> None:
    spawned = await asyncio.to_thread(spawn, MODULE, (("echo",),))  # a thread without an event loop
    child.process.adopt(spawned)
    await until(lambda: child.messages)
    assert child.messages.pop()[:2] == ("begun", child.process.process_id)
    child.process.post("well")
    await until(lambda: child.messages)
    spawned.discard()  # is not for whoever spawned it any more
    child.process.post("still")
    await until(lambda: len(child.messages) == 2)
    assert (child.messages, child.ends) == (["well", "still"], [])


async def test_one_that_was_spawned_for_nothing_leaves_nothing() -> None:
    before = descriptors()
    spawned = spawn(MODULE, (("echo",),))
    assert psutil.pid_exists(spawned.process.pid)
    spawned.discard()
    assert not psutil.pid_exists(spawned.process.pid)
    assert descriptors() == before


async def test_it_begins_without_the_collector(child: Child) -> None:
    await child.start("collector")
    await until(lambda: child.messages)
    assert child.messages == [False]


async def test_a_child_that_has_gone_leaves_no_descriptor(child: Child) -> None:
    before = descriptors()
    await child.start("exit", 0)
    await until(lambda: child.ends)
    await asyncio.to_thread(child.process.join, 30)
    assert descriptors() == before


_PARENT = """
import asyncio
from functools import partial
from photon_grpc.processes.parent import ChildProcess
async def main():
    tell = partial(print, flush=True)
    child = ChildProcess("test", "tests.support.child_mains", tell, tell)
    child.start((("close_and_stay",),))
    tell(child.process_id)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of the channel says it")
def test_it_dies_with_its_parent_whatever_it_is_doing() -> None:
    """It has closed its channel, so that nothing but the kernel can tell."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        # What it says when it has begun, which the parent prints, and the end of its channel.
        assert "begun" in parent.stdout.readline()
        assert parent.stdout.readline() == "None\n"
        assert child.is_running()
        parent.kill()
        child.wait(30)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
