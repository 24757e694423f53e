"""From a model folder to a warm runner: backend, data type, weights, KV pool, first token.

Runs on the engine thread, which owns everything made here. The KV pool is sized last, after the
weights are loaded and a forward pass of the largest step has run, so that it takes only memory that
nobody else will want.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
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
from photon_grpc.runner.base import Runner
from photon_grpc.runner.kv_cache import KVCache, num_blocks_for
from photon_grpc.runner.warmup import warm_up
from photon_grpc.stages import Stages
from photon_grpc.types import ModelInfo

_log = structlog.get_logger(__name__)


def build_runner(
    folder: Path,
    options: Options,
    progress: Callable[[int, int], None] | None = None,
    stages: Stages | None = None,
) -> Runner:
    """A runner whose first tokens have come out. Raises StartupError, naming what is wrong.

    What it takes goes on with `stages`, and into the log.
    """
    stages = stages or Stages()
    backend = choose_backend(options)
    stages.ended("device")
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
    stages.ended("weights")
    block_size = options.cache.block_size
    pool_bytes = backend.pool_bytes(
        lambda num_decodes, num_tokens: _pass(decoder, backend, options, num_decodes, num_tokens),
        config.vocab_size,
    )
    stages.ended("largest step")
    num_blocks = pool_blocks(config, options, dtype, pool_bytes, backend.max_num_seqs)
    max_model_len = _max_model_len(options, config, num_blocks * block_size)
    kv_cache = KVCache(config, ops, num_blocks, block_size, dtype=dtype, device=device)
    model = replace(
        model_info(folder, options, config, max_model_len),
        max_num_seqs=backend.max_num_seqs,
        max_num_batched_tokens=backend.max_num_batched_tokens,
    )
    stages.ended("kv pool")
    runner = backend.make_runner(decoder, model, kv_cache)
    stages.ended("runner")
    if options.engine.warmup:
        warm_up(runner)
        stages.ended("warm-up")
    _log.info(
        "model ready",
        model=model.name,
        architecture=config.architecture,
        backend=backend.name,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        kv_blocks=num_blocks,
        kv_bytes=kv_cache.num_bytes,
        seconds=stages.total_s,
        stages=stages.seconds(),
    )
    return runner


def default_num_threads() -> int:
    """One torch thread per physical core but one, which is left to the event loop; at least one.

    Torch's threads spin while they wait for one another. Where they have to share a core with the event
    loop or a neighbour, two of them are ten times slower than one.
    """
    return max(1, (psutil.cpu_count(logical=False) or 1) - 1)


def pool_blocks(
    config: ModelConfig, options: Options, dtype: torch.dtype, pool_bytes: int, max_num_seqs: int
) -> int:
    """Blocks of a KV pool in `pool_bytes`. Raises ConfigError where not even one fits.

    A pool of stated size has that size. One taken from free memory ends where a full batch of the
    longest contexts fits: what lies beyond could only hold prefixes of long ago.
    """
    num_blocks = num_blocks_for(pool_bytes, config, options.cache.block_size, dtype)
    if options.cache.kv_cache_memory_bytes:
        return num_blocks
    longest = options.model.max_model_len or config.max_position_embeddings
    return min(num_blocks, max_num_seqs * -(-longest // options.cache.block_size))


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


def _pass(
    decoder: DecoderModel, backend: Backend, options: Options, num_decodes: int, num_tokens: int
) -> None:
    """A forward pass of decode rows and prefills of so many tokens, in a cache that is thrown away."""
    config, block_size, device = decoder.config, options.cache.block_size, backend.device
    longest = options.model.max_model_len or config.max_position_embeddings
    prefills = [min(longest, num_tokens - start) for start in range(0, num_tokens, longest)]
    lens = (*(1,) * num_decodes, *prefills)
    query_starts = (0, *accumulate(lens))
    width = -(-max(lens) // block_size)
    cache = KVCache(config, backend.ops, width, block_size, dtype=decoder.dtype, device=device)
    # Rows write over one another; nobody asks what they say.
    positions = torch.cat([torch.arange(length, device=device) for length in lens])
    metadata = AttentionMetadata(
        num_decodes=num_decodes,
        slot_mapping=positions,
        block_tables=torch.arange(width, device=device).repeat(len(lens), 1),
        context_lens=torch.tensor(lens, device=device),
        query_starts=query_starts,
        context_lens_host=lens,
    )
    with torch.inference_mode():
        token_ids = torch.zeros(query_starts[-1], dtype=torch.int64, device=device)
        hidden = decoder.forward(token_ids, positions, cache, metadata)
        decoder.compute_logits(hidden[-min(len(hidden), backend.max_num_seqs) :])
