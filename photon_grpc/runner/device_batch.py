"""The batch on a device: what is known of each sequence, by slot, and whose rows a step has.

Owns tensors at fixed addresses and the host's idea of them. The device counts each sequence's computed
tokens itself, and takes a decode row's token from the sampler's state; the host counts along, and sends
only what the device cannot know: who enters, new blocks, a changed order of rows, the tokens of prompts.
Engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows
from photon_grpc.ops.base import AttentionMetadata
from photon_grpc.runner.buckets import StepShape
from photon_grpc.runner.updates import Updates
from photon_grpc.scheduler.output import NewSequence

Slots = npt.NDArray[np.int32]

# Block tables are copied four entries at a time.
_TABLE_STEP = 4
_WORD = 4
NO_SLOT = -1


@dataclass(slots=True)
class _Sequence:
    slot: int
    # Those that were known when it entered: all that a prefill can need.
    token_ids: npt.NDArray[np.int32]
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """The next `num_tokens` tokens of a sequence, which the host knows."""

    seq_id: int
    num_tokens: int
    sample: bool


class DeviceBatch:
    """Up to `max_num_seqs` sequences, in the slots that the sampler has for them."""

    def __init__(
        self,
        updates: Updates,
        last_token_ids: Tensor,
        *,
        max_model_len: int,
        block_size: int,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        """For steps of up to `max_rows` rows and `max_tokens` tokens; `last_token_ids` is the sampler's."""
        (num_slots,), device = last_token_ids.shape, last_token_ids.device
        width = -(-max_model_len // (block_size * _TABLE_STEP)) * _TABLE_STEP

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_size = block_size
        self.state = SequenceState(
            zeros(torch.int32, num_slots), zeros(torch.int32, num_slots, width), last_token_ids
        )
        self._row_slots = torch.full((max_rows,), NO_SLOT, dtype=torch.int32, device=device)
        self._query_starts = zeros(torch.int32, max_rows + 1)
        self._prompt_tokens = zeros(torch.int32, max_tokens)
        self._inputs = StepInputs(
            token_ids=zeros(torch.int64, max_tokens),
            positions=zeros(torch.int64, max_tokens),
            slot_mapping=zeros(torch.int64, max_tokens),
            context_lens=zeros(torch.int32, max_rows),
            block_tables=zeros(torch.int32, max_rows, width),
            last_tokens=zeros(torch.int64, max_rows),
        )
        self._updates = updates
        self._width = width
        self._tables_address = self.state.tables.data_ptr()
        self._sequences: dict[int, _Sequence] = {}
        self._num_computed = np.zeros(num_slots, dtype=np.int64)

    # --- sequences ------------------------------------------------------------------------------

    def add(self, new: NewSequence, slot: int) -> None:
        """A sequence enters."""
        self._sequences[new.seq_id] = _Sequence(
            slot, np.array(new.token_ids, dtype=np.int32), len(new.block_ids)
        )
        self._num_computed[slot] = new.num_computed_tokens
        self._updates.write_at(self.state.num_computed.data_ptr() + _WORD * slot, (new.num_computed_tokens,))
        if new.block_ids:
            self._updates.write_at(self._tables_address + _WORD * slot * self._width, new.block_ids)

    def remove(self, seq_id: int) -> None:
        """Forget a sequence. What has been launched with it still runs, ahead of whatever comes."""
        del self._sequences[seq_id]

    def clear(self) -> None:
        """Forget all sequences."""
        self._sequences.clear()

    def append_blocks(self, seq_id: int, block_ids: Sequence[int]) -> None:
        """Extend a sequence's block table."""
        sequence = self._sequences[seq_id]
        place = sequence.slot * self._width + sequence.num_blocks
        self._updates.write_at(self._tables_address + _WORD * place, block_ids)
        sequence.num_blocks += len(block_ids)

    def slots(self, seq_ids: Sequence[int]) -> Slots:
        """Where each sequence is."""
        sequences = self._sequences
        return np.array([sequences[seq_id].slot for seq_id in seq_ids], dtype=np.int32)

    def tokens(self, seq_id: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Tokens `start` to `stop` of those that were known when the sequence entered."""
        return self._sequences[seq_id].token_ids[start:stop]

    def num_computed_tokens(self, seq_id: int) -> int:
        """Tokens whose keys and values the launched steps have computed, or will have."""
        return int(self._num_computed[self._sequences[seq_id].slot])

    def num_computed(self, slots: Slots) -> npt.NDArray[np.int64]:
        """The same, by slot."""
        return self._num_computed[slots]

    def advance(self, slots: Slots, counts: npt.NDArray[np.int64] | int) -> None:
        """Count along with the step that is about to be launched."""
        self._num_computed[slots] += counts

    # --- rows of a step -------------------------------------------------------------------------

    def set_rows(self, shape: StepShape, decodes: Slots, prefills: Sequence[PrefillRow]) -> None:
        """Whose rows the next step has; those of `shape` beyond are idle."""
        slots = np.full(shape.num_rows, NO_SLOT, dtype=np.int32)
        slots[: len(decodes)] = decodes
        if prefills:
            slots[shape.num_decodes :][: len(prefills)] = self.slots([row.seq_id for row in prefills])
            counts = [row.num_tokens for row in prefills]
            starts = np.zeros(shape.num_prefills + 1, dtype=np.int32)
            starts[1 : len(counts) + 1] = np.cumsum(counts)
            starts[len(counts) + 1 :] = starts[len(counts)]
            chunks = [self._next_tokens(row) for row in prefills]
            self._updates.write(self._query_starts, 0, starts)
            self._updates.write(self._prompt_tokens, 0, np.concatenate(chunks))
        self._updates.write(self._row_slots, 0, slots)

    def clear_rows(self) -> None:
        """Make every row idle: work on the device, not an update."""
        self._row_slots.fill_(NO_SLOT)
        self._query_starts.zero_()

    def rows(self, shape: StepShape) -> StepRows:
        """What `step_inputs` reads of the rows."""
        return StepRows(
            slots=self._row_slots[: shape.num_rows],
            query_starts=self._query_starts[: shape.num_prefills + 1] if shape.num_prefills else None,
            prompt_tokens=self._prompt_tokens[: shape.num_prefill_tokens],
        )

    def inputs(self, shape: StepShape) -> StepInputs:
        """What `step_inputs` writes and the model reads."""
        whole = self._inputs
        rows, tokens = shape.num_rows, shape.num_tokens
        return StepInputs(
            token_ids=whole.token_ids[:tokens],
            positions=whole.positions[:tokens],
            slot_mapping=whole.slot_mapping[:tokens],
            context_lens=whole.context_lens[:rows],
            block_tables=whole.block_tables[:rows],
            last_tokens=whole.last_tokens[:rows],
        )

    def metadata(
        self, shape: StepShape, query_starts: tuple[int, ...], context_lens: tuple[int, ...]
    ) -> AttentionMetadata:
        """Attention's view of `inputs(shape)`, with what the host knows of it.

        The decode rows of a step without prefills see only what earlier steps computed: a row that begins in
        a step, and may share blocks that are filled in it, is a prefill (see `CudaRunner`).
        """
        inputs, rows = self.inputs(shape), self.rows(shape)
        return AttentionMetadata(
            num_decodes=shape.num_decodes,
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            query_starts=query_starts,
            context_lens_host=context_lens,
            query_starts_device=rows.query_starts,
            context_is_old=not shape.num_prefills,
        )

    def _next_tokens(self, row: PrefillRow) -> npt.NDArray[np.int32]:
        start = self.num_computed_tokens(row.seq_id)
        return self.tokens(row.seq_id, start, start + row.num_tokens)
