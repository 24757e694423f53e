"""Lines on their way to standard error: a bounded queue, a thread that writes, a count of what was lost.

Whoever reads the log may stop reading, and a full pipe blocks its writer. Here that is a thread with
nothing else to do; event loop and engine only put lines into the queue, which takes them or drops them.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
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
        # The writer has reported what no writer may run into; once is enough.
        self._has_reported = False
        # The last write ended inside a line.
        self._is_torn = False
        self._thread = self._start()

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

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="photon-log", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:  # noqa: BLE001 - reported; another thread takes over
            self._report(error)
            if not self._closed:
                self._thread = self._start()

    def _write_until_closed(self) -> None:
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
        if self._fd is not None:
            num_written = self._attempt(lines)
        else:
            # Such a stream does not say how far it came.
            num_written = sum(self._attempt([line]) for line in lines)
        if num_written < len(lines):
            self.count_dropped(len(lines) - num_written)
        elif dropped and self._attempt_notice(dropped):
            self._num_told += dropped

    def _attempt(self, lines: list[str]) -> int:
        """How many of `lines` were written, the first ones."""
        try:
            if self._fd is not None:
                return self._write_bytes([line.encode(errors="backslashreplace") for line in lines], self._fd)
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):
            # The reader has gone, or the stream is closed: there is nowhere left to say so but the count.
            return 0
        except BaseException as error:  # noqa: BLE001 - reported and counted; later lines may fare better
            self._report(error)
            return 0
        return len(lines)

    def _attempt_notice(self, dropped: int) -> bool:
        try:
            notice = self._notice(dropped)
        except Exception as error:  # noqa: BLE001 - reported; the count still has it
            self._report(error)
            return False
        return self._attempt([notice]) == 1

    def _write_bytes(self, lines: list[bytes], fd: int) -> int:
        # Past the stream's own buffer, whose lock the interpreter wants at its exit.
        head = b"\n" if self._is_torn else b""
        data = memoryview(head + b"".join(lines))
        num_bytes = 0
        try:
            while num_bytes < len(data):
                try:
                    num_bytes += os.write(fd, data[num_bytes:])
                except BlockingIOError:
                    select.select([], [fd], [])
        except (OSError, ValueError):
            ends = list(accumulate((len(line) for line in lines), initial=len(head)))
            if num_bytes:
                self._is_torn = num_bytes not in ends
            return sum(end <= num_bytes for end in ends[1:])
        self._is_torn = False
        return len(lines)

    def _report(self, error: BaseException) -> None:
        """Say once, where the process says such things, that the writer met what it was not made for."""
        if self._has_reported:
            return
        self._has_reported = True
        # Where that is closed, the count of what was dropped is left.
        with suppress(OSError):
            os.write(2, f"photon_grpc: the log's writer failed: {type(error).__name__}\n".encode())


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
