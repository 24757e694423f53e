"""OTLP over real sockets: a collector that listens, one that is gone, one that takes and never answers."""

from __future__ import annotations

import queue
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from photon_grpc.errors import ConfigError
from photon_grpc.telemetry.call_record import CallRecord
from photon_grpc.telemetry.call_trace import CallTrace
from photon_grpc.telemetry.otlp import OtlpExport

METHOD = "photon.v1.InferenceService/Generate"


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # no types
    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):  # type: ignore[misc]  # no types
    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.put(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def collector() -> Iterator[tuple[str, _Traces, _Metrics]]:
    server = grpc.server(ThreadPoolExecutor(2))
    traces, metrics = _Traces(), _Metrics()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(traces, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(metrics, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", traces, metrics
    finally:
        server.stop(0).wait()


def observe(export: OtlpExport, num_calls: int) -> None:
    trace = CallTrace(export.tracers, export.meters, address="127.0.0.1", port=1)
    for _ in range(num_calls):
        trace.observe(CallRecord(METHOD, started=time.monotonic(), seconds=0.1, code="OK"))


def test_a_collector_gets_spans_and_metrics_by_the_time_we_have_left() -> None:
    with collector() as (endpoint, traces, metrics):
        export = OtlpExport(endpoint, "1.2.3")
        observe(export, 3)
        export.close()
        request = traces.requests.get(timeout=20)
        (resource,) = request.resource_spans
        named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
        assert (named["service.name"], named["service.version"]) == ("photon-grpc", "1.2.3")
        assert [span.name for span in resource.scope_spans[0].spans] == [METHOD] * 3
        (measured,) = metrics.requests.get(timeout=20).resource_metrics
        (metric,) = measured.scope_metrics[0].metrics
        assert metric.name == "rpc.server.call.duration"
        assert metric.histogram.data_points[0].count == 3
        assert export.num_dropped_spans() == 0


def test_a_collector_that_is_gone_costs_nothing_but_its_spans() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check_bounded(f"http://127.0.0.1:{port}")


def test_a_collector_that_never_answers_costs_nothing_but_its_spans() -> None:
    # The kernel takes the connections and what is sent; nobody reads it.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_bounded(f"http://127.0.0.1:{listener.getsockname()[1]}")


def check_bounded(endpoint: str) -> None:
    export = OtlpExport(endpoint, "1")
    before = time.monotonic()
    observe(export, 5000)
    # Waiting for the collector would take hours: each export has five seconds.
    assert time.monotonic() - before < 60
    # More than the queue takes.
    assert export.num_dropped_spans() > 0
    before = time.monotonic()
    export.close()
    assert time.monotonic() - before < 20


def test_without_the_exporter_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"photon-grpc\[otlp\]"):
        OtlpExport("http://127.0.0.1:1", "1")
