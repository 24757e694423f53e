"""The composition root with a scripted runner: start, serve, death of the engine, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from photon_grpc import engine_place
from photon_grpc.app import RunningService, num_acceptors, serve, wakes_per_turn
from photon_grpc.errors import BackendUnavailableError, ConfigError, ListenError, ModelLoadError
from photon_grpc.options import (
    EngineOptions,
    ModelOptions,
    Options,
    TelemetryOptions,
    TenantOptions,
    TlsOptions,
)
from photon_grpc.processes import spawn as spawning
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.scheduler.output import ModelOutput
from photon_grpc.turns import WAKES_PER_TURN
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.aftermath import nothing_left_running
from tests.support.builders import model_info
from tests.support.certificates import Authority
from tests.support.engine_factories import Refused, Scripted
from tests.support.grpc_harness import quick_options, rich_error
from tests.support.tiny_model import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def options_for(folder: Path) -> Options:
    options = quick_options()
    return replace(
        options,
        model=ModelOptions(path=str(folder)),
        server=replace(options.server, metrics_port=0),
    )


def scripted(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Runner]) -> None:
    monkeypatch.setattr(
        engine_place, "RunnerFactory", lambda folder, options, own_process: lambda progress: build()
    )


class Running:
    """`serve` as a task, and where it can be reached."""

    def __init__(self, options: Options) -> None:
        self._ready: asyncio.Future[RunningService] = asyncio.get_running_loop().create_future()
        self.exit_code = asyncio.ensure_future(serve(options, ready=self._ready.set_result))

    async def service(self) -> RunningService:
        await asyncio.wait((self._ready, self.exit_code), return_when=asyncio.FIRST_COMPLETED)
        if self.exit_code.done():
            await self.exit_code
        return await self._ready


def request(max_tokens: int) -> inference_pb2.GenerateRequest:
    spec = inference_pb2.GenerationSpec(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]))
    spec.stop.max_tokens = max_tokens
    spec.output.token_ids = True
    return inference_pb2.GenerateRequest(spec=spec)


async def test_serve_answers_and_ends_with_zero_on_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info()))
    running = Running(options_for(folder))
    service = await running.service()
    assert service.metrics_port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        response = await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request(4))
        assert list(response.completions[0].token_ids) == [5, 6, 7, 5]
    reader, writer = await asyncio.open_connection("127.0.0.1", service.metrics_port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    assert "photon_generation_tokens_total 4.0" in page
    assert 'photon_request_success_total{finished_reason="max_tokens"} 1.0' in page
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running.exit_code == 0


async def page_of(port: int) -> dict[str, float]:
    """A scrape of the running server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode().partition("\r\n\r\n")[2]
    writer.close()
    await writer.wait_closed()
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


async def page_with(port: int, name: str) -> dict[str, float]:
    """The first scrape in which the sample `name` is not 0."""
    for _ in range(1000):
        page = await page_of(port)
        if page[name]:
            return page
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} stays 0")


async def test_a_scrape_tells_what_became_of_every_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    class Held(ScriptedRunner):
        """Brings one token of its third request, then holds the engine."""

        def collect(self) -> ModelOutput:
            output = super().collect()
            if output.step > 8:
                held.wait(20)
            return output

    scripted(monkeypatch, lambda: Held(model_info()))
    running = Running(options_for(folder))
    service = await running.service()
    assert service.metrics_port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(2):
            await stub.Generate(request(4))
        read = await page_of(service.metrics_port)
        method = "{method=photon.v1.InferenceService/%s}"
        assert read["photon_rpc_seconds_count{code=OK}" + method % "Generate"] == 2
        assert read["photon_request_prompt_tokens_sum"] == 6
        assert read["photon_request_generation_tokens_sum"] == 8
        # The second prompt is in the prefix cache but for what must be computed to go on.
        assert read["photon_iteration_tokens_total_sum"] >= 6
        assert read["photon_iteration_tokens_total_count"] == read["photon_step_seconds_count"] == 8
        assert read["photon_engine_heartbeat_age_seconds"] == 0
        assert read["photon_stream_queue_depth"] == 0
        assert 0 <= read["photon_event_loop_lag_seconds"] < 20
        assert any(name.startswith("photon_cache_config_info{block_size=") for name in read)

        streamed = inference_pb2.StreamGenerateRequest(spec=request(50).spec)
        waits = stub.StreamGenerate(streamed)
        refused = inference_pb2.GenerateRequest(spec=request(4).spec)
        refused.spec.sampling.top_p = 7.0
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(refused)
        await page_with(service.metrics_port, "photon_engine_heartbeat_age_seconds")
        waits.cancel()
        read = await page_with(service.metrics_port, "photon_cancelled_total{by=client}{state=waiting}")
        assert read["photon_rpc_seconds_count{code=INVALID_ARGUMENT}" + method % "Generate"] == 1
        assert read["photon_rpc_seconds_count{code=CANCELLED}" + method % "StreamGenerate"] == 1
        held.set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running.exit_code == 0


@pytest.mark.parametrize(
    ("cores", "process", "settings", "expected"),
    [
        (64, "own", {}, 4),
        (12, "own", {}, 3),
        (8, "own", {}, 2),
        (7, "own", {}, 0),
        (64, "shared", {}, 0),
        (64, "own", {"max_connections": 1}, 1),
        (64, "own", {"acceptors": -1}, 0),
        (1, "shared", {"acceptors": 3}, 3),
        # With a share of less than one connection nobody would get in.
        (1, "shared", {"acceptors": 3, "max_connections": 2}, 2),
    ],
)
def test_how_many_acceptors_there_are(
    monkeypatch: pytest.MonkeyPatch, cores: int, process: str, settings: dict[str, int], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    options = replace(quick_options(settings), engine=EngineOptions(process=process))
    assert num_acceptors(options) == expected
    assert (wakes_per_turn(options) > WAKES_PER_TURN) == (expected > 0)


async def test_serve_with_acceptors_tells_of_their_time_and_their_deaths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info()))
    options = options_for(folder)
    running = Running(replace(options, server=replace(options.server, acceptors=2)))
    service = await running.service()
    assert service.metrics_port
    before = await page_of(service.metrics_port)
    assert before["photon_acceptor_deaths_total"] == 0
    for place in (0, 1):
        assert before[f"photon_acceptor_process_cpu_seconds_total{{acceptor={place}}}"] > 0
    children = [child for child in psutil.Process().children() if "acceptor" in " ".join(child.cmdline())]
    assert len(children) == 2
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await stub.Generate(request(4))).usage.output_tokens == 4
    children[0].kill()
    assert (await page_with(service.metrics_port, "photon_acceptor_deaths_total"))[
        "photon_acceptor_deaths_total"
    ] == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running.exit_code == 0
    assert not any(child.is_running() for child in children)


class TestAnEngineOfItsOwn:
    """Its process is begun first, and ends with a start that fails."""

    @pytest.fixture
    def spawned(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The modules of the processes that were spawned, in order."""
        modules: list[str] = []
        spawn = spawning._spawn

        def watched(module: str, fd: int) -> subprocess.Popen[bytes]:
            modules.append(module)
            return spawn(module, fd)

        monkeypatch.setattr(spawning, "_spawn", watched)
        return modules

    def options(self, folder: Path, **server: object) -> Options:
        options = options_for(folder)
        return replace(
            options,
            server=replace(options.server, acceptors=1, **server),
            engine=replace(options.engine, process="own"),
        )

    def scripted(self, monkeypatch: pytest.MonkeyPatch, factory: Scripted) -> None:
        monkeypatch.setattr(engine_place, "RunnerFactory", lambda *_: factory)

    async def test_it_is_the_first_process(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, spawned: list[str]
    ) -> None:
        self.scripted(monkeypatch, Scripted())
        running = Running(self.options(folder))
        service = await running.service()
        assert spawned == ["photon_grpc.engine.child", "photon_grpc.server.acceptors.acceptor"]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
            response = await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request(4))
            assert list(response.completions[0].token_ids) == [5, 6, 7, 5]
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running.exit_code == 0

    async def test_a_listener_that_cannot_bind_ends_one_that_still_loads(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, spawned: list[str]
    ) -> None:
        self.scripted(monkeypatch, Scripted(load_s=600))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ListenError, match=str(port)):
                await serve(self.options(folder, port=port))
        assert spawned == ["photon_grpc.engine.child"]
        assert not psutil.Process().children()

    async def test_an_engine_that_cannot_start_is_the_error_although_the_listeners_stand(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            engine_place, "RunnerFactory", lambda *_: Refused(BackendUnavailableError("no device"))
        )
        with pytest.raises(BackendUnavailableError, match="no device"):
            await serve(self.options(folder))
        assert not psutil.Process().children()


async def test_the_certificate_s_expiry_is_a_metric(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info()))
    issued = Authority("photon test authority").issue()
    certificate, key = issued.write(tmp_path, "server")
    tls = TlsOptions(str(certificate), str(key))
    running = Running(replace(options_for(folder), tls=tls))
    service = await running.service()
    assert service.metrics_port
    page = await page_of(service.metrics_port)
    assert page["photon_tls_cert_expiry_timestamp_seconds"] == issued.expires_at
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running.exit_code == 0


async def test_a_collector_that_never_answers_holds_up_neither_calls_nor_the_exit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = options_for(folder)
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = replace(options, telemetry=TelemetryOptions(otlp_endpoint=endpoint))
        running = Running(options)
        service = await running.service()
        assert service.metrics_port
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for _ in range(20):
                await stub.Generate(request(2), timeout=20)
        assert (await page_of(service.metrics_port))["photon_spans_dropped_total"] >= 0
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await running.exit_code == 0


async def test_fault_02_the_engine_s_death_reaches_every_call_and_the_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info(), crash_at_step=5))
    async with nothing_left_running():
        running = Running(options_for(folder))
        service = await running.service()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            calls = [stub.Generate(request(100)) for _ in range(3)]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
                assert rich_error(raised.value).reason == "ENGINE_DEAD"
                assert "engine has stopped" in (raised.value.details() or "")
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(30):
            assert await running.exit_code == 1


async def test_a_runner_that_cannot_be_built_is_the_start_s_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Runner:
        raise BackendUnavailableError("no device")

    scripted(monkeypatch, build)
    with pytest.raises(BackendUnavailableError, match="no device"):
        await Running(options_for(folder)).service()


async def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        await Running(options_for(tmp_path)).service()


async def test_no_model_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        await serve(quick_options())


async def test_a_file_of_tenants_that_cannot_be_used_refuses_the_start(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text("[tenants.gateway]\nwieght = 4\n")
    options = replace(options_for(folder), tenants=TenantOptions(file=str(file)))
    with pytest.raises(ConfigError, match=r"tenants\.file: .*\[tenants, 1\] wieght: .* weight\?"):
        await serve(options)
