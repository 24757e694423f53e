"""What differs between the CPU and a GPU when a runner is built, in one place; the runner has no branches.

Engine thread. The CUDA libraries are imported only when the CUDA backend is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.models.llama import DecoderModel
from photon_grpc.ops.base import Ops
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.options import Options, SchedulerOptions
from photon_grpc.runner.base import Runner
from photon_grpc.runner.kv_cache import KVCache, available_memory_bytes, kv_memory_bytes
from photon_grpc.runner.model_runner import ModelRunner
from photon_grpc.runner.sampler import Sampler
from photon_grpc.types import ModelInfo

_log = structlog.get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows and tokens of the largest step, where the settings leave it open.
_CPU_LIMITS = (64, 512)
_CUDA_LIMITS = (256, 2048)

ForwardPass = Callable[[int, int], None]
"""Runs a step of so many decode rows and so many tokens of prefill, and lets go of everything."""


MakeRunner = Callable[[DecoderModel, ModelInfo, KVCache], Runner]
"""A runner for steps of up to as many rows and tokens as the `ModelInfo` says."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A device and what computes on it."""

    name: str
    device: torch.device
    ops: Ops
    max_num_seqs: int
    max_num_batched_tokens: int
    make_runner: MakeRunner
    pool_bytes: Callable[[ForwardPass, int], int]
    """Memory for a KV pool, measured after the largest steps have run; given the size of the vocabulary."""


def choose_backend(options: Options) -> Backend:
    """The backend that `model.backend` names; `auto` is CUDA where all that it needs is there, else the CPU.

    Raises BackendUnavailableError, naming what is missing, where CUDA is asked for by name.
    """
    backend, lacking = explain_backend(options)
    if lacking and torch.cuda.is_available():
        _log.warning("serving on the CPU beside a GPU", reason=lacking)
    return backend


def explain_backend(options: Options) -> tuple[Backend, str]:
    """What `choose_backend` gives, and what CUDA lacks where `auto` came to the CPU. Raises as it does."""
    match options.model.backend:
        case "cpu":
            return _cpu(options), ""
        case "cuda":
            return _cuda(options), ""
        case _:
            if not torch.cuda.is_available():
                return _cpu(options), "torch finds no GPU"
            try:
                return _cuda(options), ""
            except BackendUnavailableError as missing:
                # The plain installation has no CuPy, and must serve on a machine with a GPU all the same.
                return _cpu(options), missing.message


def gpu_memory() -> tuple[int, int] | None:
    """`(free, total)` bytes of the GPU that a start would take; None where there is none."""
    return torch.cuda.mem_get_info() if torch.cuda.is_available() else None


def resolve_dtype(name: str, backend: str) -> torch.dtype:
    """The type to compute in; `auto` is float32 on the CPU, where it is fastest, and bfloat16 on CUDA."""
    if name == "auto":
        return torch.bfloat16 if backend == "cuda" else torch.float32
    return _DTYPES[name]


def step_limits(options: SchedulerOptions, backend: str) -> tuple[int, int]:
    """`(max_num_seqs, max_num_batched_tokens)`: as stated, or what suits the backend and fits the other."""
    num_seqs, num_tokens = _CUDA_LIMITS if backend == "cuda" else _CPU_LIMITS
    if options.max_num_batched_tokens:
        num_seqs = min(num_seqs, options.max_num_batched_tokens)
    num_seqs = options.max_num_seqs or num_seqs
    return num_seqs, options.max_num_batched_tokens or max(num_tokens, num_seqs)


def _cpu(options: Options) -> Backend:
    device = torch.device("cpu")
    num_seqs, num_tokens = step_limits(options.scheduler, "cpu")

    def make_runner(decoder: DecoderModel, model: ModelInfo, kv_cache: KVCache) -> Runner:
        return ModelRunner(
            decoder, model, kv_cache, Sampler(model.vocab_size, device), max_num_seqs=model.max_num_seqs
        )

    def pool_bytes(run: ForwardPass, vocab_size: int) -> int:
        run(0, num_tokens)
        return kv_memory_bytes(options.cache, available_memory_bytes())

    return Backend("cpu", device, TorchOps(), num_seqs, num_tokens, make_runner, pool_bytes)


def _cuda(options: Options) -> Backend:
    from photon_grpc.runner.cuda_backend import cuda_backend

    return cuda_backend(options)
