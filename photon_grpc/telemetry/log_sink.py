"""Lines on their way to standard error: a bounded queue, a thread that writes, a count of what was lost.

Whoever reads the log may stop reading, and a full pipe blocks its writer. Here that is a thread with
nothing else to do; event loop and engine only put lines into the queue, which takes them or drops them.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TextIO

__all__ = ["LogSink"]

_MAX_LINES = 8192
_BATCH_CHARS = 1 << 16


class LogSink:
    """Writes to `stream` until closed. `put` never blocks and may be called on any thread.

    `notice` makes the line that tells how many were dropped, written once there is room again.
    """

    def __init__(self, stream: TextIO, notice: Callable[[int], str], max_lines: int = _MAX_LINES) -> None:
        self._stream = stream
        self._fd = _descriptor_of(stream)
        self._notice = notice
        self._max_lines = max_lines
        # An Event is set once all that was put before it is written; None ends the thread.
        self._queue: SimpleQueue[str | threading.Event | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_dropped = 0
        self._num_told = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="photon-log", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Lines that were not written, because the queue was full or nobody can read them any more."""
        return self._num_dropped

    def put(self, line: str) -> None:
        """Have `line`, which ends with a line break, written; or drop it."""
        if self._closed or self._queue.qsize() >= self._max_lines:
            self.count_dropped()
        else:
            self._queue.put(line)

    def count_dropped(self, num_lines: int = 1) -> None:
        """Count lines that never came into the queue, or out of it."""
        with self._lock:
            self._num_dropped += num_lines

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything put so far is written; False if that took longer than `timeout_s`."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout_s) if self._thread.is_alive() else False

    def close(self, timeout_s: float) -> bool:
        """Flush and end the thread; False if it is given up, blocked. May be called twice."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the writing thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            lines: list[str] = []
            size = 0
            while isinstance(item, str):
                lines.append(item)
                size += len(item)
                if size >= _BATCH_CHARS:
                    break
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    break
            if lines:
                self._write(lines)
            if isinstance(item, threading.Event):
                item.set()
            elif item is None:
                return

    def _write(self, lines: list[str]) -> None:
        dropped = self._num_dropped - self._num_told
        if dropped:
            self._num_told += dropped
            lines = [*lines, self._notice(dropped)]
        try:
            self._write_text("".join(lines))
        except (OSError, ValueError):
            # The reader has gone, or the stream is closed: there is nowhere left to say so but the count.
            self.count_dropped(len(lines))

    def _write_text(self, text: str) -> None:
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # Past the stream's own buffer, whose lock the interpreter wants at its exit.
        data = memoryview(text.encode(errors="backslashreplace"))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                select.select([], [self._fd], [])


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
