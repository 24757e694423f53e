"""`Sampler` for a GPU: the same steps, state and results, with the state on the device.

Owns one slot of device memory per sequence, and the buffers through which rows reach the kernels. All
of them keep their address, so `launch` may be captured in a CUDA graph and replayed for other rows. Nothing
here but `collect`, `sample` and `prompt_logprobs` waits for the device.
Must not know requests, streams of tokens or the scheduler beyond `SamplerSpec`. Lives on the engine
thread; everything runs on torch's current stream, which has to be the same one throughout.

Device memory per slot: the record and a bias list (2.5 KB with 300 entries), and four bytes per
vocabulary entry (0.5 MB for 128k) only while a sequence has a penalty, a bias, allowed ids or a ban.
Those come from a pool that grows by eight at a time and is never given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from photon_grpc.kernels import sampling as kernels
from photon_grpc.kernels import sampling_state as layout
from photon_grpc.kernels.best_token import best_token
from photon_grpc.runner.philox import NOISE_RANGE
from photon_grpc.runner.sampler import NO_TOKEN, SampledRows, effective_ban
from photon_grpc.scheduler.output import RowFault, SamplerSpec
from photon_grpc.types import TokenLogprobs

_MIN_TEMPERATURE = 1e-6
_MARKS_PER_CHUNK = 8


WriteState = Callable[[Tensor, int, npt.NDArray[np.generic]], None]
"""Lets a row of a contiguous tensor on the device become an array, from its beginning on, in the stream's
order."""


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """A sequence's part of the device state, on the host.

    `record` is [1] of SLOT_DTYPE, its address of marks still 0. `marks` are the marked ids and their words,
    None where the sequence needs none.
    """

    record: npt.NDArray[np.void]
    bias: layout.PackedBias
    marks: tuple[layout.Ids, npt.NDArray[np.uint32]] | None
    num_outputs: int


def pack_sequence(
    spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int, vocab_size: int
) -> PackedSequence:
    """`spec` and the tokens so far as the kernels read them."""
    params = spec.sampling
    banned = effective_ban(spec, vocab_size)
    repeats = params.repetition_penalty != 1
    counts = bool(params.presence_penalty or params.frequency_penalty)
    bias = layout.pack_bias(params.logit_bias)
    flags = 0
    for flag, is_set in (
        (layout.FLAG_GREEDY, params.temperature == 0),
        (layout.FLAG_REPETITION, repeats),
        (layout.FLAG_COUNTED, counts),
        (layout.FLAG_ALLOWED_ONLY, bool(params.allowed_token_ids)),
        (layout.FLAG_BAN, banned is not None),
    ):
        flags |= flag if is_set else 0
    marks = None
    if flags & ~layout.FLAG_GREEDY or params.logit_bias:
        marks = layout.pack_marks(
            seen=np.asarray(token_ids, dtype=np.int64) if repeats else None,
            outputs=np.asarray(token_ids[num_prompt_tokens:], dtype=np.int64) if counts else None,
            allowed=np.array(params.allowed_token_ids, dtype=np.int64),
            banned=banned,
            biased=bias.token_ids.astype(np.int64),
        )
    record = np.zeros(1, dtype=layout.SLOT_DTYPE)
    log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
    record["top_p"] = params.top_p
    record["flags"] = flags
    record["temperature"] = max(params.temperature, _MIN_TEMPERATURE)
    record["top_k"] = params.top_k if params.top_k < vocab_size else 0
    record["floor_key"] = layout.floor_key(max(log_min_p, -NOISE_RANGE))
    record["repetition_penalty"] = params.repetition_penalty
    record["frequency_penalty"] = params.frequency_penalty
    record["presence_penalty"] = params.presence_penalty
    record["seed_low"] = params.seed & 0xFFFF_FFFF
    record["seed_high"] = params.seed >> 32
    record["index"] = spec.index
    record["min_tokens"] = spec.min_tokens
    record["num_biases"] = len(bias.token_ids)
    record["top_logprobs"] = -1 if spec.top_logprobs is None else spec.top_logprobs
    return PackedSequence(record, bias, marks, len(token_ids) - num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class _Sequence:
    slot: int
    marks: Tensor | None
    is_greedy: bool
    """Temperature 0, and nothing that changes a logit."""
    top_logprobs: int | None


class HostRows:
    """The results of one launch on the host, which a copy fills while the host goes on."""

    def __init__(self, buffer: Callable[..., Tensor], max_rows: int, max_top_logprobs: int) -> None:
        """`buffer(dtype, *shape)` makes memory that the device can copy to."""
        self.token_ids = buffer(torch.int32, max_rows)
        self.chosen = buffer(torch.float64, max_rows)
        self.top_ids = buffer(torch.int32, max_rows, max_top_logprobs)
        self.top_values = buffer(torch.float64, max_rows, max_top_logprobs)
        self._token_ids = self.token_ids.numpy()

    def tokens(self, num_rows: int) -> list[int]:
        """The tokens of the first rows; NO_TOKEN for faults and idle ones."""
        tokens: list[int] = self._token_ids[:num_rows].tolist()
        return tokens

    def logprobs(self, row: int, top: int) -> TokenLogprobs:
        """Those of a row that asked for `top` alternatives."""
        ids, values = self.top_ids[row, :top].tolist(), self.top_values[row, :top].tolist()
        return TokenLogprobs(float(self.chosen[row]), tuple(zip(ids, values, strict=True)))


class _MarksPool:
    """Device rows of one word per vocabulary entry, for the sequences that need one."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # Kernels read four words at once.
        self._width = -(-vocab_size // 4) * 4
        self._device = device
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """A row of any content, int32 [width]. Raises torch.OutOfMemoryError."""
        if not self._free:
            shape = (_MARKS_PER_CHUNK, self._width)
            self._free.extend(torch.empty(shape, dtype=torch.int32, device=self._device))
        return self._free.pop()

    def give_back(self, marks: Tensor) -> None:
        self._free.append(marks)


class CudaSampler:
    """Draws the tokens of a step and keeps, by slot, what the parameters of a sequence depend on.

    `sample` is the whole of it for a runner that waits for each step. One that does not calls `set_rows`,
    then `launch` (or replays a graph of it), and later `collect`.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_rows: int | None = None,
        max_logit_bias: int = 300,
        max_top_logprobs: int = 20,
        write: WriteState | None = None,
    ) -> None:
        """Room for `max_num_seqs` sequences at a time and `max_rows` (by default as many) rows of a step.

        `write` brings a sequence's parameters to the device before the next launch; by default at once.

        Raises BackendUnavailableError without a usable device, ValueError for a vocabulary out of range.
        """
        kernels.require_usable(vocab_size)
        rows = max_num_seqs if max_rows is None else max_rows

        def buffer(dtype: torch.dtype, *shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self._vocab_size = vocab_size
        self._device = device
        self._write = write or _write_now
        self._marks = _MarksPool(vocab_size, device)
        self._sequences: dict[int, _Sequence] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self.state = kernels.SamplingState.allocate(max_num_seqs, max(max_logit_bias, 1), device)
        self.row_slots = buffer(torch.int32, rows, fill=-1)
        """[max_rows] int32: the slot of each row of the next launch, -1 for an idle one."""
        self.token_ids = buffer(torch.int32, rows, fill=NO_TOKEN)
        """[max_rows] int32: the tokens of the last launch, NO_TOKEN for faults and idle rows; not of one that
        was given another place for them."""
        self._chosen = buffer(torch.float64, rows)
        self._top_ids = buffer(torch.int32, rows, max_top_logprobs)
        self._top_values = buffer(torch.float64, rows, max_top_logprobs)

    def add(self, seq_id: int, spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """A sequence enters, for the first time or again after preemption with its outputs so far.

        Raises ValueError for more biases or alternatives than there is room for, and RuntimeError when
        every slot is taken; the sampler is then as it was.
        """
        packed = pack_sequence(spec, token_ids, num_prompt_tokens, self._vocab_size)
        num_biases = len(packed.bias.token_ids)
        if num_biases > self.state.bias_ids.shape[1]:
            raise ValueError(
                f"logit_bias has {num_biases} entries, room is for {self.state.bias_ids.shape[1]}"
            )
        if (spec.top_logprobs or 0) > self._top_ids.shape[1]:
            raise ValueError(f"top_logprobs is {spec.top_logprobs}, room is for {self._top_ids.shape[1]}")
        if not self._free:
            raise RuntimeError(f"all {len(self._sequences)} slots of the sampler are taken")
        marks = None
        if packed.marks is not None:
            marks = self._marks.take()
            marks.zero_()
            marked_ids, words = packed.marks
            marks[self._upload(marked_ids)] = self._upload(words.view(np.int32))
            packed.record["marks"] = marks.data_ptr()
        slot = self._free.pop()
        state = self.state
        if num_biases:
            self._write(state.bias_ids, slot, packed.bias.token_ids)
            self._write(state.bias_values, slot, packed.bias.values)
        self._write(state.params, slot, packed.record)
        self._write(state.num_outputs, slot, np.array([packed.num_outputs], dtype=np.int32))
        if token_ids:
            self._write(state.last_token_ids, slot, np.array([token_ids[-1]], dtype=np.int32))
        self._sequences[seq_id] = _Sequence(
            slot,
            marks,
            is_greedy=spec.sampling.temperature == 0 and marks is None,
            top_logprobs=spec.top_logprobs,
        )

    def remove(self, seq_id: int) -> None:
        """Forget a sequence. A step that was launched with it may still be under way: whatever comes to
        use its memory next is ordered behind by the stream.
        """
        sequence = self._sequences.pop(seq_id)
        self._free.append(sequence.slot)
        if sequence.marks is not None:
            self._marks.give_back(sequence.marks)

    def clear(self) -> None:
        """Forget all sequences, also after an `add` that found no memory."""
        for seq_id in list(self._sequences):
            self.remove(seq_id)
        self._free = list(range(len(self.state.num_outputs) - 1, -1, -1))

    def slot(self, seq_id: int) -> int:
        """Where `state` has this sequence."""
        return self._sequences[seq_id].slot

    def are_greedy(self, seq_ids: Sequence[int]) -> bool:
        """Whether each takes the largest of its logits as they are: for `launch` and `launch_best`."""
        return all(self._sequences[seq_id].is_greedy for seq_id in seq_ids)

    def want_logprobs(self, seq_ids: Sequence[int]) -> bool:
        """Whether `launch` has to be told so."""
        return any(self._sequences[seq_id].top_logprobs is not None for seq_id in seq_ids)

    def top_logprobs(self, seq_id: int) -> int | None:
        """How many alternatives a sequence asked for; None: no log-probabilities."""
        count = self._sequences[seq_id].top_logprobs
        return None if count is None else min(count, self._vocab_size)

    def set_rows(self, seq_ids: Sequence[int], num_rows: int | None = None) -> None:
        """Whose rows the next launch has; those from there to `num_rows` are idle."""
        slots = np.full(len(seq_ids) if num_rows is None else num_rows, -1, dtype=np.int32)
        slots[: len(seq_ids)] = [self._sequences[seq_id].slot for seq_id in seq_ids]
        self.row_slots[: len(slots)] = self._upload(slots)

    def launch(
        self, logits: Tensor, *, greedy: bool = False, logprobs: bool = False, told: Tensor | None = None
    ) -> None:
        """Sample `logits` [rows, vocab_size] for the rows set; nothing is waited for or allocated.

        `greedy` promises that every row is; `logprobs` adds those of the rows that asked. The tokens go to
        `told`, int32 [rows or more], where it is given, which may be pinned memory of the host: then no copy
        stands between this step and the next. All of these are fixed in a graph of this, the rows and their
        parameters are not.
        """
        rows = len(logits)
        token_ids, row_slots = self._told(told)[:rows], self.row_slots[:rows]
        if greedy:
            kernels.sample_greedy(token_ids, logits, row_slots, self.state)
        else:
            kernels.sample(token_ids, logits, row_slots, self.state)
        if logprobs:
            kernels.logprobs(
                self._chosen[:rows],
                self._top_ids[:rows],
                self._top_values[:rows],
                logits,
                token_ids,
                (row_slots, self.state),
            )

    def launch_best(self, best: Tensor, told: Tensor | None = None) -> None:
        """The same for rows that are all greedy, from the best of their logits (`Ops.best_logits`)."""
        rows = len(best)
        best_token(self._told(told)[:rows], best, self.row_slots[:rows], self.state)

    def _told(self, told: Tensor | None) -> Tensor:
        return self.token_ids if told is None else told

    def host_rows(self, buffer: Callable[..., Tensor]) -> HostRows:
        """Room for the results of a launch, in memory that `buffer(dtype, *shape)` makes."""
        return HostRows(buffer, *self._top_ids.shape)

    def copy_out(self, host: HostRows, num_rows: int, *, logprobs: bool) -> None:
        """Bring what the last launch had for its first rows to the host; nothing is waited for."""
        pairs = [(host.token_ids, self.token_ids)]
        if logprobs:
            pairs += [
                (host.chosen, self._chosen),
                (host.top_ids, self._top_ids),
                (host.top_values, self._top_values),
            ]
        for target, source in pairs:
            target[:num_rows].copy_(source[:num_rows], non_blocking=True)

    def collect(self, seq_ids: Sequence[int]) -> SampledRows:
        """Wait for the last launch and read what it brought for the sequences of its rows, in order."""
        rows = len(seq_ids)
        token_ids: list[int] = self.token_ids[:rows].tolist()
        faults = {
            seq_id: RowFault.NON_FINITE_LOGITS
            for seq_id, token_id in zip(seq_ids, token_ids, strict=True)
            if token_id == NO_TOKEN
        }
        logprobs: dict[int, TokenLogprobs] = {}
        if self.want_logprobs(seq_ids):
            entries = _read(self._chosen[:rows], self._top_ids[:rows], self._top_values[:rows])
            for seq_id, (chosen, top) in zip(seq_ids, entries, strict=True):
                count = self.top_logprobs(seq_id)
                if count is not None and seq_id not in faults:
                    logprobs[seq_id] = TokenLogprobs(chosen, top[:count])
        return SampledRows(token_ids, logprobs, faults)

    def sample(self, seq_ids: Sequence[int], logits: Tensor) -> SampledRows:
        """One token for each row of `logits` ([len(seq_ids), vocab_size] on the device, left as it is).

        A faulted row has NO_TOKEN and does not advance.
        """
        self.set_rows(seq_ids)
        self.launch(logits, greedy=self.are_greedy(seq_ids), logprobs=self.want_logprobs(seq_ids))
        return self.collect(seq_ids)

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens: `logits` [n, vocab_size] on the device, `token_ids` [n]."""
        rows, top = len(logits), min(top, self._vocab_size)
        chosen = torch.empty(rows, dtype=torch.float64, device=self._device)
        top_ids = torch.empty(rows, top, dtype=torch.int32, device=self._device)
        top_values = torch.empty(rows, top, dtype=torch.float64, device=self._device)
        wanted = token_ids.to(device=self._device, dtype=torch.int32)
        kernels.logprobs(chosen, top_ids, top_values, logits, wanted, top)
        return [TokenLogprobs(value, best) for value, best in _read(chosen, top_ids, top_values)]

    def _upload(self, values: npt.NDArray[np.generic]) -> Tensor:
        # torch keeps the pinned memory until the copy has been made.
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)


def _write_now(target: Tensor, row: int, values: npt.NDArray[np.generic]) -> None:
    # From pageable memory, so that the driver has taken a copy when this returns.
    source = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).ravel())
    target[row : row + 1].flatten().view(torch.uint8)[: len(source)] = source.to(target.device)


def _read(
    chosen: Tensor, top_ids: Tensor, top_values: Tensor
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Each row's value and its alternatives, on the host."""
    return [
        (value, tuple(zip(ids, values, strict=True)))
        for value, ids, values in zip(chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    ]
