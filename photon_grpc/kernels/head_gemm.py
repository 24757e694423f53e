"""The head of a model for many rows: logits, or the best of each row; see cuda_kernels/head_gemm.cu."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require_rows, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer, TensorMap
from photon_grpc.kernels.linear_output import BEST_ROWS, LinearOutput
from photon_grpc.kernels.tensor_map import ROW_ELEMENTS, tensor_map

_THREADS = 384
_TILE_TOKENS, _TILE_ROWS, _BOX_ROWS = 128, 256, 128
_CLUSTER = 2
_STAGES, _STAGE_BYTES, _BARRIER_BYTES = 4, (_TILE_TOKENS + _TILE_ROWS) * 128, 64
_SHARED_BYTES = _STAGES * _STAGE_BYTES + _BARRIER_BYTES
_ARCH = "sm_90a"
# Of the places of its tiles of tokens, those that have work; with more than one tile cuBLASLt's are smaller.
_MIN_FILL, _MIN_FILL_OF_MANY = 0.7, 0.84
_KINDS = ("float_rows", BEST_ROWS)
_MACROS = ("PHOTON_STORAGE", "PHOTON_OUTPUT", "PHOTON_SHARED_BYTES")


def _macros(storage: str, kind: str) -> dict[str, int | str]:
    return dict(zip(_MACROS, (storage, kind, _SHARED_BYTES), strict=True))


HEAD_GEMM = KernelSpec(
    name="head_gemm",
    source="head_gemm",
    parameters=(Pointer, np.int32, np.int32, np.int32, np.int64, TensorMap, TensorMap),
    max_threads=_THREADS,
    macros=_MACROS,
    checked=tuple(_macros(storage, kind) for storage in ("bf16", "f16") for kind in _KINDS),
    # At launch; warpgroups then change what they have.
    max_registers=168,
    # Of no use, and never launched, where there is less shared memory than on sm_90a.
    chosen_by_room=True,
    overlaps=True,
)
SPECS = (HEAD_GEMM,)


def is_available() -> bool:
    """Whether there is a kernel for this GPU. Raises BackendUnavailableError where there is none at all."""
    return launcher.require_cuda().arch == _ARCH


def is_faster(tokens: int) -> bool:
    """Whether cuBLASLt and greedy sampling behind it take longer, where this is available.

    On an H100, heads of Llama 3.2 1B and 3.1 8B: by 23 and 6 % with 192 tokens, 30 and 17 % with 256, 19 and
    14 % with 512; with 129 the 8B loses 6 %, with 384 13 %. Logits themselves take as long as cuBLASLt's.
    """
    tile = _CLUSTER * _TILE_TOKENS
    places = -(-tokens // tile) * tile
    return tokens >= (_MIN_FILL if tokens <= tile else _MIN_FILL_OF_MANY) * places


def num_parts(n: int) -> int:
    """How many ranks of `best_rows` there are for each row, of a vocabulary of `n`."""
    return -(-n // _TILE_ROWS)


def head_gemm(output: LinearOutput, x: Tensor, weight: Tensor) -> None:
    """y [tokens, n] = x weight^T, and on as `output`, `float_rows` or `best_rows`, says.

    `x` [tokens, k] of the weight's type, whose rows may lie apart; `weight` [n, k] bfloat16 or float16, k a
    multiple of 8. Any number of tokens, none launches nothing. A token's result depends on nothing but itself
    and the weight. Raises ValueError for anything else, and where it is not available.
    """
    if output.kind not in _KINDS:
        raise ValueError(f"{output.kind} is none of {_KINDS}")
    k = output.require_weight(weight)
    tokens, n = output.tokens, output.n
    if not k:
        raise ValueError("the weight has rows of no elements")
    if output.kind == BEST_ROWS and output.row_stride != num_parts(n):
        raise ValueError(f"ranks have {num_parts(n)} parts, not {output.row_stride}")
    stride = require_rows("x", x, weight.dtype, tokens, k)
    if not tokens or not n:
        return
    device = launcher.require_cuda()
    if device.arch != _ARCH:
        raise ValueError(f"{device.name} is {device.arch}, this is a kernel of {_ARCH}")
    variant = HEAD_GEMM.variant(**_macros(storage_name(weight.dtype), output.kind))
    kernel = launcher.load(variant, _SHARED_BYTES)
    tiles = -(-tokens // (_CLUSTER * _TILE_TOKENS)) * num_parts(n)
    clusters = min(device.num_multiprocessors // _CLUSTER, tiles)
    kernel(
        (_CLUSTER * clusters, 1, 1),
        _THREADS,
        output.out.data_ptr(),
        np.int32(tokens),
        np.int32(n),
        np.int32(k),
        np.int64(output.row_stride),
        tensor_map(x, (k, tokens), (stride,), (ROW_ELEMENTS, _TILE_TOKENS)),
        tensor_map(weight, (k, n), (k,), (ROW_ELEMENTS, _BOX_ROWS)),
    )
