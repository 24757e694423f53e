"""Counter-based random numbers: Philox4x32-10 and the Gumbel noise of the sampler.

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a
function of a counter and a key and has no state, so the noise of a draw is a function of what is
drawn, not of when or next to what.

The noise of vocabulary entry `v` at output position `p` of completion `i` under seed `s`:

    key     = (s mod 2^32, s div 2^32)
    counter = (v div 4, p, i, 0)
    x       = word (v mod 4) of philox(counter, key)        32 bits
    u       = (x + 0.5) / 2^32                              float64, exact, never 0 or 1
    noise   = -log(-log(u))                                 float64; Gumbel(0, 1)

so that a whole vocabulary takes one evaluation per four entries and any single entry is at hand
without the others. The noise lies within `NOISE_RANGE`.

Pure; knows neither requests nor models. Used on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10

# Beyond this many evaluations at once the intermediate arrays fall out of the cache, and rows one after
# the other are about three times as fast.
_CACHE_BLOCKS = 1 << 15

NOISE_RANGE = -math.log(-math.log1p(-(2.0**-33))) + math.log(33 * math.log(2.0))
"""Largest noise less the smallest: a score lower than another by more can never win a draw."""


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> list[Words]:
    """The four 32-bit words (as uint64 arrays) for 32-bit counters and keys of broadcastable shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _M0
        p1 = c2 * _M1
        c0 = (p1 >> _SHIFT) ^ c1 ^ k0
        c2 = (p0 >> _SHIFT) ^ c3 ^ k1
        c1 = p1 & _MASK
        c3 = p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


class NoiseKeys:
    """What the noise of some rows depends on beside the vocabulary entry: arrays of [rows, 1]."""

    __slots__ = ("_index", "_key", "_position")

    def __init__(self, seeds: npt.ArrayLike, indices: npt.ArrayLike, positions: npt.ArrayLike) -> None:
        """`seeds` are 64-bit, completion `indices` and output `positions` 32-bit unsigned integers."""
        seed = np.asarray(seeds, dtype=np.uint64).reshape(-1, 1)
        self._key = (seed & _MASK, seed >> _SHIFT)
        self._index = np.asarray(indices, dtype=np.uint64).reshape(-1, 1)
        self._position = np.asarray(positions, dtype=np.uint64).reshape(-1, 1)

    def select(self, rows: Sequence[int]) -> NoiseKeys:
        """The keys of some of the rows."""
        chosen = np.asarray(rows, dtype=np.intp)
        seed = self._key[0][chosen] | (self._key[1][chosen] << _SHIFT)
        return NoiseKeys(seed, self._index[chosen], self._position[chosen])

    def gumbel_all(self, vocab_size: int) -> torch.Tensor:
        """Noise of every vocabulary entry, float64 [rows, vocab_size]."""
        blocks = np.arange((vocab_size + 3) // 4, dtype=np.uint64).reshape(1, -1)
        num_rows = len(self._index)
        if num_rows > 1 and num_rows * blocks.size > _CACHE_BLOCKS:
            return torch.cat([self.select([row]).gumbel_all(vocab_size) for row in range(num_rows)])
        words = np.stack(self._words(blocks), axis=-1)
        return _gumbel(words.reshape(num_rows, -1)[:, :vocab_size])

    def gumbel_at(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Noise of chosen entries only, float64 [rows, n] for int64 `token_ids` [rows, n]."""
        ids = token_ids.numpy()
        words = np.stack(self._words((ids >> 2).astype(np.uint64)), axis=-1)
        return _gumbel(np.take_along_axis(words, (ids & 3)[..., None], axis=-1)[..., 0])

    def _words(self, blocks: Words) -> list[Words]:
        zero = np.zeros((1, 1), dtype=np.uint64)
        return philox4x32((blocks, self._position, self._index, zero), self._key)


def _gumbel(words: Words) -> torch.Tensor:
    uniform = torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32)
    return uniform.log_().neg_().log_().neg_()
