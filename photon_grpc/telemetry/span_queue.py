"""Spans on their way to a collector: a bounded queue, a thread that exports, a count of what was lost.

A collector that is slow, hangs or is gone holds up that thread and nobody else.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import structlog
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

__all__ = ["SpanQueue"]

_log = structlog.get_logger(__name__)

_MAX_SPANS = 4096
_MAX_BATCH = 512
_PERIOD_S = 1.0


class SpanQueue(SpanProcessor):
    """Implements the SDK's SpanProcessor. `on_end` never blocks and may be called on any thread."""

    def __init__(
        self, exporter: SpanExporter, *, max_spans: int = _MAX_SPANS, period_s: float = _PERIOD_S
    ) -> None:
        self._exporter = exporter
        self._max_spans = max_spans
        self._period_s = period_s
        self._spans: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._num_dropped = 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="photon-spans", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Spans that found the queue full, or that the exporter could not deliver."""
        return self._num_dropped

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: a span is of interest when it has ended."""

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span, or drop it."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._leaving.is_set() or len(self._spans) >= self._max_spans:
            self._count_dropped(1)
        else:
            self._spans.append(span)

    def shutdown(self, timeout_millis: int = 2000) -> None:
        """Export what is left, for so long, and end. May be called twice."""
        give_up_at = time.monotonic() + timeout_millis / 1000
        self._leaving.set()
        self._thread.join(max(0.0, give_up_at - time.monotonic()))
        # Cuts an export short that still hangs.
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 2000) -> bool:
        """Wait until the queue is empty; False if that took longer."""
        give_up_at = time.monotonic() + timeout_millis / 1000
        while self._spans:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(0.01)
        return True

    def _count_dropped(self, num_spans: int) -> None:
        with self._lock:
            self._num_dropped += num_spans

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._leaving.wait(self._period_s)
            while self._spans:
                batch = [self._spans.popleft() for _ in range(min(_MAX_BATCH, len(self._spans)))]
                if not self._export(batch) and is_last:
                    break
        self._count_dropped(len(self._spans))

    def _export(self, batch: list[ReadableSpan]) -> bool:
        try:
            if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                return True
        except Exception:  # noqa: BLE001 - logged and counted; later spans may fare better
            _log.exception("spans_not_exported", num_spans=len(batch))
        self._count_dropped(len(batch))
        return False
