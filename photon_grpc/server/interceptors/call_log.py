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
    generations = [part.generation for part in (record, *record.items)]
    usages = [g.usage for g in generations if g is not None and g.usage is not None]
    if usages:
        figures["prompt_tokens"] = sum(usage.prompt_tokens for usage in usages)
        figures["output_tokens"] = sum(usage.output_tokens for usage in usages)
    if record.items:
        figures["items"] = len(record.items)
        figures["failed_items"] = sum(item.code != "OK" for item in record.items)
    _log.info(
        "call finished",
        method=record.method,
        code=record.code,
        request_id=record.request_id,
        seconds=round(record.seconds, 6),
        **figures,
        **record.log_context,
    )
