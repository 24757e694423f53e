"""What stands for a name in logs."""

from __future__ import annotations

import re

from photon_grpc.telemetry.pseudonyms import Pseudonyms


def test_equal_names_have_equal_hashes_and_others_others() -> None:
    pseudonyms = Pseudonyms()
    names = ["alice", "alicf", "", "é" * 200, *(f"tenant-{number}" for number in range(1000))]
    hashes = [pseudonyms.of(name) for name in names]
    assert [pseudonyms.of(name) for name in names] == hashes
    assert len(set(hashes)) == len(names)
    assert all(re.fullmatch("[0-9a-f]{16}", text) for text in hashes)


def test_a_hash_cannot_be_found_by_hashing_names_elsewhere() -> None:
    """The key is drawn anew for each object, and with that for each process."""
    assert len({Pseudonyms().of("alice") for _ in range(10)}) == 10
