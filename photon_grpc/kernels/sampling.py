"""From logits to tokens on the GPU, and log-probabilities; see cuda_kernels/sampling.cu and logprobs.cu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels import launcher
from photon_grpc.kernels.checks import require, require_index, storage_name
from photon_grpc.kernels.launcher import Device, KernelSpec, Pointer
from photon_grpc.kernels.sampling_state import DEFINES, MAX_VOCAB_SIZE, SLOT_DTYPE

_NUM_THREADS = 512
# What a thread reads at a time, and leaves one figure of: four groups of four.
_BATCH_ENTRIES = 16
# CTAs of a row, where there are clusters: many for few rows, so that all SMs have work; two for more, where
# there is enough without and every cluster barrier costs.
_FEW_ROWS_CLUSTER = 8
_MANY_ROWS_CLUSTER = 2
_MAX_FEW_ROWS = 32
# Rows of one grid: the limit of its second dimension.
_MAX_ROWS = 65535

_MACROS = ("PHOTON_CLUSTER", "PHOTON_STORAGE", *DEFINES)
_CHECKED = tuple(
    {"PHOTON_CLUSTER": cluster, "PHOTON_STORAGE": storage, **DEFINES}
    for cluster in (1, _MANY_ROWS_CLUSTER, _FEW_ROWS_CLUSTER)
    for storage in ("f32", "bf16", "f16")
)

SAMPLE_GREEDY = KernelSpec(
    name="sample_greedy",
    source="sampling",
    parameters=(*[Pointer] * 8, np.int64, np.int32, np.int32),
    max_threads=_NUM_THREADS,
    macros=_MACROS,
    checked=_CHECKED,
    overlaps=True,
)
SAMPLE = KernelSpec(
    name="sample",
    source="sampling",
    parameters=(*[Pointer] * 8, np.int64, np.int32, np.int32),
    max_threads=_NUM_THREADS,
    macros=_MACROS,
    checked=_CHECKED,
    overlaps=True,
)
LOGPROBS = KernelSpec(
    name="logprobs",
    source="logprobs",
    parameters=(*[Pointer] * 7, np.int64, np.int32, np.int32, np.int32),
    max_threads=_NUM_THREADS,
    macros=_MACROS,
    checked=_CHECKED,
    overlaps=True,
)
SPECS = (SAMPLE_GREEDY, SAMPLE, LOGPROBS)


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What the kernels know of the sequences, by slot; every tensor keeps its address."""

    params: Tensor
    """[slots, bytes of SLOT_DTYPE] uint8."""
    bias_ids: Tensor
    """[slots, bias_capacity] int32, ascending."""
    bias_values: Tensor
    """[slots, bias_capacity] float32."""
    num_outputs: Tensor
    """[slots] int32; counted up by the kernels."""
    last_token_ids: Tensor
    """[slots] int32; each sequence's newest token, written by the kernels."""

    @classmethod
    def allocate(cls, num_slots: int, bias_capacity: int, device: torch.device) -> SamplingState:
        """Zeros throughout."""

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            params=zeros(torch.uint8, num_slots, SLOT_DTYPE.itemsize),
            bias_ids=zeros(torch.int32, num_slots, bias_capacity),
            bias_values=zeros(torch.float32, num_slots, bias_capacity),
            num_outputs=zeros(torch.int32, num_slots),
            last_token_ids=zeros(torch.int32, num_slots),
        )

    def require(self) -> int:
        """Check the tensors against each other; the number of slots. Raises ValueError."""
        num_slots, bias_capacity = self.bias_ids.shape
        require("params", self.params, torch.uint8, num_slots, SLOT_DTYPE.itemsize)
        require("bias_ids", self.bias_ids, torch.int32, num_slots, bias_capacity)
        require("bias_values", self.bias_values, torch.float32, num_slots, bias_capacity)
        require("num_outputs", self.num_outputs, torch.int32, num_slots)
        require("last_token_ids", self.last_token_ids, torch.int32, num_slots)
        return num_slots


def require_usable(vocab_size: int) -> None:
    """Raises BackendUnavailableError without a device, ValueError for a vocabulary out of range."""
    launcher.require_cuda()
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the sampling kernels take vocabularies of 1 to {MAX_VOCAB_SIZE}, not {vocab_size}")


def cluster_size(device: Device, rows: int) -> int:
    """How many CTAs share a row of a batch. No result depends on it but the last bits of `logprobs`."""
    if device.compute_capability < (9, 0):
        return 1
    return _FEW_ROWS_CLUSTER if rows <= _MAX_FEW_ROWS else _MANY_ROWS_CLUSTER


def figures_bytes(vocab_size: int, cluster: int) -> int:
    """Dynamic shared memory of a CTA: a float for each of its threads and their batches."""
    groups = -(-vocab_size // 4)
    piece = -(-groups // cluster)
    return -(-piece * 4 // (_BATCH_ENTRIES * _NUM_THREADS)) * _NUM_THREADS * 4


def sample_greedy(token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState) -> None:
    """Steps 1 and 3 to 8 of `runner/sampler.py` for rows that all have temperature 0.

    `token_ids` [rows] int32 is written, -1 for a fault and for idle rows; `logits` is [rows, vocab] of any
    stride and storage type; `row_slots` [rows] int32 names each row's slot, -1 for an idle row.
    """
    _launch(SAMPLE_GREEDY, token_ids, logits, row_slots, state)


def sample(token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState) -> None:
    """Steps 1 and 3 to 14 for rows of any parameters; arguments as for `sample_greedy`."""
    _launch(SAMPLE, token_ids, logits, row_slots, state)


def _launch(
    spec: KernelSpec, token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState
) -> None:
    rows, vocab_size = _require_logits(logits)
    state.require()
    require_index("token_ids", token_ids, torch.int32, rows)
    require_index("row_slots", row_slots, torch.int32, rows)
    cluster = cluster_size(launcher.require_cuda(), rows)
    shared_bytes = figures_bytes(vocab_size, cluster) if spec is SAMPLE else 0
    kernel = launcher.load(spec.variant(**_variant(cluster, logits.dtype)), shared_bytes)
    kernel(
        (cluster, rows, 1),
        _NUM_THREADS,
        token_ids.data_ptr(),
        state.last_token_ids.data_ptr(),
        state.num_outputs.data_ptr(),
        logits.data_ptr(),
        row_slots.data_ptr(),
        state.params.data_ptr(),
        state.bias_ids.data_ptr(),
        state.bias_values.data_ptr(),
        np.int64(logits.stride(0)),
        np.int32(vocab_size),
        np.int32(state.bias_ids.shape[1]),
    )


def logprobs(
    chosen: Tensor,
    top_ids: Tensor,
    top_values: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    asked: tuple[Tensor, SamplingState] | int,
) -> None:
    """Log-probabilities of `token_ids` [rows] int32 under `logits` [rows, vocab], with alternatives.

    `asked` is their number for every row, or (`row_slots`, state), by which rows that did not ask are left
    alone, as are rows whose token is -1. `chosen` [rows] and `top_values` [rows, capacity] are float64,
    `top_ids` [rows, capacity] is int32; entries beyond a row's number are left as they are.
    """
    rows, vocab_size = _require_logits(logits)
    capacity = top_ids.shape[1]
    require_index("chosen", chosen, torch.float64, rows)
    require_index("top_ids", top_ids, torch.int32, rows, capacity)
    require_index("top_values", top_values, torch.float64, rows, capacity)
    require_index("token_ids", token_ids, torch.int32, rows)
    if isinstance(asked, int):
        if not 0 <= asked <= capacity:
            raise ValueError(f"{asked} alternatives do not fit {capacity}")
        row_slots, params, top = 0, 0, asked
    else:
        require_index("row_slots", asked[0], torch.int32, rows)
        asked[1].require()
        row_slots, params, top = asked[0].data_ptr(), asked[1].params.data_ptr(), 0
    # The same for every batch, so that no result depends on the others in it.
    cluster = cluster_size(launcher.require_cuda(), 1)
    kernel = launcher.load(
        LOGPROBS.variant(**_variant(cluster, logits.dtype)), figures_bytes(vocab_size, cluster)
    )
    kernel(
        (cluster, rows, 1),
        _NUM_THREADS,
        chosen.data_ptr(),
        top_ids.data_ptr(),
        top_values.data_ptr(),
        logits.data_ptr(),
        token_ids.data_ptr(),
        row_slots,
        params,
        np.int64(logits.stride(0)),
        np.int32(vocab_size),
        np.int32(top),
        np.int32(capacity),
    )


def _variant(cluster: int, dtype: torch.dtype) -> dict[str, int | str]:
    return {"PHOTON_CLUSTER": cluster, "PHOTON_STORAGE": storage_name(dtype), **DEFINES}


def _require_logits(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be rows of neighbouring values, not of strides {logits.stride()}")
    rows, vocab_size = logits.shape
    if rows > _MAX_ROWS:
        raise ValueError(f"at most {_MAX_ROWS} rows, not {rows}")
    require_usable(vocab_size)
    storage_name(logits.dtype)
    return rows, vocab_size
