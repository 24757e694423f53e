"""The composition root with a scripted runner: start, serve, death of the engine, exit codes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import photon_grpc.app
from photon_grpc.app import RunningService, serve
from photon_grpc.errors import BackendUnavailableError, ConfigError, ModelLoadError
from photon_grpc.options import ModelOptions, Options, TlsOptions
from photon_grpc.runner.base import Runner
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.builders import model_info
from tests.support.certificates import Authority
from tests.support.grpc_harness import quick_options
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
        photon_grpc.app, "RunnerFactory", lambda folder, options, own_process: lambda progress: build()
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
    reader, writer = await asyncio.open_connection("127.0.0.1", service.metrics_port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    (value,) = re.findall(r"^photon_tls_cert_expiry_timestamp_seconds (\S+)$", page, re.MULTILINE)
    assert float(value) == issued.expires_at
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running.exit_code == 0


async def test_the_engine_s_death_reaches_every_call_and_the_exit_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda: ScriptedRunner(model_info(), crash_at_step=5))
    running = Running(options_for(folder))
    service = await running.service()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.public}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.Generate(request(100)) for _ in range(3)]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "engine has stopped" in (raised.value.details() or "")
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
