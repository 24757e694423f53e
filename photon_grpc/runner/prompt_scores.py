"""Log-probabilities of a prompt's own tokens, from the hidden states of a prefill. Both runners use it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn.functional import pad

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
    decoder: DecoderModel,
    sampler: PromptScorer,
    hidden: Tensor,
    targets: Tensor,
    top: int,
    *,
    pads: bool = False,
) -> tuple[TokenLogprobs, ...]:
    """Scores of `targets` [n], each foretold by its row of `hidden` [n, hidden_size]; waits for a device.

    With `pads` all is done in one shape: on a GPU libraries and allocator keep something of every other one
    for good, and prompts have any length.
    """
    entries: list[TokenLogprobs] = []
    for start in range(0, len(targets), _CHUNK):
        rows, token_ids = hidden[start : start + _CHUNK], targets[start : start + _CHUNK]
        count = len(token_ids)
        if pads:
            # Copied in any case: descriptors of the product's operands are kept by address.
            rows = pad(rows, (0, 0, 0, _CHUNK - count)) if count < _CHUNK else rows.clone()
            token_ids = pad(token_ids, (0, _CHUNK - count))
        logits = decoder.compute_logits(rows)
        entries.extend(sampler.prompt_logprobs(logits, token_ids, top)[:count])
    return tuple(entries)
