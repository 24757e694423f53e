"""Lets a call through to its handler if the caller may make it; decides by metadata and certificate alone.

Every method needs a role, and one that the table does not name is refused to everybody; only health is
open. A bearer token counts before a client certificate. A refused caller's message is never parsed.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import grpc
import structlog

from photon_grpc.errors import AccessError, ForbiddenError, UnauthenticatedError
from photon_grpc.server.callers import Caller, Callers
from photon_grpc.server.deserialize import Behavior
from photon_grpc.telemetry.pseudonyms import Pseudonyms

HEALTH_SERVICE = "grpc.health.v1.Health"

# By service, or by one method where it differs from its service.
ROLE_OF: Mapping[str, str] = {
    "photon.v1.InferenceService": "infer",
    "photon.v1.ModelService": "inspect",
    "photon.v1.ControlService": "control",
    "photon.v1.ControlService/GetLoad": "inspect",
    "photon.v1.ControlService/WatchState": "inspect",
    "grpc.reflection.v1.ServerReflection": "inspect",
    "grpc.reflection.v1alpha.ServerReflection": "inspect",
}

# Who makes the call that is being handled; None where callers are not told apart.
current_caller: ContextVar[Caller | None] = ContextVar("photon_current_caller", default=None)

_SCHEME = "bearer "
# How long a stream that is refused may take to send its first message.
_FIRST_MESSAGE_S = 1.0
_log = structlog.get_logger(__name__)


def role_of(method: str) -> str | None:
    """The role that `/service/method` needs; None for a method that nobody may call."""
    path = method.removeprefix("/")
    return ROLE_OF.get(path, ROLE_OF.get(path.partition("/")[0]))


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Inside the error interceptor, which turns what is raised here into a status."""

    def __init__(self, callers: Callers, pseudonyms: Pseudonyms) -> None:
        self._callers = callers
        self._pseudonyms = pseudonyms

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(f"/{HEALTH_SERVICE}/"):
            return handler
        if handler.unary_unary:
            return handler._replace(unary_unary=self._guard(handler.unary_unary, method))
        if handler.unary_stream:
            return handler._replace(unary_stream=self._guard(handler.unary_stream, method))
        if handler.stream_stream:
            return handler._replace(stream_stream=self._guard_both_ways(handler.stream_stream, method))
        return None  # a kind of method that no service has: unimplemented rather than open

    def _guard(self, behavior: Behavior, method: str) -> Behavior:
        async def guarded(request: Any, context: Any) -> Any:
            token = current_caller.set(self._admit(context, method))
            try:
                return await behavior(request, context)
            finally:
                current_caller.reset(token)

        return guarded

    def _guard_both_ways(self, behavior: Callable[[Any, Any], AsyncIterator[Any]], method: str) -> Any:
        async def guarded(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            try:
                self._admit(context, method)
            except AccessError:
                await _skip_one(messages)
                raise
            async for response in behavior(messages, context):
                yield response

        return guarded

    def _admit(self, context: Any, method: str) -> Caller:
        """Who calls. Raises UnauthenticatedError or ForbiddenError."""
        caller = self._identify(context)
        if caller is None:
            raise UnauthenticatedError
        if role_of(method) not in caller.roles:
            _log.warning("call forbidden", method=method, tenant=self._pseudonyms.of(caller.name))
            raise ForbiddenError
        return caller

    def _identify(self, context: Any) -> Caller | None:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                if not isinstance(value, str) or not value.lower().startswith(_SCHEME):
                    return None
                return self._callers.by_token(value[len(_SCHEME) :].strip())
        names = context.auth_context().get("x509_subject_alternative_name", ())
        return self._callers.by_sans(name.decode(errors="replace") for name in names)


async def _skip_one(messages: AsyncIterator[bytes]) -> None:
    """Wait for the first message of a stream, for a while; it is not parsed.

    A client whose stream ends while it still writes that message is told INTERNAL by its own gRPC library,
    whatever the server's status says.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_FIRST_MESSAGE_S):
            await anext(messages, None)
