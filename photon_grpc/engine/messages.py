"""Everything that crosses the boundary between the event loop and the engine.

Plain frozen dataclasses of numbers, strings and tuples: no callbacks, no futures, no tensors. A
later split into processes serialises exactly these and touches neither side.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from photon_grpc.types import EffectiveSampling, Finish, TokenLogprobs


class FailureKind(enum.Enum):
    """Why the engine ended a request without a completion; `engine/client.py` maps it to an error."""

    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    MAX_DURATION = "max_duration"
    REQUEST_FAULT = "request_fault"
    OPERATOR_ABORT = "operator_abort"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    ENGINE_DEAD = "engine_dead"


class AbortReason(enum.Enum):
    """Who ended a request: its own caller (nothing more is sent) or an operator."""

    CANCELLED = "cancelled"
    OPERATOR = "operator"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Moments on the engine's monotonic clock, in seconds; None: never.

    `start_by` and `first_token_by` and `end_by` end the request with an error, `finish_by` ends it
    well with what there is (TIME_LIMIT).
    """

    start_by: float | None = None
    first_token_by: float | None = None
    end_by: float | None = None
    finish_by: float | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A checked request of `sampling.n` completions: ids and numbers, no text.

    `stop_token_ids` and `eos_token_ids` (empty under ignore_eos) end a completion. `cache_scope`
    salts the prefix hashes: requests share blocks only inside one scope. None as `top_logprobs` means
    no log-probabilities.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: EffectiveSampling
    max_tokens: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    arrival_time: float
    priority: int = 0
    deadlines: Deadlines = Deadlines()
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None
    cache_scope: bytes = b""
    bypass_prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End one completion (`index`) or all of them (`index` None). Unknown ids are no error: it is a race."""

    request_id: str
    index: int | None = None
    reason: AbortReason = AbortReason.CANCELLED


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End every request with `DRAINING` and leave the thread."""


EngineMessage = Submit | Abort | Shutdown


@dataclass(frozen=True, slots=True)
class SequenceTimings:
    """Monotonic moments of one completion; None where it did not get that far."""

    arrival: float
    started: float | None
    first_token: float | None
    end: float | None
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step brought for one completion; `finish` or `failure` is set on its last one.

    `prompt_logprobs` comes once, with the first token, and has one entry per prompt token after the
    first.
    """

    request_id: str
    index: int
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


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step. Counters (the second group) only ever rise.

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


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything one step has for the event loop; one hand-off per step."""

    outputs: tuple[SequenceOutput, ...]
    stats: EngineStats
    time: float
