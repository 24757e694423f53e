"""The tensors behind the block ids, and how many blocks fit.

Owns the memory of keys and values and its sizing. Which block belongs to whom is the scheduler's
business, what a block looks like inside the Ops'. Engine thread.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from photon_grpc.errors import ConfigError
from photon_grpc.models.config import ModelConfig
from photon_grpc.ops.base import Ops
from photon_grpc.options import KVCacheOptions

# A cgroup without a limit says "max" (v2) or a number near 2**63 (v1).
_NO_LIMIT = 1 << 60


class KVCache:
    """Keys and values of every layer, allocated once: `layers[i]` is laid out by the Ops.

    Contents are undefined until written; readers go by block tables and context lengths alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = ops.kv_layer_shape(num_blocks, block_size, config.num_kv_heads, config.head_dim)
        try:
            storage = torch.empty(config.num_layers, *shape, dtype=dtype, device=device)
        except (MemoryError, RuntimeError) as error:
            size = num_blocks * block_size * kv_bytes_per_token(config, dtype)
            raise ConfigError(f"cache: a KV pool of {size} bytes does not fit into memory") from error
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.layers: tuple[torch.Tensor, ...] = storage.unbind(0)

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers together."""
    return config.num_layers * 2 * config.kv_size * dtype.itemsize


def num_blocks_for(memory_bytes: int, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Whole blocks in `memory_bytes`. Raises ConfigError where not even one fits."""
    block_bytes = block_size * kv_bytes_per_token(config, dtype)
    num_blocks = memory_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"cache: {memory_bytes} bytes hold no KV block; one of {block_size} tokens takes {block_bytes}"
        )
    return num_blocks


def kv_memory_bytes(options: KVCacheOptions, free_bytes: int | None = None) -> int:
    """Bytes for the KV pool: the stated size, or a share of what is free, up to the stated maximum.

    `free_bytes` is measured where it is not given. Ask after the weights are loaded and a forward pass
    of the largest step has run, so that what those take is no longer counted as free.
    """
    if options.kv_cache_memory_bytes:
        return options.kv_cache_memory_bytes
    free = available_memory_bytes() if free_bytes is None else free_bytes
    return min(int(free * options.free_memory_fraction), options.max_kv_cache_bytes)


def available_memory_bytes(
    cgroup_root: Path = Path("/sys/fs/cgroup"), own_cgroup: Path = Path("/proc/self/cgroup")
) -> int:
    """Memory that this process can still take: the machine's, or less under a cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    for limit, usage, inactive in _cgroup_figures(cgroup_root, own_cgroup):
        # Pages of files that nobody uses count as usage, and the kernel drops them on demand.
        available = min(available, max(0, limit - max(0, usage - inactive)))
    return available


def _cgroup_figures(root: Path, own: Path) -> list[tuple[int, int, int]]:
    """(limit, usage, inactive file pages) of each limited memory cgroup around this process, v1 or v2."""
    figures = []
    for line in _read(own).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if hierarchy == "0":
            base, limit_name, usage_name, inactive_key = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name, inactive_key = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        folder = base / name.lstrip("/")
        # A limit on any ancestor binds too. In a container the named folder is often not visible,
        # and the container's own cgroup is the root.
        for level in (folder, *folder.parents):
            if not level.is_relative_to(base):
                break
            limit, usage = _number(level / limit_name), _number(level / usage_name)
            if limit is not None and usage is not None and limit < _NO_LIMIT:
                figures.append((limit, usage, _stat(level / "memory.stat", inactive_key)))
    return figures


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        # Other systems have no cgroups, and not every level has every file.
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _stat(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0
