"""What a model folder holds and what of it fits into memory, told without loading it.

Reads config.json and file sizes only. The memory figures are what a start at this moment would find;
a running server measures after its weights are loaded and its largest step has run.
"""

from __future__ import annotations

from pathlib import Path

from photon_grpc.models.registry import load_config
from photon_grpc.options import Options
from photon_grpc.runner.backend import explain_backend, gpu_memory, resolve_dtype, step_limits
from photon_grpc.runner.factory import model_info, pool_blocks
from photon_grpc.runner.kv_cache import available_memory_bytes, kv_bytes_per_token, kv_memory_bytes

__all__ = ["describe_model"]


def describe_model(folder: Path, options: Options) -> list[tuple[str, str]]:
    """Names and figures for a table. Raises StartupError for a folder that could not be served."""
    config = load_config(folder)
    backend, lacking = _backend(options)
    dtype = resolve_dtype(options.model.dtype, backend)
    weight_bytes = config.num_parameters * dtype.itemsize
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    per_token = kv_bytes_per_token(config, dtype)
    block_size = options.cache.block_size
    max_num_seqs, _ = step_limits(options.scheduler, backend)
    pool_bytes = _pool_bytes(options, backend, weight_bytes)
    pool_tokens = pool_blocks(config, options, dtype, pool_bytes, max_num_seqs) * block_size
    allowed = options.model.max_model_len or config.max_position_embeddings
    info = model_info(folder, options, config, min(allowed, pool_tokens))
    heads = f"{config.num_heads} query, {config.num_kv_heads} key and value, of {config.head_dim}"
    return [
        ("model", info.name),
        ("fingerprint", info.fingerprint),
        ("architecture", config.architecture),
        ("layers", f"{config.num_layers} of width {config.hidden_size}"),
        ("heads", heads),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("parameters", f"{config.num_parameters:,}"),
        ("backend", f"{backend} ({lacking})" if lacking else backend),
        ("weights on disk", f"{_size(file_bytes)} ({_name(config.dtype)})"),
        ("weights in memory", f"{_size(weight_bytes)} ({_name(dtype)})"),
        ("KV cache per token", f"{per_token:,} bytes"),
        ("KV pool", f"{_size(pool_tokens * per_token)} in blocks of {block_size} tokens"),
        ("tokens that fit", f"{pool_tokens:,}"),
        (
            "longest context",
            f"{info.max_model_len:,} tokens (the model allows {config.max_position_embeddings:,})",
        ),
        ("end-of-sequence ids", ", ".join(map(str, config.eos_token_ids)) or "none"),
    ]


def _backend(options: Options) -> tuple[str, str]:
    """The backend of a start at this moment, and what has to be said of it.

    One that is named is taken at its word: the figures of a GPU server may be wanted where there is no GPU.
    """
    if options.model.backend == "auto":
        backend, lacking = explain_backend(options)
        return backend.name, lacking
    if options.model.backend == "cuda" and gpu_memory() is None:
        return "cuda", "torch finds no GPU: sizes are of this machine's memory"
    return options.model.backend, ""


def _pool_bytes(options: Options, backend: str, weight_bytes: int) -> int:
    """What the weights leave for the KV pool, before any step has shown what it needs itself."""
    gpu = gpu_memory() if backend == "cuda" else None
    if gpu is not None and not options.cache.kv_cache_memory_bytes:
        free, total = gpu
        in_use = total - free
        return max(int(total * options.cache.gpu_memory_utilization) - in_use - weight_bytes, 0)
    return kv_memory_bytes(options.cache, max(available_memory_bytes() - weight_bytes, 0))


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _size(num_bytes: int) -> str:
    """Binary units, as settings take them."""
    value = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
