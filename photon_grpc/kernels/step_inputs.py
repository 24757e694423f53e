"""From the slots of a step's rows to what a forward pass reads; see cuda_kernels/step_inputs.cu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_index
from photon_grpc.kernels.launcher import KernelSpec, Pointer

_THREADS = 128
_VECTOR = 4

STEP_INPUTS = KernelSpec(
    name="step_inputs",
    source="step_inputs",
    parameters=(*(Pointer,) * 12, *(np.int32,) * 5),
    max_threads=_THREADS,
    overlaps=True,
)
SPECS = (STEP_INPUTS,)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What the device knows of the sequences, by slot; every tensor keeps its address."""

    num_computed: Tensor
    """[slots] int32: tokens whose keys and values are in the cache once the launched steps have run."""
    tables: Tensor
    """[slots, max_blocks] int32."""
    last_token_ids: Tensor
    """[slots] int32: each sequence's newest token."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Whose rows a step has: the decode rows first, then those whose tokens are given."""

    slots: Tensor
    """[rows] int32; -1 is an idle row."""
    query_starts: Tensor | None
    """[rows behind the decodes + 1] int32, from 0 on; None without such rows."""
    prompt_tokens: Tensor
    """[tokens behind the decodes] int32."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What is written: one entry per token or per row."""

    token_ids: Tensor
    """[tokens] int64."""
    positions: Tensor
    """[tokens] int64."""
    slot_mapping: Tensor
    """[tokens] int64; -1 is stored nowhere."""
    context_lens: Tensor
    """[rows] int32; 0 for an idle row."""
    block_tables: Tensor
    """[rows, max_blocks] int32."""
    last_tokens: Tensor
    """[rows] int64: the place of each row's last token."""


def step_inputs(
    out: StepInputs, state: SequenceState, rows: StepRows, num_decodes: int, block_size: int
) -> None:
    """Fill `out` for the next tokens of `rows`, and count them as computed in `state`.

    The first `num_decodes` rows have one token each, the newest of their sequences. Rows with a slot have
    blocks for their tokens, and no two have the same slot. Raises ValueError for tensors that do not fit.
    """
    (num_rows,) = rows.slots.shape
    (num_tokens,) = out.token_ids.shape
    num_slots, max_blocks = state.tables.shape
    num_prefills = num_rows - num_decodes
    if max_blocks % _VECTOR:
        raise ValueError(f"a block table has {max_blocks} entries, not a multiple of {_VECTOR}")
    if num_prefills < 0 or num_tokens < num_decodes or (num_tokens > num_decodes) != (num_prefills > 0):
        raise ValueError(f"{num_decodes} of {num_rows} rows decode, in a step of {num_tokens} tokens")
    for name in ("token_ids", "positions", "slot_mapping"):
        require_index(name, getattr(out, name), torch.int64, num_tokens)
    require_index("context_lens", out.context_lens, torch.int32, num_rows)
    require_index("last_tokens", out.last_tokens, torch.int64, num_rows)
    require("block_tables", out.block_tables, torch.int32, num_rows, max_blocks)
    require("tables", state.tables, torch.int32, num_slots, max_blocks)
    require_index("num_computed", state.num_computed, torch.int32, num_slots)
    require_index("last_token_ids", state.last_token_ids, torch.int32, num_slots)
    require_index("slots", rows.slots, torch.int32, num_rows)
    require_index("prompt_tokens", rows.prompt_tokens, torch.int32, num_tokens - num_decodes)
    starts = rows.query_starts
    if (starts is not None) != (num_prefills > 0):
        raise ValueError(
            f"query_starts are for the rows behind the decodes, of which there are {num_prefills}"
        )
    if starts is not None:
        require_index("query_starts", starts, torch.int32, num_prefills + 1)
    launcher.load(STEP_INPUTS.variant())(
        (num_rows + 1, 1, 1),
        _THREADS,
        out.token_ids.data_ptr(),
        out.positions.data_ptr(),
        out.slot_mapping.data_ptr(),
        out.context_lens.data_ptr(),
        out.block_tables.data_ptr(),
        out.last_tokens.data_ptr(),
        state.num_computed.data_ptr(),
        state.last_token_ids.data_ptr(),
        state.tables.data_ptr(),
        rows.slots.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        rows.prompt_tokens.data_ptr(),
        np.int32(num_rows),
        np.int32(num_decodes),
        np.int32(num_tokens),
        np.int32(max_blocks),
        np.int32(block_size),
    )
