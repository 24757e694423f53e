"""What Prometheus sees: names and meanings as vLLM's, under our prefix `photon_`.

The engine's figures come as snapshots after each step. A snapshot is only kept, and turned into
samples when somebody scrapes, so that a step costs one assignment. Finished requests and calls are
observed one by one; what `watch_*` is given is read when somebody scrapes. Knows numbers only: no text, no
tenant, no request id. `observe_*` are called on the event loop; scrapes run on the threads of the
exposition server.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from photon_grpc.errors import ListenError
from photon_grpc.telemetry.call_record import CallRecord
from photon_grpc.types import FinishReason, Timings, Usage

__all__ = ["EngineSnapshot", "Metrics", "MetricsServer"]

# Seconds. First-token and duration buckets follow the OpenTelemetry GenAI conventions; gaps between
# tokens start lower than theirs, because those of a small model are well under ten milliseconds.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_GAP_FINE = (0.0005, 0.001, 0.002, 0.004, 0.007)
_TOKEN_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_DURATION = tuple(0.01 * 2**n for n in range(14))
_STEP = (0.0005, 0.001, 0.002, 0.004, 0.007, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = tuple(float(2**n) for n in range(18))
_TOKENS_OF_STEP = _TOKENS[:15]

# By the reason of the error, as in its ErrorInfo. Refusals of calls that the engine did not take ...
_SHED = (
    "OVERLOADED",
    "QUOTA_EXCEEDED",
    "DEADLINE_UNREACHABLE",
    "DEADLINE_TOO_SHORT",
    "STARTING",
    "DRAINING",
    "ENGINE_DEAD",
)
# ... and who ended one that it had taken; "" is a client that left, or whose deadline passed.
_CANCELLED_BY = {
    "": "client",
    "CLIENT_STALLED": "server",
    "DRAINING": "server",
    "ABORTED_BY_OPERATOR": "operator",
    "QUEUE_TIMEOUT": "deadline",
    "FIRST_TOKEN_TIMEOUT": "deadline",
    "MAX_DURATION": "deadline",
}
_CANCELLED_STATES = ("waiting", "generating")


class EngineSnapshot(Protocol):
    """The part of the engine's statistics that is exposed; `engine.messages.EngineStats` has it."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def kv_slots_used(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def generation_tokens(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def faults(self) -> int: ...
    @property
    def lost_steps(self) -> int: ...


_COUNTERS: Sequence[tuple[str, str, Callable[[EngineSnapshot], int]]] = (
    ("photon_prompt_tokens", "Prompt tokens of admitted requests.", lambda s: s.prompt_tokens),
    ("photon_generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    (
        "photon_prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries,
    ),
    ("photon_prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
    ("photon_preemptions", "Sequences preempted for want of KV blocks or memory.", lambda s: s.preemptions),
    ("photon_corrupted_requests", "Requests ended for unusable model output.", lambda s: s.faults),
    ("photon_lost_steps", "Steps for which the device had no memory.", lambda s: s.lost_steps),
)


class _EngineCollector(Collector):
    """Samples of the latest snapshot; none before the engine's first step."""

    def __init__(self) -> None:
        self.snapshot: EngineSnapshot | None = None

    def collect(self) -> Iterable[Metric]:
        snapshot = self.snapshot
        return () if snapshot is None else _families(snapshot)


def _families(snapshot: EngineSnapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "photon_num_requests_running", "Sequences in the running batch.", value=snapshot.running
    )
    yield GaugeMetricFamily(
        "photon_num_requests_waiting", "Sequences waiting for a place in the batch.", value=snapshot.waiting
    )
    if snapshot.kv_blocks_total:
        yield GaugeMetricFamily(
            "photon_kv_cache_usage_perc",
            "Share of KV blocks that live sequences hold, 0 to 1.",
            value=snapshot.kv_blocks_used / snapshot.kv_blocks_total,
        )
    slots = snapshot.kv_blocks_used * snapshot.block_size
    # With no block allocated the share is undefined: no sample, rather than a figure that means nothing.
    if slots:
        yield GaugeMetricFamily(
            "photon_kv_slot_utilization",
            "Share of the token slots in allocated KV blocks that hold a token, 0 to 1.",
            value=snapshot.kv_slots_used / slots,
        )
    for name, text, read in _COUNTERS:
        yield CounterMetricFamily(name, text, value=read(snapshot))


class _LoopHistogram(Collector):
    """A histogram of what happens with every token that goes out, every step, or every request.

    The library's takes two locks per sample, a good part of what a token costs on the event loop. Here
    one thread writes; a scrape that falls between the two lines of `observe` is off by one observation
    until the next.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, total: float, count: int = 1) -> None:
        """`count` equal observations that make `total` together."""
        self._counts[bisect_left(self._bounds, total / count)] += count
        self._sum += total

    def collect(self) -> Iterable[Metric]:
        cumulative = accumulate(tuple(self._counts))
        labels = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [(label, float(count)) for label, count in zip(labels, cumulative, strict=True)]
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _Watched(Collector):
    """A figure that is asked for at each scrape, on the thread of the scrape."""

    def __init__(
        self, family: Callable[..., Metric], name: str, text: str, read: Callable[[], float]
    ) -> None:
        self._family = family
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterable[Metric]:
        yield self._family(self._name, self._text, value=self._read())


class _Processes(Collector):
    """CPU, memory and descriptors of processes of one kind, told apart by their places among them."""

    def __init__(self, kind: str, process_ids: Callable[[], Sequence[int]]) -> None:
        self._kind = kind
        self._process_ids = process_ids

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for place, number in enumerate(self._process_ids()):
            # Without a registry it only reads.
            found = ProcessCollector(f"photon_{self._kind}", partial(str, number), registry=None).collect()
            for family in found:
                total = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    total.add_sample(sample.name, {self._kind: str(place)}, sample.value)
        return families.values()


class Metrics:
    """One registry per process, held by the composition root and passed to who has figures."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._acceptor_deaths: Counter | None = None
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        Info("photon_build", "The running version.", registry=self.registry).info({"version": version})
        self._finished = Counter(
            "photon_request_success",
            "Completions that ended well, by finish reason.",
            ["finished_reason"],
            registry=self.registry,
        )
        # A label value appears with its first sample; a rate over a counter that starts at one misses it.
        self._by_reason = {
            reason: self._finished.labels(finished_reason=reason.name.lower()) for reason in FinishReason
        }
        self._first_token = self._loop_histogram(
            "photon_time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN
        )
        self._token_gap = self._loop_histogram(
            "photon_inter_token_latency_seconds",
            "Time between successive tokens of one completion.",
            _TOKEN_GAP_FINE + _TOKEN_GAP,
        )
        self._step_seconds = self._loop_histogram(
            "photon_step_seconds", "One step of the engine: planning, model, sampling.", _STEP
        )
        self._step_tokens = self._loop_histogram(
            "photon_iteration_tokens_total",
            "Tokens that one step computed, of prompts and of outputs.",
            _TOKENS_OF_STEP,
        )
        self._end_to_end = self._loop_histogram(
            "photon_e2e_request_latency_seconds", "Arrival to last token.", _DURATION
        )
        self._queue = self._loop_histogram(
            "photon_request_queue_time_seconds", "Arrival to first scheduling.", _DURATION
        )
        self._prefill = self._loop_histogram(
            "photon_request_prefill_time_seconds", "First scheduling to first token.", _DURATION
        )
        self._decode = self._loop_histogram(
            "photon_request_decode_time_seconds", "First token to last token.", _DURATION
        )
        self._prompt_tokens = self._loop_histogram(
            "photon_request_prompt_tokens", "Tokens of the prompt of one request.", _TOKENS
        )
        self._output_tokens = self._loop_histogram(
            "photon_request_generation_tokens", "Tokens that one request generated.", _TOKENS
        )
        self._rpc = self._histogram(
            "photon_rpc_seconds", "Duration of one call, by method and status.", _DURATION, "method", "code"
        )
        self._shed = self._counter(
            "photon_shed", "Calls refused before the engine took them, by reason.", "reason"
        )
        for reason in _SHED:
            self._shed.labels(reason.lower())
        self._cancelled = self._counter(
            "photon_cancelled",
            "Generations ended from outside, by whom, and before (waiting) or after the first token.",
            "by",
            "state",
        )
        for by in set(_CANCELLED_BY.values()):
            for state in _CANCELLED_STATES:
                self._cancelled.labels(by, state)
        self._slow_consumers = self._counter(
            "photon_slow_consumer_aborts", "Calls ended because the client did not read."
        )
        self._certificate_expiry: Gauge | None = None
        self._certificates_refused = self._counter(
            "photon_tls_cert_refused",
            "Times that changed certificate files were refused and the last good ones kept.",
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _loop_histogram(self, name: str, text: str, bounds: Sequence[float]) -> _LoopHistogram:
        histogram = _LoopHistogram(name, text, bounds)
        self.registry.register(histogram)
        return histogram

    def _watch(self, family: Callable[..., Metric], name: str, text: str, read: Callable[[], float]) -> None:
        self.registry.register(_Watched(family, name, text, read))

    def watch_engine(self, heartbeat_age: Callable[[], float], unread_tokens: Callable[[], int]) -> None:
        """Expose how long the engine has kept work waiting, and the tokens that streams hold. Once."""
        self._watch(
            GaugeMetricFamily,
            "photon_engine_heartbeat_age_seconds",
            "For how long the engine has had work and made no step.",
            heartbeat_age,
        )
        self._watch(
            GaugeMetricFamily,
            "photon_stream_queue_depth",
            "Tokens that the engine has produced and no stream has taken yet.",
            unread_tokens,
        )

    def watch_engine_process(self, process_id: Callable[[], int | None]) -> None:
        """Expose CPU, memory and descriptors of the engine's process beside the server's. Once.

        No sample while there is none, and on systems without /proc.
        """

        def folder() -> str:
            number = process_id()
            return "none" if number is None else str(number)

        ProcessCollector(namespace="photon_engine", pid=folder, registry=self.registry)

    def watch_acceptors(self, process_ids: Callable[[], Sequence[int]]) -> None:
        """Expose CPU, memory and descriptors of each acceptor, and how many have died. Once.

        No sample while there is none, and on systems without /proc.
        """
        self.registry.register(_Processes("acceptor", process_ids))
        self._acceptor_deaths = self._counter(
            "photon_acceptor_deaths", "Acceptors that died, and were replaced; their connections broke."
        )

    def observe_acceptor_died(self) -> None:
        """Another acceptor takes the place of one that has died."""
        assert self._acceptor_deaths is not None
        self._acceptor_deaths.inc()

    def watch_loop(self, lag: Callable[[], float]) -> None:
        """Expose how late the event loop is. Once."""
        self._watch(
            GaugeMetricFamily,
            "photon_event_loop_lag_seconds",
            "How late the event loop ran what was due, the worst of the last 30 seconds.",
            lag,
        )

    def watch_spans(self, dropped: Callable[[], int]) -> None:
        """Expose how many spans were dropped. Once."""
        self._watch(
            CounterMetricFamily,
            "photon_spans_dropped",
            "Spans that did not reach the collector.",
            dropped,
        )

    def watch_log(self, dropped: Callable[[], int]) -> None:
        """Expose how many log records were dropped. Once."""
        self._watch(
            CounterMetricFamily,
            "photon_log_records_dropped",
            "Log records that standard error did not take.",
            dropped,
        )

    def set_cache_config(self, *, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        """Expose what the KV cache is made of. Once, when it is known."""
        Info("photon_cache_config", "The KV cache.", registry=self.registry).info(
            {
                "num_blocks": str(num_blocks),
                "block_size": str(block_size),
                "enable_prefix_caching": str(prefix_caching),
            }
        )

    def observe_step(self, snapshot: EngineSnapshot) -> None:
        """Keep the engine's latest snapshot. Constant time; called after every step."""
        self._engine.snapshot = snapshot

    def observe_tokens(self, num_tokens: int, seconds: float) -> None:
        """`num_tokens` of one completion came `seconds` after the ones before them."""
        self._token_gap.observe(seconds, num_tokens)

    def observe_iteration(self, num_tokens: int, seconds: float) -> None:
        """The engine has computed `num_tokens` in a step of `seconds`."""
        self._step_tokens.observe(num_tokens)
        self._step_seconds.observe(seconds)

    def observe_finished(self, reasons: Sequence[FinishReason], usage: Usage, timings: Timings) -> None:
        """A request ended well, with one reason per completion."""
        for reason in reasons:
            self._by_reason[reason].inc()
        self._queue.observe(timings.queue)
        self._prompt_tokens.observe(usage.prompt_tokens)
        self._output_tokens.observe(usage.output_tokens)
        self._end_to_end.observe(timings.total)
        if usage.output_tokens:
            self._first_token.observe(timings.first_token)
            self._prefill.observe(timings.prefill)
            self._decode.observe(timings.decode)

    def observe_call(self, call: CallRecord) -> None:
        """A call has ended, however it did."""
        self._rpc.labels(call.method, call.code).observe(call.seconds)
        if call.reason == "CLIENT_STALLED":
            self._slow_consumers.inc()
        if not call.items:
            self._count_end(call, call.reason)
        for item in call.items:
            # One that was still under way was ended by what ended the call.
            self._count_end(item, item.reason or call.reason)

    def _count_end(self, record: CallRecord, reason: str) -> None:
        """Count a request that was refused, or that was ended before its time."""
        generation = record.generation
        if generation is None:
            if record.code != "OK" and reason in _SHED:
                self._shed.labels(reason.lower()).inc()
        elif record.code != "OK" and reason in _CANCELLED_BY:
            state = "generating" if generation.has_first_token else "waiting"
            self._cancelled.labels(_CANCELLED_BY[reason], state).inc()

    def observe_certificate(self, expires_at: float) -> None:
        """The server's certificate is one that expires at `expires_at`, in seconds since 1970."""
        if self._certificate_expiry is None:
            # A server without TLS has no sample, rather than a certificate that expired in 1970.
            self._certificate_expiry = Gauge(
                "photon_tls_cert_expiry_timestamp_seconds",
                "When the certificate that is served expires, in seconds since 1970.",
                registry=self.registry,
            )
        self._certificate_expiry.set(expires_at)

    def observe_certificate_refused(self) -> None:
        """Certificate files changed into something that cannot be served."""
        self._certificates_refused.inc()


class MetricsServer:
    """`/metrics` over HTTP on threads of its own, until closed."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Bind and serve; port 0 takes a free one. Raises ListenError."""
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise ListenError(f"metrics listener {host}:{port}: {error.strerror}") from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and give the port back. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
