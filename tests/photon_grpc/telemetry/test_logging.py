"""Log lines, read back as an operator's collector would."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from photon_grpc.options import TelemetryOptions
from photon_grpc.telemetry.logging import configure_logging, flush_logs, num_dropped_records


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def configure(**options: str) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(TelemetryOptions(**options), stream)
    return stream


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    assert flush_logs()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_is_one_json_object_whoever_wrote_it() -> None:
    stream = configure(log_format="json")
    structlog.get_logger("ours").info("call finished", tokens=3)
    logging.getLogger("theirs").warning("spoke %s", "up", extra={"port": 7})
    ours, theirs = records(stream)
    assert (ours["event"], ours["tokens"], ours["level"], ours["logger"]) == (
        "call finished",
        3,
        "info",
        "ours",
    )
    assert (theirs["event"], theirs["port"], theirs["level"]) == ("spoke up", 7, "warning")
    assert ours["timestamp"].endswith("Z")


def test_a_traceback_stays_on_one_line() -> None:
    stream = configure(log_format="json")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        structlog.get_logger().exception("step failed")
        logging.getLogger("theirs").exception("also")
    for record in records(stream):
        assert record["exception"][0]["exc_type"] == "RuntimeError"


def test_the_level_holds_for_both_kinds() -> None:
    stream = configure(log_format="json", log_level="warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("theirs").info("quiet")
    structlog.get_logger().warning("loud")
    assert [record["event"] for record in records(stream)] == ["loud"]


def test_bound_context_is_written() -> None:
    stream = configure(log_format="json")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("x")
    assert records(stream)[0]["request_id"] == "r1"


def test_auto_is_json_off_a_terminal_and_words_on_one() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert records_of_one_line(io.StringIO())
    terminal = Terminal()
    configure_logging(TelemetryOptions(), terminal)
    structlog.get_logger().info("hello", port=7)
    assert flush_logs()
    assert "hello" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


def records_of_one_line(stream: io.StringIO) -> list[dict[str, Any]]:
    configure_logging(TelemetryOptions(), stream)
    structlog.get_logger().info("hello")
    return records(stream)


def test_configuring_twice_does_not_write_twice() -> None:
    configure(log_format="json")
    stream = configure(log_format="json")
    logging.getLogger("theirs").warning("once")
    assert len(records(stream)) == 1


def test_a_warning_becomes_a_record() -> None:
    stream = configure(log_format="json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    assert "old ways" in records(stream)[0]["event"]


def test_a_reader_that_has_gone_away_does_not_hurt(capsys: pytest.CaptureFixture[str]) -> None:
    class BrokenPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    configure_logging(TelemetryOptions(log_format="json"), BrokenPipe())
    structlog.get_logger().info("into the void")
    assert flush_logs()
    assert num_dropped_records() == 1
    closed = io.StringIO()
    configure_logging(TelemetryOptions(log_format="json"), closed)
    closed.close()
    structlog.get_logger().info("into the void")
    assert flush_logs()
    assert num_dropped_records() == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_do_not_show_local_variables(log_format: str) -> None:
    """They hold prompts and completions."""
    stream = configure(log_format=log_format)
    prompt_text = "".join(["whis", "pered ", "word"])

    def fail(prompt: str) -> None:
        raise RuntimeError(f"{len(prompt)} characters are too many")

    try:
        fail(prompt_text)
    except RuntimeError:
        structlog.get_logger("x").exception("step failed")
    assert flush_logs()
    assert "14 characters are too many" in stream.getvalue()
    assert "whispered" not in stream.getvalue()


def test_a_reader_that_does_not_read_costs_records_and_no_time() -> None:
    """More than queue and pipe hold go nowhere; the count and, once it reads on, a record say how many."""
    reading, writing = os.pipe()
    num_records = 20_000
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as writer:
        configure_logging(TelemetryOptions(log_format="json"), writer)
        log = structlog.get_logger()
        for number in range(num_records):
            log.info("line", number=number)
        assert not flush_logs(0.05)
        dropped = num_dropped_records()
        assert 0 < dropped < num_records
        read: list[dict[str, Any]] = []
        while "num_dropped" not in (record := json.loads(reader.readline())):
            read.append(record)
        assert (record["event"], record["level"]) == ("log records dropped", "warning")
        # The first ones are there, in order and none twice.
        assert [record["number"] for record in read] == list(range(len(read)))
        thread = threading.Thread(target=reader.read)
        thread.start()
        assert flush_logs(20)
        logging.getLogger().handlers[-1].close()
        writer.close()
        thread.join(20)


def test_a_file_that_may_grow_no_further_and_then_may(tmp_path: Path) -> None:
    """What was cut off ends where it is, each lost record is counted once, and the notice tells of all."""
    program = [sys.executable, "-c", _LIMITED, str(tmp_path / "log")]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    whole, torn = [], []
    for line in (tmp_path / "log").read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn.append(line)
    numbers = [record["number"] for record in whole if "number" in record]
    (notice,) = [record for record in whole if "num_dropped" in record]
    assert len(torn) == 1
    assert numbers == sorted(numbers)
    assert numbers[-1] == 100
    assert notice["num_dropped"] == 101 - len(numbers) == int(ended.stdout)


_LIMITED = """
import resource, sys
import structlog
from photon_grpc.options import TelemetryOptions
from photon_grpc.telemetry.logging import configure_logging, flush_logs, num_dropped_records
with open(sys.argv[1], "w") as file:
    configure_logging(TelemetryOptions(log_format="json"), file)
    log = structlog.get_logger()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    for number in range(100):
        log.info("line", number=number)
        if number % 10 == 9:
            assert flush_logs(20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.info("line", number=100)
    assert flush_logs(20)
    print(num_dropped_records())
"""


def test_a_record_that_cannot_be_put_into_words_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    stream = configure(log_format="json")
    # Past the other handlers of a test run, which would raise.
    (ours,) = [h for h in logging.getLogger().handlers if type(h).__module__.startswith("photon_grpc")]
    ours.handle(logging.LogRecord("theirs", logging.WARNING, "", 0, "%d apples", ("many",), None))
    logging.getLogger("theirs").warning("fine")
    assert [record["event"] for record in records(stream) if "num_dropped" not in record] == ["fine"]
    assert num_dropped_records() == 1
    assert capsys.readouterr().err == ""


class _Unspeakable:
    def __repr__(self) -> str:
        raise OSError("no words for it")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_event_that_cannot_be_put_into_words_is_counted_and_hurts_nobody(log_format: str) -> None:
    stream = configure(log_format=log_format)
    structlog.get_logger("ours").warning("lost", what=_Unspeakable())
    structlog.get_logger("ours").warning("fine")
    assert flush_logs(20)
    assert "fine" in stream.getvalue()
    assert "lost" not in stream.getvalue()
    assert num_dropped_records() == 1


def test_a_logger_without_a_name_has_that_of_its_module() -> None:
    stream = configure(log_format="json")
    structlog.get_logger().info("said")
    (record,) = records(stream)
    assert record["logger"] == __name__
    assert record["level"] == "info"


def test_the_level_of_a_logger_s_own_holds_for_events() -> None:
    stream = configure(log_format="json")
    logging.getLogger("ours.quiet").setLevel(logging.ERROR)
    for name in ("ours.quiet", "ours.loud"):
        structlog.get_logger(name).warning("said")
        structlog.get_logger(name).error("said")
    told = [(record["logger"], record["level"]) for record in records(stream)]
    assert told == [("ours.quiet", "error"), ("ours.loud", "warning"), ("ours.loud", "error")]


_BLOCKED_AT_EXIT = """
import structlog
from photon_grpc.options import TelemetryOptions
from photon_grpc.telemetry.logging import configure_logging
configure_logging(TelemetryOptions(log_format="json"))
for number in range(20_000):
    structlog.get_logger().info("line", number=number)
print("left", flush=True)
"""


def test_a_process_leaves_though_nobody_reads_its_log() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _BLOCKED_AT_EXIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "left\n"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_what_was_logged_last_is_written_before_a_process_ends() -> None:
    program = _BLOCKED_AT_EXIT.replace("20_000", "50")
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    assert [json.loads(line)["number"] for line in ended.stderr.splitlines()] == list(range(50))
