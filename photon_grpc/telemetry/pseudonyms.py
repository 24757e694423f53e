"""What stands in logs for the name of a caller or a tenant."""

from __future__ import annotations

import hmac
import os

__all__ = ["Pseudonyms"]

_KEY_BYTES = 32
# Enough to tell thousands of tenants apart, and short enough for a line.
_SHOWN_BYTES = 8


class Pseudonyms:
    """Keyed hashes (HMAC-SHA256) of names, under a key that is drawn here and ends with the object.

    Equal names have equal hashes, so the lines of one tenant belong together; whoever reads them cannot
    find the name by hashing all that come into question. Any thread.
    """

    def __init__(self) -> None:
        self._key = os.urandom(_KEY_BYTES)

    def of(self, name: str) -> str:
        """Sixteen hexadecimal digits."""
        return hmac.digest(self._key, name.encode(), "sha256")[:_SHOWN_BYTES].hex()
