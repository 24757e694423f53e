"""Every way in which a request can reach the engine, with one face: what does it say to this request?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from photon_grpc.client import Request
from photon_grpc.errors import RequestError
from photon_grpc.llm import LLM, GenerationParams
from photon_grpc.offline import OfflineSource
from photon_grpc.types import ChatInput, ChatMessage, Prompt, Role
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.support.grpc_harness import RichError, rich_error, rich_item_error

__all__ = ["BatchWay", "GenerateWay", "LlmWay", "OfflineWay", "StreamWay", "Way"]

_ANSWER_S = 60.0
_ROLES = {1: Role.SYSTEM, 2: Role.USER, 3: Role.ASSISTANT, 4: Role.TOOL}


class Way(Protocol):
    """A request in its fullest form goes in; a way need not be able to say all of it."""

    def can_say(self, request: pb.StreamGenerateRequest) -> bool: ...

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        """None where it is served to its end, else the refused fields by their paths in the request."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateWay:
    """A unary call."""

    stub: inference_pb2_grpc.InferenceServiceStub

    def can_say(self, request: pb.StreamGenerateRequest) -> bool:
        return not request.HasField("chunk_policy")

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        message = pb.GenerateRequest(request_id=request.request_id, spec=request.spec)
        try:
            self.stub.Generate(message, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return _invalid_fields(error)
        return None


@dataclass(frozen=True, slots=True)
class StreamWay:
    """A stream, read to its end."""

    stub: inference_pb2_grpc.InferenceServiceStub

    def can_say(self, request: pb.StreamGenerateRequest) -> bool:
        return True

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        try:
            for _ in self.stub.StreamGenerate(request, timeout=_ANSWER_S):
                pass
        except grpc.RpcError as error:
            return _invalid_fields(error)
        return None


@dataclass(frozen=True, slots=True)
class BatchWay:
    """The second item of a batch; the first must be served whatever becomes of it."""

    stub: inference_pb2_grpc.InferenceServiceStub

    def can_say(self, request: pb.StreamGenerateRequest) -> bool:
        # The ids of items are longer than that of their call, which has a bound of its own.
        return not request.HasField("chunk_policy") and not request.request_id

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        first = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5, 6, 7]), stop=pb.StopParams(max_tokens=1))
        message = pb.BatchGenerateRequest(specs=[first, request.spec])
        items = {item.item: item for item in self.stub.BatchGenerate(message, timeout=_ANSWER_S)}
        assert items[0].HasField("response")
        if items[1].HasField("response"):
            return None
        fields = _fields_of(rich_item_error(items[1].error))
        assert all(field.startswith("specs[1].") for field in fields)
        return [field.replace("specs[1].", "spec.") for field in fields]


def _invalid_fields(error: grpc.RpcError) -> list[str]:
    return _fields_of(rich_error(error))


def _fields_of(rich: RichError) -> list[str]:
    assert rich.code is grpc.StatusCode.INVALID_ARGUMENT, rich
    return rich.fields


_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "n", "logit_bias", "allowed_token_ids"),
)
_LLM_NAMES: Mapping[str, str] = {
    **{f"spec.sampling.{name}": name for name in _SAMPLING},
    **{f"spec.stop.{name}": name for name in ("max_tokens", "min_tokens", "ignore_eos", "time_limit")},
    "spec.stop.strings": "stop",
    "spec.stop.token_ids": "stop_token_ids",
    "spec.output.top_logprobs": "logprobs",
    "spec.output.prompt_top_logprobs": "prompt_logprobs",
}
_PROMPTS = {"spec.text", "spec.token_ids.ids", "spec.chat.messages", "spec.chat.template_args"}


@dataclass(frozen=True, slots=True)
class LlmWay:
    """The Python API."""

    llm: LLM

    def can_say(self, request: pb.StreamGenerateRequest) -> bool:
        return dict(_leaves(request)).keys() <= _LLM_NAMES.keys() | _PROMPTS

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        said = {_LLM_NAMES[path]: value for path, value in _leaves(request) if path in _LLM_NAMES}
        try:
            self.llm.generate(_prompt(request.spec), GenerationParams(**said))
        except RequestError as error:
            return [f"spec.{violation.field}" for violation in error.violations]
        return None


_OFFLINE_NAMES: Mapping[str, str] = {
    **{f"spec.sampling.{name}": name for name in ("temperature", "top_p", "top_k", "seed")},
    **{f"spec.stop.{name}": name for name in ("max_tokens", "ignore_eos")},
    "spec.stop.strings": "stop",
}
_OFFLINE_PROMPTS = {"spec.text", "spec.chat.messages"}


@dataclass(frozen=True, slots=True)
class OfflineWay:
    """The command line without a server."""

    source: OfflineSource

    def can_say(self, request: pb.StreamGenerateRequest) -> bool:
        if request.spec.WhichOneof("input") == "chat" and not request.spec.chat.messages:
            return False
        return self._with_text(request).keys() <= _OFFLINE_NAMES.keys() | _OFFLINE_PROMPTS

    def refused_fields(self, request: pb.StreamGenerateRequest) -> list[str] | None:
        leaves = self._with_text(request)
        said = {_OFFLINE_NAMES[path]: value for path, value in leaves.items() if path in _OFFLINE_NAMES}
        messages = tuple((_ROLES[m.role].value, m.content) for m in request.spec.chat.messages)
        asked = Request(text=leaves.get("spec.text", ""), messages=messages, **said)
        try:
            for _ in self.source.stream(asked):
                pass
        except RequestError as error:
            return [f"spec.{violation.field}" for violation in error.violations]
        return None

    def _with_text(self, request: pb.StreamGenerateRequest) -> dict[str, Any]:
        """It knows no token ids: where they do not matter, a text of as many takes their place."""
        leaves = dict(_leaves(request))
        if leaves.get("spec.token_ids.ids") == (5, 6, 7):
            del leaves["spec.token_ids.ids"]
            # And the BOS before them.
            leaves["spec.text"] = "\x01\x02"
        return leaves


def _leaves(message: Message, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is set, messages that are values of their own (and repeated ones) as one."""
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if isinstance(value, Duration):
            yield name, value.ToNanoseconds() / 1e9
        elif field.is_repeated and field.message_type and field.message_type.GetOptions().map_entry:
            yield name, dict(value)
        elif field.is_repeated:
            yield name, tuple(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and not isinstance(value, Struct):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _prompt(spec: pb.GenerationSpec) -> Prompt:
    match spec.WhichOneof("input"):
        case "text":
            return str(spec.text)
        case "token_ids":
            return tuple(spec.token_ids.ids)
        case _:
            messages = tuple(ChatMessage(_ROLES[m.role], m.content) for m in spec.chat.messages)
            return ChatInput(messages, _plain(spec.chat.template_args))


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Struct) else value
