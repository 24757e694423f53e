"""Clients that were generated long ago, in whatever language: what they know of the contract still holds.

Fault 29 of the list names generators of other languages. What a generator can differ in is the schema it was
run on, so here is a client of the first one; that others read today's files is seen in `tests/e2e`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from photon_grpc.v1 import control_pb2, inference_pb2, model_pb2
from tests.support import first_schema
from tests.support.first_schema import call, filled, old
from tests.support.grpc_harness import Harness, rich_error
from tests.support.scripted_service import scripted_service

ROOT = Path(__file__).resolve().parents[2]
TODAY = (inference_pb2, model_pb2, control_pb2)


def load_check_proto() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_proto", ROOT / "tools" / "check_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def today(descriptor: Descriptor) -> type[Message]:
    """Today's class of an old message."""
    *outer, name = descriptor.full_name.removeprefix("photon.v1.").split(".")
    for module in TODAY:
        scope: Any = module
        for part in (*outer, name):
            scope = getattr(scope, part, None)
        if scope is not None:
            return scope  # type: ignore[no-any-return]
    raise AssertionError(f"{descriptor.full_name} is gone")


MESSAGES = [m for m in first_schema.messages() if not m.GetOptions().map_entry]


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with scripted_service(tmp_path) as harness:
        yield harness


def method(service: str, name: str) -> Any:
    (found,) = [s for s in first_schema.services() if s.name == service]
    return found.methods_by_name[name]


INFERENCE, MODEL, CONTROL = "InferenceService", "ModelService", "ControlService"


def old_spec(**values: Any) -> Any:
    spec = old("GenerationSpec")(token_ids={"ids": [5, 6, 7]}, **values)
    spec.stop.max_tokens, spec.stop.ignore_eos = 4, True
    spec.output.token_ids = True
    return spec


def test_fault_29_no_name_number_or_type_has_changed() -> None:
    check_proto = load_check_proto()
    first = first_schema.FILES.__class__(file=first_schema.OURS)
    then, now = check_proto.contract_of(first), check_proto.contract_of(check_proto.compile_files())
    assert check_proto.breaking(then, now) == []
    # The schema has grown since, or this would be a comparison of a thing with itself.
    assert now.keys() > then.keys()
    assert "rpc photon.v1.InferenceService.BatchGenerate" in now.keys() - then.keys()


@pytest.mark.parametrize("descriptor", MESSAGES, ids=lambda d: d.full_name.removeprefix("photon.v1."))
def test_fault_29_old_bytes_and_old_json_mean_the_same_today(descriptor: Descriptor) -> None:
    new_class = today(descriptor)
    for message in filled(descriptor):
        data = message.SerializeToString(deterministic=True)
        read = new_class.FromString(data)
        assert not _unknown(read), "a field that was known is not known any more"
        assert read.SerializeToString(deterministic=True) == data
        text = json_format.MessageToJson(message, sort_keys=True)
        assert json_format.MessageToJson(read, sort_keys=True) == text
        assert json_format.Parse(text, new_class()) == read
        # And what today's server writes, as far as it was known then.
        assert type(message).FromString(read.SerializeToString()) == message


def _unknown(message: Message) -> bool:
    cleaned = type(message)()
    cleaned.CopyFrom(message)
    cleaned.DiscardUnknownFields()  # type: ignore[attr-defined]  # not in the stubs
    return cleaned.SerializeToString(deterministic=True) != message.SerializeToString(deterministic=True)


async def test_fault_29_an_old_client_generates(harness: Harness) -> None:
    request = old("GenerateRequest")(request_id="old", spec=old_spec(sampling={"seed": 11}))
    response = await call(harness.public, method(INFERENCE, "Generate"), request)
    assert response.request_id == "old"
    (completion,) = response.completions
    assert list(completion.token_ids) == [5, 6, 7, 5]
    assert completion.finish.reason == inference_pb2.FINISH_REASON_MAX_TOKENS
    assert (response.usage.prompt_tokens, response.usage.output_tokens) == (3, 4)
    assert (response.effective.sampling.seed, response.effective.stop.max_tokens) == (11, 4)

    request = old("StreamGenerateRequest")(request_id="old", spec=old_spec(), chunk_policy={"max_tokens": 2})
    events = [e async for e in call(harness.public, method(INFERENCE, "StreamGenerate"), request)]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-2:]) == ("started", ["finished", "summary"])
    tokens = [token for event in events for token in event.delta.token_ids]
    assert tokens == [5, 6, 7, 5]


async def test_fault_29_an_old_client_does_not_mind_what_came_later(harness: Harness) -> None:
    """validate_only was there at first, its admission was not; nor was the size of batches."""
    request = old("GenerateRequest")(spec=old_spec(), validate_only=True)
    response = await call(harness.public, method(INFERENCE, "Generate"), request)
    assert response.prompt.num_tokens == 3
    assert _unknown(response), "the server writes something that is new"
    info = await call(harness.public, method(MODEL, "GetModelInfo"), old("GetModelInfoRequest")())
    assert _unknown(info.capabilities)
    for field in info.capabilities.DESCRIPTOR.fields:
        assert field.is_repeated or info.capabilities.HasField(field.name), field.name
    server = await call(harness.public, method(MODEL, "GetServerInfo"), old("GetServerInfoRequest")())
    assert server.minimum_client_revision == 1 < server.schema_revision


async def test_fault_29_a_server_does_not_mind_what_came_later_either(harness: Harness) -> None:
    """A client newer than the server: fields without a name here, everywhere in its request."""
    spec = inference_pb2.GenerationSpec.FromString(old_spec().SerializeToString() + _field(900, b"later"))
    data = inference_pb2.GenerateRequest(request_id="new").SerializeToString()
    body = spec.SerializeToString()
    data += _field(2, body) + _field(901, b"later")
    generate = harness.public.unary_unary(
        "/photon.v1.InferenceService/Generate",
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )
    response = await generate(data)
    assert list(response.completions[0].token_ids) == [5, 6, 7, 5]


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes on the wire."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


async def test_fault_29_every_old_method_answers(harness: Harness) -> None:
    """Each of the first schema's methods, with a request that was right then."""
    requests: dict[str, Any] = {
        "Generate": old("GenerateRequest")(spec=old_spec()),
        "StreamGenerate": old("StreamGenerateRequest")(spec=old_spec()),
        "Tokenize": old("TokenizeRequest")(text="hello", return_offsets=True),
        "Detokenize": old("DetokenizeRequest")(token_ids=[40, 41]),
        "GetModelInfo": old("GetModelInfoRequest")(),
        "GetServerInfo": old("GetServerInfoRequest")(),
        "Abort": old("AbortRequest")(all={}, reason="test"),
        "GetLoad": old("GetLoadRequest")(),
    }
    methods = [m for service in first_schema.services() for m in service.methods]
    assert {m.name for m in methods} == requests.keys()
    answers = {}
    for made in methods:
        channel = harness.admin if made.containing_service.name == CONTROL else harness.public
        reply = call(channel, made, requests[made.name])
        answers[made.name] = [m async for m in reply] if made.server_streaming else await reply
    assert answers["Tokenize"].num_tokens == len(answers["Tokenize"].token_ids) > 0
    assert len(answers["Tokenize"].offsets) == 2 * answers["Tokenize"].num_tokens
    assert answers["Detokenize"].text
    assert answers["GetModelInfo"].model == "scripted"
    assert answers["GetLoad"].total_kv_blocks > 0
    assert answers["Abort"].aborted == 0


async def test_fault_29_an_old_client_reads_refusals(harness: Harness) -> None:
    request = old("GenerateRequest")(request_id="old", spec=old_spec(adapter="lora"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(harness.public, method(INFERENCE, "Generate"), request)
    rich = rich_error(caught.value)
    assert (rich.code, rich.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_FEATURE")
    assert rich.fields == ["spec.adapter"]
    abort = old("AbortRequest")(request_id="nobody")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(harness.admin, method(CONTROL, "Abort"), abort)
    assert rich_error(caught.value).reason == "REQUEST_NOT_FOUND"
