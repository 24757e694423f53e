"""Log lines, read back as an operator's collector would."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from photon_grpc.options import TelemetryOptions
from photon_grpc.telemetry.logging import configure_logging


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def configure(**options: str) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(TelemetryOptions(**options), stream)
    return stream


def records(stream: io.StringIO) -> list[dict[str, Any]]:
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
    closed = io.StringIO()
    configure_logging(TelemetryOptions(log_format="json"), closed)
    closed.close()
    structlog.get_logger().info("into the void")
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
    assert "14 characters are too many" in stream.getvalue()
    assert "whispered" not in stream.getvalue()
