"""What a generation tells its reader, in text; the domain twins of StreamGenerateResponse's events."""

from __future__ import annotations

from dataclasses import dataclass

from photon_grpc.errors import PhotonError
from photon_grpc.types import EffectiveParams, Finish, Timings, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """`token_ids` with `output.echo_prompt`; `logprobs` (None for the first token) when asked for."""

    num_tokens: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """Once, first, together with the first token."""

    prompt: PromptInfo
    effective: EffectiveParams


@dataclass(slots=True)
class Delta:
    """Only what is new since the last delta of the same index.

    `num_tokens` counts even when ids and text are off. `text` may lag behind the tokens while an
    incomplete character or a possible stop string is held back. Not frozen, because nearly
    every message needs one and a frozen dataclass takes several times as long to make; nobody changes it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Once per index."""

    index: int
    finish: Finish


@dataclass(frozen=True, slots=True)
class Summary:
    """Once, last."""

    usage: Usage
    timings: Timings


Event = Started | Delta | Finished | Summary


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole completion of a unary call."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class AdmissionOutlook:
    """What a request would meet if it were submitted now: seconds of waiting (None: not known), and the
    error that it would be refused with."""

    estimated_wait_s: float | None
    refusal: PhotonError | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Everything a unary call returns. With validate_only there is `admission` and no completion."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt: PromptInfo
    usage: Usage
    timings: Timings
    effective: EffectiveParams
    admission: AdmissionOutlook | None = None


@dataclass(frozen=True, slots=True)
class Tokenized:
    """`offsets` are (start, end) in UTF-8 bytes of the text, one pair per token, when asked for."""

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] = ()
