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
from photon_grpc.kernels.linear_output import (
    BEST_ROWS,
    OUTPUTS,
    PAIRS_PER_TILE,
    POINTERS,
    SIZES,
    SOURCES,
    LinearOutput,
)

TOKEN_TILES = (8, 16)
"""Tokens that a variant has room for."""
MAX_TOKENS = TOKEN_TILES[-1]

_THREADS = 256
_WARPS = 8
_CHUNK = 64
# Chunks of a thread's ring. The rings and what else is shared take more than half of a multiprocessor. Where
# many tokens leave no room for six, four still cover the latency.
_DEPTHS = (6, 5, 4)
# Those that are requested before the kernel before this one has finished. The first reads of x queue behind
# them; of up to four tokens in the rings these are few enough for more.
_EARLY, _EAGER, _EAGER_TOKENS = 2, 5, 4
# What the kernel has besides.
_STATIC_BYTES = {8: 9 << 10, 16: 18 << 10}
# Staging x costs a barrier after the wait; a CTA with fewer tiles has it in the rings instead.
_MIN_STAGED_TILES = 2
_MIN_FILL = 0.95

_MACROS = (
    "PHOTON_STORAGE",
    "PHOTON_INDEX",
    "PHOTON_OUTPUT",
    "PHOTON_INPUT",
    "PHOTON_K",
    "PHOTON_TOKENS",
    "PHOTON_DEPTH",
    "PHOTON_EARLY",
    "PHOTON_SHARED_BYTES",
)


def token_tile(tokens: int) -> int:
    """The least of TOKEN_TILES that holds them. Raises ValueError for more than MAX_TOKENS."""
    for size in TOKEN_TILES:
        if tokens <= size:
            return size
    raise ValueError(f"{tokens} tokens: there is room for {MAX_TOKENS}")


def _macros(
    storage: str,
    kind: str,
    input_kind: str,
    k: int,
    index: str = "i64",
    *,
    tokens: int = 8,
    depth: int = 6,
    early: int = _EARLY,
) -> dict[str, int | str]:
    shared_bytes = _shared_bytes(input_kind, k, tokens, depth)
    values = (storage, index, kind, input_kind, k, tokens, depth, early, shared_bytes)
    return dict(zip(_MACROS, values, strict=True))


def _shared_bytes(input_kind: str, k: int, tokens: int, depth: int) -> int:
    """The rings of the threads; x, with half a row of banks between tokens; the norm."""
    if input_kind == "direct":
        return depth * (4 + 2 * tokens // 8) * 16 * _THREADS
    padded_k = -(-k // (_CHUNK * _WARPS)) * _WARPS * _CHUNK
    values = tokens * (padded_k + 32) + (padded_k if input_kind == "normed" else 0)
    return depth * 4 * 16 * _THREADS + 2 * values


def _depth(input_kind: str, k: int, tokens: int) -> int | None:
    """The most chunks of a ring that fit the current device; None where too few do."""
    room = launcher.require_cuda().max_shared_bytes - _STATIC_BYTES[tokens]
    return next((depth for depth in _DEPTHS if _shared_bytes(input_kind, k, tokens, depth) <= room), None)


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
            _macros("bf16", kind, "normed", 2048, index)
            for kind, index in (
                ("rope_and_store", "i64"),
                ("rope_and_store", "int"),
                ("silu_and_mul", "i64"),
                ("store_rows", "i64"),
            )
        ),
        *(_macros("bf16", kind, "staged", k) for kind in ("float_rows", BEST_ROWS) for k in (2048, 3072)),
        _macros("f16", BEST_ROWS, "direct", 896),
        _macros("bf16", BEST_ROWS, "staged", 2048, tokens=16, depth=6),
        *(
            _macros("bf16", "add_rows", "direct", k, early=early)
            for k in (2048, 8192, 4096, 14336)
            for early in (_EARLY, _EAGER)
        ),
        *(_macros("bf16", kind, "normed", 3072) for kind in ("rope_and_store", "silu_and_mul")),
        *(_macros("f16", kind, "normed", 896) for kind in OUTPUTS),
        *(_macros("f16", "add_rows", "direct", k) for k in (896, 4864, 18944)),
        *(_macros("bf16", "store_rows", kind, 200) for kind in ("direct", "staged", "normed")),
        *(
            _macros("bf16", kind, "normed", k, tokens=16, depth=depth)
            for kind in ("rope_and_store", "silu_and_mul")
            for k, depth in ((2048, 6), (3072, 6), (4096, 4))
        ),
        *(_macros("bf16", "add_rows", "direct", k, tokens=16) for k in (2048, 8192, 14336)),
        *(_macros("bf16", "float_rows", "staged", k, tokens=16, depth=d) for k, d in ((2048, 6), (4096, 4))),
        *(_macros("f16", kind, "normed", 896, tokens=16) for kind in OUTPUTS),
        _macros("f16", "add_rows", "direct", 4864, tokens=16, depth=5),
    ),
    max_registers=128,
    chosen_by_room=True,
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
    _launch(output, None, x, stride, weight, None, 0.0)


def normed_gemv(output: LinearOutput, residual: Tensor, norm: Tensor, eps: float, weight: Tensor) -> None:
    """The same for x = RMSNorm(residual): `residual` float32 [tokens, k], `norm` [k] of the weight's type."""
    k = output.require_weight(weight)
    require("norm", norm, weight.dtype, k)
    stride = require_rows("residual", residual, torch.float32, output.tokens, k)
    _launch(output, "normed", residual, stride, weight, norm, eps)


def num_parts(tokens: int, n: int) -> int:
    """How many ranks of `best_rows` there are for each token, on the current device."""
    warps = token_tile(tokens) * PAIRS_PER_TILE // 32
    return _num_ctas(-(-n // (2 * PAIRS_PER_TILE))) * warps


def _num_ctas(num_tiles: int) -> int:
    return min(num_tiles, launcher.require_cuda().num_multiprocessors)


def can_norm(tokens: int, k: int) -> bool:
    """Whether so many tokens are kept by `normed_gemv` on the current device."""
    return tokens <= MAX_TOKENS and _depth("normed", k, token_tile(tokens)) is not None


def is_one_round(n: int) -> bool:
    """Whether a weight of `n` rows has a tile for nearly every multiprocessor and no second one for any."""
    tiles, places = -(-n // (2 * PAIRS_PER_TILE)), launcher.require_cuda().num_multiprocessors
    return _MIN_FILL * places <= tiles <= places


def _input_kind(output: LinearOutput, k: int) -> str:
    device = launcher.require_cuda()
    few_tiles = output.num_tiles < _MIN_STAGED_TILES * device.num_multiprocessors
    return "direct" if few_tiles or not can_norm(output.tokens, k) else "staged"


def _launch(
    output: LinearOutput,
    input_kind: str | None,
    x: Tensor,
    x_stride: int,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
) -> None:
    tokens, k = output.tokens, weight.shape[1]
    tile = token_tile(tokens)
    if not tokens:
        return
    input_kind = input_kind or _input_kind(output, k)
    if output.kind == BEST_ROWS and output.row_stride != num_parts(tokens, output.n):
        raise ValueError(f"ranks have {num_parts(tokens, output.n)} parts, not {output.row_stride}")
    depth = _depth(input_kind, k, tile)
    if depth is None:
        raise ValueError(f"{tokens} tokens of {k} values do not fit into shared memory")
    eager = output.kind == "add_rows" and input_kind == "direct" and tokens <= _EAGER_TOKENS
    macros = _macros(
        storage_name(weight.dtype),
        output.kind,
        input_kind,
        k,
        output.index,
        tokens=tile,
        depth=depth,
        early=min(_EAGER if eager else _EARLY, depth - 1),
    )
    shared_bytes = macros["PHOTON_SHARED_BYTES"]
    assert isinstance(shared_bytes, int)
    kernel = launcher.load(GEMV.variant(**macros), shared_bytes)
    kernel(
        (_num_ctas(output.num_tiles), 1, 1),
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
