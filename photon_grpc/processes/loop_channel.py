"""A channel that the running event loop serves: nothing blocks, and what one turn posts goes together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from photon_grpc.processes.channel import Channel

Receive = Callable[[list[Any]], None]
"""Takes the messages of whole frames, in order."""

# Messages in a frame, and the seconds that its first one waits while others are posted. A turn in which
# hundreds of calls begin or end takes tens of milliseconds, and whoever could work on the first of them would
# wait for the last.
MOST_POSTED = 64
MOST_WAIT_S = 0.002

Ended = Callable[[Exception | None], None]
"""Hears once that the other end has closed, or of the frame that could not be read."""


class LoopChannel:
    """Takes the channel over. Make it on the loop that is to serve it.

    What a turn posts goes in frames of up to `most_posted` messages, each as soon as it is full or one is
    posted `MOST_WAIT_S` behind its first.
    """

    def __init__(
        self,
        channel: Channel,
        receive: Receive,
        ended: Ended,
        *,
        most_posted: int = MOST_POSTED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_posted = most_posted
        self._clock = clock
        # Until when the first message in the outbox waits.
        self._send_by = 0.0
        self._channel: Channel | None = channel
        self._receive = receive
        self._ended = ended
        self._outbox: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._on_readable)
        self._write_on(channel)

    def post(self, message: Any) -> None:
        """Send a message, together with whatever else this turn of the loop posts. Harmless after the end."""
        if self._channel is None:
            return
        now = self._clock()
        if not self._outbox:
            self._loop.call_soon(self._send)
            self._send_by = now + MOST_WAIT_S
        self._outbox.append(message)
        if len(self._outbox) >= self._most_posted or now >= self._send_by:
            self._send()

    def close(self) -> None:
        """Send no more and hear no more; what was posted in this turn is sent if the socket has room."""
        channel = self._channel
        if channel is None:
            return
        self._send()
        self._forget(channel)

    def _send(self) -> None:
        messages, self._outbox = self._outbox, []
        channel = self._channel
        if channel is None or not messages:
            return
        try:
            channel.send(messages)
        except OSError:
            return  # the other end has gone, which the reading side is about to find and tell
        self._write_on(channel)

    def _write_on(self, channel: Channel) -> None:
        """Have the loop send what the socket did not take."""
        if channel.has_unsent:
            self._loop.add_writer(channel.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            channel.flush()
        except OSError:
            self._loop.remove_writer(channel.fileno())
            return
        if not channel.has_unsent:
            self._loop.remove_writer(channel.fileno())

    def _on_readable(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            messages = channel.receive()
        except EOFError:
            self._end(channel, None)
        except Exception as error:  # noqa: BLE001 - a frame that cannot be read is the end of all that could follow
            self._end(channel, error)
        else:
            if messages:
                self._receive(messages)

    def _end(self, channel: Channel, error: Exception | None) -> None:
        self._forget(channel)
        self._ended(error)

    def _forget(self, channel: Channel) -> None:
        self._loop.remove_reader(channel.fileno())
        self._loop.remove_writer(channel.fileno())
        channel.close()
        self._channel = None
