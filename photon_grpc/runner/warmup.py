"""Real steps through a runner before anyone is served, who would wait for what comes up at its first use.

They go straight to the runner, so that no counter of the scheduler ever tells of tokens that nobody
asked for. The blocks they write are free afterwards and carry no name.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

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

# Of numpy's allocator (numpy/_core/src/multiarray/alloc.c).
_CACHED_BYTES = 1024
_CACHED_PER_SIZE = 7
# A mark for each sequence of a batch is a byte long, all other arrays are of words.
_DENSE_BYTES = 256
_WORD_BYTES = 4
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
_PLAIN = SamplerSpec(_SAMPLING)
# Penalties have marks that torch puts in place, and a prompt that is scored runs kernel by kernel.
_RICH = SamplerSpec(
    replace(_SAMPLING, presence_penalty=0.5, repetition_penalty=1.1), top_logprobs=0, prompt_top_logprobs=0
)


def warm_up(runner: Runner) -> None:
    """Prefill, decode and removal of a plain sequence, and of one with all that may be asked for.

    Raises BackendUnavailableError without a token.
    """
    _run_sequence(runner, (0,), _PLAIN)
    if runner.model.max_model_len > 1:
        _run_sequence(runner, (0, 0), _RICH)
    fill_array_cache()


def fill_array_cache() -> None:
    """Have numpy take the memory that it will keep of small arrays, a megabyte, before anyone is served.

    Of each size in bytes below 1,024 it keeps what seven arrays needed. A load of random lengths comes upon
    new sizes for hours, and what it takes for them lies between what it frees.
    """
    for size in (*range(1, _DENSE_BYTES), *range(_DENSE_BYTES, _CACHED_BYTES, _WORD_BYTES)):
        arrays = [np.empty(size, np.uint8) for _ in range(_CACHED_PER_SIZE)]
        for array in arrays:
            array.fill(0)


def _run_sequence(runner: Runner, prompt: tuple[int, ...], spec: SamplerSpec) -> None:
    num_blocks = -(-len(prompt) // runner.block_size)
    new = NewSequence(_WARMUP_SEQ_ID, prompt, len(prompt), 0, tuple(range(num_blocks)), spec)
    row = ScheduledSequence(_WARMUP_SEQ_ID, len(prompt), True)
    _run(runner, SchedulerOutput(0, (), (new,), (row,), len(prompt)))
    if runner.model.max_model_len > len(prompt):
        more_blocks: dict[int, tuple[int, ...]] = {}
        if num_blocks * runner.block_size == len(prompt):
            more_blocks[_WARMUP_SEQ_ID] = (num_blocks % runner.num_blocks,)
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
