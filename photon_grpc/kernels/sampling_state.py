"""How the sampling kernels lay out what they know of a sequence, and its packing.

Owns the record of `sampling_state.cuh` and the bits in it; both sides are compiled from `DEFINES`. Knows
no requests: the caller says what each sequence asks for. Pure numpy, used on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SLOT_DTYPE = np.dtype(
    [
        ("marks", np.uint64),
        ("top_p", np.float64),
        ("flags", np.uint32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("floor_key", np.uint32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("seed_low", np.uint32),
        ("seed_high", np.uint32),
        ("index", np.uint32),
        ("min_tokens", np.int32),
        ("num_biases", np.int32),
        ("top_logprobs", np.int32),
        ("padding", np.uint32),
    ]
)
"""One sequence's parameters. `marks` is a device address, or 0 where no entry differs from another."""

FLAG_GREEDY = 1
FLAG_REPETITION = 2
FLAG_COUNTED = 4
FLAG_ALLOWED_ONLY = 8
FLAG_BAN = 16

MARK_COUNT = 0x00FF_FFFF
MARK_BIASED = 0x1000_0000
MARK_BANNED = 0x2000_0000
MARK_ALLOWED = 0x4000_0000
MARK_SEEN = 0x8000_0000

MAX_VOCAB_SIZE = (1 << 18) - 1
"""Masses in fixed point of so many entries fit 63 bits."""

DEFINES: dict[str, str] = {
    "PHOTON_SLOT_BYTES": str(SLOT_DTYPE.itemsize),
    "PHOTON_FLAG_GREEDY": f"{FLAG_GREEDY}u",
    "PHOTON_FLAG_REPETITION": f"{FLAG_REPETITION}u",
    "PHOTON_FLAG_COUNTED": f"{FLAG_COUNTED}u",
    "PHOTON_FLAG_ALLOWED_ONLY": f"{FLAG_ALLOWED_ONLY}u",
    "PHOTON_FLAG_BAN": f"{FLAG_BAN}u",
    "PHOTON_MARK_COUNT": f"{MARK_COUNT}u",
    "PHOTON_MARK_SEEN": f"{MARK_SEEN}u",
    "PHOTON_MARK_ALLOWED": f"{MARK_ALLOWED}u",
    "PHOTON_MARK_BANNED": f"{MARK_BANNED}u",
    "PHOTON_MARK_BIASED": f"{MARK_BIASED}u",
}

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedBias:
    """Ascending ids, and what is added to each; equal ids in the order in which they are added."""

    token_ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


def pack_bias(bias: Sequence[tuple[int, float]]) -> PackedBias:
    """A bias list of any order."""
    token_ids = np.array([token_id for token_id, _ in bias], dtype=np.int32)
    values = np.array([value for _, value in bias], dtype=np.float32)
    order = np.argsort(token_ids, kind="stable")
    return PackedBias(token_ids[order], values[order])


def pack_marks(
    *,
    seen: Ids | None = None,
    outputs: Ids | None = None,
    allowed: Ids | None = None,
    banned: Ids | None = None,
    biased: Ids | None = None,
) -> tuple[Ids, npt.NDArray[np.uint32]]:
    """The entries that have any mark, and their words; `outputs` counts how often an id is in it.

    Ids of the other arrays may occur more than once, to no effect.
    """
    marked = [
        (part, np.uint32(mark))
        for part, mark in (
            (seen, MARK_SEEN),
            (allowed, MARK_ALLOWED),
            (banned, MARK_BANNED),
            (biased, MARK_BIASED),
        )
        if part is not None
    ]
    counted = np.zeros(0, dtype=np.int64) if outputs is None else outputs
    token_ids, places = np.unique(
        np.concatenate([counted, *(part for part, _ in marked)]).astype(np.int64), return_inverse=True
    )
    words = np.bincount(places[: len(counted)], minlength=len(token_ids)).astype(np.uint32)
    start = len(counted)
    for part, mark in marked:
        words[places[start : start + len(part)]] |= mark
        start += len(part)
    return token_ids, words


def floor_key(floor: float) -> int:
    """Bits of -s for the lowest float32 s with s >= `floor`; `floor` <= 0."""
    lowest = np.float32(floor)
    if float(lowest) < floor:
        lowest = np.nextafter(lowest, np.float32(math.inf))
    return int(np.abs(lowest).view(np.uint32))
