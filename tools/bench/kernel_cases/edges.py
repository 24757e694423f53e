"""Timing cases of what stands around the matrix products: norms, rotation with KV write, SwiGLU, embedding.

Sizes of Llama-3.2-1B (hidden 2048, 32 + 2 * 8 heads of 64, inner 8192) in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from photon_grpc.kernels.embedding import embedding
from photon_grpc.kernels.rmsnorm import add_rms_norm, rms_norm
from photon_grpc.kernels.rope_store_kv import rope, rope_store_kv
from photon_grpc.kernels.silu_and_mul import silu_and_mul
from tools.bench.kernel_cases import READ_BYTES_PER_US, Case, copies_for, predicted_us

ROWS = (1, 16, 64, 256, 2048)
HIDDEN, INNER, VOCAB = 2048, 8192, 128256
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 64, 16
NUM_POSITIONS = 4096
EPS = 1e-5
BF16 = torch.bfloat16


def cases() -> Iterator[Case]:
    """Every kernel at every number of rows; the promised comparisons are those of 256 rows."""
    for rows in ROWS:
        yield _rms_norm(rows)
        yield _add_rms_norm(rows)
        yield _rope(rows)
        yield _rope_store_kv(rows)
        yield _silu_and_mul(rows)
        yield _embedding(rows)


def _case(
    name: str,
    num_bytes: int,
    launch: Callable[[int], None],
    eager: Callable[[int], None] | None = None,
    min_speedup: float = 0.0,
) -> Case:
    floor = num_bytes / READ_BYTES_PER_US
    return Case(name, num_bytes, floor, predicted_us(num_bytes), launch, eager, min_speedup)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def _rms_norm(rows: int) -> Case:
    num_bytes = (2 * rows + 1) * HIDDEN * 2
    x, weight = _randn(copies_for(num_bytes), rows, HIDDEN), _randn(HIDDEN)
    out = torch.empty_like(x)

    def eager(i: int) -> None:
        # The composition that transformers runs.
        wide = x[i % len(x)].float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        _ = weight * wide.to(BF16)

    return _case(
        f"rms_norm [{rows}, {HIDDEN}]",
        num_bytes,
        lambda i: rms_norm(out[i % len(x)], x[i % len(x)], weight, EPS),
        eager,
        5.0 if rows == 256 else 0.0,
    )


def _add_rms_norm(rows: int) -> Case:
    num_bytes = rows * HIDDEN * (2 + 4 + 4 + 2) + HIDDEN * 2
    x, weight = _randn(copies_for(num_bytes), rows, HIDDEN), _randn(HIDDEN)
    residual, out = x.float(), torch.empty_like(x)
    return _case(
        f"add_rms_norm [{rows}, {HIDDEN}], float32 residual",
        num_bytes,
        lambda i: add_rms_norm(out[i % len(x)], residual[i % len(x)], x[i % len(x)], weight, EPS),
    )


def _angles() -> Tensor:
    frequencies = 500000.0 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.outer(torch.arange(NUM_POSITIONS, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().cuda()


def _rope(rows: int) -> Case:
    """In place on q alone, [rows, 2048]."""
    num_bytes = 2 * rows * NUM_HEADS * HEAD_DIM * 2 + rows * HEAD_DIM * 4
    x, table = _randn(copies_for(num_bytes), rows, NUM_HEADS, HEAD_DIM), _angles()
    positions = torch.randint(NUM_POSITIONS, (rows,), device="cuda")
    cos, sin = table[positions].to(BF16)[:, None].chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def eager(i: int) -> None:
        # The composition that transformers runs, its cos and sin made beforehand.
        q = x[i % len(x)]
        low, high = q[..., : HEAD_DIM // 2], q[..., HEAD_DIM // 2 :]
        _ = (q * cos) + (torch.cat((-high, low), dim=-1) * sin)

    return _case(
        f"rope [{rows}, {NUM_HEADS * HEAD_DIM}]",
        num_bytes,
        lambda i: rope(x[i % len(x)], table, positions),
        eager,
        6.0 if rows == 256 else 0.0,
    )


def _rope_store_kv(rows: int) -> Case:
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    num_bytes = 2 * rows * heads * HEAD_DIM * 2 + rows * HEAD_DIM * 4
    copies = copies_for(num_bytes)
    qkv, table = _randn(copies, rows, heads, HEAD_DIM), _angles()
    positions = torch.randint(NUM_POSITIONS, (rows,), device="cuda")
    num_blocks = max(64, 4 * rows)
    cache = torch.zeros(num_blocks, NUM_KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=BF16)
    slots = torch.stack(
        [torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:rows] for _ in range(copies)]
    )

    def launch(i: int) -> None:
        row = qkv[i % copies]
        rope_store_kv(row[:, :NUM_HEADS], cache, row, None, EPS, table, positions, slots[i % copies])

    return _case(f"rope_store_kv {rows} tokens, {heads} heads of {HEAD_DIM}", num_bytes, launch)


def _silu_and_mul(rows: int) -> Case:
    num_bytes = 3 * rows * INNER * 2
    gate_up = _randn(copies_for(num_bytes), rows, 2 * INNER)
    out = torch.empty(len(gate_up), rows, INNER, device="cuda", dtype=BF16)

    def launch(i: int) -> None:
        silu_and_mul(out[i % len(out)], gate_up[i % len(out)])

    return _case(f"silu_and_mul [{rows}, {INNER}]", num_bytes, launch)


def _embedding(rows: int) -> Case:
    num_bytes = rows * HIDDEN * (2 + 4)
    weight, copies = _randn(VOCAB, HIDDEN), copies_for(num_bytes)
    ids = torch.randint(VOCAB, (copies, rows), device="cuda")
    out = torch.empty(copies, rows, HIDDEN, device="cuda")
    return _case(
        f"embedding [{rows}, {HIDDEN}] to float32",
        num_bytes,
        lambda i: embedding(out[i % copies], ids[i % copies], weight),
    )
