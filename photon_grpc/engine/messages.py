"""Everything that crosses the boundary between the event loop and the engine.

Plain frozen dataclasses of numbers, strings and tuples: no callbacks, no futures, no tensors. Where
the engine has a process of its own, exactly these are pickled. Moments are of the monotonic clock,
which the processes of one machine share. A request is named by its `key`, an integer that the event
loop never uses twice: a client may reuse a request_id while late outputs of its earlier attempt are
still on their way.
"""

from __future__ import annotations

import copyreg
import enum
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from photon_grpc.errors import PhotonError
from photon_grpc.scheduler.output import (
    FailureKind,
    PlainTokens,
    SchedulerStats,
    SequenceOutput,
    SequenceTimings,
)
from photon_grpc.scheduler.request import Deadlines
from photon_grpc.types import EffectiveSampling, FinishReason, ModelInfo

__all__ = [
    "Abort",
    "AbortReason",
    "CacheFlushed",
    "Deadlines",
    "EngineMessage",
    "EngineReady",
    "EngineRequest",
    "EngineStats",
    "EngineStopped",
    "FailureKind",
    "FlushCache",
    "LoadProgress",
    "LoopMessage",
    "PlainTokens",
    "SequenceOutput",
    "SequenceTimings",
    "Shutdown",
    "StepOutputs",
    "Submit",
]

EngineStats = SchedulerStats


class AbortReason(enum.Enum):
    """Who ended a request."""

    CANCELLED = "cancelled"
    OPERATOR = "operator"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A checked request of `sampling.n` completions: ids and numbers, no text.

    `stop_token_ids` and `eos_token_ids` (empty under ignore_eos) end a completion; reaching
    `max_tokens` ends it with `length_finish`. None as `top_logprobs` means no log-probabilities. `tenant`
    is whom the work is for, a name that nothing here looks into; empty where callers are not told apart.
    Requests share blocks only inside one tenant, and there only with an equal `cache_salt`. While several
    tenants wait each gets `weight` shares of the engine, and none of them enters the batch with more than
    `kv_share` of all KV blocks in its hands.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: EffectiveSampling
    max_tokens: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    arrival_time: float
    length_finish: FinishReason = FinishReason.MAX_TOKENS
    priority: int = 0
    deadlines: Deadlines = field(default_factory=Deadlines)
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    tenant: str = ""
    weight: float = 1.0
    kv_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a request. Its outputs will carry `key`."""

    key: int
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End one completion, or all of them where `index` is None. An unknown key is a lost race, no error."""

    key: int
    index: int | None = None
    reason: AbortReason = AbortReason.CANCELLED


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End every request with DRAINING, and then the engine."""


@dataclass(frozen=True, slots=True)
class FlushCache:
    """Forget every cached prefix. Answered with a CacheFlushed of the same `ticket`."""

    ticket: int


EngineMessage = Submit | Abort | Shutdown | FlushCache


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far the loading of weights has come, in bytes. None or any number of them before EngineReady."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The runner stands; `num_blocks * block_size` tokens fit into its KV pool."""

    model: ModelInfo
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Everything one step has for the event loop: one hand-off per step. `time` is the heartbeat.

    `news` are the outputs that say more than a token (the first one, log-probabilities, an end); the
    others, nearly all of a busy step, are in `tokens`. The step planned `num_tokens` tokens, of prompts and
    of outputs, and took `seconds`; both are 0 when there was nothing to plan.
    """

    news: tuple[SequenceOutput, ...]
    stats: EngineStats
    time: float
    tokens: PlainTokens = field(default_factory=PlainTokens)
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def outputs(self) -> tuple[SequenceOutput, ...]:
        """All outputs as objects, for readers who may take their time."""
        tokens = self.tokens
        plain = zip(tokens.keys, tokens.indices, tokens.token_ids, strict=True)
        return (*self.news, *(SequenceOutput(key, index, (token_id,)) for key, index, token_id in plain))


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """The engine has ended: asked to (`error` None), or because something failed."""

    error: PhotonError | None


@dataclass(frozen=True, slots=True)
class CacheFlushed:
    """No prefix is known any more; `blocks_freed` blocks that nobody holds had kept one."""

    ticket: int
    blocks_freed: int


def _pickle_by_fields(message_class: type[Any]) -> None:
    """Pickle a dataclass as a call of it. What `slots=True` brings for it walks the fields in Python, both
    ways, which takes longer than everything else about sending a request."""
    get: Callable[[Any], tuple[Any, ...]] = attrgetter(*(one.name for one in fields(message_class)))
    copyreg.pickle(message_class, lambda message: (message_class, get(message)))


# What crosses with every call or step, and has more than one field.
for _class in (
    Submit,
    EngineRequest,
    EffectiveSampling,
    Deadlines,
    Abort,
    StepOutputs,
    SequenceTimings,
):
    _pickle_by_fields(_class)

LoopMessage = LoadProgress | EngineReady | StepOutputs | CacheFlushed | EngineStopped
