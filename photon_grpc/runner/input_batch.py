"""The batch as flat arrays: one slot per sequence, written in place, read by whole columns.

Arrays keep their address for the life of the runner, so that a device runner can mirror or pin them.
All index arithmetic of a step is vectorised over its rows; Python touches a row only when it enters,
leaves or gets a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepIndices:
    """Where each token of a step comes from and goes to. Shapes: [num_tokens], [num_rows], ...

    `block_tables` is [num_rows, widest]; entries behind a row's own blocks are zero or stale and are
    never read, since `context_lens` ends before them.
    """

    token_ids: IntArray
    positions: IntArray
    slot_mapping: IntArray
    block_tables: IntArray
    context_lens: IntArray
    query_starts: tuple[int, ...]


class InputBatch:
    """Token ids, block tables and progress of up to `max_num_seqs` sequences."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self._token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int64)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self._slots: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slots)

    def add(
        self, seq_id: int, token_ids: Sequence[int], block_ids: Sequence[int], num_computed_tokens: int
    ) -> None:
        """Take a sequence into a free slot."""
        slot = self._free.pop()
        self._slots[seq_id] = slot
        self._token_ids[slot, : len(token_ids)] = token_ids
        self._num_tokens[slot] = len(token_ids)
        self._block_tables[slot, : len(block_ids)] = block_ids
        self._num_blocks[slot] = len(block_ids)
        self._num_computed[slot] = num_computed_tokens

    def remove(self, seq_id: int) -> None:
        """Give a slot back; a sequence that never entered is no error."""
        slot = self._slots.pop(seq_id, None)
        if slot is not None:
            self._free.append(slot)

    def clear(self) -> None:
        """Give all slots back."""
        self._free.extend(self._slots.values())
        self._slots.clear()

    def append_blocks(self, seq_id: int, block_ids: Sequence[int]) -> None:
        """Extend a sequence's block table."""
        slot = self._slots[seq_id]
        start = self._num_blocks[slot]
        self._block_tables[slot, start : start + len(block_ids)] = block_ids
        self._num_blocks[slot] = start + len(block_ids)

    def append_token(self, seq_id: int, token_id: int) -> None:
        """Add a sampled token."""
        slot = self._slots[seq_id]
        self._token_ids[slot, self._num_tokens[slot]] = token_id
        self._num_tokens[slot] += 1

    def token_at(self, seq_id: int, start: int, stop: int) -> IntArray:
        """Token ids of positions `start` to `stop` of one sequence."""
        return self._token_ids[self._slots[seq_id], start:stop]

    def num_computed_tokens(self, seq_id: int) -> int:
        """Tokens whose keys and values are in the cache."""
        return int(self._num_computed[self._slots[seq_id]])

    def step(self, seq_ids: Sequence[int], num_tokens: Sequence[int], num_decodes: int) -> StepIndices:
        """Indices of the next `num_tokens` tokens of each row, and count them as computed.

        The first `num_decodes` rows have one token each.
        """
        slots = np.fromiter((self._slots[seq_id] for seq_id in seq_ids), dtype=np.int64, count=len(seq_ids))
        starts = self._num_computed[slots]
        if num_decodes == len(seq_ids):
            row_slots, positions = slots, starts
            query_starts = tuple(range(num_decodes + 1))
            counts: IntArray | int = 1
        else:
            counts = np.asarray(num_tokens, dtype=np.int64)
            ends = np.cumsum(counts)
            row_slots = np.repeat(slots, counts)
            positions = np.arange(ends[-1]) - np.repeat(ends - counts, counts) + np.repeat(starts, counts)
            query_starts = (0, *ends.tolist())
        context_lens = starts + counts
        self._num_computed[slots] = context_lens
        blocks, offsets = np.divmod(positions, self._block_size)
        width = -(-int(context_lens.max()) // self._block_size)
        return StepIndices(
            token_ids=self._token_ids[row_slots, positions],
            positions=positions,
            slot_mapping=self._block_tables[row_slots, blocks] * self._block_size + offsets,
            block_tables=self._block_tables[slots, :width],
            context_lens=context_lens,
            query_starts=query_starts,
        )
