"""What differs between the CPU and a GPU when a runner is built, in one place; the runner has no branches.

Engine thread. The CUDA libraries are imported only when the CUDA backend is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.ops.base import Ops
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.options import Options
from photon_grpc.runner.kv_cache import available_memory_bytes
from photon_grpc.runner.model_runner import RowSampler
from photon_grpc.runner.sampler import Sampler

_log = structlog.get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Backend:
    """A device and what computes on it."""

    name: str
    device: torch.device
    ops: Ops
    make_sampler: Callable[[int], RowSampler]
    """A sampler for a vocabulary of this size."""
    free_memory_bytes: Callable[[], int]


def choose_backend(options: Options) -> Backend:
    """The backend that `model.backend` names; `auto` is CUDA where all that it needs is there, else the CPU.

    Raises BackendUnavailableError, naming what is missing, where CUDA is asked for by name.
    """
    match options.model.backend:
        case "cpu":
            return _cpu()
        case "cuda":
            return _cuda(options)
        case _:
            if not torch.cuda.is_available():
                return _cpu()
            try:
                return _cuda(options)
            except BackendUnavailableError as missing:
                # The plain installation has no CuPy, and must serve on a machine with a GPU all the same.
                _log.warning("serving on the CPU beside a GPU", reason=missing.message)
                return _cpu()


def resolve_dtype(name: str, backend: str) -> torch.dtype:
    """The type to compute in; `auto` is float32 on the CPU, where it is fastest, and bfloat16 on CUDA."""
    if name == "auto":
        return torch.bfloat16 if backend == "cuda" else torch.float32
    return _DTYPES[name]


def _cpu() -> Backend:
    device = torch.device("cpu")
    return Backend(
        "cpu", device, TorchOps(), lambda vocab_size: Sampler(vocab_size, device), available_memory_bytes
    )


def _cuda(options: Options) -> Backend:
    from photon_grpc.ops.cuda_ops import CudaOps

    max_num_seqs = options.scheduler.max_num_seqs
    ops = CudaOps(max_decodes=max_num_seqs)
    device = torch.device("cuda", torch.cuda.current_device())

    def make_sampler(vocab_size: int) -> RowSampler:
        from photon_grpc.runner.cuda_sampler import CudaSampler

        return CudaSampler(
            vocab_size,
            device,
            max_num_seqs=max_num_seqs,
            max_logit_bias=options.limits.max_logit_bias,
            max_top_logprobs=options.limits.max_top_logprobs,
        )

    def free_memory_bytes() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])

    return Backend("cuda", device, ops, make_sampler, free_memory_bytes)
