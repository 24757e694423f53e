"""The CUDA backend, put together: stream, Ops, sampler, runner, and the memory that is left for the KV pool.

Engine thread, on a stream of its own.
"""

from __future__ import annotations

import structlog
import torch

from photon_grpc.errors import ConfigError
from photon_grpc.kernels.apply_updates import apply_updates
from photon_grpc.kernels.paged_attention_decode import MAX_ROWS
from photon_grpc.kernels.step_inputs import step_inputs
from photon_grpc.models.llama import DecoderModel
from photon_grpc.ops.cuda_ops import CudaOps
from photon_grpc.options import Options
from photon_grpc.runner.backend import Backend, ForwardPass, step_limits
from photon_grpc.runner.base import Runner
from photon_grpc.runner.buckets import Buckets
from photon_grpc.runner.cuda_runner import CudaRunner, StepKernels
from photon_grpc.runner.cuda_sampler import CudaSampler, WriteState
from photon_grpc.runner.kv_cache import KVCache
from photon_grpc.runner.stream import CudaStream, engine_stream
from photon_grpc.types import ModelInfo

_log = structlog.get_logger(__name__)

# What the driver keeps of one captured step.
_GRAPH_BYTES = 1 << 20
# A captured step allocates in a pool of its own, where shapes that follow one another leave holes.
_POOL_SLACK = 1.5
_MARK_BYTES = 4


def cuda_backend(options: Options) -> Backend:
    """Raises BackendUnavailableError where the machine lacks something, ConfigError for too many rows."""
    num_seqs, num_tokens = step_limits(options.scheduler, "cuda")
    if num_seqs > MAX_ROWS:
        raise ConfigError(f"scheduler.max_num_seqs is {num_seqs}: backend cuda takes up to {MAX_ROWS}")
    ops = CudaOps(max_decodes=num_seqs)
    device = torch.device("cuda", torch.cuda.current_device())
    engine_stream()
    kernels = StepKernels(apply_updates, step_inputs)

    def make_runner(decoder: DecoderModel, model: ModelInfo, kv_cache: KVCache) -> Runner:
        def make_sampler(write: WriteState, max_rows: int) -> CudaSampler:
            return CudaSampler(
                model.vocab_size,
                device,
                max_num_seqs=model.max_num_seqs,
                max_rows=max_rows,
                max_logit_bias=options.limits.max_logit_bias,
                max_top_logprobs=options.limits.max_top_logprobs,
                write=write,
            )

        runner = CudaRunner(
            decoder,
            model,
            kv_cache,
            make_sampler,
            kernels=kernels,
            stream=CudaStream(),
            max_num_seqs=model.max_num_seqs,
            max_num_batched_tokens=model.max_num_batched_tokens,
            # In float32 attention is driven from the host, row by row.
            capture=decoder.dtype is not torch.float32,
        )
        if options.engine.warmup:
            runner.prepare()
        return runner

    def pool_bytes(run: ForwardPass, vocab_size: int) -> int:
        run(0, num_tokens)
        captured_bytes = _captured_bytes(run, Buckets(num_seqs, num_tokens))
        stated = options.cache.kv_cache_memory_bytes
        if stated:
            return stated
        # Penalties and bans of every sequence; the sampler takes them when they are asked for.
        marks_bytes = num_seqs * vocab_size * _MARK_BYTES
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        # What the largest step took stays with torch's allocator, and so is in use.
        allowed = int(total * options.cache.gpu_memory_utilization)
        left = allowed - (total - free) - captured_bytes - marks_bytes
        _log.info(
            "gpu memory",
            total=total,
            in_use=total - free,
            captured=captured_bytes,
            sampler=marks_bytes,
            pool=left,
        )
        if left <= 0:
            raise ConfigError(
                f"cache.gpu_memory_utilization is {options.cache.gpu_memory_utilization}: of {total} bytes "
                f"{total - free} are in use before there is a KV pool"
            )
        return left

    return Backend("cuda", device, ops, num_seqs, num_tokens, make_runner, pool_bytes)


def _captured_bytes(run: ForwardPass, buckets: Buckets) -> int:
    """Memory that graphs will hold: that of the largest, which all share, and the driver's part of each."""
    largest = buckets.largest
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(largest.num_decodes, largest.num_prefill_tokens)
    peak = torch.cuda.max_memory_allocated() - before
    return int(peak * _POOL_SLACK) + _GRAPH_BYTES * len(buckets.kinds())
