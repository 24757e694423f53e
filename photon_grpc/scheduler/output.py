"""What the scheduler hands to the runner for one step, and what the runner hands back.

Plain data: it can be logged, replayed, or sent to another rank. A sequence is named by its
`seq_id`, an integer that the scheduler never uses twice, so that a late result for a sequence that
has ended can never be taken for that of a newer one with the same request_id.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from photon_grpc.types import EffectiveSampling, TokenLogprobs


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

    `new_block_ids` are to be appended to the sequence's block table first. `sample` is true when the
    row's last token is the sequence's last known one, so that the step yields its next token. In a
    decode step launched before the previous step was collected, that last token is known to the
    runner alone.
    """

    seq_id: int
    num_tokens: int
    sample: bool
    new_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. `removed` left the batch (finished, aborted or preempted): forget their rows first."""

    step: int
    removed: tuple[int, ...]
    new: tuple[NewSequence, ...]
    rows: tuple[ScheduledSequence, ...]
    num_tokens: int

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
