"""What each tenant is entitled to: the settings of all, and the file that says otherwise for some.

`tenants.file` is TOML: `[tenants.NAME]` for a tenant, `[default]` for everyone who has no such table. A key
that is missing in the one is that of the other, and one that is missing there is the setting of the same
name in the section `tenants`. Event loop only.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from photon_grpc.options import TenantOptions
from photon_grpc.watched_file import WatchedFile

__all__ = ["TenantTerms", "TenantTermsOf"]


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """The terms of one tenant. 0 is no limit for the five quotas, None none for the priority.

    `weight` is its shares of a contended engine, `max_priority` what a higher priority is taken for,
    `kv_share` the part of the KV blocks that it may hold while others wait.
    """

    weight: float = 1.0
    max_concurrent_requests: int = 0
    requests_per_s: float = 0.0
    request_burst: int = 100
    tokens_per_s: float = 0.0
    token_burst: int = 1 << 20
    max_priority: int | None = None
    kv_share: float = 1.0


@dataclass(frozen=True, slots=True)
class _Key:
    """What a value may be: `rule` says it to whoever has to correct it."""

    is_whole: bool
    rule: str
    allows: Callable[[float], bool]


_COUNT = _Key(True, "a whole number, 0 for any number", lambda value: value >= 0)
_RATE = _Key(False, "a number, 0 for any number", lambda value: value >= 0)
_BURST = _Key(True, "a whole number above 0", lambda value: value > 0)
_KEYS: Mapping[str, _Key] = {
    # Beyond these a tenant would wait for ever, and that is what quotas are for.
    "weight": _Key(False, "a number from 0.001 to 1000", lambda value: 0.001 <= value <= 1000),
    "max_concurrent_requests": _COUNT,
    "requests_per_s": _RATE,
    "request_burst": _BURST,
    "tokens_per_s": _RATE,
    "token_burst": _BURST,
    "max_priority": _Key(True, "a whole number, at least 0", lambda value: value >= 0),
    "kv_share": _Key(False, "a number above 0, at most 1", lambda value: 0 < value <= 1),
}
assert [*_KEYS] == [field.name for field in fields(TenantTerms)]


@dataclass(frozen=True, slots=True)
class _Content:
    default: TenantTerms
    tenants: Mapping[str, TenantTerms]


class TenantTermsOf:
    """Call it with a tenant's name for its terms; equal terms are the same object while nothing changes."""

    def __init__(self, options: TenantOptions) -> None:
        """Raises ConfigError, with the place, for a file that cannot be used."""
        base = TenantTerms(
            max_concurrent_requests=options.max_concurrent_requests,
            requests_per_s=options.requests_per_s,
            request_burst=options.request_burst,
            tokens_per_s=options.tokens_per_s,
            token_burst=options.token_burst,
        )
        self._base = _Content(base, {})
        self._file: WatchedFile[_Content] | None = None
        if options.file:
            self._file = WatchedFile("tenants.file", options.file, lambda content: _parse(content, base))

    def __call__(self, tenant: str) -> TenantTerms:
        content = self._file.current() if self._file is not None else self._base
        return content.tenants.get(tenant, content.default)


def _parse(content: bytes, base: TenantTerms) -> _Content:
    """The terms in a file. Raises ValueError, which names the place by its number: it ends up in the log,
    where no tenant's name is written."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    # So that a file that is still being written is not taken for one with fewer tenants.
    if text and not text.endswith("\n"):
        raise ValueError("the last line does not end")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Some of its messages quote a table's name as well.
        place = re.search(r"\(at [^()]*\)$", str(error))
        raise ValueError(f"not valid TOML {place[0] if place else ''}".rstrip()) from None
    for number, name in enumerate(tables, 1):
        if name not in ("default", "tenants"):
            raise ValueError(f"key {number} of the file: expected [default] or [tenants.NAME]")
    default = _terms("default", tables.get("default", {}), base)
    tenants = tables.get("tenants", {})
    if not isinstance(tenants, dict):
        raise ValueError("tenants: expected [tenants.NAME]")
    return _Content(
        default,
        {
            name: _terms(f"tenants, {number}", table, default)
            for number, (name, table) in enumerate(tenants.items(), 1)
        },
    )


def _terms(place: str, table: Any, base: TenantTerms) -> TenantTerms:
    if not isinstance(table, dict):
        raise ValueError(f"[{place}] expected a table")
    for name, value in table.items():
        key = _KEYS.get(name)
        if key is None:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            raise ValueError(
                f"[{place}] {name}: no such key" + (f"; did you mean {near[0]}?" if near else "")
            )
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (key.is_whole and not isinstance(value, int)) or not key.allows(value):
            raise ValueError(f"[{place}] {name} = {value!r}: must be {key.rule}")
    return replace(base, **table)
