"""The server's process from outside: signals at every moment, its parents, its port, its health."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.support.call_stages import (
    NO_WINDOW,
    VOCAB_SIZE,
    Ask,
    open_channel,
    reason_of,
    scripted_runner,
    scripted_server,
)
from tests.support.server_aftermath import Aftermath, census_of, finished_calls, records
from tests.support.server_process import ServerProcess, serve_command, wait_until_ready
from tools.make_tiny_model import write_tokenizer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Far above every bound of the server's own (a drain's ends, the engine's join).
_EXIT_S = 60.0


def stream(channel: grpc.Channel, request: inference_pb2.StreamGenerateRequest) -> grpc.Call:
    return inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request, timeout=_EXIT_S)


def failure(call: grpc.Call) -> grpc.RpcError:
    """How a stream fails; what came before is read."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def assert_gone(server: ServerProcess, codes: dict[str, str], code: int = 0) -> None:
    """The process ended by itself with `code`, each call has its one status, and nothing of it is left."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.process.wait(_EXIT_S) == code, server.log.read_text()[-4000:]
    assert not [child for child in children if child.is_running()]
    ended = {call["request_id"]: call["code"] for call in finished_calls(server.log)}
    assert len(ended) == len(finished_calls(server.log)), "a call ended twice"
    assert {name: ended.get(name) for name in codes} == codes
    assert not [line for line in records(server.log) if line["level"] == "error"]
    for address in (server.address, server.admin):
        host, _, port = address.rpartition(":")
        with pytest.raises(ConnectionRefusedError), contextlib.closing(socket.socket()) as probe:
            probe.connect((host, int(port)))


# --- 31 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_31_a_signal_when_idle(tmp_path: Path, number: signal.Signals) -> None:
    with scripted_server(tmp_path, scripted_runner()) as server:
        server.process.send_signal(number)
        assert_gone(server, {})


def test_fault_31_sigterm_loaded_lets_all_that_it_took_finish(tmp_path: Path) -> None:
    settings = {"scheduler__max_num_seqs": 2}
    with (
        scripted_server(tmp_path, scripted_runner(), **settings) as server,
        open_channel(server.address) as channel,
    ):
        requests = [Ask(max_tokens=150).request() for _ in range(4)]
        calls = [stream(channel, request) for request in requests]
        server.wait_for("loaded", lambda load: (load.running, load.queued) == (2, 2))
        server.process.send_signal(signal.SIGTERM)
        # Refused once the propagation time is over.
        while (refused := refusal(channel)) is None:
            time.sleep(0.01)
        assert (refused.code(), reason_of(refused)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        for call in calls:
            assert list(call)[-1].summary.usage.output_tokens == 150
        assert_gone(server, dict.fromkeys((request.request_id for request in requests), "OK"))


def refusal(channel: grpc.Channel) -> grpc.RpcError | None:
    """The error of a call that is tried now, one that needs no place; None if it is answered."""
    request = inference_pb2.TokenizeRequest(text="a")
    try:
        inference_pb2_grpc.InferenceServiceStub(channel).Tokenize(request, timeout=_EXIT_S)
    except grpc.RpcError as error:
        return error
    return None


@pytest.mark.parametrize("acceptors", [-1, 2])
def test_fault_31_sigterm_loaded_with_calls_that_do_not_end(tmp_path: Path, acceptors: int) -> None:
    """One reads, one waits, one has never read its first message: none holds the exit, each has a status."""
    settings = {"scheduler__max_num_seqs": 2, "server__drain_max_s": 0.3, "server__acceptors": acceptors}
    with (
        scripted_server(tmp_path, scripted_runner(), **settings) as server,
        open_channel(server.address) as channel,
        open_channel(server.address, *NO_WINDOW) as unread,
    ):
        requests = [Ask(200, prompt_logprobs=True).request(), Ask().request(), Ask().request()]
        calls = [stream(unread, requests[0])]
        while not census_of(server)["stalled"]:
            time.sleep(0.05)
        calls.append(stream(channel, requests[1]))
        next(calls[1])
        calls.append(stream(channel, requests[2]))
        server.wait_for("loaded", lambda load: (load.running, load.queued) == (2, 1))
        server.process.send_signal(signal.SIGTERM)
        for call in calls[1:]:
            error = failure(call)
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert_gone(server, dict.fromkeys((request.request_id for request in requests), "UNAVAILABLE"))


@pytest.mark.parametrize(("where", "number"), [("shared", signal.SIGTERM), ("own", signal.SIGINT)])
def test_fault_31_a_signal_while_the_model_loads(tmp_path: Path, where: str, number: signal.Signals) -> None:
    write_tokenizer(tmp_path, VOCAB_SIZE, add_bos=False)
    # Of an hour, so that nobody waits for its end.
    command = serve_command(tmp_path, scripted_runner(load_s=3600.0), engine__process=where)
    log = tmp_path / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _EXIT_S
        while "\nloading\n" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        bound = [line for line in records(log) if line["event"] == "listening"]
        with open_channel(bound[0]["address"]) as channel:
            error = failure(stream(channel, Ask().request()))
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
            request = health_pb2.HealthCheckRequest()
            assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status == NOT_SERVING
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(_EXIT_S) == 0, log.read_text()
        assert not [child for child in children if child.is_running()]
    finally:
        process.kill()
        process.wait()


def test_fault_31_sigterm_while_an_operator_s_drain_goes_on(tmp_path: Path) -> None:
    """The operator's grace of an hour counts no more, and the drain can no longer be taken back."""
    settings = {"server__drain_max_s": 600}
    with (
        scripted_server(tmp_path, scripted_runner(), **settings) as server,
        open_channel(server.address) as channel,
        open_channel(server.admin) as admin,
    ):
        control = control_pb2_grpc.ControlServiceStub(admin)
        request = Ask(max_tokens=300).request()
        call = stream(channel, request)
        next(call)
        hour = duration_pb2.Duration(seconds=800)
        assert control.Drain(control_pb2.DrainRequest(grace=hour), timeout=30).in_flight == 1
        server.process.send_signal(signal.SIGTERM)
        states = control.WatchState(control_pb2.WatchStateRequest(), timeout=_EXIT_S)
        while next(states).detail != "leaving":
            pass
        with pytest.raises(grpc.RpcError) as caught:
            control.Drain(control_pb2.DrainRequest(undo=True), timeout=30)
        assert reason_of(caught.value) == "DRAINING"
        assert list(call)[-1].summary.usage.output_tokens == 300
        assert_gone(server, {request.request_id: "OK"})


def test_fault_31_a_second_signal_cuts_the_drain_short(tmp_path: Path) -> None:
    settings = {"server__drain_max_s": 600, "server__drain_propagation_s": 600}
    with (
        scripted_server(tmp_path, scripted_runner(), **settings) as server,
        open_channel(server.address) as channel,
    ):
        request = Ask().request()
        call = stream(channel, request)
        next(call)
        for count, number in enumerate((signal.SIGTERM, signal.SIGINT), start=1):
            server.process.send_signal(number)
            # Two that wait for their turn at the same time may be one.
            wait_for_records(server.log, "signal", count)
        error = failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert_gone(server, {request.request_id: "UNAVAILABLE"})


def wait_for_records(log: Path, event: str, count: int) -> None:
    """Until the log has `count` records of `event`."""
    deadline = time.monotonic() + _EXIT_S
    while len([line for line in records(log) if line["event"] == event]) < count:
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the engine ends after its step")
@pytest.mark.parametrize(("acceptors", "num_children"), [(-1, 1), (2, 3)])
def test_fault_31_a_killed_server_takes_its_engine_and_acceptors_with_it(
    tmp_path: Path, acceptors: int, num_children: int
) -> None:
    settings = {"engine__process": "own", "server__acceptors": acceptors}
    with (
        scripted_server(tmp_path, scripted_runner(), **settings) as server,
        open_channel(server.address) as channel,
    ):
        call = stream(channel, Ask().request())
        next(call)
        children = psutil.Process(server.process.pid).children()
        assert len(children) == num_children
        server.process.kill()
        assert failure(call).code() is grpc.StatusCode.UNAVAILABLE
        deadline = time.monotonic() + _EXIT_S
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)


_LAUNCHER = """
import json, subprocess, sys, time
server = subprocess.Popen(json.loads(sys.argv[1]), stdout=open(sys.argv[2], "w"), stderr=subprocess.PIPE)
print(server.pid, flush=True)
for line in server.stderr:
    pass
"""


def test_fault_31_a_killed_launcher_leaves_a_server_that_serves_and_drains(tmp_path: Path) -> None:
    """Whoever started it also read its log: nobody does any more."""
    write_tokenizer(tmp_path, VOCAB_SIZE, add_bos=False)
    command = serve_command(tmp_path, scripted_runner())
    log = tmp_path / "log"
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, json.dumps(command), str(log)], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    server = psutil.Process(int(launcher.stdout.readline()))
    try:
        while not log.exists():
            time.sleep(0.01)
        address, admin, _ = wait_until_ready(launcher, log)
        with open_channel(address) as channel:
            call = stream(channel, Ask(max_tokens=150).request())
            next(call)
            launcher.kill()
            launcher.wait()
            assert list(call)[-1].summary.usage.output_tokens == 150
            for _ in range(20):
                assert refusal(channel) is None
            ServerProcess(launcher, address, admin, None, log).wait_until_idle()
            call = stream(channel, Ask(max_tokens=150).request())
            next(call)
            server.send_signal(signal.SIGTERM)
            assert list(call)[-1].summary.usage.output_tokens == 150
        server.wait(_EXIT_S)
    finally:
        launcher.kill()
        launcher.stdout.close()
        launcher.wait()
        with contextlib.suppress(psutil.NoSuchProcess):
            server.kill()


# --- 32 -------------------------------------------------------------------------------------------


def test_fault_32_watches_that_are_open_across_a_drain(tmp_path: Path) -> None:
    """Told at once, open as long as there is something to tell, and ended well by the server."""
    with (
        scripted_server(tmp_path, scripted_runner()) as server,
        open_channel(server.address) as channel,
        open_channel(server.admin) as admin,
    ):
        aftermath = Aftermath(server)
        control, health = control_pb2_grpc.ControlServiceStub(admin), health_pb2_grpc.HealthStub(channel)
        names = ("", "photon.v1.InferenceService", "photon.liveness")
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
        states = control.WatchState(control_pb2.WatchStateRequest())
        assert {next(watch).status for watch in watches} == {SERVING}
        assert next(states).state == control_pb2.WatchStateResponse.STATE_READY
        # A drain that is taken back.
        control.Drain(control_pb2.DrainRequest(), timeout=30)
        assert [next(watch).status for watch in watches[:2]] == [NOT_SERVING] * 2
        assert next(states).state == control_pb2.WatchStateResponse.STATE_DRAINING
        control.Drain(control_pb2.DrainRequest(undo=True), timeout=30)
        assert [next(watch).status for watch in watches[:2]] == [SERVING] * 2
        assert next(states).state == control_pb2.WatchStateResponse.STATE_READY
        # One for good.
        request = Ask(max_tokens=200).request()
        call = stream(channel, request)
        next(call)
        server.process.send_signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches[:2]] == [NOT_SERVING] * 2
        assert next(states).state == control_pb2.WatchStateResponse.STATE_DRAINING
        assert all(watch.is_active() for watch in watches)
        assert list(call)[-1].summary.usage.output_tokens == 200
        assert [message.status for message in watches[2]] == [NOT_SERVING], "alive up to its end"
        for watch in (*watches, states):
            list(watch)
            assert watch.code() is grpc.StatusCode.OK, "cut off, not ended"
        assert_gone(server, {request.request_id: "OK"})
        aftermath.check_codes({request.request_id: "OK"})


# --- 33 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """Four places, eight in the queue, and steps of 0.3 s in each of which 16 prompt tokens are computed."""
    settings = {
        "server__metrics_port": 0,
        "scheduler__max_num_seqs": 4,
        "scheduler__max_num_batched_tokens": 16,
        "limits__max_queued_requests": 8,
    }
    folder = tmp_path_factory.mktemp("server")
    with scripted_server(folder, scripted_runner(step_s=0.3), **settings) as server:
        yield Aftermath(server)
        assert server.stop() == 0


@pytest.mark.parametrize("listener", ["port", "admin_port", "metrics_port"])
def test_fault_33_a_second_server_on_the_same_port(served: Aftermath, tmp_path: Path, listener: str) -> None:
    server = served.server
    assert server.metrics is not None
    taken = {"port": server.address, "admin_port": server.admin, "metrics_port": server.metrics}[listener]
    write_tokenizer(tmp_path, VOCAB_SIZE, add_bos=False)
    setting = {f"server__{listener}": taken.rpartition(":")[2]}
    command = serve_command(tmp_path, scripted_runner(), **setting)
    second = subprocess.run(command, capture_output=True, text=True, timeout=_EXIT_S, check=False)
    assert second.returncode == 2, second
    assert taken.rpartition(":")[2] in second.stderr
    assert "Traceback" not in second.stderr
    with open_channel(server.address) as channel:
        assert refusal(channel) is None
    served.check()


# --- 35 -------------------------------------------------------------------------------------------


class Prober:
    """Asks for the health of everything, again and again, on a connection and a thread of its own."""

    NAMES = ("", "photon.v1.InferenceService", "photon.liveness")

    def __init__(self, server: ServerProcess) -> None:
        self.answers: list[int] = []
        self._server = server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._probe)

    def _probe(self) -> None:
        with open_channel(self._server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not self._done.is_set():
                for name in self.NAMES:
                    request = health_pb2.HealthCheckRequest(service=name)
                    self.answers.append(health.Check(request, timeout=30).status)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_fault_35_health_in_a_long_prefill(served: Aftermath) -> None:
    """Steps so long that several probes fall into each."""
    with open_channel(served.server.address) as channel, Prober(served.server) as prober:
        request = Ask(prompt_tokens=160, max_tokens=2).request()
        call = stream(channel, request)
        served.server.wait_for("prefilling", lambda load: load.running == 1)
        before = len(prober.answers)
        assert list(call)[-1].summary.usage.output_tokens == 2
        during = len(prober.answers) - before
    assert set(prober.answers) == {SERVING}
    assert during > 11, "fewer answers than steps: the probes waited for them"
    served.check({request.request_id: "OK"})


def end_of(call: grpc.Call) -> str | None:
    """The reason with which a stream fails, None if it does not."""
    try:
        list(call)
    except grpc.RpcError as error:
        return reason_of(error)
    return None


def test_fault_35_health_under_overload(served: Aftermath) -> None:
    """A full queue sheds; it changes no health, and no probe waits behind it or creates work of its own."""
    with open_channel(served.server.address) as channel, Prober(served.server) as prober:
        requests = [Ask(max_tokens=4).request() for _ in range(40)]
        calls = [stream(channel, request) for request in requests]
        codes: dict[str, str] = {}
        for request, call in zip(requests, calls, strict=True):
            reason = end_of(call)
            codes[request.request_id] = "OK" if reason is None else "UNAVAILABLE"
            assert reason in (None, "OVERLOADED")
    assert set(prober.answers) == {SERVING}
    assert 12 <= list(codes.values()).count("OK") < 40
    served.check(codes)
