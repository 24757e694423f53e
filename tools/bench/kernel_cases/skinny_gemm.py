"""Timing cases of the products of 16 to 128 tokens: the weights of Llama-3.2-1B and Llama-3.1-8B in bfloat16.

`eager` is torch's product (cuBLASLt) alone, without what is fused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from photon_grpc.kernels.linear_output import LinearOutput
from photon_grpc.kernels.skinny_gemm import skinny_gemm
from photon_grpc.kernels.skinny_gemm_tma import skinny_gemm_tma
from tools.bench.kernel_cases import READ_BYTES_PER_US, Case, copies_for
from tools.bench.products import BF16, MODELS, make_output

TOKENS = (16, 32, 64, 128)

# What a launch of a chain costs beyond its bytes in µs, and the share of the read stream at which it reads
# them. Without the copy engine, at 128 tokens x is read from L2 as often as the weight from memory.
_PREDICTED = {16: (0.9, 0.94), 32: (0.9, 0.94), 64: (1.3, 0.88), 128: (1.8, 0.7)}
_PREDICTED_TMA = {16: (2.2, 0.97), 32: (2.2, 0.97), 64: (2.2, 0.97), 128: (3.0, 0.9)}


def cases() -> Iterator[Case]:
    """Every weight at every number of tokens, by mma.sync, by wgmma, and by the copy engine and wgmma. The
    prediction of the second is that of the first."""
    for model, weights in MODELS.items():
        for name, n, k in weights:
            for tokens in TOKENS:
                for kernel in _KERNELS:
                    yield _case(model, name, n, k, tokens, kernel)


def _by_mma(output: LinearOutput, x: torch.Tensor, weight: torch.Tensor) -> None:
    skinny_gemm(output, x, weight)


def _by_wgmma(output: LinearOutput, x: torch.Tensor, weight: torch.Tensor) -> None:
    skinny_gemm(output, x, weight, warpgroup=True)


_KERNELS: dict[str, Callable[[LinearOutput, torch.Tensor, torch.Tensor], None]] = {
    "mma": _by_mma,
    "wgmma": _by_wgmma,
    "tma": skinny_gemm_tma,
}


def _case(model: str, name: str, n: int, k: int, tokens: int, kernel: str) -> Case:
    num_bytes = 2 * n * k + 2 * tokens * k
    copies = copies_for(num_bytes)
    weight = torch.randn(copies, n, k, device="cuda", dtype=BF16)
    x = torch.randn(copies, tokens, k, device="cuda", dtype=BF16)
    output, out_bytes = make_output(model, name, n, tokens)
    num_bytes += out_bytes
    fixed_us, share = (_PREDICTED_TMA if kernel == "tma" else _PREDICTED)[tokens]
    multiply = _KERNELS[kernel]

    def launch(i: int) -> None:
        multiply(output, x[i % copies], weight[i % copies])

    def eager(i: int) -> None:
        _ = F.linear(x[i % copies], weight[i % copies])

    return Case(
        f"skinny_gemm {model} {name} [{n}, {k}] {tokens} tokens {kernel}",
        num_bytes,
        num_bytes / READ_BYTES_PER_US,
        fixed_us + num_bytes / (share * READ_BYTES_PER_US),
        launch,
        eager,
    )
