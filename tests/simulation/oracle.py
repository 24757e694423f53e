"""What a call's completions are when it runs alone: a loop over a pure function of prompt and position.

Nothing here knows of batches, chunks, blocks or preemption, so none of them can change the answer.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass

from photon_grpc.types import Finish, FinishReason, TokenLogprobs

EOS_IDS = (1, 0)
STOP_IDS = (2, 3)
FIRST_PLAIN_ID = 4
VOCABULARY = 24

_MASK = (1 << 32) - 1


@dataclass(frozen=True)
class Completion:
    token_ids: tuple[int, ...]
    finish: Finish


def name_of(prompt: tuple[int, ...]) -> int:
    """A number that stands for the prompt."""
    return zlib.crc32(array("I", prompt).tobytes())


def next_token(prompt_name: int, index: int, position: int, min_tokens: int, banned: tuple[int, ...]) -> int:
    """The token at output `position` of completion `index`; ends are drawn at one position in sixteen.

    A sampler draws none of `banned` before `min_tokens` outputs exist. This one does half of the time:
    the scheduler has to hold out by itself.
    """
    mixed = (prompt_name ^ (index * 0x9E3779B1) ^ (position * 0x85EBCA6B)) & _MASK
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & _MASK
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & _MASK
    mixed ^= mixed >> 15
    if mixed % 16 == 0:
        token = (mixed >> 4) % FIRST_PLAIN_ID
        is_obedient = (mixed >> 8) % 2 == 0
        if not (is_obedient and position < min_tokens and token in banned):
            return token
    return FIRST_PLAIN_ID + (mixed >> 10) % (VOCABULARY - FIRST_PLAIN_ID)


def complete(
    prompt: tuple[int, ...],
    index: int,
    *,
    max_tokens: int,
    min_tokens: int,
    eos_ids: tuple[int, ...],
    stop_ids: tuple[int, ...],
    length_finish: FinishReason,
) -> Completion:
    """Completion `index` of a call that runs alone."""
    name = name_of(prompt)
    token_ids: list[int] = []
    while True:
        token = next_token(name, index, len(token_ids), min_tokens, (*eos_ids, *stop_ids))
        token_ids.append(token)
        if len(token_ids) >= min_tokens:
            if token in eos_ids:
                return Completion(tuple(token_ids), Finish(FinishReason.EOS, eos_token_id=token))
            if token in stop_ids:
                return Completion(tuple(token_ids), Finish(FinishReason.STOP, stop_token_id=token))
        if len(token_ids) == max_tokens:
            return Completion(tuple(token_ids), Finish(length_finish))


def logprobs_of(token_id: int, top: int) -> TokenLogprobs:
    """The log-probability that the simulated model gives a token."""
    return TokenLogprobs(-float(token_id), tuple((token_id + n, -float(token_id + n)) for n in range(top)))
