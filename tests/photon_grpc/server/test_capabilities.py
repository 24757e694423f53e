"""What GetModelInfo promises against what the server does: everything it says works, everything it does not
say is refused with its code and its field, over a real channel.

Driven by the descriptors: a field of a request, a capability or a method without a row here fails the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import model_pb2
from tests.support.grpc_harness import Harness, rich_error, rich_item_error
from tests.support.scripted_service import scripted_service

SPEC = "spec."
MODEL_LEN, VOCAB = 4096, 512
METHODS = ("Generate", "StreamGenerate", "BatchGenerate")


@dataclass(frozen=True)
class Refusal:
    """How a request ends that is not taken; `field` is the first path that it names, empty for none."""

    code: str
    reason: str
    field: str = ""


def invalid(field: str) -> Refusal:
    return Refusal("INVALID_ARGUMENT", "INVALID_FIELD", field)


def unsupported(field: str) -> Refusal:
    return Refusal("UNIMPLEMENTED", "UNSUPPORTED_FEATURE", field)


@dataclass(frozen=True)
class Row:
    """A field: what may stand in it, and what may not and how that ends. `beside` is set along with it."""

    taken: Sequence[Any] = ()
    refused: Sequence[tuple[Any, Refusal]] = ()
    beside: Mapping[str, Any] | None = None


def bounds(path: str, *taken: Any, refused: Sequence[Any]) -> Row:
    """Values that fit, and those that are INVALID_FIELD at the field itself."""
    return Row(taken, [(value, invalid(path)) for value in refused])


def user(content: str = "hello") -> dict[str, Any]:
    return {"role": pb.ChatMessage.ROLE_USER, "content": content}


SECOND = timedelta(seconds=1)
NAN = float("nan")
# By path in the request. Chat is a model with a template here; without one see the capability's row.
FIELDS: dict[str, Row] = {
    "spec.model": Row(["", "scripted"], [("other", Refusal("NOT_FOUND", "MODEL_NOT_FOUND"))]),
    "spec.text": bounds("spec.text", "hello", refused=["", "x" * ((512 << 10) + 1)]),
    "spec.token_ids.ids": Row(
        [[5], [5] * (MODEL_LEN - 3)],
        [
            ([], invalid("spec.token_ids.ids")),
            ([VOCAB], invalid("spec.token_ids.ids[0]")),
            (
                [5] * MODEL_LEN,
                Refusal("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", "spec.token_ids.ids"),
            ),
        ],
    ),
    "spec.chat.messages": Row(
        [[user()], [user()] * 256],
        [
            ([], invalid("spec.chat.messages")),
            ([user()] * 257, invalid("spec.chat.messages")),
            ([{"content": "x"}], invalid("spec.chat.messages[0].role")),
            ([user(), {"role": 9, "content": "x"}], invalid("spec.chat.messages[1].role")),
        ],
    ),
    "spec.chat.template_args": Row(
        [{}],
        [({"nobody_knows": 1}, invalid("spec.chat.template_args"))],
        beside={"chat": {"messages": [user()]}},
    ),
    "spec.chat.continue_final_message": Row([True, False], beside={"chat": {"messages": [user()]}}),
    "spec.sampling.temperature": bounds("spec.sampling.temperature", 0.0, 0.5, 2.0, refused=[-0.1, 2.1, NAN]),
    "spec.sampling.top_p": bounds("spec.sampling.top_p", 0.5, 1.0, refused=[0.0, 1.1, NAN]),
    "spec.sampling.top_k": bounds("spec.sampling.top_k", 0, VOCAB, refused=[VOCAB + 1]),
    "spec.sampling.min_p": bounds("spec.sampling.min_p", 0.0, 1.0, refused=[-0.1, 1.1]),
    "spec.sampling.presence_penalty": bounds(
        "spec.sampling.presence_penalty", -2.0, 2.0, refused=[-2.1, 2.1]
    ),
    "spec.sampling.frequency_penalty": bounds(
        "spec.sampling.frequency_penalty", -2.0, 2.0, refused=[-2.1, 2.1]
    ),
    "spec.sampling.repetition_penalty": bounds(
        "spec.sampling.repetition_penalty", 0.5, 2.0, refused=[0.0, 2.1]
    ),
    "spec.sampling.seed": Row([0, (1 << 64) - 1]),
    "spec.sampling.n": bounds("spec.sampling.n", 1, 8, refused=[0, 9]),
    "spec.sampling.logit_bias": Row(
        [{5: -1.5}, dict.fromkeys(range(300), 1.0)],
        [
            (dict.fromkeys(range(301), 1.0), invalid("spec.sampling.logit_bias")),
            ({5: 100.5}, invalid("spec.sampling.logit_bias[5]")),
            ({VOCAB: 1.0}, invalid(f"spec.sampling.logit_bias[{VOCAB}]")),
        ],
    ),
    "spec.sampling.allowed_token_ids": Row(
        [[5], [7] * 1024],
        [
            ([7] * 1025, invalid("spec.sampling.allowed_token_ids")),
            ([VOCAB], invalid("spec.sampling.allowed_token_ids[0]")),
        ],
    ),
    "spec.stop.max_tokens": bounds("spec.stop.max_tokens", 1, 5, refused=[0, MODEL_LEN]),
    "spec.stop.min_tokens": bounds("spec.stop.min_tokens", 0, 3, refused=[4]),
    "spec.stop.strings": Row(
        [["x"], ["x" * 128] * 16],
        [
            (["x"] * 17, invalid("spec.stop.strings")),
            (["x", ""], invalid("spec.stop.strings[1]")),
            (["x" * 129], invalid("spec.stop.strings[0]")),
        ],
    ),
    "spec.stop.token_ids": Row(
        [[9], [9] * 64],
        [([9] * 65, invalid("spec.stop.token_ids")), ([VOCAB], invalid("spec.stop.token_ids[0]"))],
    ),
    "spec.stop.ignore_eos": Row([True, False]),
    "spec.stop.include_stop": Row([True, False]),
    "spec.stop.time_limit": bounds(
        "spec.stop.time_limit", 60 * SECOND, 900 * SECOND, refused=[0 * SECOND, -SECOND, 901 * SECOND]
    ),
    "spec.constraint.json_schema": Row((), [("{}", unsupported("spec.constraint"))]),
    "spec.constraint.regex": Row((), [("a*", unsupported("spec.constraint"))]),
    "spec.constraint.grammar": Row((), [("root ::= x", unsupported("spec.constraint"))]),
    "spec.constraint.choice.values": Row((), [(["a"], unsupported("spec.constraint"))]),
    "spec.constraint.json_object": Row((), [({}, unsupported("spec.constraint"))]),
    "spec.output.text": Row([True, False]),
    "spec.output.token_ids": Row([True, False]),
    "spec.output.top_logprobs": bounds("spec.output.top_logprobs", 0, 20, refused=[21]),
    "spec.output.prompt_top_logprobs": bounds("spec.output.prompt_top_logprobs", 0, 20, refused=[21]),
    "spec.output.echo_prompt": Row([True, False]),
    "spec.output.skip_special_tokens": Row([True, False]),
    "spec.scheduling.priority": bounds("spec.scheduling.priority", 0, 9, refused=[-1, 10]),
    "spec.scheduling.queue_timeout": bounds(
        "spec.scheduling.queue_timeout", 60 * SECOND, refused=[0 * SECOND, -SECOND, 901 * SECOND]
    ),
    "spec.scheduling.first_token_budget": bounds(
        "spec.scheduling.first_token_budget", 60 * SECOND, refused=[0 * SECOND, -SECOND, 901 * SECOND]
    ),
    "spec.cache.bypass_prefix_cache": Row([True, False]),
    "spec.cache.cache_salt": bounds(
        "spec.cache.cache_salt", "a.b:c_d-1", "x" * 64, refused=["x" * 65, "a b"]
    ),
    "spec.adapter": Row([""], [("lora", unsupported("spec.adapter"))]),
    "spec.add_special_tokens": Row([True, False], beside={"text": "hello"}),
    "spec.truncate_input_tokens": bounds(
        "spec.truncate_input_tokens", 1, MODEL_LEN - 1, refused=[0, MODEL_LEN]
    ),
    "spec.experimental": Row([{}], [({"x": 1}, invalid("spec.experimental"))]),
}
# Beside the spec, by method.
OTHER_FIELDS: dict[str, dict[str, Row]] = {
    "Generate": {
        "request_id": bounds("request_id", "", "a.b:c_d-1", "x" * 128, refused=["x" * 129, "a b"]),
        "validate_only": Row([True, False]),
    },
    "StreamGenerate": {
        "request_id": bounds("request_id", "", "x" * 128, refused=["x" * 129, "a b"]),
        "chunk_policy.max_tokens": bounds("chunk_policy.max_tokens", 1, 256, refused=[0, 257]),
        "chunk_policy.max_delay": bounds(
            "chunk_policy.max_delay", SECOND / 10, SECOND, refused=[0 * SECOND, -SECOND, 2 * SECOND]
        ),
        "resumable": Row([False], [(True, unsupported("resumable"))]),
    },
    "BatchGenerate": {
        "request_id": bounds("request_id", "", "x" * 126, refused=["x" * 127, "a b"]),
    },
    "Tokenize": {
        "model": Row(["", "scripted"], [("other", Refusal("NOT_FOUND", "MODEL_NOT_FOUND"))]),
        "text": bounds("text", "hello", refused=["", "x" * ((512 << 10) + 1)]),
        "chat.messages": Row([[user()]], [([], invalid("chat.messages"))]),
        "chat.template_args": Row(
            [{}], [({"x": 1}, invalid("chat.template_args"))], beside={"chat": {"messages": [user()]}}
        ),
        "chat.continue_final_message": Row([True, False], beside={"chat": {"messages": [user()]}}),
        "add_special_tokens": Row([True, False]),
        "return_offsets": Row([True, False]),
    },
    "Detokenize": {
        "model": Row(["", "scripted"], [("other", Refusal("NOT_FOUND", "MODEL_NOT_FOUND"))]),
        "token_ids": Row(
            [[], [5] * MODEL_LEN],
            [([5] * (MODEL_LEN + 1), invalid("token_ids")), ([VOCAB], invalid("token_ids[0]"))],
        ),
        "skip_special_tokens": Row([True, False]),
    },
}
METHODS_WITH_ROWS = {*METHODS, "Tokenize", "Detokenize"}


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """Paths of all fields; of messages that are not ours, are repeated, or are empty, the field itself."""
    for field in descriptor.fields:
        path = prefix + field.name
        is_message = field.type == FieldDescriptor.TYPE_MESSAGE
        is_ours = is_message and field.message_type.full_name.startswith("photon.")
        if is_ours and field.message_type.fields and not field.is_repeated:
            yield from leaves(field.message_type, f"{path}.")
        else:
            yield path


def assign(message: Any, path: str, value: Any) -> None:
    """Set the field at `path`, present even where the value is empty."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
        message.SetInParent()
    field = message.DESCRIPTOR.fields_by_name[name]
    if isinstance(value, timedelta):
        getattr(message, name).FromTimedelta(value)
    elif field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
        getattr(message, name).SetInParent()
        message.MergeFrom(type(message)(**{name: value}))
    elif field.is_repeated:
        message.ClearField(name)
        message.MergeFrom(type(message)(**{name: value}))
    else:
        setattr(message, name, value)


def base_spec(beside: Mapping[str, Any] | None = None) -> pb.GenerationSpec:
    spec = pb.GenerationSpec(**({"token_ids": {"ids": [5, 6, 7]}} if beside is None else beside))
    spec.stop.max_tokens = 3
    return spec


def generation(method: str, path: str, value: Any, row: Row) -> Any:
    """A request of `method` with one field set, which the base has not."""
    spec = base_spec(row.beside)
    if path.startswith(SPEC):
        assign(spec, path.removeprefix(SPEC), value)
    if method == "BatchGenerate":
        message = pb.BatchGenerateRequest(specs=[spec])
    else:
        message = getattr(pb, f"{method}Request")(spec=spec)
    if not path.startswith(SPEC):
        assign(message, path, value)
    return message


@dataclass
class Outcome:
    """How a call or its one item ended, and what was told of its parameters where it ended well."""

    refusal: Refusal | None
    effective: pb.EffectiveParams | None = None


async def send(harness: Harness, method: str, message: Any) -> Outcome:
    call = getattr(harness.inference, method)(message)
    try:
        if method == "StreamGenerate":
            events = [event async for event in call]
            return Outcome(None, events[0].started.effective)
        if method == "BatchGenerate":
            (item,) = [item async for item in call]
            if item.HasField("error"):
                return Outcome(refusal_of(rich_item_error(item.error)))
            return Outcome(None, item.response.effective)
        response = await call
        return Outcome(None, getattr(response, "effective", None))
    except grpc.aio.AioRpcError as error:
        return Outcome(refusal_of(rich_error(error)))


def refusal_of(rich: Any) -> Refusal:
    return Refusal(rich.code.name, rich.reason, rich.fields[0] if rich.fields else "")


def of_method(refusal: Refusal, method: str) -> Refusal:
    """Paths of a batch's item begin with its place."""
    if method == "BatchGenerate" and refusal.field.startswith(SPEC):
        return Refusal(refusal.code, refusal.reason, "specs[0]." + refusal.field.removeprefix(SPEC))
    return refusal


def plain(value: Any) -> Any:
    """A field's value, or what was asked for, in a form that compares."""
    if isinstance(value, Duration):
        return value.ToTimedelta()
    if isinstance(value, float):
        return pytest.approx(value)
    if isinstance(value, Mapping):
        return {key: pytest.approx(bias) for key, bias in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with scripted_service(tmp_path) as harness:
        yield harness


def test_no_field_and_no_method_is_without_a_row() -> None:
    service = pb.DESCRIPTOR.services_by_name["InferenceService"]
    assert {method.name for method in service.methods} == METHODS_WITH_ROWS
    assert set(FIELDS) == {SPEC + path for path in leaves(pb.GenerationSpec.DESCRIPTOR)}
    for method in service.methods:
        paths = {p for p in leaves(method.input_type) if not p.startswith(SPEC) and p != "specs"}
        assert paths == set(OTHER_FIELDS[method.name]), method.name
    assert {field.name for field in model_pb2.Capabilities.DESCRIPTOR.fields} == set(CAPABILITIES)


@pytest.mark.parametrize("method", METHODS)
async def test_every_field_is_taken_within_its_bounds_and_refused_beyond(
    harness: Harness, method: str
) -> None:
    for path, row in (FIELDS | OTHER_FIELDS[method]).items():
        for value in row.taken:
            outcome = await send(harness, method, generation(method, path, value, row))
            assert outcome.refusal is None, (path, value)
            assert outcome.effective is not None
            section, _, name = path.removeprefix(SPEC).partition(".")
            if section in ("sampling", "stop"):
                # What was used comes back, zero as zero.
                told = getattr(getattr(outcome.effective, section), name)
                assert plain(told) == plain(value), path
        for value, refusal in row.refused:
            outcome = await send(harness, method, generation(method, path, value, row))
            assert outcome.refusal == of_method(refusal, method), (path, value)


@pytest.mark.parametrize("method", ["Tokenize", "Detokenize"])
async def test_every_field_of_the_text_calls(harness: Harness, method: str) -> None:
    def make(path: str, value: Any, row: Row) -> Any:
        message = getattr(pb, f"{method}Request")(**(row.beside or {}))
        if method == "Tokenize" and not row.beside and not path.startswith(("text", "chat")):
            message.text = "hello"
        assign(message, path, value)
        return message

    for path, row in OTHER_FIELDS[method].items():
        for value in row.taken:
            assert (await send(harness, method, make(path, value, row))).refusal is None, (path, value)
        for value, refusal in row.refused:
            assert (await send(harness, method, make(path, value, row))).refusal == refusal, (path, value)


# What GetModelInfo says. Each row: what a capability of this value lets in, and how the rest is refused.

Probe = tuple[Any, Refusal | None]


def spec_with(path: str, value: Any) -> pb.GenerationSpec:
    spec = base_spec()
    assign(spec, path, value)
    return spec


def at_most(path: str, make: Any = lambda number: number) -> Any:
    def probes(limit: int) -> list[Probe]:
        return [
            (spec_with(path, make(limit)), None),
            (spec_with(path, make(limit + 1)), invalid(SPEC + path)),
        ]

    return probes


def if_said(path: str, *values: Any) -> Any:
    def probes(said: bool) -> list[Probe]:
        first, _, _ = path.partition(".")
        is_input = first in {
            field.name for field in pb.GenerationSpec.DESCRIPTOR.oneofs_by_name["input"].fields
        }
        refusal = None if said else unsupported(SPEC + (first if is_input else path))
        return [(spec_with(path, value), refusal) for value in values]

    return probes


def constraints(kinds: Sequence[str]) -> list[Probe]:
    values = {"json_schema": "{}", "regex": "a*", "grammar": "root ::= x", "choice": {"values": ["a"]}}
    fields = pb.Constraint.DESCRIPTOR.oneofs_by_name["kind"].fields
    assert set(kinds) <= {field.name for field in fields}
    return [
        (
            pb.GenerationSpec(text="x", constraint=pb.Constraint(**{field.name: values.get(field.name, {})})),
            None if field.name in kinds else unsupported("spec.constraint"),
        )
        for field in fields
    ]


def batches(limit: int) -> list[Probe]:
    return [
        (pb.BatchGenerateRequest(specs=[base_spec()] * limit), None),
        (pb.BatchGenerateRequest(specs=[base_spec()] * (limit + 1)), invalid("specs")),
    ]


def resuming(said: bool) -> list[Probe]:
    refusal = None if said else unsupported("resumable")
    return [(pb.StreamGenerateRequest(spec=base_spec(), resumable=True), refusal)]


def seeds(said: bool) -> list[Probe]:
    assert said, "a server that does not say so needs another row"
    return [(spec_with("sampling.seed", 7), None)]


CAPABILITIES: dict[str, Any] = {
    "text_input": if_said("text", "hello"),
    "token_ids_input": if_said("token_ids.ids", [5, 6]),
    "chat_input": if_said("chat.messages", [user()]),
    "constraint_kinds": constraints,
    "max_top_logprobs": at_most("output.top_logprobs"),
    "max_prompt_top_logprobs": at_most("output.prompt_top_logprobs"),
    "max_n": at_most("sampling.n"),
    "max_stop_strings": at_most("stop.strings", lambda number: ["x"] * number),
    "priority": if_said("scheduling.priority", 0, 5, 9),
    "cache_salt": if_said("cache.cache_salt", "salt"),
    "resume": resuming,
    "seeded_determinism": seeds,
    "max_batch_items": batches,
}


async def probe(harness: Harness, message: Any) -> Refusal | None:
    """How a spec in a Generate, or a whole request of its own method, ends."""
    if isinstance(message, pb.GenerationSpec):
        return (await send(harness, "Generate", pb.GenerateRequest(spec=message))).refusal
    if isinstance(message, pb.StreamGenerateRequest):
        return (await send(harness, "StreamGenerate", message)).refusal
    try:
        items = [item async for item in harness.inference.BatchGenerate(message)]
    except grpc.aio.AioRpcError as error:
        return refusal_of(rich_error(error))
    assert all(item.HasField("response") for item in items)
    return None


@pytest.mark.parametrize("has_chat_template", [True, False])
async def test_every_capability_is_the_truth(tmp_path: Path, has_chat_template: bool) -> None:
    async with scripted_service(tmp_path, has_chat_template=has_chat_template) as harness:
        info = await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest())
        assert info.capabilities.chat_input is has_chat_template
        for name, probes in CAPABILITIES.items():
            for message, refusal in probes(getattr(info.capabilities, name)):
                assert await probe(harness, message) == refusal, name


async def test_model_and_lengths_are_the_truth(harness: Harness) -> None:
    info = await harness.models.GetModelInfo(model_pb2.GetModelInfoRequest())
    assert await probe(harness, spec_with("model", info.model)) is None
    longest = pb.GenerationSpec(token_ids={"ids": [5]})
    longest.stop.max_tokens, longest.stop.ignore_eos = info.max_output_tokens, True
    response = await harness.inference.Generate(pb.GenerateRequest(spec=longest))
    assert response.usage.output_tokens == info.max_output_tokens
    assert response.effective.model_fingerprint == info.fingerprint
    longest.stop.max_tokens += 1
    assert await probe(harness, longest) == invalid("spec.stop.max_tokens")
    widest = pb.GenerationSpec(token_ids={"ids": [5] * (info.max_context_tokens - 1)})
    assert await probe(harness, widest) is None
    widest.token_ids.ids.append(5)
    refusal = await probe(harness, widest)
    assert refusal == Refusal("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", "spec.token_ids.ids")
    tokenized = await harness.inference.Tokenize(pb.TokenizeRequest(text="hello"))
    assert tokenized.max_context_tokens == info.max_context_tokens


async def test_equal_seeds_give_equal_tokens_and_are_told_where_none_was_asked_for(harness: Harness) -> None:
    asked = base_spec()
    asked.sampling.temperature, asked.output.token_ids = 1.0, True
    first = await harness.inference.Generate(pb.GenerateRequest(spec=asked))
    asked.sampling.seed = first.effective.sampling.seed
    again = await harness.inference.Generate(pb.GenerateRequest(spec=asked))
    assert again.effective == first.effective
    assert again.completions == first.completions


async def test_methods_that_are_not_there_are_unimplemented(harness: Harness) -> None:
    for name in ("ResumeGenerate", "generate", "Embed"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.public.unary_unary(f"/photon.v1.InferenceService/{name}")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
