"""Greedy sampling of rows whose best entries a product has found; see cuda_kernels/best_token.cu."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_index
from photon_grpc.kernels.launcher import KernelSpec, Pointer
from photon_grpc.kernels.sampling import SamplingState

_ROWS_PER_CTA = 4
_WARP = 32

BEST_TOKEN = KernelSpec(
    name="best_token",
    source="best_token",
    parameters=(*[Pointer] * 5, np.int32, np.int32),
    max_threads=_ROWS_PER_CTA * _WARP,
    overlaps=True,
)
SPECS = (BEST_TOKEN,)


def best_token(token_ids: Tensor, ranks: Tensor, row_slots: Tensor, state: SamplingState) -> None:
    """Steps 1 and 8 of `runner/sampler.py` for rows that all have temperature 0 and no marks.

    `token_ids` [rows] int32 is written, -1 for a fault and for idle rows; `ranks` [rows, parts] int64 is what
    `linear_output.best_rows` wrote; `row_slots` [rows] int32 names each row's slot, -1 for an idle row.
    """
    rows, parts = ranks.shape
    require("ranks", ranks, torch.int64, rows, parts)
    state.require()
    require_index("token_ids", token_ids, torch.int32, rows)
    require_index("row_slots", row_slots, torch.int32, rows)
    if not rows:
        return
    launcher.load(BEST_TOKEN.variant())(
        (-(-rows // _ROWS_PER_CTA), 1, 1),
        _ROWS_PER_CTA * _WARP,
        token_ids.data_ptr(),
        state.last_token_ids.data_ptr(),
        state.num_outputs.data_ptr(),
        ranks.data_ptr(),
        row_slots.data_ptr(),
        np.int32(rows),
        np.int32(parts),
    )
