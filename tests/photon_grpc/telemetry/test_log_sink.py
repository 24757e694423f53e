"""The thread that writes log lines, with streams that fail in every way and a thread that dies."""

from __future__ import annotations

import ctypes
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from photon_grpc.telemetry.log_sink import LogSink

PATIENCE_S = 30.0


class Picky(io.StringIO):
    """Raises for lines that `error_of` has an error for."""

    def __init__(self, error_of: Callable[[str], BaseException | None]) -> None:
        super().__init__()
        self._error_of = error_of

    def write(self, text: str) -> int:
        error = self._error_of(text)
        if error is not None:
            raise error
        return super().write(text)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this is not set, sinks write nothing: what is put comes as one batch."""
    gate = threading.Event()
    write = LogSink._write

    def waiting(self: LogSink, lines: list[str]) -> None:
        gate.wait(PATIENCE_S)
        write(self, lines)

    monkeypatch.setattr(LogSink, "_write", waiting)
    yield gate
    gate.set()


def notice(num_dropped: int) -> str:
    return f"{num_dropped} dropped\n"


ERRORS = [RuntimeError("no"), MemoryError(), TypeError(), KeyError("x"), SystemExit(3), RecursionError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_fault_08_a_line_that_cannot_be_written_costs_that_line(
    error: BaseException, held: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = Picky(lambda text: error if "bad" in text else None)
    sink = LogSink(stream, notice)
    lines = ["one\n", "bad\n", "two\n", "bad\n", "three\n"]
    for line in lines:
        sink.put(line)
    held.set()
    assert sink.flush(PATIENCE_S)
    assert stream.getvalue() == "one\ntwo\nthree\n"
    assert sink.num_dropped == 2
    sink.put("four\n")
    assert sink.close(PATIENCE_S)
    assert stream.getvalue().splitlines()[3:] == ["four", "2 dropped"]
    reported = capfd.readouterr().err
    assert reported.count("the log's writer failed") == 1
    assert type(error).__name__ in reported


def test_fault_08_a_reader_that_has_gone_is_no_failure_of_the_writer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    sink = LogSink(Picky(lambda text: BrokenPipeError()), notice)
    sink.put("one\n")
    sink.put("two\n")
    assert sink.close(PATIENCE_S)
    assert sink.num_dropped == 2
    assert capfd.readouterr().err == ""


def test_fault_08_a_notice_that_cannot_be_made_ends_nothing() -> None:
    def unable(num_dropped: int) -> str:
        raise KeyError("num_dropped")

    stream = io.StringIO()
    sink = LogSink(stream, unable)
    sink.count_dropped()
    for line in ("one\n", "two\n"):
        sink.put(line)
        assert sink.flush(PATIENCE_S)
    assert stream.getvalue() == "one\ntwo\n"
    assert sink.num_dropped == 1
    assert sink.close(PATIENCE_S)


def test_fault_08_a_thread_that_dies_is_replaced() -> None:
    stream = io.StringIO()
    sink = LogSink(stream, notice)
    sink.put("one\n")
    assert sink.flush(PATIENCE_S)
    dying = sink._thread
    assert dying.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(dying.ident), ctypes.py_object(SystemExit)
    )
    # Asleep in the queue, it dies with the next thing that comes, which is lost.
    sink.flush(0.5)
    dying.join(PATIENCE_S)
    assert not dying.is_alive()
    give_up_at = time.monotonic() + PATIENCE_S
    while sink._thread is dying and time.monotonic() < give_up_at:
        time.sleep(0.01)
    sink.put("two\n")
    assert sink.flush(PATIENCE_S)
    assert stream.getvalue() == "one\ntwo\n"
    assert sink.close(PATIENCE_S)
    assert not sink._thread.is_alive()


_LIMITED = """
import resource, signal, sys
from photon_grpc.telemetry.log_sink import LogSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))
with open(sys.argv[1], "w") as file:
    sink = LogSink(file, lambda dropped: f"{dropped} dropped\\n")
    for n in range(5):
        sink.put(f"first {n}\\n")
    sink.flush(30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    sink.put("second\\n")
    sink.close(30)
    print(sink.num_dropped)
"""


def test_lines_before_a_full_disk_are_not_counted_and_none_is_glued_to_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    lines = path.read_text().splitlines()
    assert lines == ["first 0", "first 1", "first 2", "f", "second", "2 dropped"]
    assert ended.stdout.strip() == "2"
    assert ended.stderr == ""
