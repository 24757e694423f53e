"""Timing cases of the products of 1 and 8 tokens: the weights of Llama-3.2-1B and Llama-3.1-8B in bfloat16.

As a decode step has them: behind a norm for q, k, v and for gate and up, which `eager`, torch's product
(cuBLASLt) alone, has not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from photon_grpc.kernels.gemv import gemv, normed_gemv
from tools.bench.kernel_cases import READ_BYTES_PER_US, Case, copies_for, predicted_us
from tools.bench.products import BF16, MODELS, make_output

TOKENS = (1, 8)
EPS = 1e-5
NORMED = ("qkv", "gate_up")


def cases() -> Iterator[Case]:
    """Every weight at every number of tokens."""
    for model, weights in MODELS.items():
        for name, n, k in weights:
            for tokens in TOKENS:
                yield _case(model, name, n, k, tokens)


def _case(model: str, name: str, n: int, k: int, tokens: int) -> Case:
    is_normed = name in NORMED
    num_bytes = 2 * n * k + (4 if is_normed else 2) * tokens * k
    copies = copies_for(num_bytes)
    weight = torch.randn(copies, n, k, device="cuda", dtype=BF16)
    x = torch.randn(copies, tokens, k, device="cuda", dtype=BF16)
    residual, norm = x.float(), torch.ones(k, device="cuda", dtype=BF16)
    output, out_bytes = make_output(model, name, n, tokens)
    num_bytes += out_bytes

    def launch(i: int) -> None:
        if is_normed:
            normed_gemv(output, residual[i % copies], norm, EPS, weight[i % copies])
        else:
            gemv(output, x[i % copies], weight[i % copies])

    def eager(i: int) -> None:
        _ = F.linear(x[i % copies], weight[i % copies])

    return Case(
        f"gemv {model} {name} [{n}, {k}] {tokens} tokens",
        num_bytes,
        num_bytes / READ_BYTES_PER_US,
        predicted_us(num_bytes),
        launch,
        eager,
    )
