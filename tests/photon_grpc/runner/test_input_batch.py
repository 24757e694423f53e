"""Step indices against a slow reference that keeps each sequence as a list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.runner.input_batch import InputBatch, StepIndices

MAX_SEQS, MAX_LEN = 5, 24


@dataclass
class Sequence:
    token_ids: list[int]
    block_ids: list[int]
    num_computed: int = 0
    slots_written: list[int] = field(default_factory=list)


class Reference:
    """The same books, one token at a time."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: dict[int, Sequence] = {}

    def check_step(self, rows: list[tuple[int, int]], indices: StepIndices) -> None:
        token_ids, positions, slots, starts = [], [], [], [0]
        for row, (seq_id, count) in enumerate(rows):
            sequence = self.sequences[seq_id]
            for position in range(sequence.num_computed, sequence.num_computed + count):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                block = sequence.block_ids[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            sequence.num_computed += count
            starts.append(len(token_ids))
            assert indices.context_lens[row] == sequence.num_computed
            num_blocks = -(-sequence.num_computed // self.block_size)
            assert indices.block_tables[row, :num_blocks].tolist() == sequence.block_ids[:num_blocks]
        assert indices.token_ids.tolist() == token_ids
        assert indices.positions.tolist() == positions
        assert indices.slot_mapping.tolist() == slots
        assert indices.query_starts == tuple(starts)
        assert len(indices.context_lens) == len(indices.block_tables) == len(rows)


def run_random(data: st.DataObject, block_size: int, steps: int) -> None:
    batch, reference = InputBatch(MAX_SEQS, MAX_LEN, block_size), Reference(block_size)
    next_block = 0
    next_id = 1

    def blocks(count: int) -> list[int]:
        nonlocal next_block
        # Each block is new and far from the last, so a stale table entry shows.
        taken = [7 * (next_block + n) for n in range(count)]
        next_block += count
        return taken

    for _ in range(steps):
        while len(reference.sequences) < MAX_SEQS and data.draw(st.booleans(), label="add"):
            length = data.draw(st.integers(1, MAX_LEN - 1), label="length")
            cached = data.draw(st.integers(0, (length - 1) // block_size), label="cached") * block_size
            token_ids = [next_id * 100 + position for position in range(length)]
            table = blocks(data.draw(st.integers(cached // block_size, -(-length // block_size))))
            batch.add(next_id, token_ids, table, cached)
            reference.sequences[next_id] = Sequence(token_ids, table, cached)
            next_id += 1
        for seq_id in list(reference.sequences):
            if data.draw(st.integers(0, 4), label="remove") == 0:
                batch.remove(seq_id)
                del reference.sequences[seq_id]
        assert len(batch) == len(reference.sequences)
        rows: list[tuple[int, int]] = []
        for seq_id, sequence in reference.sequences.items():
            room = len(sequence.token_ids) - sequence.num_computed
            if room and data.draw(st.booleans(), label="row"):
                rows.append((seq_id, data.draw(st.integers(1, room), label="count")))
        rows.sort(key=lambda row: row[1] > 1)
        if not rows:
            continue
        for seq_id, count in rows:
            sequence = reference.sequences[seq_id]
            needed = -(-(sequence.num_computed + count) // block_size) - len(sequence.block_ids)
            if needed > 0:
                new = blocks(needed)
                batch.append_blocks(seq_id, new)
                sequence.block_ids.extend(new)
        num_decodes = sum(count == 1 for _, count in rows)
        reference.check_step(rows, batch.step([r[0] for r in rows], [r[1] for r in rows], num_decodes))
        for seq_id, _ in rows:
            sequence = reference.sequences[seq_id]
            assert batch.num_computed_tokens(seq_id) == sequence.num_computed
            if sequence.num_computed == len(sequence.token_ids) < MAX_LEN:
                sequence.token_ids.append(seq_id * 100 + 99)
                batch.append_token(seq_id, seq_id * 100 + 99)
            stop = len(sequence.token_ids)
            assert batch.token_at(seq_id, 0, stop).tolist() == sequence.token_ids


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([1, 3, 4, 16]))
def test_random_batches_equal_the_reference(data: st.DataObject, block_size: int) -> None:
    run_random(data, block_size, steps=8)


def test_batch_up_down_up() -> None:
    """Bug of an ancestor: batch buffers could not shrink, so decode after prefill failed."""
    batch = InputBatch(4, 64, 4)
    for width in (1, 4, 2, 3, 1, 4):
        ids = list(range(100 * width, 100 * width + width))
        for number, seq_id in enumerate(ids):
            batch.add(seq_id, [seq_id] * 6, [number * 2, number * 2 + 1], 0)
        prefill = batch.step(ids, [6] * width, 0)
        assert prefill.query_starts == tuple(range(0, 6 * width + 1, 6))
        for seq_id in ids:
            batch.append_token(seq_id, seq_id + 1)
        decode = batch.step(ids, [1] * width, width)
        assert decode.token_ids.tolist() == [seq_id + 1 for seq_id in ids]
        assert decode.positions.tolist() == [6] * width
        assert decode.query_starts == tuple(range(width + 1))
        for seq_id in ids:
            batch.remove(seq_id)
        assert len(batch) == 0


def test_positions_are_each_row_s_own() -> None:
    """Bug of an ancestor: row 0's position was taken for all."""
    batch = InputBatch(3, 64, 4)
    for seq_id, length in ((1, 3), (2, 9), (3, 5)):
        batch.add(seq_id, list(range(length)), [seq_id * 4 + n for n in range(3)], length - 1)
    assert batch.step([3, 1, 2], [1, 1, 1], 3).positions.tolist() == [4, 2, 8]


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
def test_slots_across_a_block_border(length: int) -> None:
    """Bug of an ancestor: a length that is a multiple of the block read the table at -1."""
    batch = InputBatch(1, 64, 4)
    batch.add(1, list(range(length)), [50, 40, 30], 0)
    whole = [50 * 4 + n for n in range(4)] + [40 * 4 + n for n in range(4)] + [30 * 4 + n for n in range(4)]
    assert batch.step([1], [length], 0).slot_mapping.tolist() == whole[:length]
    batch.append_token(1, 99)
    assert batch.step([1], [1], 1).slot_mapping.tolist() == [whole[length]]


def test_slots_are_used_again_and_nothing_of_the_old_row_shows() -> None:
    batch = InputBatch(1, 16, 4)
    batch.add(1, list(range(100, 116)), [9, 8, 7, 6], 0)
    batch.step([1], [16], 0)
    batch.remove(1)
    batch.add(2, [1, 2, 3], [5], 0)
    indices = batch.step([2], [3], 0)
    assert indices.token_ids.tolist() == [1, 2, 3]
    assert indices.block_tables.tolist() == [[5]]
    with pytest.raises(IndexError):
        batch.add(3, [1], [1], 0)


def test_removing_what_never_entered_is_no_error() -> None:
    batch = InputBatch(1, 16, 4)
    batch.remove(77)
    batch.add(1, [1], [0], 0)
    batch.remove(1)
    batch.remove(1)
    batch.add(2, [1], [0], 0)
    assert len(batch) == 1


def test_a_chunk_counts_as_computed_without_changing_earlier_indices() -> None:
    batch = InputBatch(2, 64, 4)
    batch.add(1, list(range(20)), list(range(5)), 0)
    batch.add(2, list(range(6)), [7, 8], 0)
    first = batch.step([1, 2], [8, 6], 0)
    kept = first.positions.copy(), first.context_lens.copy()
    second = batch.step([1], [12], 0)
    assert second.positions.tolist() == list(range(8, 20))
    assert np.array_equal(first.positions, kept[0])
    assert np.array_equal(first.context_lens, kept[1])
