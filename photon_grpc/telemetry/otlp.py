"""Spans and metrics to a collector over OTLP/gRPC; the optional extra `otlp`.

Nothing here waits for the collector but threads of its own, and leaving takes at most two seconds
whatever the collector does.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

from photon_grpc.errors import ConfigError
from photon_grpc.telemetry.span_queue import SpanQueue

__all__ = ["OtlpExport"]

_EXPORT_TIMEOUT_S = 5.0
_METRICS_PERIOD_S = 15.0
_LEAVE_S = 2.0


class OtlpExport:
    """Providers whose spans and metrics go to the collector at `endpoint` (`http://` or `https://`)."""

    def __init__(self, endpoint: str, version: str) -> None:
        """Raises ConfigError where the exporter is not installed. Connects later, on its own threads."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise ConfigError(
                "telemetry.otlp_endpoint needs the exporter: pip install 'photon-grpc[otlp]'"
            ) from None
        # Each failed attempt would be a record; what is lost is counted.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        resource = Resource.create(
            {
                "service.name": "photon-grpc",
                "service.version": version,
                "service.instance.id": f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}",
            }
        )
        self._queue = SpanQueue(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))
        self.tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.tracers.add_span_processor(self._queue)
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S),
            export_interval_millis=_METRICS_PERIOD_S * 1000,
        )
        self.meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)

    def num_dropped_spans(self) -> int:
        """Spans that did not reach the collector. Any thread."""
        return self._queue.num_dropped

    def close(self) -> None:
        """Send what is left; what takes longer than two seconds is given up. Blocks for as long."""
        leaving = [
            threading.Thread(target=shutdown, name="photon-otlp-close", daemon=True)
            for shutdown in (
                lambda: self._queue.shutdown(round(_LEAVE_S * 1000)),
                lambda: self.meters.shutdown(timeout_millis=_LEAVE_S * 1000),
            )
        ]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join(_LEAVE_S)
