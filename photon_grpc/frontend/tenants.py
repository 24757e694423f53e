"""What each tenant may use: requests at the same time, requests per second, tokens per second.

A tenant is a name that the transport vouches for; empty where callers are not told apart, and then all of
them together are one tenant. What it may use is in its terms, which may change while it is here: new terms
count for what begins from then on. Event loop only; the clock is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from photon_grpc.errors import QuotaExceededError
from photon_grpc.frontend.tenant_terms import TenantTerms, TenantTermsOf
from photon_grpc.options import TenantOptions

__all__ = ["Bucket", "Lease", "Tenants"]

# Until one of the tenant's own calls ends; nobody knows when that is.
_BUSY_WAIT_S = 1.0
# Tenants that are remembered before the idle ones among them are forgotten.
_MANY_TENANTS = 1024


class Bucket:
    """Holds at most `size`, refilled at `rate` per second; full at first. A rate of 0 is no limit."""

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate = rate
        self._size = size
        self._level = size
        self._updated = now

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` can be taken: 0 now, infinite never."""
        if not self._rate:
            return 0.0
        self._refill(now)
        if amount > self._size:
            return math.inf
        return max(0.0, (amount - self._level) / self._rate)

    def take(self, now: float, amount: float) -> None:
        """Take what `wait` has said is there."""
        if self._rate:
            self._refill(now)
            self._level -= amount

    def give_back(self, now: float, amount: float) -> None:
        """Of what was taken, this was not used."""
        if not self._rate:
            return
        self._refill(now)
        self._level = min(self._size, self._level + amount)

    def is_full(self, now: float) -> bool:
        """Nothing is missing: the bucket need not be remembered."""
        self._refill(now)
        return self._level >= self._size

    def change(self, rate: float, size: float, now: float) -> None:
        """From now on another rate and size; what is missing stays missing, as far as the size goes."""
        self._refill(now)
        missing = self._size - self._level if self._rate else 0.0
        self._rate, self._size = rate, size
        self._level = size - min(missing, size)

    def _refill(self, now: float) -> None:
        elapsed, self._updated = now - self._updated, now
        self._level = min(self._size, self._level + elapsed * self._rate)


@dataclass(slots=True, eq=False)
class _Tenant:
    terms: TenantTerms
    requests: Bucket
    tokens: Bucket
    num_live: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """One live request of a tenant; use inside `with`, or `close` it."""

    _tenants: Tenants
    _tenant: _Tenant
    terms: TenantTerms
    """Those of the moment at which the request came."""
    used_tokens: int = 0
    """Prompt and output; set by whoever knows, before the end."""
    _reserved: int = 0
    _is_closed: bool = field(default=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def reserve(self, num_tokens: int) -> None:
        """Take the most that the request can use. Raises QuotaExceededError."""
        self._tenants.reserve(self._tenant, num_tokens)
        self._reserved = num_tokens

    def close(self) -> None:
        """The request has ended: what it reserved and did not use goes back. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._tenants.left(self._tenant, max(0, self._reserved - self.used_tokens))


class Tenants:
    """The books of all tenants."""

    def __init__(self, options: TenantOptions, *, clock: Callable[[], float]) -> None:
        """Raises ConfigError for a `tenants.file` that cannot be used."""
        self._terms_of = TenantTermsOf(options)
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._tenants)

    def terms(self, name: str) -> TenantTerms:
        """What the tenant may have now."""
        return self._terms_of(name)

    def check(self, name: str, num_tokens: int) -> None:
        """Raise what `enter`, and then `reserve`, would raise now; counts nothing."""
        now, terms = self._clock(), self._terms_of(name)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = _new(terms, now)
        else:
            _follow(tenant, terms, now)
        _check_entry(tenant, now)
        _check_tokens(tenant, now, num_tokens)

    def enter(self, name: str) -> Lease:
        """Count a request of the tenant `name`. Raises QuotaExceededError, and has counted nothing then."""
        now, terms = self._clock(), self._terms_of(name)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._add(name, terms, now)
        else:
            _follow(tenant, terms, now)
        _check_entry(tenant, now)
        tenant.requests.take(now, 1)
        tenant.num_live += 1
        return Lease(self, tenant, terms)

    def _add(self, name: str, terms: TenantTerms, now: float) -> _Tenant:
        if len(self._tenants) >= _MANY_TENANTS:
            self._tenants = {n: t for n, t in self._tenants.items() if not _is_idle(t, now)}
        self._tenants[name] = tenant = _new(terms, now)
        return tenant

    # --- from leases ----------------------------------------------------------------------------

    def reserve(self, tenant: _Tenant, num_tokens: int) -> None:
        """Take tokens of the bucket; called by the lease, once. Raises QuotaExceededError."""
        now = self._clock()
        _check_tokens(tenant, now, num_tokens)
        tenant.tokens.take(now, num_tokens)

    def left(self, tenant: _Tenant, num_unused: int) -> None:
        """A request has ended; called by the lease, once."""
        tenant.num_live -= 1
        tenant.tokens.give_back(self._clock(), num_unused)


def _new(terms: TenantTerms, now: float) -> _Tenant:
    return _Tenant(
        terms=terms,
        requests=Bucket(terms.requests_per_s, terms.request_burst, now),
        tokens=Bucket(terms.tokens_per_s, terms.token_burst, now),
    )


def _follow(tenant: _Tenant, terms: TenantTerms, now: float) -> None:
    """The file of tenants may have changed since the last request."""
    if tenant.terms is not terms:
        tenant.terms = terms
        tenant.requests.change(terms.requests_per_s, terms.request_burst, now)
        tenant.tokens.change(terms.tokens_per_s, terms.token_burst, now)


def _check_entry(tenant: _Tenant, now: float) -> None:
    limit = tenant.terms.max_concurrent_requests
    if limit and tenant.num_live >= limit:
        raise QuotaExceededError("requests at the same time", _BUSY_WAIT_S)
    if wait := tenant.requests.wait(now, 1):
        raise QuotaExceededError("requests per second", wait)


def _check_tokens(tenant: _Tenant, now: float, num_tokens: int) -> None:
    if wait := tenant.tokens.wait(now, num_tokens):
        raise QuotaExceededError("tokens per second", wait)


def _is_idle(tenant: _Tenant, now: float) -> bool:
    return not tenant.num_live and tenant.requests.is_full(now) and tenant.tokens.is_full(now)
