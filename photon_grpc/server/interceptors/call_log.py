"""One structured log line per finished call.

Holds method, status, request id, duration and the sizes of what was read and written: never a request
or a response.
"""

from __future__ import annotations

import structlog

from photon_grpc.telemetry.call_record import CallRecord

_log = structlog.get_logger(__name__)


def log_call(record: CallRecord) -> None:
    """Write the line of a call that has ended."""
    figures: dict[str, object] = {}
    if record.reason:
        figures["reason"] = record.reason
    generation = record.generation
    if generation is not None and generation.usage is not None:
        figures["prompt_tokens"] = generation.usage.prompt_tokens
        figures["output_tokens"] = generation.usage.output_tokens
    _log.info(
        "call finished",
        method=record.method,
        code=record.code,
        request_id=record.request_id,
        seconds=round(record.seconds, 6),
        **figures,
        **record.log_context,
    )
