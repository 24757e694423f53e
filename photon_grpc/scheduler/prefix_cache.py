"""Chained block hashes: the name of a full KV block is its tokens and all that came before them.

`hash(block) = SHA-256(hash(previous block) || tokens)`, and the first block's predecessor is the hash
of the request's cache scope. Two blocks with one name therefore hold the same keys and values, and
nobody outside a scope can name a block of it. SHA-256 because a collision would show one caller the
continuation of another's prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


def scope_root(cache_scope: bytes) -> bytes:
    """The predecessor of a scope's first blocks."""
    return sha256(b"photon/kv/" + cache_scope).digest()


def extend_hashes(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Append to `hashes` until it names the first `num_blocks` full blocks of `token_ids`."""
    assert num_blocks * block_size <= len(token_ids), "only full blocks have a name"
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
        tokens = array("I", token_ids[start : start + block_size])
        parent = sha256(parent + tokens.tobytes()).digest()
        hashes.append(parent)
