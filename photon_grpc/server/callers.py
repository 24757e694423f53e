"""Who may call: the file of callers, read again when it changes.

One caller a line, `name role[,role] credential`; `#` begins a comment. The credential is
`sha256:HEX`, the hash of a bearer token, `token:TEXT`, the token itself, or `san:NAME`, a subject
alternative name of a client certificate. A running server that finds a file it cannot use goes on with
the last good one. Knows no call and no method. Event loop only.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from photon_grpc.watched_file import WatchedFile

__all__ = ["ROLES", "Caller", "Callers"]

ROLES = frozenset({"infer", "inspect", "control"})

_MIN_TOKEN_CHARS = 16
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Caller:
    """One line of the file."""

    name: str
    roles: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Entries:
    tokens: tuple[tuple[bytes, Caller], ...]  # by SHA-256 digest
    sans: dict[str, Caller]


class Callers:
    """The callers of a file. Looks at the file with each question."""

    def __init__(self, file: str) -> None:
        """Raises ConfigError, with the line, for a file that cannot be used."""
        self._file = WatchedFile("auth.callers_file", file, _parse)

    def has(self, name: str) -> bool:
        """Whether some line is of this name."""
        entries = self._file.current()
        return any(caller.name == name for _, caller in entries.tokens) or any(
            caller.name == name for caller in entries.sans.values()
        )

    def by_token(self, token: str) -> Caller | None:
        """Whose token that is. Takes equally long for every token of a length."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, caller in self._file.current().tokens:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def by_sans(self, names: Iterable[str]) -> Caller | None:
        """Whose certificate has these subject alternative names; the first that is known counts."""
        sans = self._file.current().sans
        return next((sans[name] for name in names if name in sans), None)


def _parse(content: bytes) -> _Entries:
    """The callers in a file. Raises ValueError, which names the line and never shows a token."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    # So that a file that is still being written is not taken for one with fewer callers.
    if text and not text.endswith("\n"):
        raise ValueError("the last line does not end")
    tokens: dict[bytes, Caller] = {}
    sans: dict[str, Caller] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 3:
            raise ValueError(f"line {number}: expected `name role[,role] credential`")
        name, roles, credential = words
        caller = Caller(name, frozenset(roles.split(",")))
        if not caller.roles <= ROLES:
            raise ValueError(f"line {number}: a role is one of {', '.join(sorted(ROLES))}")
        kind, _, value = credential.partition(":")
        if kind == "san" and value:
            if value in sans:
                raise ValueError(f"line {number}: an earlier line has this name")
            sans[value] = caller
            continue
        digest = _digest(kind, value, number)
        if digest in tokens:
            raise ValueError(f"line {number}: an earlier line has this token")
        tokens[digest] = caller
    if not tokens and not sans:
        raise ValueError("names no caller")
    return _Entries(tuple(tokens.items()), sans)


def _digest(kind: str, value: str, number: int) -> bytes:
    if kind == "token":
        if len(value) < _MIN_TOKEN_CHARS:
            raise ValueError(f"line {number}: a token has at least {_MIN_TOKEN_CHARS} characters")
        return hashlib.sha256(value.encode()).digest()
    if kind != "sha256":
        raise ValueError(f"line {number}: a credential is sha256:HEX, token:TEXT or san:NAME")
    try:
        digest = bytes.fromhex(value)
    except ValueError:
        digest = b""
    if len(digest) != _DIGEST_BYTES:
        raise ValueError(f"line {number}: sha256 has {2 * _DIGEST_BYTES} hexadecimal digits")
    return digest
