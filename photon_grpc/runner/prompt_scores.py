"""Log-probabilities of a prompt's own tokens, from the hidden states of a prefill. Both runners use it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from photon_grpc.models.llama import DecoderModel
from photon_grpc.types import TokenLogprobs

# Logits of so many positions are held at a time.
_CHUNK = 64


class PromptScorer(Protocol):
    """The part of a sampler that scores given tokens."""

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> list[TokenLogprobs]: ...


def num_scored(num_tokens: int, start: int, num_prompt_tokens: int) -> int:
    """How many of the next `num_tokens` positions from `start` on foretell a token of the prompt.

    The logits at position p are about the token at p + 1.
    """
    return max(0, min(num_tokens, num_prompt_tokens - 1 - start))


def score_prompt(
    decoder: DecoderModel, sampler: PromptScorer, hidden: Tensor, targets: Tensor, top: int
) -> tuple[TokenLogprobs, ...]:
    """Scores of `targets` [n], each foretold by its row of `hidden` [n, hidden_size]; waits for a device."""
    entries: list[TokenLogprobs] = []
    for start in range(0, len(targets), _CHUNK):
        logits = decoder.compute_logits(hidden[start : start + _CHUNK])
        entries.extend(sampler.prompt_logprobs(logits, targets[start : start + _CHUNK], top))
    return tuple(entries)
