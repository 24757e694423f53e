"""What the scheduler hands to the runner for one step, and what the runner hands back.

Plain data: it can be logged, replayed, or sent to another rank. A sequence is named by its
`seq_id`, an integer that the scheduler never uses twice, so that a late result for a sequence that
has ended can never be taken for that of a newer one with the same request_id.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from photon_grpc.types import EffectiveSampling, Finish, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """Everything the sampler needs to know of one sequence, fixed for its life.

    `index` tells the completions of one request apart, so that they draw different noise from one
    seed. `banned_token_ids` (EOS and stop ids) may not be drawn before `min_tokens` outputs exist.
    `top_logprobs` is None for no log-probabilities, 0 for those of the sampled token alone.
    """

    sampling: EffectiveSampling
    index: int = 0
    min_tokens: int = 0
    banned_token_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that enters the batch, for the first time or again after preemption.

    `token_ids` are prompt and outputs so far; the first `num_prompt_tokens` are the prompt. The first
    `num_computed_tokens` have their KV in `block_ids` already (prefix hits).
    """

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: tuple[int, ...]
    sampler: SamplerSpec


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One row of a step: compute the next `num_tokens` tokens of `seq_id`.

    `sample` is true when the row's last token is the sequence's last known one, so that the step yields
    its next token. In a decode step launched before the previous step was collected, that last token is
    known to the runner alone.
    """

    seq_id: int
    num_tokens: int
    sample: bool


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. `removed` left the batch (finished, aborted or preempted): forget their rows first.

    `new_block_ids` has, by `seq_id`, the blocks to append to the block tables of sequences that were in
    the batch already. With `same_rows` nobody entered or left and `rows` are those of the step before, the
    very same object: whatever a runner made of them still holds.
    """

    step: int
    removed: tuple[int, ...]
    new: tuple[NewSequence, ...]
    rows: tuple[ScheduledSequence, ...]
    num_tokens: int
    new_block_ids: dict[int, tuple[int, ...]] = field(default_factory=dict)
    same_rows: bool = False

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to compute."""
        return not self.rows


class RowFault(enum.Enum):
    """Why the runner could not produce a token for one row, and for that row alone."""

    NON_FINITE_LOGITS = "non_finite_logits"


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """The tokens of one step, in the order of the rows that had `sample` set.

    `token_ids[i]` is a list because a later runner may draft several tokens per step. `logprobs` has,
    for the sequences that asked, one entry per token. `prompt_logprobs` has, for the sequences that
    asked, entries for the prompt tokens computed in this step; the very first prompt token has none.
    """

    step: int
    seq_ids: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    faults: dict[int, RowFault] = field(default_factory=dict)


class FailureKind(enum.Enum):
    """Why a request ended without a completion; `engine/client.py` maps it to an error."""

    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    MAX_DURATION = "max_duration"
    REQUEST_FAULT = "request_fault"
    OUT_OF_MEMORY = "out_of_memory"
    OPERATOR_ABORT = "operator_abort"
    DRAINING = "draining"
    ENGINE_DEAD = "engine_dead"


@dataclass(frozen=True, slots=True)
class SequenceTimings:
    """Monotonic moments of one completion; None where it did not get that far."""

    arrival: float
    started: float | None
    first_token: float | None
    end: float | None
    preemptions: int = 0


class SequenceOutput(NamedTuple):
    """What one step brought for completion `index` of the request `key`.

    `finish` or `failure` is set on the last one. `prompt_logprobs` comes once, with the first token,
    and has one entry per prompt token after the first. `timings` comes with the first token, after
    each resumption and with the last output. A tuple, since a frozen dataclass takes several times as long
    to make, and every message to a client needs one.
    """

    key: int
    index: int  # type: ignore[assignment]  # in place of tuple.index, which nobody needs here
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    failure: FailureKind | None = None
    cached_prompt_tokens: int = 0
    timings: SequenceTimings | None = None

    @property
    def is_last(self) -> bool:
        """True when nothing more will come for this completion."""
        return self.finish is not None or self.failure is not None


class PlainTokens(NamedTuple):
    """Outputs that are one token and nothing else, as columns: nearly all that a decode step brings.

    `token_ids[i]` is for completion `indices[i]` of the request `keys[i]`. A completion stands here or has
    a SequenceOutput in a step, never both.
    """

    keys: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


class SchedulerStats(NamedTuple):
    """A snapshot after a step. The fields of the second group only ever rise.

    `kv_slots_used` is the number of token slots, in blocks of live sequences, that hold a token;
    divided by `kv_blocks_used * block_size` it says how much of the allocated memory is of use.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_slots_used: int = 0
    block_size: int = 0

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    faults: int = 0
    lost_steps: int = 0
