"""Timing cases of the products of 16 to 128 tokens: the weights of Llama-3.2-1B and Llama-3.1-8B in bfloat16.

`eager` is torch's product (cuBLASLt) alone, without what is fused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from photon_grpc.kernels import linear_output
from photon_grpc.kernels.linear_output import LinearOutput
from photon_grpc.kernels.skinny_gemm import skinny_gemm
from tools.bench.kernel_cases import READ_BYTES_PER_US, Case, copies_for

TOKENS = (16, 32, 64, 128)
BLOCK_SIZE, NUM_POSITIONS = 16, 4096
BF16 = torch.bfloat16

# Rows and k of the weights, and for qkv the heads: query, key, size.
_MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "1B": (
        ("qkv", 3072, 2048),
        ("o", 2048, 2048),
        ("gate_up", 16384, 2048),
        ("down", 2048, 8192),
        ("head", 128256, 2048),
    ),
    "8B": (
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
        ("head", 128256, 4096),
    ),
}
_HEADS = {"1B": (32, 8, 64), "8B": (32, 8, 128)}

# What a launch of a chain costs beyond its bytes in µs, and the share of the read stream at which it reads
# them. At 128 tokens x is read from L2 as often as the weight from memory.
_PREDICTED = {16: (0.9, 0.94), 32: (0.9, 0.94), 64: (1.3, 0.88), 128: (1.8, 0.7)}


def cases() -> Iterator[Case]:
    """Every weight at every number of tokens, by mma.sync and by wgmma. The prediction is of the first."""
    for model, weights in _MODELS.items():
        for name, n, k in weights:
            for tokens in TOKENS:
                for warpgroup in (False, True):
                    yield _case(model, name, n, k, tokens, warpgroup)


def _case(model: str, name: str, n: int, k: int, tokens: int, warpgroup: bool) -> Case:
    num_bytes = 2 * n * k + 2 * tokens * k
    copies = copies_for(num_bytes)
    weight = torch.randn(copies, n, k, device="cuda", dtype=BF16)
    x = torch.randn(copies, tokens, k, device="cuda", dtype=BF16)
    output, out_bytes = _output(model, name, n, tokens)
    num_bytes += out_bytes
    fixed_us, share = _PREDICTED[tokens]

    def launch(i: int) -> None:
        skinny_gemm(output, x[i % copies], weight[i % copies], warpgroup=warpgroup)

    def eager(i: int) -> None:
        _ = F.linear(x[i % copies], weight[i % copies])

    return Case(
        f"skinny_gemm {model} {name} [{n}, {k}] {tokens} tokens {'wgmma' if warpgroup else 'mma'}",
        num_bytes,
        num_bytes / READ_BYTES_PER_US,
        fixed_us + num_bytes / (share * READ_BYTES_PER_US),
        launch,
        eager,
    )


def _output(model: str, name: str, n: int, tokens: int) -> tuple[LinearOutput, int]:
    """Where the model puts the results, and the bytes that this reads and writes."""
    make: dict[str, Callable[[], tuple[LinearOutput, int]]] = {
        "qkv": lambda: (_rope_and_store(model, tokens), 2 * n * tokens),
        "o": lambda: (linear_output.add_rows(_zeros(tokens, n)), 8 * n * tokens),
        "gate_up": lambda: (linear_output.silu_and_mul(_zeros(tokens, n // 2).to(BF16)), n * tokens),
        "down": lambda: (linear_output.add_rows(_zeros(tokens, n)), 8 * n * tokens),
        "head": lambda: (linear_output.float_rows(_zeros(tokens, n)), 4 * n * tokens),
    }
    return make[name]()


def _rope_and_store(model: str, tokens: int) -> LinearOutput:
    num_heads, num_kv_heads, head_dim = _HEADS[model]
    num_blocks = 4 * tokens
    cache = torch.zeros(num_blocks, num_kv_heads, 2, BLOCK_SIZE, head_dim, device="cuda", dtype=BF16)
    return linear_output.rope_and_store(
        _zeros(tokens, num_heads, head_dim).to(BF16),
        cache,
        torch.rand(NUM_POSITIONS, head_dim, device="cuda"),
        torch.randint(NUM_POSITIONS, (tokens,), device="cuda"),
        torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:tokens],
    )


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="cuda")
