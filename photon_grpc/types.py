"""Domain types that every room shares: what a request asks for and how it ends.

Plain frozen dataclasses; no torch, no grpc, no protobuf. Names follow `proto/photon/v1/inference.proto`
so that a path such as `spec.sampling.top_p` reads the same on the wire and here. Durations are
seconds as floats. `None` means "not stated: take the default"; zero is always a value.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class FinishReason(enum.IntEnum):
    """Why a completion ended well. The numbers are those of the proto enum."""

    EOS = 1
    STOP = 2
    MAX_TOKENS = 3
    CONTEXT_LIMIT = 4
    TIME_LIMIT = 5
    ABORTED = 6
    CONSTRAINT_DEAD_END = 7


class Role(enum.Enum):
    """Who said a chat message; the value is the word chat templates use."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one completion; at most one of the three matched fields is set."""

    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    eos_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits before any sampling parameter.

    `logprob` belongs to the token itself. `top` holds `(token_id, logprob)`, most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation for the model's own chat template."""

    messages: tuple[ChatMessage, ...]
    template_args: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the caller asked for. Meanings and limits: `engine/validation.py`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StopParams:
    max_tokens: int | None = None
    min_tokens: int | None = None
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    include_stop: bool | None = None
    time_limit: float | None = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    text: bool = True
    token_ids: bool = False
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None
    echo_prompt: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class SchedulingOptions:
    priority: int | None = None
    queue_timeout: float | None = None
    first_token_budget: float | None = None


@dataclass(frozen=True, slots=True)
class CacheOptions:
    bypass_prefix_cache: bool = False
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class ChunkPolicy:
    """When a delta is sent: at `max_tokens` or after `max_delay`, whichever comes first.

    Both absent: as soon as there is anything and the previous write is done.
    """

    max_tokens: int | None = None
    max_delay: float | None = None


Prompt = str | tuple[int, ...] | ChatInput


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One Generate or StreamGenerate call, decoded but not yet checked."""

    prompt: Prompt | None
    request_id: str = ""
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopParams = field(default_factory=StopParams)
    output: OutputOptions = field(default_factory=OutputOptions)
    scheduling: SchedulingOptions = field(default_factory=SchedulingOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    chunk_policy: ChunkPolicy = field(default_factory=ChunkPolicy)
    add_special_tokens: bool | None = None
    truncate_input_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EffectiveSampling:
    """SamplingParams after defaults: what the sampler uses and the server echoes."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EffectiveStop:
    """StopParams after defaults. `strings` are matched by the front end, the rest by the engine."""

    max_tokens: int
    min_tokens: int
    strings: tuple[str, ...]
    token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop: bool
    time_limit: float | None


@dataclass(frozen=True, slots=True)
class EffectiveParams:
    sampling: EffectiveSampling
    stop: EffectiveStop
    model_fingerprint: str


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the monotonic clock. `first_token` counts from arrival."""

    queue: float
    prefill: float
    first_token: float
    decode: float
    total: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine and front end must know of the served model; fixed once it is loaded."""

    name: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    default_min_p: float = 0.0
    default_repetition_penalty: float = 1.0
    has_chat_template: bool = False
    max_num_seqs: int = 64
    """Sequences that run at the same time, where the settings leave it open."""
    max_num_batched_tokens: int = 512
    """Tokens computed in one step, likewise."""
