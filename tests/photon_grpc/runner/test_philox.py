"""Philox against the published vectors, and the noise against its definition in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.runner.philox import NOISE_RANGE, NoiseKeys, philox4x32

# "philox4x32 10" in kat_vectors of the Random123 distribution: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 once more, on Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def _noise(seed: int, index: int, position: int, token_id: int) -> float:
    words = _scalar([token_id // 4, position, index, 0], [seed % 2**32, seed >> 32])
    return -math.log(-math.log((words[token_id % 4] + 0.5) / 2**32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in _hex(counter))
    k0, k1 = (np.array([word], dtype=np.uint64) for word in _hex(key))
    assert [int(word[0]) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == _hex(expected)
    assert _scalar(_hex(counter), _hex(key)) == _hex(expected)


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1), st.integers(0, 7), st.integers(0, 2**32 - 1), st.integers(0, 300_000)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_single_entries_follow_the_definition(rows: list[tuple[int, int, int, int]]) -> None:
    seeds, indices, positions, token_ids = zip(*rows, strict=True)
    noise = NoiseKeys(np.array(seeds, dtype=np.uint64), indices, positions).gumbel_at(
        torch.tensor(token_ids).reshape(-1, 1)
    )
    assert noise.dtype == torch.float64
    expected = [_noise(*row) for row in rows]
    assert noise.flatten().tolist() == pytest.approx(expected, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 1000])
def test_all_entries_are_the_single_entries(vocab_size: int) -> None:
    keys = NoiseKeys([1, 2**63], [0, 3], [5, 0])
    chosen = torch.arange(vocab_size).flip(0).expand(2, -1)
    assert torch.equal(keys.gumbel_all(vocab_size).flip(1), keys.gumbel_at(chosen))


def test_seed_index_and_position_each_change_the_noise() -> None:
    base = NoiseKeys([7], [0], [0]).gumbel_all(64)
    for other in (
        NoiseKeys([8], [0], [0]),
        NoiseKeys([7 + 2**32], [0], [0]),
        NoiseKeys([7], [1], [0]),
        NoiseKeys([7], [0], [1]),
    ):
        assert not torch.equal(other.gumbel_all(64), base)


def test_noise_has_gumbel_moments() -> None:
    noise = NoiseKeys([3], [0], [11]).gumbel_all(1 << 18)
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_noise_range_covers_the_extreme_words() -> None:
    lowest, highest = (-math.log(-math.log((word + 0.5) / 2**32)) for word in (0, 2**32 - 1))
    assert pytest.approx(highest - lowest, abs=1e-6) == NOISE_RANGE
