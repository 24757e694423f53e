"""How log records look and where they go: structlog over the standard library, on standard error.

Records of other libraries pass through the same processors, so that a JSON log is JSON to its last
line. Ours, of which every call has one, go to the writer as soon as they are in words: as records of the
standard library they would be looked up, copied and put into words twice as slowly. Prompts, completions
and token text never go into a record; that is the rule of the callers. A record is put into words on the
thread that makes it and written by one of its own (`log_sink.py`): logging never blocks. Configured once by
the command line, before any other thread starts; a program that uses the package as a library keeps its own
logging.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TextIO

import structlog
import structlog.tracebacks
from structlog.typing import Processor

from photon_grpc.options import TelemetryOptions
from photon_grpc.telemetry.log_sink import LogSink

__all__ = ["configure_logging", "flush_logs", "num_dropped_records"]

# How long a process that leaves waits for a reader that does not read.
_EXIT_FLUSH_S = 2.0

# Libraries that report at INFO what is of no interest to an operator of this service.
_QUIET = ("asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "matplotlib", "transformers")


# Local variables hold prompts and completions, which never reach a log.
_TRACEBACKS_WITHOUT_LOCALS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def configure_logging(options: TelemetryOptions, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records to `stream` (standard error) in one format.

    Calling it again replaces the earlier configuration. What is not written when the process leaves gets
    two seconds for it.
    """
    target = sys.stderr if stream is None else stream
    as_json = options.log_format == "json" or (options.log_format == "auto" and not target.isatty())
    level = logging.getLevelNamesMapping()[options.log_level.upper()]

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor]
    if as_json:
        rendering = [_TRACEBACKS_WITHOUT_LOCALS, structlog.processors.JSONRenderer()]
    else:
        rendering = [
            structlog.dev.ConsoleRenderer(
                colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )
    handler = _SinkHandler(target, formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _SinkHandler):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _Rendering(rendering, handler.sink),
        ],
        logger_factory=_SinkLoggerFactory(handler.sink),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def flush_logs(timeout_s: float = _EXIT_FLUSH_S) -> bool:
    """Wait until every record made so far is written; False if that took longer than `timeout_s`."""
    return all(handler.sink.flush(timeout_s) for handler in _sink_handlers())


def num_dropped_records() -> int:
    """Records that were not written because standard error did not take them. Any thread."""
    return sum(handler.sink.num_dropped for handler in _sink_handlers())


def _sink_handlers() -> list[_SinkHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _SinkHandler)]


class _Rendering:
    """The last processor: puts an event into words, or counts it as lost; its caller must not fail for it."""

    def __init__(self, processors: Sequence[Processor], sink: LogSink) -> None:
        self._processors = tuple(processors)
        self._sink = sink

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        result: Any = event
        try:
            for processor in self._processors:
                result = processor(logger, method, result)
        except Exception as error:  # what is being put into words may raise anything
            self._sink.count_dropped()
            raise structlog.DropEvent from error
        return f"{result}\n"


class _SinkLogger:
    """What structlog's loggers write to. Its name and level are those of the standard library's logger."""

    def __init__(self, logger: logging.Logger, put: Callable[[str], None]) -> None:
        self.name = logger.name
        self.disabled = logger.disabled
        self.getEffectiveLevel = logger.getEffectiveLevel
        self.debug = self.info = self.warning = self.warn = put
        self.error = self.exception = self.critical = self.fatal = put


class _SinkLoggerFactory:
    def __init__(self, sink: LogSink) -> None:
        self._put = sink.put
        # One without a name gets that of the module which asks, not of this one.
        self._loggers = structlog.stdlib.LoggerFactory(ignore_frame_names=[__name__])

    def __call__(self, *names: Any) -> _SinkLogger:
        return _SinkLogger(self._loggers(*names), self._put)


class _SinkHandler(logging.Handler):
    """Puts records into words and the words into a sink of its own."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.sink = LogSink(stream, self._notice)
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.sink.put(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - logging must not fail its caller; told as what it is, a lost record
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a record that cannot be put into words; the library would write to the stream itself."""
        self.sink.count_dropped()

    def close(self) -> None:
        """Write what is left, for at most two seconds. May be called twice."""
        atexit.unregister(self.close)
        self.sink.close(_EXIT_FLUSH_S)
        super().close()

    def _notice(self, num_dropped: int) -> str:
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, "log records dropped", (), None)
        record.num_dropped = num_dropped
        return self.format(record) + "\n"
