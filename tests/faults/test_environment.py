"""Service faults 40 to 44: a log that is full, a clock that jumps, no descriptors, memory or collector."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from photon_grpc.telemetry.call_trace import CallTrace
from photon_grpc.telemetry.span_queue import SpanQueue
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.fuzzing.wire import LENGTH, tagged
from tests.support.call_stages import Ask, open_channel, scripted_runner, scripted_server
from tests.support.certificates import Authority
from tests.support.grpc_harness import rich_error
from tests.support.scripted_service import scripted_service
from tests.support.server_aftermath import Aftermath
from tests.support.server_process import ServerProcess
from tests.support.wall_clock import WallClock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses Linux's limits of other processes")

PACKAGE = Path(__file__).parents[2] / "photon_grpc"
GENERATE = "/photon.v1.InferenceService/Generate"


def wait_for(what: str, condition: Any) -> None:
    """Until `condition()`."""
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)


def generate(channel: grpc.Channel, count: int = 1, max_tokens: int = 3) -> None:
    """`count` calls, one behind the other, each served whole."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for _ in range(count):
        spec = Ask(max_tokens=max_tokens).request().spec
        answer = stub.Generate(inference_pb2.GenerateRequest(spec=spec), timeout=60)
        assert answer.usage.output_tokens == max_tokens


def begin(channel: grpc.Channel, max_tokens: int, **asked: Any) -> Any:
    """A stream that has brought its first message."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.StreamGenerate(Ask(max_tokens=max_tokens, **asked).request(), timeout=110)
    assert next(call).seq == 1
    return call


def finish(call: Any, max_tokens: int) -> inference_pb2.Summary:
    """The rest of a stream, which has every token, in order; its summary."""
    messages = list(call)
    assert [message.seq for message in messages] == list(range(2, len(messages) + 2))
    assert sum(message.delta.num_tokens for message in messages) == max_tokens
    summary: inference_pb2.Summary = messages[-1].summary
    assert summary.usage.output_tokens == max_tokens
    return summary


def figure(server: ServerProcess, name: str) -> float:
    """One figure of the server's metrics."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as page:
        found = re.search(rf"^{name} (\S+)$", page.read().decode(), re.M)
    assert found is not None, name
    return float(found[1])


@contextmanager
def limited(server: ServerProcess, which: int, soft: int) -> Iterator[None]:
    """A limit of the running server's process, for a while."""
    before = resource.prlimit(
        server.process.pid, which, (soft, resource.prlimit(server.process.pid, which)[1])
    )
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, which, before)


# --- 40 -------------------------------------------------------------------------------------------


@contextmanager
def full_device() -> Iterator[int]:
    sink = os.open("/dev/full", os.O_WRONLY)
    yield sink
    os.close(sink)


@contextmanager
def unread_pipe() -> Iterator[int]:
    """Full from the start."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


@contextmanager
def broken_pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("process", ["shared", "own"])
@pytest.mark.parametrize("sink", [full_device, unread_pipe, broken_pipe])
def test_fault_40_a_log_that_nobody_takes(tmp_path: Path, sink: Any, process: str) -> None:
    """From the start, for the engine's process too; the server serves, counts what is lost, and leaves."""
    with (
        sink() as stderr,
        scripted_server(
            tmp_path,
            scripted_runner(step_s=0.0),
            stderr=stderr,
            engine__process=process,
            telemetry__log_level="debug",
            server__metrics_port=0,
        ) as server,
        open_channel(server.address) as channel,
    ):
        aftermath = Aftermath(server)
        generate(channel, count=100)
        # A pipe that is not read blocks the thread that writes, and the queue takes some thousand lines.
        if sink is not unread_pipe:
            wait_for("counted", lambda: figure(server, "photon_log_records_dropped_total") >= 100)
        channel.close()
        aftermath.check()
        assert server.stop() == 0


def test_fault_40_a_log_file_at_its_limit_and_then_not(tmp_path: Path) -> None:
    with (
        scripted_server(tmp_path, scripted_runner(step_s=0.0), server__metrics_port=0) as server,
        open_channel(server.address) as channel,
    ):
        aftermath = Aftermath(server)
        generate(channel)
        wait_for("logged", lambda: "call finished" in server.log.read_text())
        # In the middle of a line to come.
        with limited(server, resource.RLIMIT_FSIZE, server.log.stat().st_size + 100):
            generate(channel, count=50)
            wait_for("counted", lambda: figure(server, "photon_log_records_dropped_total") >= 50)
            lost = figure(server, "photon_log_records_dropped_total")
        generate(channel)
        wait_for("told", lambda: '"num_dropped"' in server.log.read_text())
        channel.close()
        aftermath.check()
        assert server.stop() == 0
    lines = server.log.read_text().splitlines()
    (notice,) = [json.loads(line) for line in lines if '"num_dropped"' in line]
    assert notice["num_dropped"] >= lost
    # The line that was cut off is the only one that is none.
    after = lines[lines.index(next(line for line in lines if "call finished" in line)) :]
    assert sum(not line.endswith("}") for line in after if not line.startswith("census")) == 1


# --- 41 -------------------------------------------------------------------------------------------

# Who looks at the wall clock, and for what.
WALL_CLOCK = {
    "frontend/chat.py": "the date that a chat template writes",
    "server/model_info.py": "when this server started",
    "server/tls.py": "in how many seconds a certificate expires, for the log",
    "telemetry/call_trace.py": "where a span lies, for a collector",
}


def test_fault_41_nothing_is_measured_by_the_wall_clock() -> None:
    pattern = re.compile(r"\btime\.time\b|\btime_ns\b|\bdatetime\b|GetCurrentTime|\bfrom time import\b")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "v1" and pattern.search(path.read_text())
    }
    assert found == set(WALL_CLOCK)


# Every clock that a caller can set, longer than any of this takes and shorter than the jump.
CLOCKS: dict[str, Any] = {
    "scheduling": {"queue_timeout": {"seconds": 100}, "first_token_budget": {"seconds": 100}},
    "stop": {"time_limit": {"seconds": 100}},
}


@pytest.mark.parametrize("process", ["shared", "own"])
def test_fault_41_a_wall_clock_that_jumps(
    tmp_path: Path, process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an hour, there and back, under a stream and under calls whose clocks all run; over mutual TLS."""
    clock = WallClock(tmp_path)
    authority = Authority("test")
    (tmp_path / "ca.crt").write_bytes(authority.pem)
    # Good at any of the hours.
    yesterday = timedelta(days=-1)
    cert, key = authority.issue(begins=yesterday).write(tmp_path, "server")
    client = authority.issue(for_client=True, begins=yesterday)
    with monkeypatch.context() as patch, ExitStack() as stack:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        server = stack.enter_context(
            scripted_server(
                tmp_path,
                scripted_runner(step_s=0.01),
                engine__process=process,
                tls__cert_file=cert,
                tls__key_file=key,
                tls__client_ca_file=tmp_path / "ca.crt",
                tls__require_client_cert=True,
            )
        )
        credentials = grpc.ssl_channel_credentials(authority.pem, client.key, client.certificate)

        def connect() -> grpc.Channel:
            options = [("grpc.use_local_subchannel_pool", 1)]
            return stack.enter_context(grpc.secure_channel(server.address, credentials, options))

        known = connect()
        generate(known)
        for hours in (1, -1, 0):
            running = begin(known, 200, **CLOCKS)
            clock.set(hours * 3600)
            summaries = [finish(begin(channel, 20, **CLOCKS), 20) for channel in (known, connect())]
            for timings in (summary.timings for summary in (*summaries, finish(running, 200))):
                parts = (timings.queue, timings.prefill, timings.first_token, timings.decode, timings.total)
                assert all(0 <= part.seconds < 100 for part in parts)
        server.wait_until_idle()
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


# --- 42 -------------------------------------------------------------------------------------------


def test_fault_42_descriptors_exhausted_then_recovered(tmp_path: Path) -> None:
    """Whoever is connected is served; who comes meanwhile waits, and is served too."""
    with (
        scripted_server(
            tmp_path, scripted_runner(step_s=0.005), server__metrics_port=0, server__handshake_timeout_s=600
        ) as server,
        open_channel(server.address) as known,
        open_channel(server.address) as late,
    ):
        aftermath = Aftermath(server)
        running = begin(known, 400)
        process = psutil.Process(server.process.pid)
        room = 3
        limit = process.num_fds() + room
        host, _, port = server.address.rpartition(":")
        with limited(server, resource.RLIMIT_NOFILE, limit), ExitStack() as stack:
            # The kernel takes them all, the server as many as it has descriptors.
            for _ in range(20):
                stack.enter_context(socket.create_connection((host, int(port))))
            wait_for("exhausted", lambda: process.num_fds() == limit)
            generate(known, count=20)
            connected = grpc.channel_ready_future(late)
            assert finish(running, 400)
            generate(known)
            assert not connected.done()
            stack.close()
            # Still under the limit: what came back is used again.
            connected.result(timeout=60)
            generate(late, count=20)
        known.close()
        late.close()
        aftermath.check()
        assert server.stop() == 0


# --- 43 -------------------------------------------------------------------------------------------


def many_messages(count: int) -> bytes:
    """A GenerateRequest whose chat has so many messages of two bytes, which take twenty times as much."""
    return tagged(2, LENGTH, tagged(4, LENGTH, b"\x0a\x00" * count))


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    rich = rich_error(caught.value)
    return rich.code, rich.reason


def test_fault_43_no_memory_for_a_message(tmp_path: Path) -> None:
    """The parser runs into the limit of the address space; what is beside it and follows is served."""
    with (
        scripted_server(tmp_path, scripted_runner(step_s=0.005)) as server,
        open_channel(server.address) as channel,
    ):
        aftermath = Aftermath(server)
        running = begin(channel, 600)
        send = channel.unary_unary(GENERATE)
        message = many_messages(500_000)
        size = psutil.Process(server.process.pid).memory_info().vms
        # Room for the bytes themselves and a thread's stack, and not for the 23 MiB that they make.
        with limited(server, resource.RLIMIT_AS, size + (14 << 20)):
            for _ in range(3):
                told = refused(lambda: send(message, timeout=60))
                assert told == (grpc.StatusCode.UNAVAILABLE, "OUT_OF_MEMORY")
            generate(channel)
        assert finish(running, 600)
        assert refused(lambda: send(message, timeout=60)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
        )
        channel.close()
        aftermath.check()
        assert server.stop() == 0


# --- 44 -------------------------------------------------------------------------------------------


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # no types
    """Takes spans and answers once `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_asked = threading.Event()
        self.num_spans = 0

    def Export(self, request: Any, context: Any) -> Any:
        self.is_asked.set()
        self.gate.wait(60)
        for resource_spans in request.resource_spans:
            self.num_spans += sum(len(scope.spans) for scope in resource_spans.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


class Measurements(metrics_service_pb2_grpc.MetricsServiceServicer):  # type: ignore[misc]  # no types
    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def Export(self, request: Any, context: Any) -> Any:
        self._gate.wait(60)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@dataclass(frozen=True)
class Endpoint:
    """A port, whether the server has a connection to it (that it keeps), and who answers there in the end."""

    port: int
    is_connected: Callable[[], Any]
    collector: Collector | None = None


@contextmanager
def absent() -> Iterator[Endpoint]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield Endpoint(port, lambda: True)


@contextmanager
def hanging() -> Iterator[Endpoint]:
    """The kernel takes the connections and what is sent; nobody reads it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Endpoint(listener.getsockname()[1], lambda: select.select([listener], [], [], 0)[0])


@contextmanager
def slow() -> Iterator[Endpoint]:
    server = grpc.server(ThreadPoolExecutor(4))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Measurements(collector.gate), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Endpoint(port, collector.is_asked.is_set, collector)
    finally:
        collector.gate.set()
        server.stop(0).wait()


@pytest.mark.parametrize("collector", [absent, hanging, slow])
def test_fault_44_a_collector_that_takes_nothing_holds_up_nobody(tmp_path: Path, collector: Any) -> None:
    """It answers no span before the calls are through: a call that waited for it would wait for ever."""
    with (
        collector() as endpoint,
        scripted_server(
            tmp_path,
            scripted_runner(step_s=0.0),
            telemetry__otlp_endpoint=f"http://127.0.0.1:{endpoint.port}",
            server__metrics_port=0,
        ) as server,
    ):
        server.wait_until_idle()
        wait_for("connected", endpoint.is_connected)
        aftermath = Aftermath(server)
        with open_channel(server.address) as channel:
            generate(channel, count=100)
            finish(begin(channel, 50), 50)
            if endpoint.collector is None:
                wait_for("lost", lambda: figure(server, "photon_spans_dropped_total") > 0)
                generate(channel, count=100)
            else:
                assert endpoint.collector.num_spans == 0
                endpoint.collector.gate.set()
                wait_for("delivered", lambda: endpoint.collector.num_spans >= 101)
        aftermath.check()
        assert server.stop() == 0


class Blocked(SpanExporter):
    """Remembers on which threads it was called; never answers before `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.threads: set[str] = set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(60)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.gate.set()


async def test_fault_44_spans_leave_on_a_thread_of_their_own(tmp_path: Path) -> None:
    exporter = Blocked()
    queue = SpanQueue(exporter, period_s=0.0)
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(queue)
    trace = CallTrace(tracers, MeterProvider(shutdown_on_exit=False), address="127.0.0.1", port=1)
    try:
        async with scripted_service(tmp_path, call_observers=[trace.observe]) as harness:
            for _ in range(50):
                spec = Ask(max_tokens=3).request().spec
                await harness.inference.Generate(inference_pb2.GenerateRequest(spec=spec), timeout=60)
            assert not exporter.gate.is_set()
    finally:
        queue.shutdown()
    assert exporter.threads == {"photon-spans"}
    assert queue.num_dropped == 0
