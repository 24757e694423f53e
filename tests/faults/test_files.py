"""Service faults 39 and 45: the files of a model and of the kernels, damaged, gone, or not to be written."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from photon_grpc.app import RunningService, serve
from photon_grpc.errors import KernelCompileError, StartupError
from photon_grpc.kernels import compiler
from photon_grpc.kernels.compiler import cubin_file
from photon_grpc.kernels.sources import load_source, source_folder
from photon_grpc.models import loader
from photon_grpc.options import EngineOptions, KVCacheOptions, ModelOptions, Options
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
from tests.support.aftermath import nothing_left_running
from tests.support.confined import read_only, without_override
from tests.support.grpc_harness import quick_options
from tests.support.server_process import serve_command, wait_until_ready
from tests.support.tiny_model import tiny_model_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("sharded"), shards=3)


def options_for(folder: Path) -> Options:
    return replace(
        quick_options(),
        model=ModelOptions(path=str(folder)),
        cache=KVCacheOptions(kv_cache_memory_bytes=8 << 20),
        engine=EngineOptions(num_threads=1, process="shared"),
    )


def descriptors() -> int:
    return psutil.Process().num_fds()


# --- 39 -------------------------------------------------------------------------------------------


def _cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def _change(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, NORM: change(tensors[NORM])}, folder / WEIGHTS)

    return damage


def _point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(folder / index["weight_map"][NORM], folder.parent / "secret.safetensors")
    index["weight_map"][NORM] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _lose_a_shard(folder: Path) -> None:
    (folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]).unlink()


# What is done to a whole folder, and what the error must name.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (_cut(WEIGHTS, 100), WEIGHTS),
    "weights empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "wrong type": (_change(lambda tensor: tensor.to(torch.int32)), NORM),
    "wrong shape": (_change(lambda tensor: torch.cat([tensor, tensor])), NORM),
    "wrong dimensions": (_change(lambda tensor: tensor.reshape(2, -1)), NORM),
    "config cut short": (_cut("config.json", 20), "config.json"),
    "config gone": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "tokenizer cut short": (_cut("tokenizer.json", 20), "tokenizer"),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "folder gone": (shutil.rmtree, "no such folder"),
}
SHARD_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard gone": (_lose_a_shard, ".safetensors"),
    "index naming another folder": (_point_outside, "../secret.safetensors"),
    "index cut short": (_cut(INDEX, 20), INDEX),
    "index gone": (lambda folder: (folder / INDEX).unlink(), INDEX),
}


async def refused(folder: Path) -> str:
    """What a start says that must fail; nothing of it may be left."""
    async with nothing_left_running():
        with pytest.raises(StartupError) as caught:
            await serve(options_for(folder))
    return caught.value.message


@pytest.mark.parametrize("damage", [*DAMAGES, *SHARD_DAMAGES])
async def test_fault_39_a_damaged_model_is_refused_by_name(
    damage: str, whole: Path, sharded: Path, tmp_path: Path
) -> None:
    source, (damage_it, named) = (
        (whole, DAMAGES[damage]) if damage in DAMAGES else (sharded, SHARD_DAMAGES[damage])
    )
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    damage_it(folder)
    assert named in await refused(folder)
    # Of the first start, which may leave the process what any start does.
    before = descriptors()
    assert named in await refused(folder)
    assert descriptors() <= before


@pytest.mark.parametrize("loss", ["gone", "cut short", "empty"])
async def test_fault_39_a_file_that_is_lost_while_the_model_loads(
    sharded: Path, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the headers of all have been read and the first files too."""
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    last = max(folder.glob("*.safetensors"))
    map_file = loader._map

    def lose(path: Path) -> Any:
        if path == last and loss == "gone":
            path.unlink()
        elif path == last:
            os.truncate(path, 0 if loss == "empty" else path.stat().st_size - 1)
        return map_file(path)

    monkeypatch.setattr(loader, "_map", lose)
    assert last.name in await refused(folder)


async def test_fault_39_a_file_may_go_that_is_being_read(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped: the model comes up, and whole."""
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    map_file = loader._map

    def lose(path: Path) -> Any:
        mapping = map_file(path)
        path.unlink()
        return mapping

    monkeypatch.setattr(loader, "_map", lose)
    async with nothing_left_running():
        ready: asyncio.Future[RunningService] = asyncio.get_running_loop().create_future()
        leaving = asyncio.ensure_future(serve(options_for(folder), ready=ready.set_result))
        await asyncio.wait((ready, leaving), return_when=asyncio.FIRST_COMPLETED)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{(await ready).ports.public}") as channel:
            request = inference_pb2.GenerateRequest(spec=inference_pb2.GenerationSpec(text="hello"))
            request.spec.stop.max_tokens, request.spec.stop.ignore_eos = 4, True
            answer = await inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)
        assert answer.usage.output_tokens == 4
        os.kill(os.getpid(), signal.SIGTERM)
        assert await leaving == 0
    assert list(folder.glob("*.safetensors")) == []


def test_fault_39_a_start_that_fails_says_the_same_in_either_process(whole: Path, tmp_path: Path) -> None:
    """Exit code 2, file and tensor named, no traceback."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    _cut(WEIGHTS, 100)(folder)
    messages = []
    for where in ("own", "shared"):
        command = serve_command(folder, engine__process=where, server__admin_port=-1)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        messages.append(ended.stderr.strip().splitlines()[-1])
    assert messages[0] == messages[1]
    assert f"{WEIGHTS}: {NORM}: truncated" in messages[0]


@pytest.mark.skipif(os.name != "posix", reason="of folders with permissions")
def test_fault_39_a_read_only_folder_is_all_that_a_server_needs(whole: Path, tmp_path: Path) -> None:
    """Model, home, caches and working folder in one, and nothing of it can be written."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    environment = {
        **os.environ,
        **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"), str(folder)),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log = tmp_path / "log"
    with read_only(folder):
        attempt = without_override([sys.executable, "-c", f"open({str(folder / 'new')!r}, 'w')"])
        assert b"Permission denied" in subprocess.run(attempt, capture_output=True, check=False).stderr
        before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
        with log.open("w") as sink:
            process = subprocess.Popen(
                without_override(serve_command(folder, engine__process="own")),
                stdout=sink,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=folder,
                env=environment,
            )
        try:
            address, _, _ = wait_until_ready(process, log)
            with grpc.insecure_channel(address) as channel:
                spec = inference_pb2.GenerationSpec(text="hello")
                spec.stop.max_tokens, spec.stop.ignore_eos = 4, True
                answer = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                    inference_pb2.GenerateRequest(spec=spec), timeout=60
                )
            assert answer.usage.output_tokens == 4
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    assert "Traceback" not in log.read_text()


# --- 45 -------------------------------------------------------------------------------------------

MACROS = {"PHOTON_STORAGE": "bf16"}
ARCHITECTURE = "sm_90a"
KERNEL = "silu_and_mul"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' sources, in place of them."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="the dev extra brings cuda-bindings on Linux alone")
    folder = tmp_path / "cuda_kernels"
    shutil.copytree(source_folder(), folder)
    monkeypatch.setattr(compiler, "load_source", lambda stem: load_source(stem, folder))
    return folder


def test_fault_45_a_kernel_that_does_not_compile_leaves_nothing_behind(sources: Path, tmp_path: Path) -> None:
    """Its error is that of a start, with the compiler's log; once mended it compiles in the same process."""
    cache, source = tmp_path / "cache", sources / f"{KERNEL}.cu"
    good = source.read_text()
    source.write_text(good + "\nthis is no C;\n")
    for _ in range(2):
        with (
            pytest.raises(KernelCompileError) as caught,
            cubin_file(KERNEL, MACROS, ARCHITECTURE, cache),
        ):
            pass
        assert isinstance(caught.value, StartupError)
        assert f"{KERNEL}.cu" in caught.value.message
        assert "this is no C" in caught.value.log or "error" in caught.value.log
        assert list(cache.glob("*")) == []
    source.write_text(good)
    with cubin_file(KERNEL, MACROS, ARCHITECTURE, cache) as path:
        assert path.read_bytes().startswith(b"\x7fELF")


def test_fault_45_a_header_that_changed_is_not_taken_from_the_cache(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    header = next(path for path in sorted((sources / "include" / "photon").glob("*.cuh")) if _is_used(path))
    with cubin_file(KERNEL, MACROS, ARCHITECTURE, cache) as path:
        first = path
    header.write_text(header.read_text() + "\n#define PHOTON_STALE 1\n")
    with cubin_file(KERNEL, MACROS, ARCHITECTURE, cache) as path:
        assert path != first
    header.write_text("#error another header\n")
    with (
        pytest.raises(KernelCompileError, match="another header"),
        cubin_file(KERNEL, MACROS, ARCHITECTURE, cache),
    ):
        pass


def _is_used(header: Path) -> bool:
    """Whether the kernel here includes it."""
    text = (header.parents[2] / f"{KERNEL}.cu").read_text()
    return f'"photon/{header.name}"' in text


_COMPILE = f"""
import structlog, sys
from pathlib import Path
from photon_grpc.kernels.compiler import cubin_file
with structlog.testing.capture_logs() as logs:
    for storage in ("bf16", "f16"):
        with cubin_file({KERNEL!r}, {{"PHOTON_STORAGE": storage}}, {ARCHITECTURE!r}) as path:
            assert path.read_bytes().startswith(b"\\x7fELF")
            assert not path.is_relative_to(sys.argv[1])
        assert not path.exists()
(warning,) = logs
print(warning["log_level"], warning["folder"], warning["reason"])
"""


@pytest.mark.skipif(os.name != "posix", reason="of folders with permissions")
def test_fault_45_a_cache_folder_that_is_read_only_costs_time_and_one_warning(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="the dev extra brings cuda-bindings on Linux alone")
    with read_only(tmp_path):
        ended = subprocess.run(
            without_override([sys.executable, "-c", _COMPILE, str(tmp_path)]),
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert ended.stdout == f"warning {tmp_path / 'photon_grpc' / 'kernels'} Permission denied\n", ended.stderr
    assert list(tmp_path.iterdir()) == []
