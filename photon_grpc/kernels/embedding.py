"""Rows of the embedding table on the GPU; see cuda_kernels/embedding.cu."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import index_name, require, require_index, storage_name
from photon_grpc.kernels.launcher import KernelSpec, Pointer

_VEC = 8
_THREADS = 128

EMBEDDING = KernelSpec(
    name="embedding",
    source="embedding",
    parameters=(Pointer, Pointer, Pointer, np.int32, np.int64),
    max_threads=_THREADS,
    macros=("PHOTON_STORAGE", "PHOTON_RESIDUAL", "PHOTON_INDEX"),
    checked=tuple(
        {"PHOTON_STORAGE": storage, "PHOTON_RESIDUAL": residual, "PHOTON_INDEX": index}
        for storage in ("bf16", "f16", "f32")
        for residual in dict.fromkeys((storage, "f32"))
        for index in ("int", "i64")
    ),
    overlaps=True,
)
SPECS = (EMBEDDING,)


def embedding(out: Tensor, token_ids: Tensor, weight: Tensor) -> None:
    """out [tokens, hidden] = rows of `weight` [vocab, hidden]; contiguous.

    `token_ids` [tokens] are int32 or int64; one outside of the vocabulary gives zeros. `out` has
    `weight`'s type or float32.
    """
    vocab_size, hidden = weight.shape
    (tokens,) = token_ids.shape
    if hidden % _VEC:
        raise ValueError(f"hidden is {hidden}, not a multiple of {_VEC}")
    require("weight", weight, weight.dtype, vocab_size, hidden)
    require("out", out, out.dtype, tokens, hidden)
    require_index("token_ids", token_ids, token_ids.dtype, tokens)
    residual = storage_name(out.dtype)
    if residual not in ("f32", storage_name(weight.dtype)):
        raise ValueError(f"out is {out.dtype} and weight {weight.dtype}")
    kernel = launcher.load(
        EMBEDDING.variant(
            PHOTON_STORAGE=storage_name(weight.dtype),
            PHOTON_RESIDUAL=residual,
            PHOTON_INDEX=index_name(token_ids.dtype),
        )
    )
    grid = (tokens, -(-hidden // (_VEC * _THREADS)), 1)
    kernel(
        grid,
        _THREADS,
        out.data_ptr(),
        token_ids.data_ptr(),
        weight.data_ptr(),
        np.int32(hidden),
        np.int64(vocab_size),
    )
