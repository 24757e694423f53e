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
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from photon_grpc.errors import MalformedMessageError

MessageT = TypeVar("MessageT", bound=Message)
Behavior = Callable[[Any, Any], Awaitable[Any]]


def parse(message_class: type[MessageT], data: bytes) -> MessageT:
    """The message in `data`. Raises MalformedMessageError for truncated or garbled bytes, strings that
    are not UTF-8 and nesting deeper than protobuf allows."""
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
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
