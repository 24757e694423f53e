"""A client made from the contract as it first landed, beside today's modules in one process.

`first_schema.binpb` is what `protoc --include_imports --descriptor_set_out` makes of the `proto` folder of
commit 4f7bcd3, the first that had one. It is never made anew: it stands for clients that are out there.
The messages live in a pool of their own, since protobuf refuses one name twice in one pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

FILES = descriptor_pb2.FileDescriptorSet.FromString(
    Path(__file__).with_name("first_schema.binpb").read_bytes()
)
_POOL = descriptor_pool.DescriptorPool()
for _file in FILES.file:
    _POOL.Add(_file)
OURS = [file for file in FILES.file if file.package == "photon.v1"]


def old(name: str) -> Any:
    """The class of a message of `photon.v1` as it was."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"photon.v1.{name}"))


def services() -> list[ServiceDescriptor]:
    """The services as they were."""
    names = [service.name for file in OURS for service in file.service]
    return [_POOL.FindServiceByName(f"photon.v1.{name}") for name in names]


def messages() -> Iterator[Descriptor]:
    """Every message as it was, nested ones included."""

    def below(descriptor: Descriptor) -> Iterator[Descriptor]:
        yield descriptor
        for nested in descriptor.nested_types:
            yield from below(nested)

    for file in OURS:
        for message in file.message_type:
            yield from below(_POOL.FindMessageTypeByName(f"photon.v1.{message.name}"))


def call(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> Any:
    """Make a call as a stub of that time would."""
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    return make(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )(request)


def filled(descriptor: Descriptor, depth: int = 0) -> list[Message]:
    """Messages in which every field has a value that is not its default, as many as it takes for all the
    members of every oneof to occur."""
    alternatives = max((len(oneof.fields) for oneof in descriptor.oneofs), default=1)
    return [_filled(descriptor, turn, depth) for turn in range(alternatives)]


def _filled(descriptor: Descriptor, turn: int, depth: int) -> Message:
    message = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Struct":
        message["key"] = "value"  # type: ignore[index]  # protobuf gives Struct the methods of a dict
        return message
    for number, field in enumerate(descriptor.fields, start=1):
        oneof = field.containing_oneof
        if oneof is not None and oneof.fields[turn % len(oneof.fields)] is not field:
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[number] = 1.5
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            part = _filled(field.message_type, turn, depth + 1)
            if field.is_repeated:
                getattr(message, field.name).append(part)
            else:
                getattr(message, field.name).CopyFrom(part)
        elif field.is_repeated:
            getattr(message, field.name).append(_value(field, number))
        else:
            setattr(message, field.name, _value(field, number))
    return message


def _value(field: FieldDescriptor, number: int) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"text {number}"
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type == FieldDescriptor.TYPE_ENUM:
        return field.enum_type.values[-1].number
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return number + 0.5
    return number
