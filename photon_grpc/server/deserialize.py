"""Registers servicers so that request bytes are parsed where a parse error becomes a proper status.

grpcio answers bytes that its deserializer refuses with UNKNOWN and the name of a Python class. So the
handlers are registered without a deserializer and parse first thing in their own body, inside the
error interceptor and behind every check that needs only metadata. Knows nothing of what a message
means. Event loop only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from photon_grpc.errors import ConfigError, MalformedMessageError, OutOfMemoryError

MessageT = TypeVar("MessageT", bound=Message)
Behavior = Callable[[Any, Any], Awaitable[Any]]


# How upb says in a DecodeError that memory was refused to it; the bytes may be fine.
_NO_MEMORY = "Arena alloc failed"


def require_compiled_protobuf() -> None:
    """Raises ConfigError where protobuf is its pure-Python self, which recurses as deep as a message of a
    stranger says (CVE-2025-4565); upb has a limit."""
    implementation = api_implementation.Type()
    if implementation != "upb":
        raise ConfigError(
            f"protobuf parses with its {implementation!r} implementation, which hostile messages can crash: "
            "upb is needed; is PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION set?"
        )


def parse(message_class: type[MessageT], data: bytes) -> MessageT:
    """The message in `data`. Raises MalformedMessageError for truncated or garbled bytes, strings that
    are not UTF-8 and nesting deeper than protobuf allows, OutOfMemoryError where there is no room for it."""
    try:
        message = message_class()
        message.ParseFromString(data)
    except MemoryError as error:
        raise OutOfMemoryError from error
    except DecodeError as error:
        if str(error).endswith(_NO_MEMORY):
            raise OutOfMemoryError from error
        raise MalformedMessageError(f"the request is no valid {message_class.DESCRIPTOR.name}") from error
    return message


def _parsing(message_class: type[Message], behavior: Behavior) -> Behavior:
    async def parse_and_call(data: bytes, context: Any) -> Any:
        return await behavior(parse(message_class, data), context)

    return parse_and_call


def add_service(server: grpc.aio.Server, service: ServiceDescriptor, servicer: object) -> None:
    """Register every method of `service` with the coroutine method of the same name on `servicer`.

    Each takes the parsed request and the context; one that streams writes its responses with
    `context.write`. Raises AttributeError for a method that the servicer lacks.
    """
    handlers = {}
    for method in service.methods:
        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make(
            _parsing(GetMessageClass(method.input_type), getattr(servicer, method.name)),
            request_deserializer=None,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    server.add_registered_method_handlers(service.full_name, handlers)
