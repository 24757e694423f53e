"""The products of a decode step of Llama-3.2-1B and Llama-3.1-8B in bfloat16: shapes and outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from photon_grpc.kernels import linear_output
from photon_grpc.kernels.linear_output import LinearOutput

BLOCK_SIZE, NUM_POSITIONS = 16, 4096
BF16 = torch.bfloat16

# Rows and k of the weights, and for qkv the heads: query, key, size.
MODELS: dict[str, tuple[tuple[str, int, int], ...]] = {
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


def make_output(model: str, name: str, n: int, tokens: int) -> tuple[LinearOutput, int]:
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
