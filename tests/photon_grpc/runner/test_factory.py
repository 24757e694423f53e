"""From folder and options to a runner: what is refused, what is sized, what is served."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from photon_grpc.errors import BackendUnavailableError, ConfigError
from photon_grpc.models.llama import DecoderModel
from photon_grpc.options import KVCacheOptions, ModelOptions, Options, SchedulerOptions
from photon_grpc.runner import backend
from photon_grpc.runner.backend import resolve_dtype
from photon_grpc.runner.factory import build_runner, default_num_threads
from tests.support.builders import engine_core, engine_request, generate
from tests.support.tiny_model import tiny_model_folder

CONTEXT = 256
POOL = 4 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(pool_bytes: int = POOL, **model: object) -> Options:
    return Options(
        model=replace(ModelOptions(), **model),
        cache=KVCacheOptions(kv_cache_memory_bytes=pool_bytes),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=64),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_names_what_is_missing(folder: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="cuda"):
        build_runner(folder, options(backend="cuda"))


def test_a_stated_context_beyond_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{CONTEXT} positions"):
        build_runner(folder, options(max_model_len=CONTEXT + 1))


def test_a_stated_context_beyond_the_pool_is_refused(folder: Path) -> None:
    one_block = (
        build_runner(folder, options())._kv_cache.num_bytes // build_runner(folder, options()).num_blocks
    )
    with pytest.raises(ConfigError, match="pool holds 32 tokens"):
        build_runner(folder, options(2 * one_block, max_model_len=100))


def test_an_unstated_context_is_cut_to_the_pool(folder: Path) -> None:
    runner = build_runner(folder, options())
    assert runner.model.max_model_len == CONTEXT
    block_bytes = runner._kv_cache.num_bytes // runner.num_blocks
    small = build_runner(folder, options(3 * block_bytes))
    assert small.num_blocks == 3
    assert small.model.max_model_len == 48


def test_a_pool_from_free_memory_ends_at_a_full_batch(folder: Path) -> None:
    runner = build_runner(folder, options(0))
    assert runner.num_blocks == 4 * CONTEXT // runner.block_size


def test_the_pool_is_sized_after_the_largest_step_has_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    forward, measure = DecoderModel.forward, backend.kv_memory_bytes

    def noted_forward(self: DecoderModel, token_ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        happened.append(len(token_ids))
        return forward(self, token_ids, *rest, **more)

    def noted_measure(*arguments: object) -> int:
        happened.append("sized")
        return measure(*arguments)

    monkeypatch.setattr(DecoderModel, "forward", noted_forward)
    monkeypatch.setattr(backend, "kv_memory_bytes", noted_measure)
    build_runner(folder, options())
    assert happened[:2] == [64, "sized"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_type_computes(folder: Path, dtype: str) -> None:
    runner = build_runner(folder, options(dtype=dtype))
    assert runner._kv_cache.dtype is resolve_dtype(dtype, "cpu")
    core = engine_core(runner, max_num_seqs=4)
    assert len(generate(core, one=engine_request((5, 6, 7), 8, eos_token_ids=()))["one"]) == 8


def test_the_served_name_is_stated_or_the_folder_s(folder: Path) -> None:
    assert build_runner(folder, options()).model.name == folder.name
    assert build_runner(folder, options(served_name="mine")).model.name == "mine"


def test_random_weights_need_no_file_and_have_a_fingerprint_of_their_own(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with structlog.testing.capture_logs() as logs:
        drawn = build_runner(tmp_path, options(load_format="random"))
    assert [entry["log_level"] for entry in logs if "random" in entry["event"]] == ["warning"]
    request = engine_request((5, 6, 7), 8, eos_token_ids=())
    tokens = generate(engine_core(drawn, max_num_seqs=4), one=request)["one"]
    again = build_runner(tmp_path, options(load_format="random"))
    assert generate(engine_core(again, max_num_seqs=4), one=request)["one"] == tokens

    loaded = build_runner(folder, options())
    unread = build_runner(folder, options(load_format="random"))
    assert generate(engine_core(unread, max_num_seqs=4), one=request)["one"] == tokens
    assert loaded.model.fingerprint != unread.model.fingerprint


def test_threads_leave_a_core_to_the_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (3, 2), (None, 1)):
        monkeypatch.setattr("psutil.cpu_count", lambda logical, cores=cores: cores)
        assert default_num_threads() == threads
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 3)
    build_runner(folder, options())
    assert torch.get_num_threads() == 2


def test_no_tensor_is_left_to_the_collector(folder: Path) -> None:
    """An engine's process loads with the collector paused: what only that finds would count as in use."""
    gc.collect()
    gc.disable()
    try:
        before = num_tensors()
        runner = build_runner(folder, options())
        after = num_tensors()
        gc.collect()
        assert num_tensors() == after > before
    finally:
        gc.enable()
    assert runner.num_blocks


def num_tensors() -> int:
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
