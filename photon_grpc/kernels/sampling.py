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
_CLUSTER = 8
# The most static shared memory of any kernel here, which a resident piece has to leave.
_STATIC_SHARED_BYTES = 10 << 10
# Rows above which greedy rows fill the machine without help: one CTA each, and no cluster barrier.
_MAX_CLUSTERED_GREEDY_ROWS = 64
# Rows of one grid: the limit of its second dimension.
_MAX_ROWS = 65535

_MACROS = ("PHOTON_CLUSTER", "PHOTON_RESIDENT", "PHOTON_STORAGE", *DEFINES)
_CHECKED = tuple(
    {"PHOTON_CLUSTER": cluster, "PHOTON_RESIDENT": resident, "PHOTON_STORAGE": storage, **DEFINES}
    for cluster, resident in ((1, 0), (1, 1), (_CLUSTER, 0), (_CLUSTER, 1))
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
    parameters=(*[Pointer] * 9, np.int64, np.int32, np.int32),
    max_threads=_NUM_THREADS,
    macros=_MACROS,
    checked=_CHECKED,
    overlaps=True,
)
LOGPROBS = KernelSpec(
    name="logprobs",
    source="logprobs",
    parameters=(*[Pointer] * 8, np.int64, np.int32, np.int32, np.int32),
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


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a row is shared out: CTAs of a cluster, and whether its pieces lie in shared memory."""

    cluster: int
    resident: bool
    piece_bytes: int

    @property
    def shared_bytes(self) -> int:
        return self.piece_bytes if self.resident else 0

    def macros(self, dtype: torch.dtype) -> dict[str, int | str]:
        return {
            "PHOTON_CLUSTER": self.cluster,
            "PHOTON_RESIDENT": int(self.resident),
            "PHOTON_STORAGE": storage_name(dtype),
            **DEFINES,
        }


def row_shape(device: Device, vocab_size: int) -> _Shape:
    """The same for every batch, so that no result depends on the others in it."""
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the sampling kernels take vocabularies of 1 to {MAX_VOCAB_SIZE}, not {vocab_size}")
    cluster = _CLUSTER if device.compute_capability >= (9, 0) else 1
    groups = -(-vocab_size // 4)
    piece_bytes = -(-groups // cluster) * 16
    return _Shape(cluster, piece_bytes + _STATIC_SHARED_BYTES <= device.max_shared_bytes, piece_bytes)


def scratch_bytes(rows: int, vocab_size: int) -> int:
    """Device memory that `sample` and `logprobs` need for `rows` rows on the current device; mostly 0.

    Raises BackendUnavailableError without a device.
    """
    shape = row_shape(launcher.require_cuda(), vocab_size)
    return 0 if shape.resident else rows * shape.cluster * shape.piece_bytes


def sample_greedy(token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState) -> None:
    """Steps 1 and 3 to 8 of `runner/sampler.py` for rows that all have temperature 0.

    `token_ids` [rows] int32 is written, -1 for a fault and for idle rows; `logits` is [rows, vocab] of any
    stride and storage type; `row_slots` [rows] int32 names each row's slot, -1 for an idle row.
    """
    rows, vocab_size = _require(token_ids, logits, row_slots, state)
    shape = row_shape(launcher.require_cuda(), vocab_size)
    cluster = shape.cluster if rows <= _MAX_CLUSTERED_GREEDY_ROWS else 1
    shape = _Shape(cluster, False, 0)
    kernel = launcher.load(SAMPLE_GREEDY.variant(**shape.macros(logits.dtype)))
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


def sample(
    token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState, scratch: Tensor | None = None
) -> None:
    """Steps 1 and 3 to 14 for rows of any parameters; arguments as for `sample_greedy`.

    `scratch`, uint8, has `scratch_bytes` bytes or more; None where that is 0.
    """
    rows, vocab_size = _require(token_ids, logits, row_slots, state)
    shape = row_shape(launcher.require_cuda(), vocab_size)
    kernel = launcher.load(SAMPLE.variant(**shape.macros(logits.dtype)), shape.shared_bytes)
    kernel(
        (shape.cluster, rows, 1),
        _NUM_THREADS,
        token_ids.data_ptr(),
        state.last_token_ids.data_ptr(),
        state.num_outputs.data_ptr(),
        _scratch(scratch, shape, rows),
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
    scratch: Tensor | None = None,
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
    shape = row_shape(launcher.require_cuda(), vocab_size)
    kernel = launcher.load(LOGPROBS.variant(**shape.macros(logits.dtype)), shape.shared_bytes)
    kernel(
        (shape.cluster, rows, 1),
        _NUM_THREADS,
        chosen.data_ptr(),
        top_ids.data_ptr(),
        top_values.data_ptr(),
        _scratch(scratch, shape, rows),
        logits.data_ptr(),
        token_ids.data_ptr(),
        row_slots,
        params,
        np.int64(logits.stride(0)),
        np.int32(vocab_size),
        np.int32(top),
        np.int32(capacity),
    )


def _require_logits(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be rows of neighbouring values, not of strides {logits.stride()}")
    rows, vocab_size = logits.shape
    if rows > _MAX_ROWS:
        raise ValueError(f"at most {_MAX_ROWS} rows, not {rows}")
    storage_name(logits.dtype)
    return rows, vocab_size


def _require(token_ids: Tensor, logits: Tensor, row_slots: Tensor, state: SamplingState) -> tuple[int, int]:
    rows, vocab_size = _require_logits(logits)
    state.require()
    require_index("token_ids", token_ids, torch.int32, rows)
    require_index("row_slots", row_slots, torch.int32, rows)
    return rows, vocab_size


def _scratch(scratch: Tensor | None, shape: _Shape, rows: int) -> int:
    if shape.resident:
        return 0
    needed = rows * shape.cluster * shape.piece_bytes
    if scratch is None or scratch.numel() < needed:
        raise ValueError(f"scratch must have {needed} bytes")
    require("scratch", scratch, torch.uint8, *scratch.shape)
    return scratch.data_ptr()
