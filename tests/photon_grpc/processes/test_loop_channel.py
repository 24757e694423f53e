"""A channel on the event loop: what a turn posts goes together, nothing blocks, the end is told once."""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
import time
from typing import Any

import pytest

from photon_grpc.processes.channel import Channel
from photon_grpc.processes.loop_channel import LoopChannel
from tests.support.grpc_harness import until

# More than any socket buffer takes.
_BIG = 4 << 20


class Heard:
    """All that a LoopChannel told, and its other end."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.frames: list[list[Any]] = []
        self.ends: list[Exception | None] = []
        self.now = 0.0
        self.channel = LoopChannel(
            Channel(ours), self.frames.append, self.ends.append, clock=lambda: self.now
        )


@pytest.fixture
async def heard() -> Any:
    made = Heard()
    yield made
    made.channel.close()
    made.theirs.close()


def frame(*messages: Any) -> bytes:
    """As `Channel` sends them, written down independently of it."""
    body = pickle.dumps(list(messages), 5)
    return struct.pack("=Q", len(body)) + body


async def test_what_one_turn_posts_goes_as_one_frame(heard: Heard) -> None:
    for turn in (["a", "b", "c"], ["d"]):
        for message in turn:
            heard.channel.post(message)
        heard.theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            heard.theirs.recv(1)
        await asyncio.sleep(0)
        assert heard.theirs.recv(1 << 16) == frame(*turn)


async def test_a_turn_that_posts_much_sends_what_is_there_before_it_ends() -> None:
    ours, theirs = socket.socketpair()
    channel = LoopChannel(Channel(ours), [].append, [].append, most_posted=3, clock=lambda: 0.0)
    theirs.setblocking(False)
    try:
        for message in "abcdefg":
            channel.post(message)
        assert theirs.recv(1 << 16) == frame("a", "b", "c") + frame("d", "e", "f")
        await asyncio.sleep(0)
        assert theirs.recv(1 << 16) == frame("g")
        channel.post("h")
        await asyncio.sleep(0)
        assert theirs.recv(1 << 16) == frame("h")
    finally:
        channel.close()
        theirs.close()


async def test_in_a_long_turn_what_waits_goes_with_the_next_message(heard: Heard) -> None:
    heard.theirs.setblocking(False)
    for message in "abc":
        heard.channel.post(message)
        heard.now += 0.0008
    with pytest.raises(BlockingIOError):
        heard.theirs.recv(1)
    heard.channel.post("d")
    assert heard.theirs.recv(1 << 16) == frame("a", "b", "c", "d")
    # It begins anew with the next.
    heard.now += 1.0
    heard.channel.post("e")
    with pytest.raises(BlockingIOError):
        heard.theirs.recv(1)
    await asyncio.sleep(0)
    assert heard.theirs.recv(1 << 16) == frame("e")


async def test_messages_are_heard_in_order(heard: Heard) -> None:
    heard.theirs.sendall(frame(1, 2) + frame(3)[:9])
    await until(lambda: heard.frames)
    assert heard.frames == [[1, 2]]
    heard.theirs.sendall(frame(3)[9:] + frame(4))
    await until(lambda: len(heard.frames) == 2)
    assert heard.frames == [[1, 2], [3, 4]]
    assert heard.ends == []


async def test_nothing_blocks_while_the_other_end_does_not_read(heard: Heard) -> None:
    heard.channel.post(b"x" * _BIG)
    await asyncio.sleep(0)
    heard.channel.post("behind")
    # The other direction goes on meanwhile.
    heard.theirs.sendall(frame("still heard"))
    await until(lambda: heard.frames)
    assert heard.frames == [["still heard"]]
    other = Channel(heard.theirs)
    received: list[Any] = []

    def all_came() -> bool:
        received.extend(other.receive())
        return len(received) == 2

    await until(all_came)
    assert received == [b"x" * _BIG, "behind"]


async def test_an_idle_channel_uses_no_time_once_all_is_sent(heard: Heard) -> None:
    """A descriptor that is always writable must not be watched for that."""
    heard.channel.post(b"x" * _BIG)
    await asyncio.sleep(0)
    other = Channel(heard.theirs)
    await until(other.receive)
    before = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - before < 0.15


async def test_the_end_is_told_once_behind_all_that_came(heard: Heard) -> None:
    heard.theirs.sendall(frame("last") + frame("cut short")[:-1])
    heard.theirs.close()
    await until(lambda: heard.ends)
    assert heard.frames == [["last"]]
    await asyncio.sleep(0.05)
    assert heard.ends == [None]


async def test_an_end_with_something_of_ours_unsent_is_told_as_any_other(heard: Heard) -> None:
    heard.channel.post(b"x" * _BIG)
    await asyncio.sleep(0)
    heard.theirs.close()
    heard.channel.post("more")
    await until(lambda: heard.ends)
    await asyncio.sleep(0.05)
    assert heard.ends == [None]


async def test_a_frame_that_cannot_be_read_is_the_end_with_its_error(heard: Heard) -> None:
    heard.theirs.sendall(frame("before") + struct.pack("=Q", 3) + b"\xff\xff\xff" + frame("after"))
    await until(lambda: heard.ends)
    (error,) = heard.ends
    assert isinstance(error, pickle.UnpicklingError)
    # A frame behind it would be the next one of a stream that has lost its place.
    assert "after" not in [message for messages in heard.frames for message in messages]
    heard.theirs.settimeout(10)
    assert heard.theirs.recv(1) == b"", "closed for the other end as well"


async def test_a_close_sends_what_was_posted_and_hears_no_more(heard: Heard) -> None:
    heard.channel.post("a")
    heard.channel.post("b")
    heard.channel.close()
    heard.theirs.settimeout(10)
    assert heard.theirs.recv(1 << 16) == frame("a", "b")
    assert heard.theirs.recv(1) == b""
    await asyncio.sleep(0.05)
    assert (heard.frames, heard.ends) == ([], [])


async def test_everything_is_harmless_after_the_end(heard: Heard) -> None:
    heard.theirs.close()
    await until(lambda: heard.ends)
    heard.channel.post("a")
    heard.channel.close()
    heard.channel.close()
    heard.channel.post("b")
    await asyncio.sleep(0.05)
    assert heard.ends == [None]


async def test_what_was_kept_of_the_first_messages_is_sent_by_the_loop() -> None:
    """A channel that was written to before there was a loop to serve it."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel.send([b"x" * _BIG])
    assert channel.has_unsent
    served = LoopChannel(channel, lambda messages: None, lambda error: None)
    other = Channel(theirs)
    received: list[Any] = []
    await until(lambda: received.extend(other.receive()) or received)
    assert received == [b"x" * _BIG]
    served.close()
    other.close()
