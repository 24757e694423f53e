"""Spans and histograms of real calls, read out of the SDK's in-memory exporters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from photon_grpc.telemetry.call_record import CallRecord, GenerationRecord
from photon_grpc.telemetry.call_trace import CallTrace
from photon_grpc.types import FinishReason, Timings, Usage
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import EFFECTIVE
from tests.support.grpc_harness import until
from tests.support.scripted_service import scripted_service

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
CANARY = "canary-91c2"
STREAM = "photon.v1.InferenceService/StreamGenerate"


class Collected:
    """A CallTrace whose spans and metrics stay here."""

    def __init__(self, **arguments: Any) -> None:
        self._exporter = InMemorySpanExporter()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.trace = CallTrace(
            tracers,
            MeterProvider([self._reader], shutdown_on_exit=False),
            address="127.0.0.1",
            port=50051,
            **arguments,
        )

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """By name, those of one call."""
        finished: Sequence[ReadableSpan] = self._exporter.get_finished_spans()
        assert len({span.name for span in finished}) == len(finished)
        return {span.name: span for span in finished}

    def points(self) -> dict[str, Any]:
        """The one data point of each histogram."""
        data = self._reader.get_metrics_data()
        assert data is not None
        metrics = [
            metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]
        assert all(metric.unit == "s" for metric in metrics)
        return {metric.name: metric.data.data_points[0] for metric in metrics}


def streamed(max_tokens: int) -> pb.StreamGenerateRequest:
    spec = pb.GenerationSpec(text=CANARY)
    spec.stop.max_tokens = max_tokens
    spec.stop.ignore_eos = True
    spec.sampling.temperature = 0.5
    spec.sampling.seed = 11
    return pb.StreamGenerateRequest(spec=spec, request_id="call-1")


async def test_a_stream_is_a_server_span_with_three_phases_inside(tmp_path: Path) -> None:
    collected = Collected()
    with capture_logs() as records:
        async with scripted_service(tmp_path, call_observers=(collected.trace.observe,)) as harness:
            metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("tracestate", "vendor=1"))
            call = harness.inference.StreamGenerate(streamed(5), metadata=metadata)
            while await call.read() is not grpc.aio.EOF:
                pass
            await until(lambda: len(collected.spans) == 4)
    spans = collected.spans
    server = spans[STREAM]
    assert server.kind is SpanKind.SERVER
    assert server.parent is not None
    assert server.parent.is_remote
    assert f"{server.context.trace_id:032x}" == TRACE_ID
    assert f"{server.parent.span_id:016x}" == PARENT_ID
    assert server.context.trace_state.to_header() == "vendor=1"
    assert server.status.status_code is StatusCode.UNSET
    assert [event.name for event in server.events] == ["first_token"]
    attributes = dict(server.attributes or {})
    prompt_tokens = attributes.pop("gen_ai.usage.input_tokens")
    assert isinstance(prompt_tokens, int)
    assert prompt_tokens > 0
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": STREAM,
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": 50051,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "photon",
        "gen_ai.request.model": attributes["gen_ai.response.model"],
        "gen_ai.response.model": attributes["gen_ai.response.model"],
        "gen_ai.response.id": "call-1",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.seed": 11,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.finish_reasons": ("max_tokens",),
        "gen_ai.usage.output_tokens": 5,
    }
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert phase.kind is SpanKind.INTERNAL
        assert phase.parent is not None
        assert phase.parent.span_id == server.context.span_id
    moments = [server.start_time, *(m for p in phases for m in (p.start_time, p.end_time)), server.end_time]
    known = [moment for moment in moments if moment is not None]
    assert len(known) == 8
    assert known == sorted(known)
    assert server.events[0].timestamp == phases[2].start_time
    (line,) = [record for record in records if record["event"] == "call finished"]
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, f"{server.context.span_id:016x}")
    assert line["request_id"] == "call-1"
    assert CANARY not in repr([span.to_json() for span in spans.values()])


async def test_without_a_collector_the_line_still_has_the_caller_s_trace(tmp_path: Path) -> None:
    with capture_logs() as records:
        async with scripted_service(tmp_path) as harness:
            for parent in (f"00-{TRACE_ID}-{PARENT_ID}-01", "nonsense"):
                await harness.inference.Generate(
                    pb.GenerateRequest(spec=streamed(1).spec), metadata=(("traceparent", parent),)
                )
    with_trace, without = [record for record in records if record["event"] == "call finished"]
    assert with_trace["trace_id"] == TRACE_ID
    assert "trace_id" not in without


async def test_a_refused_call_is_a_span_with_an_error_type(tmp_path: Path) -> None:
    collected = Collected()
    bad = pb.GenerateRequest(spec=streamed(5).spec)
    bad.spec.sampling.top_p = 7.0
    async with scripted_service(tmp_path, call_observers=(collected.trace.observe,)) as harness:
        with pytest.raises(grpc.aio.AioRpcError):
            await harness.inference.Generate(bad)
        await until(lambda: len(collected.spans) == 1)
    (span,) = collected.spans.values()
    attributes = dict(span.attributes or {})
    assert attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert attributes["error.type"] == "INVALID_FIELD"
    assert span.parent is None
    # The client's doing, not a fault of the server.
    assert span.status.status_code is StatusCode.UNSET
    assert CANARY not in span.to_json()
    assert set(collected.points()) == {"rpc.server.call.duration"}


async def test_a_call_that_its_client_leaves_is_a_span_of_what_it_did(tmp_path: Path) -> None:
    collected = Collected()
    async with scripted_service(tmp_path, step_s=0.005, call_observers=(collected.trace.observe,)) as harness:
        call = harness.inference.StreamGenerate(streamed(2000))
        await call.read()
        call.cancel()
        await until(lambda: len(collected.spans) == 4)
    attributes = dict(collected.spans[STREAM].attributes or {})
    assert attributes["rpc.response.status_code"] == attributes["error.type"] == "CANCELLED"
    assert 0 < int(str(attributes["gen_ai.usage.output_tokens"])) < 2000
    assert set(collected.points()) == {"rpc.server.call.duration", "gen_ai.server.request.duration"}


def record() -> CallRecord:
    """A chat of two completions, 1,001 tokens each, which were preempted three times."""
    return CallRecord(
        STREAM,
        started=50.0,
        seconds=4.0,
        code="OK",
        request_id="r",
        generation=GenerationRecord(
            arrival=50.5,
            requested_model="",
            model="tiny",
            is_chat=True,
            effective=sampled_twice(),
            has_first_token=True,
            finish_reasons=(FinishReason.EOS, FinishReason.EOS),
            usage=Usage(prompt_tokens=4, cached_prompt_tokens=0, output_tokens=2002),
            timings=Timings(queue=0.25, prefill=0.25, first_token=0.5, decode=2.0, total=2.5, preemptions=3),
        ),
    )


def sampled_twice() -> Any:
    return replace(EFFECTIVE, sampling=replace(EFFECTIVE.sampling, n=2))


def test_an_item_of_a_batch_is_a_span_inside_the_call_s() -> None:
    collected = Collected(clock=lambda: 54.0, wall_clock=lambda: 1000 * 1_000_000_000)
    item = replace(record(), started=51.0, seconds=2.5, code="ABORTED", reason="ABORTED_BY_OPERATOR")
    collected.trace.observe(replace(record(), method="Batch", generation=None, items=[item]))
    spans = collected.spans
    assert set(spans) == {"Batch", "item"}
    inner = spans["item"]
    assert inner.parent is not None
    assert inner.parent.span_id == spans["Batch"].context.span_id
    assert ((inner.start_time or 0) / 1e9, (inner.end_time or 0) / 1e9) == (997.0, 999.5)
    attributes = dict(inner.attributes or {})
    assert attributes["gen_ai.response.id"] == "r"
    assert attributes["gen_ai.usage.output_tokens"] == 2002
    assert attributes["error.type"] == "ABORTED_BY_OPERATOR"
    request = collected.points()["gen_ai.server.request.duration"]
    assert request.sum == 2.5
    assert dict(request.attributes)["error.type"] == "ABORTED_BY_OPERATOR"


def test_phases_lie_where_the_timings_say() -> None:
    second = 1_000_000_000
    collected = Collected(clock=lambda: 54.0, wall_clock=lambda: 1000 * second)
    collected.trace.observe(record())
    spans = collected.spans
    places = {
        name: ((span.start_time or 0) / second, (span.end_time or 0) / second) for name, span in spans.items()
    }
    assert places == {
        STREAM: (996.0, 1000.0),
        "queue": (996.5, 996.75),
        "prefill": (996.75, 997.0),
        "decode": (997.0, 999.0),
    }
    first_token, preempted = spans[STREAM].events
    assert first_token.timestamp == 997 * second
    assert (preempted.name, dict(preempted.attributes or {})) == ("preempted", {"photon.preemptions": 3})


def test_histograms_have_the_buckets_and_attributes_of_the_conventions() -> None:
    collected = Collected()
    collected.trace.observe(record())
    points = collected.points()
    assert points["rpc.server.call.duration"].sum == 4.0
    assert points["gen_ai.server.request.duration"].sum == 4.0
    assert points["gen_ai.server.time_to_first_token"].sum == 0.5
    # 2 s for the 1,000 tokens after the first, of each of the two that ran side by side.
    assert points["gen_ai.server.time_per_output_token"].sum == pytest.approx(0.002)
    per_token = points["gen_ai.server.time_per_output_token"].explicit_bounds
    assert per_token[-13:] == (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
    assert per_token[0] < 0.001
    assert points["gen_ai.server.time_to_first_token"].explicit_bounds[0] == 0.001
    duration = points["gen_ai.server.request.duration"].explicit_bounds
    assert (duration[0], duration[-1]) == (0.01, 81.92)
    assert dict(points["gen_ai.server.time_to_first_token"].attributes) == {
        "server.address": "127.0.0.1",
        "server.port": 50051,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "photon",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
    }
    assert dict(points["rpc.server.call.duration"].attributes) == {
        "server.address": "127.0.0.1",
        "server.port": 50051,
        "rpc.system.name": "grpc",
        "rpc.method": STREAM,
        "rpc.response.status_code": "OK",
    }
