"""Sizes of the KV pool, from configuration, options and what the machine has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from photon_grpc.errors import ConfigError
from photon_grpc.models.config import ModelConfig, read_config
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.options import KVCacheOptions
from photon_grpc.runner.kv_cache import (
    KVCache,
    available_memory_bytes,
    kv_bytes_per_token,
    kv_memory_bytes,
    num_blocks_for,
)
from tests.support.tiny_model import tiny_model_folder

# 2 layers, keys and values, 2 heads of 24 features.
ELEMENTS_PER_TOKEN = 2 * 2 * 2 * 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(tiny_model_folder(tmp_path_factory.mktemp("kv"), tokenizer=False))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_per_token_are_those_of_the_allocation(
    config: ModelConfig, dtype: torch.dtype, size: int
) -> None:
    cache = KVCache(config, TorchOps(), 10, 8, dtype=dtype, device=torch.device("cpu"))

    assert kv_bytes_per_token(config, dtype) == ELEMENTS_PER_TOKEN * size
    assert cache.num_bytes == 10 * 8 * ELEMENTS_PER_TOKEN * size
    assert len(cache.layers) == config.num_layers
    assert {layer.dtype for layer in cache.layers} == {dtype}


def test_blocks_fill_the_memory_and_no_more(config: ModelConfig) -> None:
    block = 16 * ELEMENTS_PER_TOKEN * 4
    assert num_blocks_for(block, config, 16, torch.float32) == 1
    assert num_blocks_for(5 * block - 1, config, 16, torch.float32) == 4
    assert num_blocks_for(5 * block, config, 16, torch.float32) == 5
    with pytest.raises(ConfigError, match=str(block)):
        num_blocks_for(block - 1, config, 16, torch.float32)


def test_fault_03_a_pool_larger_than_memory_is_a_config_error(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        KVCache(config, TorchOps(), 1 << 50, 16, dtype=torch.float32, device=torch.device("cpu"))


def test_stated_size_wins_and_a_share_is_capped() -> None:
    stated = KVCacheOptions(kv_cache_memory_bytes=123, free_memory_fraction=0.5, max_kv_cache_bytes=100)
    share = KVCacheOptions(free_memory_fraction=0.25, max_kv_cache_bytes=1000)

    assert kv_memory_bytes(stated, free_bytes=10) == 123
    assert kv_memory_bytes(share, free_bytes=2000) == 500
    assert kv_memory_bytes(share, free_bytes=10_000) == 1000
    assert 0 < kv_memory_bytes(KVCacheOptions()) <= KVCacheOptions().max_kv_cache_bytes


def test_without_cgroups_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 777

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert available_memory_bytes(tmp_path, tmp_path / "none") == 777


@pytest.mark.parametrize("level", ["", "system.slice", "system.slice/photon.service"])
def test_cgroup_v2_limits_at_any_level(tmp_path: Path, level: str) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/system.slice/photon.service\n")
    folder = root / level
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("1000000\n")
    (folder / "memory.current").write_text("400000\n")
    (folder / "memory.stat").write_text("anon 5\ninactive_file 100000\n")

    assert available_memory_bytes(root, own) == 700_000


def test_cgroup_without_a_limit_is_none(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/\n")
    root.mkdir()
    (root / "memory.max").write_text("max\n")
    (root / "memory.current").write_text("1\n")

    assert available_memory_bytes(root, own) > 1_000_000


def test_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/\n")
    root.mkdir()
    (root / "memory.max").write_text("1000\n")
    (root / "memory.current").write_text("2000\n")

    assert available_memory_bytes(root, own) == 0


def test_cgroup_v1(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    folder = root / "memory" / "docker"
    folder.mkdir(parents=True)
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "memory" / "memory.usage_in_bytes").write_text("900\n")
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("900\n")
    (folder / "memory.stat").write_text("total_inactive_file 50\n")

    assert available_memory_bytes(root, own) == 150
