"""The queue between calls and a collector, with exporters that deliver, fail, hang and raise."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from photon_grpc.telemetry.span_queue import SpanQueue


class Exporter(SpanExporter):
    """Keeps names; hangs while `gate` is closed; answers and raises what it is told to."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.names: list[str] = []
        self.result = result
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.is_busy = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.is_busy.set()
        self.gate.wait()
        if self.error is not None:
            raise self.error
        self.names += [span.name for span in spans]
        return self.result

    def shutdown(self) -> None:
        self.gate.set()


def make_spans(queue: SpanQueue, *names: str) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(queue)
    for name in names:
        provider.get_tracer("test").start_span(name).end()


def test_everything_is_exported_in_order_by_the_end() -> None:
    exporter = Exporter()
    queue = SpanQueue(exporter, period_s=60)
    names = [str(number) for number in range(1500)]
    make_spans(queue, *names)
    queue.shutdown(20_000)
    assert exporter.names == names
    assert queue.num_dropped == 0


def test_a_collector_that_hangs_costs_spans_and_no_time() -> None:
    exporter = Exporter()
    exporter.gate.clear()
    queue = SpanQueue(exporter, max_spans=10, period_s=0.001)
    make_spans(queue, "first")
    assert exporter.is_busy.wait(20)
    make_spans(queue, *("later" for _ in range(25)))
    assert queue.num_dropped == 15
    assert not queue.force_flush(10)
    before = time.monotonic()
    queue.shutdown(100)
    assert time.monotonic() - before < 10


def test_what_a_collector_refuses_is_dropped_and_counted() -> None:
    exporter = Exporter(SpanExportResult.FAILURE)
    queue = SpanQueue(exporter, period_s=60)
    make_spans(queue, *(str(number) for number in range(600)))
    queue.shutdown(20_000)
    # Leaving does not try the rest on a collector that has just failed.
    assert len(exporter.names) == 512
    assert queue.num_dropped == 600
    make_spans(queue, "too late")
    assert queue.num_dropped == 601


def test_fault_08_an_exporter_that_raises_does_not_end_the_thread() -> None:
    exporter = Exporter()
    exporter.error = RuntimeError("no")
    queue = SpanQueue(exporter, period_s=0.001)
    make_spans(queue, "lost")
    deadline = time.monotonic() + 20
    while not queue.num_dropped and time.monotonic() < deadline:
        time.sleep(0.001)
    exporter.error = None
    make_spans(queue, "kept")
    queue.shutdown(20_000)
    assert exporter.names == ["kept"]
    assert queue.num_dropped == 1


def test_what_is_not_sampled_is_not_kept() -> None:
    exporter = Exporter()
    queue = SpanQueue(exporter, period_s=60)
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(queue)
    provider.get_tracer("test").start_span("unsampled").end()
    queue.shutdown(20_000)
    assert exporter.names == []
    assert queue.num_dropped == 0
