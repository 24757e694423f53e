"""Real steps through a runner before anyone is served.

They go straight to the runner, so that no counter of the scheduler ever tells of tokens that nobody
asked for. The blocks they write are free afterwards and carry no name.
"""

from __future__ import annotations

from photon_grpc.errors import BackendUnavailableError
from photon_grpc.runner.base import Runner
from photon_grpc.scheduler.output import (
    ModelOutput,
    NewSequence,
    SamplerSpec,
    ScheduledSequence,
    SchedulerOutput,
)
from photon_grpc.types import EffectiveSampling

# The scheduler counts from 1.
_WARMUP_SEQ_ID = 0
_SAMPLING = EffectiveSampling(
    temperature=1.0,
    top_p=0.9,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    seed=0,
    n=1,
)


def warm_up(runner: Runner) -> None:
    """One prefill step, one decode step, one removal. Raises BackendUnavailableError without a token."""
    prompt = (0,)
    new = NewSequence(_WARMUP_SEQ_ID, prompt, len(prompt), 0, (0,), SamplerSpec(_SAMPLING))
    more_blocks: dict[int, tuple[int, ...]] = {}
    if runner.block_size == len(prompt):
        more_blocks[_WARMUP_SEQ_ID] = (1 % runner.num_blocks,)
    row = ScheduledSequence(_WARMUP_SEQ_ID, len(prompt), True)
    _run(runner, SchedulerOutput(0, (), (new,), (row,), len(prompt)))
    if runner.model.max_model_len > len(prompt):
        row = ScheduledSequence(_WARMUP_SEQ_ID, 1, True)
        _run(runner, SchedulerOutput(0, (), (), (row,), 1, more_blocks))
    runner.launch(SchedulerOutput(0, (_WARMUP_SEQ_ID,), (), (), 0))
    runner.collect()


def _run(runner: Runner, output: SchedulerOutput) -> ModelOutput:
    runner.launch(output)
    result = runner.collect()
    if result.faults or not result.token_ids:
        raise BackendUnavailableError("the warm-up step brought no token: the model's logits are not finite")
    return result
