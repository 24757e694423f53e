"""Server reflection under both of its names, grpc.reflection.v1alpha and grpc.reflection.v1.

grpcio-reflection serves v1alpha only; the messages of v1 are the same under another package, so the
one servicer answers for both, and the v1 descriptor is derived from the v1alpha one. Event loop only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from photon_grpc.server.deserialize import parse

V1ALPHA_SERVICE = str(reflection.SERVICE_NAME)
V1_SERVICE = "grpc.reflection.v1.ServerReflection"

_V1ALPHA_PACKAGE = "grpc.reflection.v1alpha"
_V1_PACKAGE = "grpc.reflection.v1"
_V1_FILE = "grpc/reflection/v1/reflection.proto"


def v1_descriptor() -> FileDescriptor:
    """The descriptor of grpc/reflection/v1/reflection.proto, registered on first use."""
    pool = descriptor_pool.Default()
    with contextlib.suppress(KeyError):
        return pool.FindFileByName(_V1_FILE)
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name = _V1_FILE
    file.package = _V1_PACKAGE
    file.ClearField("options")  # they name v1alpha's packages and call the file deprecated
    for message in file.message_type:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
            method.output_type = method.output_type.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(_V1_FILE)


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Let `server` describe `services` (full names) and reflection itself.

    As in `deserialize.add_service` requests are parsed where a parse error becomes a proper status.
    """
    v1_descriptor()
    servicer = reflection.aio.ReflectionServicer((*services, V1ALPHA_SERVICE, V1_SERVICE))

    async def parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        async for data in requests:
            yield parse(reflection_pb2.ServerReflectionRequest, data)

    async def reflect(
        requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        async for response in servicer.ServerReflectionInfo(parsed(requests), context):
            yield response

    handler = grpc.stream_stream_rpc_method_handler(
        reflect,
        request_deserializer=None,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for service in (V1ALPHA_SERVICE, V1_SERVICE):
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        server.add_registered_method_handlers(service, handlers)
