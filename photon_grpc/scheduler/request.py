"""A sequence inside the scheduler: its tokens, its progress, its clocks.

`num_computed_tokens` is the only progress state. Prefill, chunked prefill, decode and resumption after
preemption are one path: compute the tokens between it and `num_tokens`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from photon_grpc.scheduler.output import SamplerSpec, ScheduledSequence, SequenceTimings
from photon_grpc.types import FinishReason, TokenLogprobs


class RequestStatus(enum.Enum):
    """Where a sequence is. PREEMPTED is WAITING for the second time: it has been seen to run."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Moments on the engine's monotonic clock, in seconds; None: never.

    `start_by`, `first_token_by` and `end_by` end the request with an error; `finish_by` ends it well
    with what there is (TIME_LIMIT).
    """

    start_by: float | None = None
    first_token_by: float | None = None
    end_by: float | None = None
    finish_by: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One completion. Made by the engine, owned and changed by the scheduler alone."""

    seq_id: int
    key: int
    index: int
    prompt_token_ids: tuple[int, ...]
    sampler: SamplerSpec
    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    arrival_time: float
    length_finish: FinishReason = FinishReason.MAX_TOKENS
    priority: int = 0
    deadlines: Deadlines = field(default_factory=Deadlines)
    cache_root: bytes = b""
    bypass_prefix_cache: bool = False
    # For whom, how many shares of a contended engine that tenant has, and the part of all KV blocks with
    # which it may enter while others wait; a tenant's sequences may differ.
    tenant: str = ""
    weight: float = 1.0
    kv_share: float = 1.0

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    # The first tokens that its tenant has been charged for, or need not be: see `FairQueue`.
    num_charged_tokens: int = 0
    # Tokens that launched steps will have sampled but that have not been collected yet.
    num_pending_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_cached_prompt_tokens: int = 0
    num_preemptions: int = 0
    # The first step since the sequence last entered the batch; what earlier ones bring is of an old life.
    admitted_step: int = 0
    started_time: float | None = None
    first_token_time: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # The timings changed since they were last told: the first token came, or the sequence resumed.
    has_news: bool = True

    # What a step of nothing but decoding looks at, so that it need not look at anything else. While fewer
    # tokens are computed, the next step computes one more, and needs no block for it; 0 when the sequence
    # does not decode.
    steady_until: int = 0
    # While fewer tokens are known, one more that does not end the sequence is all that there is to tell.
    plain_until: int = 0
    ending_token_ids: frozenset[int] = field(init=False)
    # Prompt and as many outputs as were asked for.
    num_tokens_at_most: int = field(init=False)
    decode_row: ScheduledSequence = field(init=False)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)
        self.ending_token_ids = self.eos_token_ids | self.stop_token_ids
        self.num_tokens_at_most = len(self.prompt_token_ids) + self.max_tokens
        self.decode_row = ScheduledSequence(self.seq_id, 1, True)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs, those of uncollected steps included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def decodes(self) -> bool:
        """Whether all that is to be computed is its newest token."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens <= 1

    @property
    def wants_another_token(self) -> bool:
        """False once the outputs under way fill `max_tokens`."""
        return len(self.token_ids) + self.num_pending_tokens < self.num_tokens_at_most

    def timings(self, end: float | None) -> SequenceTimings:
        """The clocks so far."""
        return SequenceTimings(
            arrival=self.arrival_time,
            started=self.started_time,
            first_token=self.first_token_time,
            end=end,
            preemptions=self.num_preemptions,
        )
