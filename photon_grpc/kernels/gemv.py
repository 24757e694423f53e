"""Products of up to sixteen tokens with a weight, fused with what stands before and behind them.

See cuda_kernels/gemv.cu. A token's result depends on the weight's shape and on `input` alone, not on how many
tokens there are beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer
from photon_grpc.kernels.linear_output import OUTPUTS, POINTERS, SIZES, SOURCES, LinearOutput

MAX_TOKENS = 16

_THREADS = 256
_WARPS = 8
_CHUNK = 64
_DEPTH = 4
_GROUP_TOKENS = 8
# Of one CTA on sm_80, with room for what is static.
_MAX_STAGED_BYTES = 150 << 10
# Staging x costs a barrier after the wait; a CTA with fewer tiles has it in the rings instead.
_MIN_STAGED_TILES = 2

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_INDEX",
    "PHOTON_OUTPUT",
    "PHOTON_INPUT",
    "PHOTON_K",
    "PHOTON_TOKENS",
    "PHOTON_DEPTH",
    "PHOTON_SHARED_BYTES",
)


def _macros(
    storage: str, kind: str, input_kind: str, k: int, tokens: int, index: str = "i64"
) -> dict[str, int | str]:
    values = (storage, index, kind, input_kind, k, tokens, _DEPTH, _shared_bytes(input_kind, k, tokens))
    return dict(zip(_MACROS, values, strict=True))


def _shared_bytes(input_kind: str, k: int, tokens: int) -> int:
    """The rings of the threads; x, with half a row of banks between tokens; the norm."""
    if input_kind == "direct":
        return _DEPTH * (4 + tokens // 4) * 16 * _THREADS
    padded_k = -(-k // (_CHUNK * _WARPS)) * _WARPS * _CHUNK
    values = tokens * (padded_k + 32) + (padded_k if input_kind == "normed" else 0)
    return _DEPTH * 4 * 16 * _THREADS + 2 * values


GEMV = KernelSpec(
    name="gemv",
    source="gemv",
    parameters=(
        *POINTERS,
        *(Pointer,) * 3,
        *SOURCES,
        np.int32,
        *SIZES,
        *(np.int64,) * 2,
        np.float32,
    ),
    max_threads=_THREADS,
    macros=_MACROS,
    # Llama 3.2 1B in all its uses, then sizes with tails, long rows, and the other types.
    checked=(
        *(
            _macros("bf16", kind, "normed", 2048, 8, index)
            for kind, index in (
                ("rope_and_store", "i64"),
                ("rope_and_store", "int"),
                ("silu_and_mul", "i64"),
                ("float_rows", "i64"),
                ("store_rows", "i64"),
            )
        ),
        *(_macros("bf16", kind, "staged", 2048, 16) for kind in OUTPUTS),
        *(_macros("bf16", "add_rows", "direct", k, tokens) for k in (2048, 8192) for tokens in (8, 16)),
        *(
            _macros("f16", kind, "normed", 896, 8)
            for kind in ("rope_and_store", "silu_and_mul", "float_rows")
        ),
        *(_macros("f16", "add_rows", "direct", k, 8) for k in (896, 4864, 18944)),
        *(_macros("bf16", kind, "normed", 4096, 8) for kind in ("rope_and_store", "silu_and_mul")),
        _macros("bf16", "add_rows", "direct", 4096, 16),
        _macros("bf16", "add_rows", "direct", 200, 8),
        _macros("bf16", "store_rows", "normed", 200, 16),
        _macros("bf16", "store_rows", "direct", 2048, 8),
    ),
    # Two CTAs to a multiprocessor.
    max_registers=128,
    overlaps=True,
)
SPECS = (GEMV,)


def gemv(output: LinearOutput, x: Tensor, weight: Tensor) -> None:
    """y [tokens, n] = x weight^T, and on as `output` says.

    `x` [tokens, k] of the weight's type, whose rows may lie apart; `weight` [n, k] bfloat16 or float16, k a
    multiple of 8. 1 to MAX_TOKENS tokens, none launches nothing. Raises ValueError for anything else.
    """
    k = output.require_weight(weight)
    tokens = output.tokens
    stride = require_rows("x", x, weight.dtype, tokens, k)
    _launch(output, _input_kind(output, k, tokens), x, stride, weight, None, 0.0)


def normed_gemv(output: LinearOutput, residual: Tensor, norm: Tensor, eps: float, weight: Tensor) -> None:
    """The same for x = RMSNorm(residual): `residual` float32 [tokens, k], `norm` [k] of the weight's type."""
    k = output.require_weight(weight)
    require("norm", norm, weight.dtype, k)
    stride = require_rows("residual", residual, torch.float32, output.tokens, k)
    _launch(output, "normed", residual, stride, weight, norm, eps)


def can_norm(k: int, tokens: int) -> bool:
    """Whether the x of so many tokens fits where `normed_gemv` keeps it."""
    return tokens <= MAX_TOKENS and _shared_bytes("normed", k, _padded(tokens)) <= _MAX_STAGED_BYTES


def _padded(tokens: int) -> int:
    return _GROUP_TOKENS if tokens <= _GROUP_TOKENS else MAX_TOKENS


def _input_kind(output: LinearOutput, k: int, tokens: int) -> str:
    device = launcher.require_cuda()
    few_tiles = output.num_tiles < _MIN_STAGED_TILES * device.num_multiprocessors
    return "direct" if few_tiles or not can_norm(k, tokens) else "staged"


def _launch(
    output: LinearOutput,
    input_kind: str,
    x: Tensor,
    x_stride: int,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
) -> None:
    tokens, k = output.tokens, weight.shape[1]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: there is room for {MAX_TOKENS}")
    if not tokens:
        return
    padded = _padded(tokens)
    if input_kind == "normed" and not can_norm(k, tokens):
        raise ValueError(f"{tokens} tokens of {k} values do not fit into shared memory")
    macros = _macros(storage_name(weight.dtype), output.kind, input_kind, k, padded, output.index)
    shared_bytes = macros["PHOTON_SHARED_BYTES"]
    assert isinstance(shared_bytes, int)
    kernel = launcher.load(GEMV.variant(**macros), shared_bytes)
    kernel(
        (min(output.num_tiles, kernel.device.num_multiprocessors), 1, 1),
        _THREADS,
        *output.targets,
        x.data_ptr(),
        weight.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        *output.sources,
        np.int32(tokens),
        *output.sizes,
        np.int64(x_stride),
        np.int64(output.row_stride),
        np.float32(eps),
    )
