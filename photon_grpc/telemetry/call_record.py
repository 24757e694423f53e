"""What one call was: filled in by whoever handles it, read by logs, metrics and traces when it has ended.

The transport opens a record and makes it `current_call`; whoever works for the call finds it there, so
that no signature carries it. Lengths, moments and settings only: no text, no token ids. Event loop only.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from photon_grpc.types import EffectiveParams, FinishReason, Timings, Usage

__all__ = ["CallRecord", "GenerationRecord", "current_call"]


@dataclass(slots=True)
class GenerationRecord:
    """A request that the engine has taken. `usage` and `timings` tell how far it came, also when it failed.

    `arrival` is in seconds of the monotonic clock. `model` is the served one, `requested_model` what the
    caller asked for (often empty). Without `has_first_token` it waited, or its prompt was being computed,
    to the end.
    """

    arrival: float
    requested_model: str
    model: str
    is_chat: bool
    effective: EffectiveParams
    has_first_token: bool = False
    finish_reasons: tuple[FinishReason, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(slots=True)
class CallRecord:
    """One call. `method` is `package.Service/Method`; `started` is in seconds of the monotonic clock.

    `code` is the name of the gRPC status, `reason` that of the error (`OVERLOADED`), empty where the
    server did not end the call with one: the call went well, or the client left.
    """

    method: str
    started: float
    seconds: float = 0.0
    code: str = "CANCELLED"
    reason: str = ""
    request_id: str = ""
    generation: GenerationRecord | None = None
    # Of a call of many requests, one for each in the order in which they were begun.
    items: list[CallRecord] = field(default_factory=list)
    # The W3C trace context that the client sent: `traceparent`, `tracestate`.
    trace_headers: dict[str, str] = field(default_factory=dict)
    # What log lines of and about the call carry beside the above, such as its trace.
    log_context: dict[str, str] = field(default_factory=dict)


current_call: ContextVar[CallRecord | None] = ContextVar("photon_current_call", default=None)
