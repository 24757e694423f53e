"""A runner without a model: tokens from a script, at a chosen pace.

For tests of everything above the runner, and for measuring the front end alone. It keeps the same
books as a real runner (blocks, positions) and refuses a step that a real cache could not serve, so a
scheduler that hands out a wrong block fails here too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from photon_grpc.runner.base import StepOutOfMemoryError
from photon_grpc.scheduler.output import ModelOutput, RowFault, SchedulerOutput
from photon_grpc.types import ModelInfo, TokenLogprobs

Script = Callable[[tuple[int, ...], int, int], int]
"""`(prompt_token_ids, completion index, number of outputs so far)` -> next token id."""


def echo(prompt: tuple[int, ...], index: int, position: int) -> int:
    """Say the prompt again and again; completion `index` starts that much later in it."""
    return prompt[(position + index) % len(prompt)]


def logprobs_of(token_id: int, top: int) -> TokenLogprobs:
    """The scripted log-probability of a token: minus its id. The `top` alternatives are the next ids."""
    return TokenLogprobs(-float(token_id), tuple((token_id + n, -float(token_id + n)) for n in range(top)))


@dataclass(slots=True)
class _Row:
    prompt: tuple[int, ...]
    index: int
    token_ids: list[int]
    num_computed: int
    block_ids: list[int] = field(default_factory=list)
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None


class ScriptedRunner:
    """Implements `runner.base.Runner`.

    `step_s` seconds pass per step, slept on the engine thread. `faults` maps (prompt length, output
    position) to a row fault; `crash_at_step` raises from `launch`, as a broken device would, and
    StepOutOfMemoryError is raised where `out_of_memory` says so of a step. With `check_cache` every row's
    whole block table is compared with its tokens in every step.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        script: Script = echo,
        step_s: float = 0.0,
        max_in_flight: int = 1,
        faults: dict[tuple[int, int], RowFault] | None = None,
        crash_at_step: int | None = None,
        out_of_memory: Callable[[SchedulerOutput], bool] | None = None,
        check_cache: bool = True,
    ) -> None:
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_in_flight = max_in_flight
        self._script = script
        self._step_s = step_s
        self._faults = faults or {}
        self._crash_at_step = crash_at_step
        self._out_of_memory = out_of_memory
        self._check_cache = check_cache
        self._rows: dict[int, _Row] = {}
        # Which (position, token) each cache slot holds: the content a real cache would have.
        self._slots: dict[int, tuple[int, int]] = {}
        self._outputs: deque[ModelOutput] = deque()

    def launch(self, output: SchedulerOutput) -> None:
        """Compute one step at once; its tokens wait for `collect`."""
        assert len(self._outputs) < self.max_in_flight, "more steps under way than allowed"
        if self._crash_at_step is not None and output.step >= self._crash_at_step:
            raise RuntimeError("scripted device fault")
        for seq_id in output.removed:
            self._rows.pop(seq_id, None)
        for new in output.new:
            assert new.seq_id not in self._rows
            self._rows[new.seq_id] = _Row(
                new.token_ids[: new.num_prompt_tokens],
                new.sampler.index,
                list(new.token_ids),
                new.num_computed_tokens,
                list(new.block_ids),
                new.sampler.top_logprobs,
                new.sampler.prompt_top_logprobs,
            )
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for scheduled in output.rows:
            row = self._rows[scheduled.seq_id]
            row.block_ids.extend(output.new_block_ids.get(scheduled.seq_id, ()))
            end = row.num_computed + scheduled.num_tokens
            if self._check_cache:
                for position in range(row.num_computed, end):
                    self._slots[self._slot(row, position)] = (position, row.token_ids[position])
            if row.prompt_top_logprobs is not None and row.num_computed < len(row.prompt):
                told = row.prompt[row.num_computed + 1 : end + 1]
                prompt_logprobs[scheduled.seq_id] = tuple(
                    logprobs_of(t, row.prompt_top_logprobs) for t in told
                )
            row.num_computed = end
        if self._out_of_memory is not None and self._out_of_memory(output):
            self._lose(output)
        seq_ids: list[int] = []
        tokens: list[tuple[int, ...]] = []
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        faults: dict[int, RowFault] = {}
        for scheduled in output.rows:
            row = self._rows[scheduled.seq_id]
            if self._check_cache:
                self._compare_cache(row)
            if not scheduled.sample:
                continue
            assert row.num_computed == len(row.token_ids), "sampling before the last token is computed"
            position = len(row.token_ids) - len(row.prompt)
            token = self._script(row.prompt, row.index, position)
            fault = self._faults.get((len(row.prompt), position))
            if fault is not None:
                faults[scheduled.seq_id] = fault
            elif row.top_logprobs is not None:
                logprobs[scheduled.seq_id] = (logprobs_of(token, row.top_logprobs),)
            row.token_ids.append(token)
            seq_ids.append(scheduled.seq_id)
            tokens.append((token,))
        self._outputs.append(
            ModelOutput(output.step, tuple(seq_ids), tuple(tokens), logprobs, prompt_logprobs, faults)
        )

    def collect(self) -> ModelOutput:
        """The oldest launched step."""
        if self._step_s:
            time.sleep(self._step_s)
        return self._outputs.popleft()

    def close(self) -> None:
        """Forget everything."""
        self._rows.clear()

    def _lose(self, output: SchedulerOutput) -> NoReturn:
        """Some of the step has been written, nobody knows which part, and nothing else is known any more."""
        for scheduled in output.rows:
            row = self._rows[scheduled.seq_id]
            for position in range(row.num_computed - scheduled.num_tokens, row.num_computed):
                self._slots.pop(self._slot(row, position), None)
        self._rows.clear()
        raise StepOutOfMemoryError("scripted lack of memory")

    def _slot(self, row: _Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _compare_cache(self, row: _Row) -> None:
        for position in range(row.num_computed):
            assert self._slots.get(self._slot(row, position)) == (position, row.token_ids[position]), (
                "the block table leads to another sequence's keys"
            )
