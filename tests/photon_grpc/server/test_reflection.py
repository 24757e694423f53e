"""Reflection under both names, read by clients that know nothing of our modules."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from photon_grpc.server.reflection import V1_SERVICE, V1ALPHA_SERVICE, v1_descriptor
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import Harness, quick_options, rich_error, running_server

PUBLIC = ["grpc.health.v1.Health", "photon.v1.InferenceService", "photon.v1.ModelService"]
ADMIN = ["grpc.health.v1.Health", "photon.v1.ControlService"]


async def ask(channel: grpc.aio.Channel, service: str, **question: str) -> Any:
    """One question. The messages of both packages are the same bytes; the names are checked below."""
    call = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(**question))
    response = await call.read()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    return response


def pool_of(files: Sequence[bytes]) -> descriptor_pool.DescriptorPool:
    """A pool from nothing but what the server sent; fails when a dependency is missing."""
    protos = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]
    by_name = {proto.name: proto for proto in protos}
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(name: str) -> None:
        if name not in added:
            added.add(name)
            for dependency in by_name[name].dependency:
                add(dependency)
            pool.Add(by_name[name])

    for name in by_name:
        add(name)
    return pool


def listener(harness: Harness, name: str) -> grpc.aio.Channel:
    return harness.public if name == "public" else harness.admin


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize("service", [V1_SERVICE, V1ALPHA_SERVICE])
@pytest.mark.parametrize(("name", "served"), [("public", PUBLIC), ("admin", ADMIN)])
async def test_list_and_describe_all_that_is_served(service: str, name: str, served: list[str]) -> None:
    async with running_server(FakeFrontDoor(), quick_options({"reflection": "public"})) as harness:
        channel = listener(harness, name)
        listed = [
            s.name for s in (await ask(channel, service, list_services="")).list_services_response.service
        ]
        assert sorted(listed) == sorted([*served, V1_SERVICE, V1ALPHA_SERVICE])
        for symbol in listed:
            response = await ask(channel, service, file_containing_symbol=symbol)
            files = response.file_descriptor_response.file_descriptor_proto
            pool = pool_of(files)
            for method in pool.FindServiceByName(symbol).methods:
                package = symbol.rpartition(".")[0]
                assert method.input_type.full_name.startswith(f"{package}.")
                assert method.output_type.full_name.startswith(f"{package}.")


def test_the_v1_descriptor_differs_from_v1alpha_in_its_package_alone() -> None:
    derived, original = (
        descriptor_pb2.FileDescriptorProto.FromString(descriptor.serialized_pb)
        for descriptor in (v1_descriptor(), reflection_pb2.DESCRIPTOR)
    )
    assert derived.name == "grpc/reflection/v1/reflection.proto"
    original.name = derived.name
    original.ClearField("options")
    assert str(original).replace("v1alpha", "v1") == str(derived)
    assert v1_descriptor() is v1_descriptor()


@pytest.mark.parametrize("service", [V1_SERVICE, V1ALPHA_SERVICE])
async def test_unknown_symbols_and_files(service: str) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        for question in ({"file_containing_symbol": "no.such.Thing"}, {"file_by_filename": "no/such.proto"}):
            response = await ask(harness.admin, service, **question)
            assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.usefixtures("each_listener")
@pytest.mark.parametrize("setting", ["admin", "public", "off"])
async def test_where_reflection_is_served(setting: str) -> None:
    on = {"admin": {"admin"}, "public": {"admin", "public"}, "off": set()}[setting]
    async with running_server(FakeFrontDoor(), quick_options({"reflection": setting})) as harness:
        for name in ("admin", "public"):
            channel = listener(harness, name)
            if name in on:
                response = await ask(channel, V1_SERVICE, list_services="")
                assert response.list_services_response.service
            else:
                # Nothing is written: a write would race with the refusal.
                refused = channel.stream_stream(f"/{V1_SERVICE}/ServerReflectionInfo")()
                assert await refused.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("service", [V1_SERVICE, V1ALPHA_SERVICE])
async def test_bytes_that_are_no_question_are_refused_as_everywhere(service: str) -> None:
    async with running_server(FakeFrontDoor()) as harness:
        call = harness.admin.stream_stream(f"/{service}/ServerReflectionInfo")()
        await call.write(b"\x0a\x02\xff\xfe")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert rich_error(caught.value).reason == "MALFORMED_MESSAGE"
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("each_listener")
async def test_the_stock_client_calls_a_method_it_learnt_by_reflection() -> None:
    def learn_and_call(target: str) -> str:
        with grpc.insecure_channel(target) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName("photon.v1.InferenceService").FindMethodByName("Generate")
            request_class = message_factory.GetMessageClass(method.input_type)
            response_class = message_factory.GetMessageClass(method.output_type)
            request = request_class()
            request.spec.text = "hello"
            call = channel.unary_unary(
                "/photon.v1.InferenceService/Generate",
                request_class.SerializeToString,
                response_class.FromString,
            )
            return str(call(request, timeout=10).completions[0].text)

    async with running_server(FakeFrontDoor(), quick_options({"reflection": "public"})) as harness:
        assert await asyncio.to_thread(learn_and_call, harness.target) == " tok tok tok"
