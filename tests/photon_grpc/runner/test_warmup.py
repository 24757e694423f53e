"""Warm-up: real steps, no trace in anybody's books, a clear refusal of a model that brings no token."""

from __future__ import annotations

import subprocess
import sys

import pytest

from photon_grpc.engine.messages import Submit
from photon_grpc.errors import BackendUnavailableError
from photon_grpc.runner.warmup import warm_up
from photon_grpc.scheduler.output import ModelOutput, RowFault
from tests.support.builders import RecordingRunner, engine_core, engine_request, model_info, run_to_end
from tests.support.heap_bytes import heap_bytes


@pytest.mark.parametrize(("num_blocks", "block_size"), [(2, 1), (1, 2), (8, 16)])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_prefill_decode_removal(num_blocks: int, block_size: int, in_flight: int) -> None:
    model = model_info(max_model_len=num_blocks * block_size)
    runner = RecordingRunner(model, num_blocks=num_blocks, block_size=block_size, max_in_flight=in_flight)
    warm_up(runner)
    shapes = [[(row.num_tokens, row.sample) for row in plan.rows] for plan in runner.plans]
    plain = [[(1, True)], [(1, True)], []]
    # A context of two tokens has no room for another.
    rich = [[(2, True)], [(1, True)], []] if num_blocks * block_size > 2 else [[(2, True)], []]
    assert shapes == plain + rich
    ends = [plan.removed for plan in runner.plans if not plan.rows]
    starts = [plan.new[0] for plan in runner.plans if plan.new]
    assert ends == [(new.seq_id,) for new in starts]


def test_one_sequence_has_all_that_may_be_asked_for() -> None:
    runner = RecordingRunner(model_info(), num_blocks=8, block_size=16)
    warm_up(runner)
    plain, rich = (plan.new[0].sampler for plan in runner.plans if plan.new)
    assert plain.sampling.repetition_penalty == 1
    assert (plain.top_logprobs, plain.prompt_top_logprobs) == (None, None)
    assert rich.sampling.repetition_penalty != 1
    assert rich.sampling.presence_penalty
    assert (rich.top_logprobs, rich.prompt_top_logprobs) == (0, 0)


def test_a_context_of_one_token_has_no_decode_step() -> None:
    runner = RecordingRunner(model_info(max_model_len=1), num_blocks=1, block_size=1)
    warm_up(runner)
    assert [len(plan.rows) for plan in runner.plans] == [1, 0]


def test_nothing_of_it_shows_afterwards() -> None:
    runner = RecordingRunner(model_info(), num_blocks=4, block_size=4)
    warm_up(runner)
    core = engine_core(runner)
    assert core.scheduler.stats().generation_tokens == 0
    core.submit(Submit(1, engine_request((0, 0, 0, 0, 0), 3)))
    outputs = run_to_end(core)
    assert [token for output in outputs for token in output.token_ids] == [0, 0, 0]
    assert max(output.cached_prompt_tokens for output in outputs) == 0


def test_a_fault_in_either_step_refuses_the_start() -> None:
    for position in (0, 1):
        runner = RecordingRunner(model_info(), faults={(1, position): RowFault.NON_FINITE_LOGITS})
        with pytest.raises(BackendUnavailableError, match="not finite"):
            warm_up(runner)


def test_no_token_refuses_the_start() -> None:
    class Mute(RecordingRunner):
        def collect(self) -> ModelOutput:
            return ModelOutput(super().collect().step, (), ())

    with pytest.raises(BackendUnavailableError):
        warm_up(Mute(model_info()))


# Prints how many bytes in use at malloc seven arrays of each length, of words and of marks, leave behind.
_ARRAYS = """
import gc, sys
import numpy as np
from photon_grpc.runner.warmup import fill_array_cache
from tests.support.heap_bytes import heap_bytes

if sys.argv[1] == "filled":
    fill_array_cache()
gc.collect()
before = heap_bytes()
for length in range(1, 256):
    for kind in (np.int32, np.bool_):
        arrays = [np.zeros(length, kind) for _ in range(7)]
        del arrays
print(heap_bytes() - before)
"""


@pytest.mark.skipif(heap_bytes() is None, reason="malloc does not tell what is in use")
def test_arrays_of_new_lengths_take_nothing_that_stays() -> None:
    def left(how: str) -> int:
        command = [sys.executable, "-c", _ARRAYS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert left("plain") > 500_000, "numpy no longer keeps them: nothing is to be filled"
    assert left("filled") < 20_000
