"""What OpenTelemetry gets of a call: a server span with its phases, and four histograms.

Everything is made when the call has ended, from its record, so that a call pays nothing on its way. Names
are those of the conventions for RPC and for generative AI. Sizes, moments and settings only: no text.
Event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from photon_grpc.telemetry.call_record import CallRecord, GenerationRecord
from photon_grpc.types import Timings, Usage

__all__ = ["CallTrace"]

# Seconds. The first row is finer than the conventions ask for: a small model's token takes less than 10 ms.
_PER_TOKEN = (
    *(0.0005, 0.001, 0.002, 0.004, 0.007),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_DURATION = tuple(0.01 * 2**n for n in range(14))

# Statuses that tell of a fault of the server; the others are the client's own doing.
_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}

# An attribute holds 64 bits with a sign, a seed may be larger.
_MAX_INTEGER = (1 << 63) - 1

_Attributes = dict[str, AttributeValue]


class CallTrace:
    """Makes the spans and observations of ended calls.

    `address` and `port` are those of the public listener, as it was configured. `wall_clock` is in
    nanoseconds since the epoch, `clock` the one of the records.
    """

    def __init__(
        self,
        tracers: TracerProvider,
        meters: MeterProvider,
        *,
        address: str,
        port: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = tracers.get_tracer("photon_grpc")
        self._propagator = TraceContextTextMapPropagator()
        self._place: _Attributes = {"server.address": address, "server.port": port}
        self._clock = clock
        self._wall_clock = wall_clock
        meter = meters.get_meter("photon_grpc")

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Callable[..., None]:
            made = meter.create_histogram(
                name, unit="s", description=text, explicit_bucket_boundaries_advisory=bounds
            )
            return made.record

        self._rpc = histogram("rpc.server.call.duration", "Duration of a call.", _DURATION)
        self._request = histogram(
            "gen_ai.server.request.duration", "Duration of a generation, with its call.", _DURATION
        )
        self._first_token = histogram(
            "gen_ai.server.time_to_first_token", "Arrival to first token.", _FIRST_TOKEN
        )
        self._per_token = histogram(
            "gen_ai.server.time_per_output_token", "Time of an output token after the first.", _PER_TOKEN
        )

    def observe(self, call: CallRecord) -> None:
        """A call has ended. Puts the ids of its span where the call's log line takes them from."""
        shared = {**self._place, **_of_call(call)}
        self._measure(call, shared)
        parent = self._propagator.extract(call.trace_headers, Context())
        # Monotonic moments, laid beside the wall clock as it is now.
        epoch = self._wall_clock() - round(self._clock() * 1e9)

        def moment(seconds: float) -> int:
            return epoch + round(seconds * 1e9)

        span = self._tracer.start_span(
            call.method, parent, SpanKind.SERVER, shared, start_time=moment(call.started)
        )
        ids = span.get_span_context()
        call.log_context["trace_id"] = trace.format_trace_id(ids.trace_id)
        call.log_context["span_id"] = trace.format_span_id(ids.span_id)
        if span.is_recording():
            if call.code in _SERVER_FAULTS:
                span.set_status(StatusCode.ERROR)
            if call.generation is not None:
                span.set_attributes(_of_request(call.generation))
                span.set_attribute("gen_ai.response.id", call.request_id)
                if call.generation.timings is not None:
                    self._add_phases(span, call.generation, call.generation.timings, moment)
            for item in call.items:
                self._add_item(span, item, moment)
        span.end(moment(call.started + call.seconds))

    def _add_item(self, span: trace.Span, item: CallRecord, moment: Callable[[float], int]) -> None:
        """A span inside the call's, without phases of its own: there may be hundreds of them."""
        inside = trace.set_span_in_context(span, Context())
        attributes: _Attributes = {"gen_ai.response.id": item.request_id}
        if item.code != "OK":
            attributes["error.type"] = item.reason or item.code
        if item.generation is not None:
            attributes |= _of_request(item.generation)
        made = self._tracer.start_span(
            "item", inside, SpanKind.INTERNAL, attributes, start_time=moment(item.started)
        )
        if item.code in _SERVER_FAULTS:
            made.set_status(StatusCode.ERROR)
        made.end(moment(item.started + item.seconds))

    def _add_phases(
        self,
        span: trace.Span,
        generation: GenerationRecord,
        timings: Timings,
        moment: Callable[[float], int],
    ) -> None:
        if not generation.has_first_token:
            # How much of its time it waited and how much was prefill is told with the first token.
            return
        arrival = generation.arrival
        started = arrival + timings.queue
        first_token = arrival + timings.first_token
        end = arrival + timings.total
        span.add_event("first_token", timestamp=moment(first_token))
        if timings.preemptions:
            span.add_event("preempted", {"photon.preemptions": timings.preemptions}, moment(end))
        inside = trace.set_span_in_context(span, Context())
        phases = (
            ("queue", arrival, started),
            ("prefill", started, first_token),
            ("decode", first_token, end),
        )
        for name, begin, finish in phases:
            phase = self._tracer.start_span(name, inside, SpanKind.INTERNAL, start_time=moment(begin))
            phase.end(moment(finish))

    def _measure(self, call: CallRecord, shared: Mapping[str, AttributeValue]) -> None:
        self._rpc(call.seconds, shared)
        for record in (call, *call.items):
            self._measure_generation(record)

    def _measure_generation(self, call: CallRecord) -> None:
        generation = call.generation
        if generation is None:
            return
        attributes = {**self._place, **_of_model(generation)}
        if call.code != "OK":
            attributes["error.type"] = call.reason or call.code
        self._request(call.seconds, attributes)
        if call.code == "OK" and generation.timings is not None and generation.usage is not None:
            self._measure_tokens(generation.usage, generation.timings, generation, attributes)

    def _measure_tokens(
        self, usage: Usage, timings: Timings, generation: GenerationRecord, attributes: _Attributes
    ) -> None:
        if not usage.output_tokens:
            return
        self._first_token(timings.first_token, attributes)
        num_completions = generation.effective.sampling.n
        num_later = usage.output_tokens - num_completions
        if num_later > 0:
            self._per_token(timings.decode * num_completions / num_later, attributes)


def _of_call(call: CallRecord) -> _Attributes:
    attributes: _Attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": call.method,
        "rpc.response.status_code": call.code,
    }
    if call.code != "OK":
        attributes["error.type"] = call.reason or call.code
    return attributes


def _of_model(generation: GenerationRecord) -> _Attributes:
    return {
        "gen_ai.operation.name": "chat" if generation.is_chat else "text_completion",
        "gen_ai.provider.name": "photon",
        "gen_ai.request.model": generation.requested_model or generation.model,
        "gen_ai.response.model": generation.model,
    }


def _of_request(generation: GenerationRecord) -> _Attributes:
    sampling, stop = generation.effective.sampling, generation.effective.stop
    attributes = {
        **_of_model(generation),
        "gen_ai.request.max_tokens": stop.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.choice.count": sampling.n,
    }
    if sampling.seed <= _MAX_INTEGER:
        attributes["gen_ai.request.seed"] = sampling.seed
    if generation.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = tuple(
            reason.name.lower() for reason in generation.finish_reasons
        )
    if generation.usage is not None:
        attributes["gen_ai.usage.input_tokens"] = generation.usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = generation.usage.output_tokens
    return attributes
