"""A step's inputs from the state of its sequences: the oracle's on any rows, and nothing else moves."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from photon_grpc.kernels.step_inputs import SequenceState, StepInputs, StepRows, step_inputs
from tests.support.kernels import FakeLauncher, Fenced
from tests.support.step_device import step_inputs_oracle

NUM_SLOTS = 40
MAX_BLOCKS = 64


def state_of(block_size: int, seed: int) -> SequenceState:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    return SequenceState(
        num_computed=draw(MAX_BLOCKS * block_size - 600, NUM_SLOTS),
        tables=draw(1 << 20, NUM_SLOTS, MAX_BLOCKS),
        last_token_ids=draw(128_000, NUM_SLOTS),
    )


def rows_of(num_decodes: int, idle_decodes: int, counts: list[int], idle_rows: int, spare: int) -> StepRows:
    """Slots in shuffled order; idle rows lie behind the others of their kind, except that row 0 is idle too
    where there is more than one.
    """
    choose = random.Random(f"{num_decodes}/{counts}")
    slots = choose.sample(range(NUM_SLOTS), num_decodes + len(counts))
    decodes = slots[:num_decodes] + [-1] * idle_decodes
    if idle_decodes > 1:
        decodes = decodes[-1:] + decodes[:-1]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    total = starts[-1] + spare
    starts += starts[-1:] * idle_rows
    return StepRows(
        slots=torch.tensor(decodes + slots[num_decodes:] + [-1] * idle_rows, dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32) if len(starts) > 1 else None,
        prompt_tokens=torch.randint(1000, (total,), dtype=torch.int32),
    )


def blank(rows: int, tokens: int, memory: Fenced) -> StepInputs:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return memory.empty(*shape, dtype=dtype)

    return StepInputs(
        token_ids=empty(torch.int64, tokens),
        positions=empty(torch.int64, tokens),
        slot_mapping=empty(torch.int64, tokens),
        context_lens=empty(torch.int32, rows),
        block_tables=empty(torch.int32, rows, MAX_BLOCKS),
        last_tokens=empty(torch.int64, rows),
    )


def copied(part: Any, memory: Fenced) -> Any:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return replace(part, **{n: memory.copy(v) for n, v in values.items() if v is not None})


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize(
    ("num_decodes", "idle_decodes", "counts", "idle_rows", "spare"),
    [
        (1, 0, [], 0, 0),
        (3, 0, [], 0, 0),
        (0, 2, [], 0, 0),
        (20, 12, [], 0, 0),
        (0, 0, [1], 0, 0),
        (0, 0, [200, 1, 129], 3, 17),
        (7, 1, [2, 511], 6, 0),
        (7, 9, [128, 3], 6, 131),
        (0, 4, [], 16, 16),
    ],
)
def test_inputs_are_the_oracles(
    block_size: int, num_decodes: int, idle_decodes: int, counts: list[int], idle_rows: int, spare: int
) -> None:
    memory, host = Fenced(), Fenced("cpu")
    rows = rows_of(num_decodes, idle_decodes, counts, idle_rows, spare)
    state, decodes = state_of(block_size, seed=len(counts)), num_decodes + idle_decodes
    num_rows, num_tokens = len(rows.slots), decodes + sum(counts) + spare
    expected, actual = blank(num_rows, num_tokens, host), blank(num_rows, num_tokens, memory)
    on_device = copied(state, memory)
    step_inputs(actual, on_device, copied(rows, memory), decodes, block_size)
    step_inputs_oracle(expected, state, rows, decodes, block_size)

    for name in ("token_ids", "positions", "slot_mapping", "context_lens", "last_tokens"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    for row, context_len in enumerate(expected.context_lens.tolist()):
        width = -(-context_len // block_size)
        assert torch.equal(actual.block_tables[row, :width].cpu(), expected.block_tables[row, :width])
    for field in fields(state):
        assert torch.equal(getattr(on_device, field.name).cpu(), getattr(state, field.name)), field.name
    memory.check()


@pytest.mark.gpu
def test_tables_of_32k_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "MAX_BLOCKS", 2048)
    test_inputs_are_the_oracles(16, 7, 1, [2, 511], 6, 0)
    test_inputs_are_the_oracles(16, 20, 12, [], 0, 0)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLauncher().install(monkeypatch)
    state, rows = state_of(16, seed=0), rows_of(2, 1, [5], 1, 2)
    out = blank(5, 10, Fenced("cpu"))
    step_inputs(out, state, rows, 3, 16)
    assert [launch.grid for launch in fake.launches] == [(6, 1, 1)]
    cases = [
        (replace(out, token_ids=out.token_ids[:9]), state, rows, 3, "must have shape"),
        (replace(out, positions=out.positions.int()), state, rows, 3, "positions must be"),
        (out, replace(state, tables=state.tables[:, :62]), rows, 3, "multiple of 4"),
        (out, replace(state, num_computed=state.num_computed[:9]), rows, 3, "num_computed"),
        (out, state, replace(rows, query_starts=None), 3, "query_starts"),
        (out, state, rows, 5, "5 of 5 rows decode"),
        (out, state, rows, 6, "6 of 5 rows decode"),
        (out, state, rows, 2, "prompt_tokens"),
    ]
    for bad_out, bad_state, bad_rows, num_decodes, message in cases:
        with pytest.raises(ValueError, match=message):
            step_inputs(bad_out, bad_state, bad_rows, num_decodes, 16)
    assert len(fake.launches) == 1
