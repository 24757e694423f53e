"""Frames over a socket pair: whole or not at all, in order, without ever blocking the sender."""

from __future__ import annotations

import pickle
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from photon_grpc.engine.messages import Abort
from photon_grpc.processes.channel import Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A bare writer and the channel that reads it."""
    writer, reader = socket.socketpair()
    channel = Channel(reader)
    yield writer, channel
    writer.close()
    channel.close()


def frame(messages: Any) -> bytes:
    body = pickle.dumps(messages)
    return struct.pack("=Q", len(body)) + body


def test_messages_arrive_in_order_and_frames_are_joined(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    assert other.receive() == []
    one.send([Abort(1), Abort(2, 0)])
    one.send((Abort(3),))
    other.send(["back"])
    assert other.receive() == [Abort(1), Abort(2, 0), Abort(3)]
    assert other.receive() == []
    assert one.receive() == ["back"]


def test_a_frame_that_comes_in_pieces_is_returned_once_it_is_whole(
    raw: tuple[socket.socket, Channel],
) -> None:
    writer, channel = raw
    data = frame([1]) + frame(["two", "three"]) + frame([4])
    generator = random.Random(7)
    received: list[Any] = []
    while data:
        size = generator.randint(1, 9)
        writer.sendall(data[:size])
        data = data[size:]
        received += channel.receive()
    assert received == [1, "two", "three", 4]


def test_the_end_is_told_after_everything_before_it(raw: tuple[socket.socket, Channel]) -> None:
    writer, channel = raw
    writer.sendall(frame([1]) + frame([2])[:-1])
    writer.close()
    assert channel.receive() == [1]
    for _ in range(2):
        with pytest.raises(EOFError):
            channel.receive()


def test_a_peer_that_died_with_something_unread_is_the_end_too(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    one.send(["unread"])
    other.send(["last words"])
    other.close()
    assert one.receive() == ["last words"]
    with pytest.raises(EOFError):
        one.receive()
    with pytest.raises(OSError):
        one.send(["nobody is there"])


def test_a_sender_never_blocks_and_nothing_is_lost(pair: tuple[Channel, Channel]) -> None:
    """Many times what a socket holds; the reader comes late."""
    one, other = pair
    sent = [bytes([n]) * 100_000 for n in range(100)]
    for message in sent:
        one.send([message])
    assert one.has_unsent
    received: list[bytes] = []
    while len(received) < len(sent):
        received += other.receive()
        one.flush()
    assert received == sent
    assert not one.has_unsent
    assert other.receive() == []


def test_waiting_sends_what_was_kept(pair: tuple[Channel, Channel]) -> None:
    """Both sides have more to send than a socket holds: whoever waits must also write."""
    one, other = pair
    large = bytes(5_000_000)

    def answer() -> None:
        other.send([large])
        messages: list[Any] = []
        while not messages:
            other.wait()
            messages = other.receive()
        other.flush_all()

    thread = threading.Thread(target=answer)
    one.send([large])
    thread.start()
    messages: list[Any] = []
    while not messages:
        one.wait()
        messages = one.receive()
    one.flush_all()
    thread.join()
    assert messages == [large]
