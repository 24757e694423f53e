"""A device for `CudaRunner` without a GPU: late, padded and as picky as the real one.

Work waits in a queue until the host waits for it, so a host that reads too early, or writes into memory
that a copy has yet to read, gets other tokens. The kernels of a step are torch here, and the oracles of
those in CUDA C.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from photon_grpc.kernels.apply_updates import SEGMENT_DTYPE, SEGMENT_WORDS
from photon_grpc.kernels.sampling import SamplingState
from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows
from photon_grpc.ops.base import AttentionMetadata
from photon_grpc.ops.torch_ops import TorchOps
from photon_grpc.runner.cuda_runner import StepKernels
from photon_grpc.runner.cuda_sampler import HostRows, WriteState
from photon_grpc.runner.sampler import NO_TOKEN, Sampler, effective_ban
from photon_grpc.runner.stream import Work
from photon_grpc.scheduler.output import SamplerSpec
from photon_grpc.types import TokenLogprobs

CPU = torch.device("cpu")
MAX_TOP_LOGPROBS = 4


class LazyStream:
    """Implements `runner.stream.Stream`: does nothing before somebody waits for it."""

    def __init__(self) -> None:
        self._queue: deque[Work] = deque()
        self._num_enqueued = 0
        self._num_done = 0
        self.num_captures = 0
        self.num_replays = 0

    def run(self, work: Work) -> None:
        self._queue.append(work)
        self._num_enqueued += 1

    def capture(self, work: Work) -> Work:
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay

    def mark(self) -> _LazyMark:
        return _LazyMark(self)

    def host_buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @property
    def end(self) -> int:
        return self._num_enqueued

    def advance_to(self, end: int) -> None:
        with torch.inference_mode():
            while self._num_done < end:
                self._queue.popleft()()
                self._num_done += 1


class _LazyMark:
    def __init__(self, stream: LazyStream) -> None:
        self._stream = stream
        self._end = 0

    def set(self) -> None:
        self._end = self._stream.end

    def wait(self) -> None:
        self._stream.advance_to(self._end)


def apply_updates_oracle(message: Tensor, first_segment: int, num_segments: int) -> None:
    words = message.numpy()
    end = first_segment + num_segments * SEGMENT_WORDS
    segments = words[first_segment:end].copy().view(SEGMENT_DTYPE)
    written: set[int] = set()
    for segment in segments:
        address, start, count = (int(segment[name]) for name in ("address", "start", "count"))
        places = set(range(address, address + 4 * count, 4))
        assert not places & written, "two segments of a message write one place"
        written |= places
        ctypes.memmove(address, message.data_ptr() + 4 * start, 4 * count)


def step_inputs_oracle(
    out: StepInputs, state: SequenceState, rows: StepRows, num_decodes: int, block_size: int
) -> None:
    out.token_ids.fill_(0)
    out.positions.fill_(0)
    out.slot_mapping.fill_(-1)
    for row, slot in enumerate(rows.slots.tolist()):
        out.context_lens[row] = 0
        out.last_tokens[row] = 0
        if slot < 0:
            continue
        if row < num_decodes:
            first, tokens = row, state.last_token_ids[slot : slot + 1]
        else:
            assert rows.query_starts is not None
            begin, end = rows.query_starts[row - num_decodes :][:2].tolist()
            first, tokens = num_decodes + begin, rows.prompt_tokens[begin:end]
        start, count = int(state.num_computed[slot]), len(tokens)
        positions = torch.arange(start, start + count)
        blocks = state.tables[slot].long()[positions // block_size]
        span = slice(first, first + count)
        out.token_ids[span] = tokens.long()
        out.positions[span] = positions
        out.slot_mapping[span] = blocks * block_size + positions % block_size
        out.context_lens[row] = start + count
        out.last_tokens[row] = first + count - 1
        width = -(-(start + count) // block_size)
        out.block_tables[row, :width] = state.tables[slot, :width]
        state.num_computed[slot] = start + count


TORCH_STEP_KERNELS = StepKernels(apply_updates_oracle, step_inputs_oracle)
"""The kernels of a step in torch."""


class PaddedTorchOps(TorchOps):
    """TorchOps that reads a step's lengths from its tensors, skips idle rows and stores slot -1 nowhere.

    What attention leaves unwritten is NaN, as it may be on a GPU. The best of a row's logits is its largest
    one and where it stands, for `LaneSampler.launch_best`.
    """

    def best_logits(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        best = self.logits(hidden, weight).max(-1)
        return torch.stack([best.values.double(), best.indices.double()], dim=-1)

    def store_kv(self, kv: Tensor, layer_cache: Tensor, slot_mapping: Tensor) -> None:
        stored = slot_mapping >= 0
        super().store_kv(kv[stored], layer_cache, slot_mapping[stored])

    def attention(
        self, q: Tensor, kv: Tensor, layer_cache: Tensor, metadata: AttentionMetadata, scale: float
    ) -> Tensor:
        out = q.new_full((q.shape[0], q.shape[1] * q.shape[2]), float("nan"))
        decodes = metadata.num_decodes
        out[:decodes] = 0
        starts = list(range(decodes))
        if metadata.query_starts_device is not None:
            starts += [decodes + start for start in metadata.query_starts_device.tolist()]
        else:
            starts.append(decodes)
        for row, context_len in enumerate(metadata.context_lens.tolist()):
            first, end = starts[row : row + 2]
            if context_len == 0 or first == end:
                continue
            alone = replace(
                metadata,
                num_decodes=0,
                block_tables=metadata.block_tables[row : row + 1].long(),
                context_lens=metadata.context_lens[row : row + 1].long(),
                query_starts=(0, end - first),
                context_lens_host=(context_len,),
            )
            out[first:end] = super().attention(q[first:end], kv[first:end], layer_cache, alone, scale)
        return out


class LaneSampler:
    """`CudaSampler` in terms of `Sampler`: the state of a slot names a lane of the CPU's sampler.

    As on the device, the lane of a slot changes when the update with it arrives.
    """

    def __init__(self, vocab_size: int, write: WriteState, *, max_num_seqs: int, max_rows: int) -> None:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        self.state = SamplingState(
            params=zeros(torch.int32, max_num_seqs),
            bias_ids=zeros(torch.int32, max_num_seqs, 1),
            bias_values=zeros(torch.float32, max_num_seqs, 1),
            num_outputs=zeros(torch.int32, max_num_seqs),
            last_token_ids=zeros(torch.int32, max_num_seqs),
        )
        self.row_slots = torch.full((max_rows,), -1, dtype=torch.int32)
        self._write = write
        self._vocab_size = vocab_size
        self._sampler = Sampler(vocab_size, CPU)
        self.num_best_launches = 0
        self._free = list(range(max_num_seqs))
        self._sequences: dict[int, tuple[int, SamplerSpec]] = {}
        self._num_lanes = 0
        self._out = HostRows(
            lambda dtype, *shape: torch.zeros(shape, dtype=dtype), max_rows, MAX_TOP_LOGPROBS
        )

    def add(self, seq_id: int, spec: SamplerSpec, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        slot = self._free.pop()
        self._num_lanes += 1
        self._sampler.add(self._num_lanes, spec, token_ids, num_prompt_tokens)
        self._write(self.state.params, slot, np.array([self._num_lanes], dtype=np.int32))
        self._write(self.state.last_token_ids, slot, np.array([token_ids[-1]], dtype=np.int32))
        self._sequences[seq_id] = (slot, spec)

    def remove(self, seq_id: int) -> None:
        self._free.append(self._sequences.pop(seq_id)[0])

    def clear(self) -> None:
        self._sequences.clear()
        self._free = list(range(len(self.state.num_outputs)))

    def slot(self, seq_id: int) -> int:
        return self._sequences[seq_id][0]

    def are_greedy(self, seq_ids: Sequence[int]) -> bool:
        return all(self._takes_largest(self._sequences[seq_id][1]) for seq_id in seq_ids)

    def _takes_largest(self, spec: SamplerSpec) -> bool:
        params = spec.sampling
        changes = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        limits = params.logit_bias or params.allowed_token_ids
        banned = effective_ban(spec, self._vocab_size)
        return params.temperature == 0 and not (changes or limits) and banned is None

    def top_logprobs(self, seq_id: int) -> int | None:
        return self._sequences[seq_id][1].top_logprobs

    def launch(
        self, logits: Tensor, *, greedy: bool = False, logprobs: bool = False, told: Tensor | None = None
    ) -> None:
        token_ids = self._out.token_ids if told is None else told
        for row, slot in enumerate(self.row_slots[: len(logits)].tolist()):
            token_ids[row] = NO_TOKEN
            if slot < 0:
                continue
            lane = int(self.state.params[slot])
            result = self._sampler.sample((lane,), logits[row : row + 1].contiguous())
            (token_id,) = result.token_ids
            token_ids[row] = token_id
            if token_id != NO_TOKEN:
                self.state.last_token_ids[slot] = token_id
            if logprobs and lane in result.logprobs:
                entry = result.logprobs[lane]
                self._out.chosen[row] = entry.logprob
                for place, (token, value) in enumerate(entry.top):
                    self._out.top_ids[row, place] = token
                    self._out.top_values[row, place] = value

    def launch_best(self, best: Tensor, told: Tensor | None = None) -> None:
        logits = torch.full((len(best), self._vocab_size), -torch.inf)
        for row, (value, token_id) in enumerate(best.tolist()):
            logits[row, int(token_id)] = value
        self.num_best_launches += 1
        self.launch(logits, greedy=True, told=told)

    def host_rows(self, buffer: Callable[..., Tensor]) -> HostRows:
        return HostRows(buffer, *self._out.top_ids.shape)

    def copy_out(self, host: HostRows, num_rows: int, *, logprobs: bool) -> None:
        names = ("token_ids", "chosen", "top_ids", "top_values") if logprobs else ("token_ids",)
        for name in names:
            target: Tensor = getattr(host, name)
            target[:num_rows] = getattr(self._out, name)[:num_rows]

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> list[TokenLogprobs]:
        return self._sampler.prompt_logprobs(logits, token_ids.long(), top)


def lane_sampler(vocab_size: int, max_num_seqs: int) -> Callable[[WriteState, int], Any]:
    """The factory that `CudaRunner` takes."""
    return lambda write, max_rows: LaneSampler(
        vocab_size, write, max_num_seqs=max_num_seqs, max_rows=max_rows
    )
