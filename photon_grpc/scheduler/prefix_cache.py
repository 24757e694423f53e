"""Chained block hashes: the name of a full KV block is its tokens and all that came before them.

`hash(block) = SHA-256(hash(previous block) || tokens)`, and the first block's predecessor is the hash
of the request's sharing scope. Two blocks with one name therefore hold the same keys and values, and
nobody outside a scope can name a block of it. SHA-256 because a collision would show one caller the
continuation of another's prompt.

A scope is a tenant, or a part of one: whether a prefix hits can be told from the time to the first token,
so prompts that were shared across tenants could be guessed from outside. Its name is keyed, so that block
names tell nothing and cannot be computed outside the engine that made them.
"""

from __future__ import annotations

import hmac
from array import array
from collections.abc import Sequence
from hashlib import sha256

KEY_BYTES = 32
_LENGTH_BYTES = 4


def scope_root(key: bytes, tenant: str, cache_salt: str) -> bytes:
    """The predecessor of a scope's first blocks: HMAC-SHA256 under `key` of the tenant and the salt.

    The tenant's length comes first, so no salt makes one tenant's scope another's; a salt can only part
    the requests of its own tenant.
    """
    name = tenant.encode()
    message = len(name).to_bytes(_LENGTH_BYTES, "big") + name + cache_salt.encode()
    return hmac.digest(key, message, "sha256")


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
