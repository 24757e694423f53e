"""How log records look and where they go: structlog over the standard library, on standard error.

Records of other libraries pass through the same formatter, so that a JSON log is JSON to its last
line. Prompts, completions and token text never go into a record; that is the rule of the callers.
Configured once by the command line, before any other thread starts; a program that uses the package as
a library keeps its own logging.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
import structlog.tracebacks
from structlog.typing import Processor

from photon_grpc.options import TelemetryOptions

__all__ = ["configure_logging"]

# Libraries that report at INFO what is of no interest to an operator of this service.
_QUIET = ("asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "matplotlib", "transformers")


# Local variables hold prompts and completions, which never reach a log.
_TRACEBACKS_WITHOUT_LOCALS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def configure_logging(options: TelemetryOptions, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records to `stream` (standard error) in one format.

    Calling it again replaces the earlier configuration.
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
    handler = _ForgivingHandler(target)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _ForgivingHandler):
            root.removeHandler(old)
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
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class _ForgivingHandler(logging.StreamHandler[TextIO]):
    """A reader that has gone away costs its log lines, not the service or more noise on the stream."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, (BrokenPipeError, ValueError)) and (
            isinstance(error, BrokenPipeError) or self.stream.closed
        ):
            return
        super().handleError(record)
