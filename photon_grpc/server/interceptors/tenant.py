"""For whom a call is made: the caller, or the tenant that a trusted hop states in the metadata.

`photon-tenant` and `photon-priority` are believed from the callers of `auth.trusted_hops` alone, gateways
that know their own users. From anybody else they are refused, not ignored: a client that believes itself
a tenant of its own must not find out by meeting others. The refusal is PERMISSION_DENIED because it
depends on who says it; what a trusted hop states wrongly is INVALID_ARGUMENT. Event loop only.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Set
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import grpc

from photon_grpc.errors import ForbiddenError, InvalidRequestError
from photon_grpc.server.deserialize import Behavior
from photon_grpc.server.interceptors.auth import HEALTH_SERVICE, current_caller
from photon_grpc.telemetry.call_record import current_call
from photon_grpc.telemetry.pseudonyms import Pseudonyms
from photon_grpc.types import GenerationRequest

TENANT_KEY = "photon-tenant"
PRIORITY_KEY = "photon-priority"

# No comma and no space: with them a proxy joins what it was sent twice.
_TENANT = re.compile(r"[A-Za-z0-9._:@/-]{1,128}")
_PRIORITY = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Origin:
    """`tenant` is empty where callers are not told apart; `priority` is None where nobody has stated one,
    and counts before the one in the request."""

    tenant: str = ""
    priority: int | None = None

    def stamp(self, request: GenerationRequest) -> GenerationRequest:
        """The request with what was stated of it, whatever the caller behind the hop asks for."""
        if self.priority is None:
            return request
        return replace(request, scheduling=replace(request.scheduling, priority=self.priority))


_NOBODY = Origin()
# For whom the call is made that is being handled.
current_origin: ContextVar[Origin] = ContextVar("photon_current_origin", default=_NOBODY)


class TenantInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Inside the auth interceptor where there is one; `trusted_hops` are names of callers."""

    def __init__(self, trusted_hops: Set[str], max_priority: int, pseudonyms: Pseudonyms) -> None:
        self._trusted_hops = trusted_hops
        self._max_priority = max_priority
        self._pseudonyms = pseudonyms

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        # Probes and reflection are made for nobody.
        if (
            handler is None
            or handler.request_streaming
            or handler_call_details.method.startswith(f"/{HEALTH_SERVICE}/")
        ):
            return handler
        if handler.response_streaming:
            return handler._replace(unary_stream=self._told(handler.unary_stream))
        return handler._replace(unary_unary=self._told(handler.unary_unary))

    def _told(self, behavior: Behavior) -> Behavior:
        async def told(request: Any, context: Any) -> Any:
            origin = self._origin(context)
            record = current_call.get()
            if record is not None and origin.tenant:
                record.log_context["tenant"] = self._pseudonyms.of(origin.tenant)
            token = current_origin.set(origin)
            try:
                return await behavior(request, context)
            finally:
                current_origin.reset(token)

        return told

    def _origin(self, context: Any) -> Origin:
        """Raises ForbiddenError or InvalidRequestError."""
        caller = current_caller.get()
        name = caller.name if caller is not None else ""
        stated: dict[str, str] = {}
        for key, value in context.invocation_metadata() or ():
            if key not in (TENANT_KEY, PRIORITY_KEY):
                continue
            if name not in self._trusted_hops:
                raise ForbiddenError(f"only callers of auth.trusted_hops may state {key}")
            if key in stated:
                raise InvalidRequestError.of(key, "must be there once")
            stated[key] = value
        if not stated:
            return Origin(name)
        return Origin(
            tenant=_tenant(stated[TENANT_KEY]) if TENANT_KEY in stated else name,
            priority=self._priority(stated[PRIORITY_KEY]) if PRIORITY_KEY in stated else None,
        )

    def _priority(self, value: str) -> int:
        if _PRIORITY.fullmatch(value) is None or int(value) > self._max_priority:
            raise InvalidRequestError.of(PRIORITY_KEY, f"must be a number from 0 to {self._max_priority}")
        return int(value)


def _tenant(value: str) -> str:
    if _TENANT.fullmatch(value) is None:
        raise InvalidRequestError.of(TENANT_KEY, f"must match {_TENANT.pattern}")
    return value
