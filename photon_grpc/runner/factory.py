"""From a model folder to a warm runner: backend, data type, weights, KV pool, first token.

Runs on the engine thread, which owns everything made here. The KV pool is sized last, after the
weights are loaded and a forward pass of the largest step has run, so that it takes only memory that
nobody else will want.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import structlog
import torch

from photon_grpc.errors import ConfigError
from photon_grpc.models.config import ModelConfig
from photon_grpc.models.fingerprint import fingerprint
from photon_grpc.models.llama import DecoderModel
from photon_grpc.models.loader import load_weights
from photon_grpc.models.random_weights import draw_weights
from photon_grpc.models.registry import build_model, load_config
from photon_grpc.ops.base import AttentionMetadata
from photon_grpc.options import Options
from photon_grpc.runner.backend import Backend, choose_backend, resolve_dtype
from photon_grpc.runner.kv_cache import KVCache, kv_memory_bytes, num_blocks_for
from photon_grpc.runner.model_runner import ModelRunner
from photon_grpc.runner.warmup import warm_up
from photon_grpc.types import ModelInfo

_log = structlog.get_logger(__name__)


def build_runner(
    folder: Path, options: Options, progress: Callable[[int, int], None] | None = None
) -> ModelRunner:
    """A runner whose first tokens have come out. Raises StartupError, naming what is wrong."""
    backend = choose_backend(options)
    torch.set_num_threads(options.engine.num_threads or default_num_threads())
    config = load_config(folder)
    dtype = resolve_dtype(options.model.dtype, backend.name)
    device, ops = backend.device, backend.ops
    decoder = build_model(
        config, ops, dtype=dtype, device=device, max_positions=options.model.max_model_len or None
    )
    if options.model.load_format == "random":
        _log.warning("weights drawn at random: for benchmarks only, the output means nothing")
        draw_weights(decoder)
    else:
        load_weights(decoder, folder, progress=progress)
    _profile(decoder, config, backend, dtype, options)
    block_size = options.cache.block_size
    num_blocks = pool_blocks(config, options, dtype, backend.free_memory_bytes())
    max_model_len = _max_model_len(options, config, num_blocks * block_size)
    kv_cache = KVCache(config, ops, num_blocks, block_size, dtype=dtype, device=device)
    model = model_info(folder, options, config, max_model_len)
    runner = ModelRunner(
        decoder,
        model,
        kv_cache,
        backend.make_sampler(config.vocab_size),
        max_num_seqs=options.scheduler.max_num_seqs,
    )
    if options.engine.warmup:
        warm_up(runner)
    _log.info(
        "model ready",
        model=model.name,
        architecture=config.architecture,
        backend=backend.name,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        kv_blocks=num_blocks,
        kv_bytes=kv_cache.num_bytes,
    )
    return runner


def default_num_threads() -> int:
    """One torch thread per physical core but one, which is left to the event loop; at least one.

    Torch's threads spin while they wait for one another. Where they have to share a core with the event
    loop or a neighbour, two of them are ten times slower than one.
    """
    return max(1, (psutil.cpu_count(logical=False) or 1) - 1)


def pool_blocks(
    config: ModelConfig, options: Options, dtype: torch.dtype, free_bytes: int | None = None
) -> int:
    """Blocks of the KV pool; `free_bytes` is measured where it is not given. Raises ConfigError.

    A pool of stated size has that size. One taken from free memory ends where a full batch of the
    longest contexts fits: what lies beyond could only hold prefixes of long ago.
    """
    num_blocks = num_blocks_for(
        kv_memory_bytes(options.cache, free_bytes), config, options.cache.block_size, dtype
    )
    if options.cache.kv_cache_memory_bytes:
        return num_blocks
    longest = options.model.max_model_len or config.max_position_embeddings
    return min(num_blocks, options.scheduler.max_num_seqs * -(-longest // options.cache.block_size))


def model_info(folder: Path, options: Options, config: ModelConfig, max_model_len: int) -> ModelInfo:
    """What engine and front end need to know of the checkpoint."""
    defaults = config.generation
    return ModelInfo(
        name=options.model.served_name or Path(options.model.path or folder).resolve().name,
        fingerprint=fingerprint(folder, options.model.load_format),
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids,
        default_temperature=defaults.temperature,
        default_top_p=defaults.top_p,
        default_top_k=defaults.top_k,
        default_min_p=defaults.min_p,
        default_repetition_penalty=defaults.repetition_penalty,
    )


def _max_model_len(options: Options, config: ModelConfig, pool_tokens: int) -> int:
    stated = options.model.max_model_len
    if stated > config.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {stated}: the model has {config.max_position_embeddings} positions"
        )
    if stated > pool_tokens:
        raise ConfigError(f"model.max_model_len is {stated}: the KV pool holds {pool_tokens} tokens")
    allowed = stated or config.max_position_embeddings
    if allowed > pool_tokens:
        _log.warning("context cut to the KV pool", model_allows=allowed, kv_tokens=pool_tokens)
    return min(allowed, pool_tokens)


def _profile(
    decoder: DecoderModel, config: ModelConfig, backend: Backend, dtype: torch.dtype, options: Options
) -> None:
    """One forward pass of the largest step, in a cache that is thrown away."""
    num_tokens = options.scheduler.max_num_batched_tokens
    num_tokens = min(num_tokens, options.model.max_model_len or config.max_position_embeddings)
    block_size = options.cache.block_size
    num_blocks = -(-num_tokens // block_size)
    device = backend.device
    cache = KVCache(config, backend.ops, num_blocks, block_size, dtype=dtype, device=device)
    positions = torch.arange(num_tokens, device=device)
    metadata = AttentionMetadata(
        num_decodes=0,
        slot_mapping=positions,
        block_tables=torch.arange(num_blocks, device=device)[None],
        context_lens=torch.tensor([num_tokens], device=device),
        query_starts=(0, num_tokens),
        context_lens_host=(num_tokens,),
    )
    with torch.inference_mode():
        token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        hidden = decoder.forward(token_ids, positions, cache, metadata)
        decoder.compute_logits(hidden[-min(num_tokens, options.scheduler.max_num_seqs) :])
