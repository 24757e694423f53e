"""Lines on their way to standard error: a bounded queue, a thread that writes, a count of what was lost.

Whoever reads the log may stop reading, and a full pipe blocks its writer. Here that is a thread with
nothing else to do; event loop and engine only put lines into the queue, which takes them or drops them.
"""

from __future__ import annotations

import os
import select
import threading
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
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
        # What came last into the stream is the beginning of a line.
        self._is_torn = False
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
        records = [*lines, self._notice(dropped)] if dropped else lines
        num_written = self._write_records(records)
        if num_written == len(records):
            self._num_told += dropped
        elif num_written < len(lines):
            # There is nowhere left to say so but the count, until there is room again.
            self.count_dropped(len(lines) - num_written)

    def _write_records(self, records: list[str]) -> int:
        """How many were written whole: all, or those before the reader was gone or the room was used up."""
        if self._fd is not None:
            return self._write_bytes(self._fd, [r.encode(errors="backslashreplace") for r in records])
        try:
            self._stream.write("".join(records))
            self._stream.flush()
        except (OSError, ValueError):
            return 0
        return len(records)

    def _write_bytes(self, fd: int, records: list[bytes]) -> int:
        """Past the stream's own buffer, whose lock the interpreter wants at its exit."""
        if self._is_torn:
            records = [b"\n" + records[0], *records[1:]]
        ends = list(accumulate(map(len, records)))
        data = memoryview(b"".join(records))
        position = 0
        while position < len(data):
            try:
                position += os.write(fd, data[position:])
            except BlockingIOError:
                select.select([], [fd], [])
            except OSError:
                break
        num_written = bisect_right(ends, position)
        if position:
            self._is_torn = position != (ends[num_written - 1] if num_written else 0)
        return num_written


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
