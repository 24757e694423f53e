"""Decoding and encoding against the contract's own descriptors, so that no field can be forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from photon_grpc.engine.load import EngineLoad
from photon_grpc.engine.messages import EngineStats
from photon_grpc.errors import InvalidRequestError, RequestError, UnsupportedFeatureError
from photon_grpc.frontend.events import (
    Completion,
    Delta,
    Finished,
    GenerationResult,
    PromptInfo,
    Started,
    Summary,
    Tokenized,
)
from photon_grpc.options import LimitOptions
from photon_grpc.server import convert
from photon_grpc.types import (
    ChatInput,
    ChatMessage,
    ChunkPolicy,
    Finish,
    FinishReason,
    GenerationRequest,
    Role,
    SamplingParams,
    StopParams,
    TokenLogprobs,
    Usage,
)
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import EFFECTIVE, TIMINGS

LIMITS = LimitOptions()


def decode(spec: pb.GenerationSpec, limits: LimitOptions = LIMITS) -> GenerationRequest:
    return convert.decode_generate(pb.GenerateRequest(spec=spec), "id", limits)


def fields_refused(spec: pb.GenerationSpec, limits: LimitOptions = LIMITS) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        decode(spec, limits)
    return [violation.field for violation in caught.value.violations]


# Every leaf of the two requests: set alone, it changes the decoded request or is refused by its path.

REFUSED = {
    "spec.constraint.json_schema": "spec.constraint",
    "spec.constraint.regex": "spec.constraint",
    "spec.constraint.grammar": "spec.constraint",
    "spec.constraint.choice.values": "spec.constraint",
    "spec.constraint.json_object": "spec.constraint",
    "spec.adapter": "spec.adapter",
    "spec.experimental": "spec.experimental",
    "resumable": "resumable",
}
# Decoded elsewhere: the servicer hands these two on itself.
BESIDE_THE_REQUEST = {"request_id", "validate_only"}


def leaves(descriptor: Descriptor, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field in descriptor.fields:
        path = (*prefix, field.name)
        is_message = field.type == FieldDescriptor.TYPE_MESSAGE
        is_map = is_message and field.message_type.GetOptions().map_entry
        is_ours = is_message and field.message_type.full_name.startswith("photon.") and not is_map
        if is_ours and field.message_type.fields and not field.is_repeated:
            yield from leaves(field.message_type, path)
        else:
            yield path


def values_for(field: FieldDescriptor) -> list[Any]:
    """Values of which at least one differs from what the absent field means."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        return [True, False]
    if field.type == FieldDescriptor.TYPE_STRING:
        return ["x"]
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return [0.5]
    return [3]


def set_leaf(message: Any, path: tuple[str, ...]) -> list[Any]:
    """Variants of `message` with only the leaf at `path` set."""
    variants = []
    parent, *_ = [message]
    for name in path[:-1]:
        parent = getattr(parent, name)
        parent.SetInParent()
    field = parent.DESCRIPTOR.fields_by_name[path[-1]]
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    if is_message and field.message_type.GetOptions().map_entry:
        getattr(parent, field.name)[5] = 0.5
        return [message]
    if is_message and field.is_repeated:
        getattr(parent, field.name).add(role=pb.ChatMessage.ROLE_USER, content="x")
        return [message]
    if is_message:
        child = getattr(parent, field.name)
        child.SetInParent()
        if isinstance(child, Duration):
            child.FromMilliseconds(1500)
        elif isinstance(child, Struct):
            child["key"] = "x"
        return [message]
    for value in values_for(field):
        if field.is_repeated:
            getattr(parent, field.name).append(value)
        else:
            setattr(parent, field.name, value)
        copy = type(message)()
        copy.CopyFrom(message)
        variants.append(copy)
    return variants


def leaf_cases() -> list[tuple[type[Any], tuple[str, ...]]]:
    return [
        (message_class, path)
        for message_class in (pb.GenerateRequest, pb.StreamGenerateRequest)
        for path in leaves(message_class.DESCRIPTOR)
        if ".".join(path) not in BESIDE_THE_REQUEST
    ]


def decode_any(message: Any) -> GenerationRequest:
    if isinstance(message, pb.GenerateRequest):
        return convert.decode_generate(message, "id", LIMITS)
    return convert.decode_stream_generate(message, "id", LIMITS)


@pytest.mark.parametrize(("message_class", "path"), leaf_cases(), ids=lambda v: getattr(v, "__name__", None))
def test_no_field_is_ignored(message_class: type[Any], path: tuple[str, ...]) -> None:
    # A parent that is set but empty must not count as the effect of the leaf.
    empty = message_class()
    parent = empty
    for name in path[:-1]:
        parent = getattr(parent, name)
        if name not in ("constraint", "token_ids", "choice"):
            parent.SetInParent()
    refused_as = REFUSED.get(".".join(path))
    outcomes = []
    for variant in set_leaf(message_class(), path):
        try:
            outcomes.append(decode_any(variant))
        except RequestError as error:
            outcomes.append([violation.field for violation in error.violations])
    if refused_as is not None:
        assert [refused_as] in outcomes
        return
    baseline = decode_any(empty)
    assert all(isinstance(outcome, GenerationRequest) for outcome in outcomes)
    assert any(outcome != baseline for outcome in outcomes)


def test_the_walk_sees_every_field_of_the_spec() -> None:
    seen = {path[1] for _, path in leaf_cases() if path[0] == "spec"}
    assert seen == {field.name for field in pb.GenerationSpec.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in pb.SamplingParams.DESCRIPTOR.fields
        if field.has_presence and field.type != FieldDescriptor.TYPE_MESSAGE
    ],
)
def test_zero_is_a_value_and_absent_is_none(name: str) -> None:
    assert getattr(decode(pb.GenerationSpec(sampling=pb.SamplingParams())).sampling, name) is None
    zero = decode(pb.GenerationSpec(sampling=pb.SamplingParams(**{name: 0}))).sampling
    assert getattr(zero, name) == 0
    assert getattr(zero, name) is not None


def test_an_empty_request_is_all_defaults() -> None:
    assert decode(pb.GenerationSpec()) == GenerationRequest(prompt=None, request_id="id")


def test_values_arrive() -> None:
    spec = pb.GenerationSpec(
        model="m",
        token_ids=pb.TokenIds(ids=[1, 2, 4294967295]),
        sampling=pb.SamplingParams(seed=2**64 - 1, logit_bias={7: -2.5}, allowed_token_ids=[3, 4]),
        stop=pb.StopParams(
            strings=["a", "ü"], token_ids=[5], time_limit=Duration(seconds=1, nanos=500_000_000)
        ),
        truncate_input_tokens=9,
    )
    message = pb.StreamGenerateRequest(spec=spec, chunk_policy=pb.ChunkPolicy(max_tokens=4))
    message.chunk_policy.max_delay.FromMilliseconds(20)
    request = convert.decode_stream_generate(message, "id", LIMITS)
    assert request == GenerationRequest(
        prompt=(1, 2, 4294967295),
        request_id="id",
        model="m",
        sampling=SamplingParams(seed=2**64 - 1, logit_bias={7: -2.5}, allowed_token_ids=(3, 4)),
        stop=StopParams(strings=("a", "ü"), token_ids=(5,), time_limit=1.5),
        chunk_policy=ChunkPolicy(max_tokens=4, max_delay=0.02),
        truncate_input_tokens=9,
    )


@pytest.mark.parametrize("kind", ["text", "token_ids", "chat"])
def test_an_empty_input_is_not_a_missing_one(kind: str) -> None:
    spec = pb.GenerationSpec()
    if kind == "text":
        spec.text = ""
    else:
        getattr(spec, kind).SetInParent()
    assert decode(spec).prompt is not None


def test_chat_roles_and_template_args() -> None:
    chat = pb.ChatInput(continue_final_message=True)
    for role in (1, 2, 3, 4):
        chat.messages.add(role=role, content=str(role))
    chat.template_args.update({"flag": True, "n": 3, "x": 0.5, "deep": {"list": [1, None, "s"]}})
    assert decode(pb.GenerationSpec(chat=chat)).prompt == ChatInput(
        messages=(
            ChatMessage(Role.SYSTEM, "1"),
            ChatMessage(Role.USER, "2"),
            ChatMessage(Role.ASSISTANT, "3"),
            ChatMessage(Role.TOOL, "4"),
        ),
        template_args={"flag": True, "n": 3, "x": 0.5, "deep": {"list": [1, None, "s"]}},
        continue_final_message=True,
    )


@pytest.mark.parametrize("role", [0, 5, 99])
def test_unknown_roles_are_refused_by_position(role: int) -> None:
    chat = pb.ChatInput()
    chat.messages.add(role=pb.ChatMessage.ROLE_USER)
    chat.messages.add(role=role)
    assert fields_refused(pb.GenerationSpec(chat=chat)) == ["spec.chat.messages[1].role"]


LENGTHS = [
    ("spec.chat.messages", "max_chat_messages", lambda n: {"chat": {"messages": [{"role": 2}] * n}}),
    ("spec.stop.strings", "max_stop_strings", lambda n: {"stop": {"strings": ["x"] * n}}),
    ("spec.stop.token_ids", "max_stop_token_ids", lambda n: {"stop": {"token_ids": [1] * n}}),
    (
        "spec.sampling.logit_bias",
        "max_logit_bias",
        lambda n: {"sampling": {"logit_bias": dict.fromkeys(range(n), 1.0)}},
    ),
    (
        "spec.sampling.allowed_token_ids",
        "max_allowed_token_ids",
        lambda n: {"sampling": {"allowed_token_ids": [1] * n}},
    ),
]


@pytest.mark.parametrize(("path", "limit", "build"), LENGTHS, ids=[case[0] for case in LENGTHS])
def test_repeated_fields_are_counted_at_the_limit(path: str, limit: str, build: Any) -> None:
    maximum = getattr(LIMITS, limit)
    decode(pb.GenerationSpec(**build(maximum)))
    assert fields_refused(pb.GenerationSpec(**build(maximum + 1))) == [path]


def test_an_overlong_field_is_refused_without_a_look_at_its_elements() -> None:
    class Untouchable:
        def __len__(self) -> int:
            return 17

        def __iter__(self) -> Iterator[str]:
            raise AssertionError("touched")

    decoder = convert._Decoder(LIMITS)
    assert not decoder.fits("spec.stop.strings", Untouchable(), 16)


def test_all_violations_come_together() -> None:
    spec = pb.GenerationSpec(stop={"strings": ["x"] * 99, "token_ids": [1] * 99})
    spec.scheduling.queue_timeout.seconds = -1
    spec.experimental["a"] = 1
    assert fields_refused(spec) == [
        "spec.experimental",
        "spec.stop.strings",
        "spec.stop.token_ids",
        "spec.scheduling.queue_timeout",
    ]


DURATION_PATHS = [
    "spec.stop.time_limit",
    "spec.scheduling.queue_timeout",
    "spec.scheduling.first_token_budget",
]
BAD_DURATIONS = [
    (-1, 0),
    (0, -1),
    (1, -1),
    (-1, 1),
    (0, 1_000_000_000),
    (0, -(2**31)),
    (2**63 - 1, 0),
    (-(2**63), 0),
]


@pytest.mark.parametrize("path", DURATION_PATHS)
@pytest.mark.parametrize(("seconds", "nanos"), BAD_DURATIONS)
def test_durations_that_are_none(path: str, seconds: int, nanos: int) -> None:
    spec = pb.GenerationSpec()
    _, parent, name = path.split(".")
    getattr(getattr(spec, parent), name).CopyFrom(Duration(seconds=seconds, nanos=nanos))
    assert fields_refused(spec) == [path]


@given(st.floats(min_value=0, max_value=1e6))
def test_durations_keep_their_nanoseconds(seconds: float) -> None:
    spec = pb.GenerationSpec(stop=pb.StopParams(time_limit=convert.encode_duration(seconds)))
    decoded = decode(spec).stop.time_limit
    assert decoded is not None
    assert math.isclose(decoded, seconds, rel_tol=1e-12, abs_tol=0.5e-9)


def nested(depth: int) -> Struct:
    struct = Struct()
    inner = struct
    for _ in range(depth - 1):
        inner = inner.fields["k"].struct_value
    inner.fields["k"].bool_value = True
    return struct


def with_args(struct: Struct) -> pb.GenerationSpec:
    return pb.GenerationSpec(chat=pb.ChatInput(template_args=struct))


def test_template_args_depth() -> None:
    decode(with_args(nested(LIMITS.max_template_args_depth)))
    assert fields_refused(with_args(nested(LIMITS.max_template_args_depth + 1))) == [
        "spec.chat.template_args"
    ]


def test_template_args_list_depth() -> None:
    struct = Struct()
    value = struct.fields["k"]
    for _ in range(LIMITS.max_template_args_depth):
        value = value.list_value.values.add()
    value.bool_value = True
    assert fields_refused(with_args(struct)) == ["spec.chat.template_args"]


@pytest.mark.parametrize("kind", ["string", "key", "list"])
def test_template_args_size(kind: str) -> None:
    size = LIMITS.max_template_args_bytes
    struct = Struct()
    if kind == "string":
        struct["k"] = "x" * size
    elif kind == "key":
        struct["x" * size] = 1
    else:
        struct["k"] = [True] * size
    assert fields_refused(with_args(struct)) == ["spec.chat.template_args"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_template_args_numbers_are_finite(number: float) -> None:
    struct = Struct()
    struct.fields["k"].number_value = number
    assert fields_refused(with_args(struct)) == ["spec.chat.template_args"]


def test_template_args_are_as_large_as_their_compact_json() -> None:
    values = {"k": [1, -2.5, 1e300, True, False, None, "é", {}, []], "other": {"a": [[]], "b": {}}}
    struct = Struct()
    struct.update(values)
    size = len(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())
    # Struct knows no integers, and of whole numbers the shorter form is what a template writes.
    size += len(str(int(1e300))) - len("1e+300")
    decode(with_args(struct), LimitOptions(max_template_args_bytes=size))
    assert fields_refused(with_args(struct), LimitOptions(max_template_args_bytes=size - 1)) == [
        "spec.chat.template_args"
    ]


def test_template_args_value_without_kind() -> None:
    struct = Struct()
    struct.fields["k"].SetInParent()
    assert fields_refused(with_args(struct)) == ["spec.chat.template_args"]


def test_resumable_false_asks_for_nothing() -> None:
    convert.decode_stream_generate(pb.StreamGenerateRequest(resumable=False), "id", LIMITS)
    with pytest.raises(UnsupportedFeatureError):
        convert.decode_stream_generate(pb.StreamGenerateRequest(resumable=True), "id", LIMITS)


def test_tokenize_input() -> None:
    assert convert.decode_tokenize(pb.TokenizeRequest(text="x"), LIMITS) == "x"
    with pytest.raises(InvalidRequestError) as missing:
        convert.decode_tokenize(pb.TokenizeRequest(), LIMITS)
    assert [v.field for v in missing.value.violations] == ["input"]
    chat = pb.ChatInput(messages=[pb.ChatMessage(role=0)])
    with pytest.raises(InvalidRequestError) as bad_role:
        convert.decode_tokenize(pb.TokenizeRequest(chat=chat), LIMITS)
    assert [v.field for v in bad_role.value.violations] == ["chat.messages[0].role"]


def test_detokenize_ids_are_counted() -> None:
    assert convert.decode_token_ids(pb.DetokenizeRequest(token_ids=[1, 2]), 2) == (1, 2)
    with pytest.raises(InvalidRequestError):
        convert.decode_token_ids(pb.DetokenizeRequest(token_ids=[1, 2, 3]), 2)


# Encoding.


def test_delta_with_logprobs() -> None:
    delta = Delta(
        index=1,
        text="ü",
        token_ids=(4, 5),
        logprobs=(TokenLogprobs(-0.5, ((4, -0.5), (9, -1.5))), TokenLogprobs(-2.0, ((8, -0.25),))),
        num_tokens=2,
    )
    response = convert.encode_event(delta, "id", 7)
    assert (response.request_id, response.seq, response.WhichOneof("event")) == ("id", 7, "delta")
    assert list(response.delta.token_ids) == [4, 5]
    assert list(response.delta.logprobs.values) == [-0.5, -2.0]
    assert [list(top.token_ids) for top in response.delta.logprobs.top] == [[4, 9], [8]]
    assert [list(top.logprobs) for top in response.delta.logprobs.top] == [[-0.5, -1.5], [-0.25]]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.text(max_size=5), st.lists(st.integers(0, 1 << 20), max_size=4)),
        max_size=12,
    )
)
def test_a_message_that_is_filled_again_is_that_of_its_own_event(
    parts: list[tuple[int, str, list[int]]],
) -> None:
    """Across the change of the object, with one other event between."""
    encoder = convert.EventEncoder("id")
    seq = 0
    for _ in range(convert._DELTAS_PER_MESSAGE - 6):
        seq += 1
        encoder.encode_delta(Delta(1, "x", (7, 8, 9), (), 3))
    for index, text, token_ids in parts:
        delta = Delta(index, text, tuple(token_ids), (), len(token_ids))
        for message in (encoder.encode_delta(delta), encoder.encode(Finished(0, Finish(FinishReason.EOS)))):
            seq += 1
            assert message.seq == seq
            if message.HasField("delta"):
                expected = convert.encode_event(delta, "id", seq)
                assert message.SerializeToString() == expected.SerializeToString()


def test_logprobs_without_alternatives_have_no_top() -> None:
    response = convert.encode_event(Delta(0, "", (1,), (TokenLogprobs(-1.0),), 1), "id", 1)
    assert list(response.delta.logprobs.values) == [-1.0]
    assert not response.delta.logprobs.top
    assert not convert.encode_event(Delta(0, "", (1,), (), 1), "id", 1).delta.HasField("logprobs")


def test_prompt_logprobs_are_parallel_to_the_prompt() -> None:
    prompt = PromptInfo(2, (1, 2), (None, TokenLogprobs(-1.0, ((2, -1.0),))))
    message = convert.encode_event(Started(prompt, EFFECTIVE), "id", 1).started.prompt
    assert math.isnan(message.logprobs.values[0])
    assert message.logprobs.values[1] == -1.0
    assert [len(top.token_ids) for top in message.logprobs.top] == [0, 1]


def test_effective_params_state_every_scalar() -> None:
    effective = convert.encode_effective(EFFECTIVE)
    for part in (effective.sampling, effective.stop):
        for field in part.DESCRIPTOR.fields:
            if field.has_presence and field.type != FieldDescriptor.TYPE_MESSAGE:
                assert part.HasField(field.name), field.name
    assert effective.sampling.seed == 7
    assert dict(effective.sampling.logit_bias) == {5: -1.5}
    assert not effective.stop.HasField("time_limit")


@pytest.mark.parametrize("reason", list(FinishReason))
def test_finish_reasons_have_the_numbers_and_names_of_the_contract(reason: FinishReason) -> None:
    encoded = convert.encode_finish(Finish(reason)).reason
    assert pb.FinishReason.Name(encoded) == f"FINISH_REASON_{reason.name}"


def test_every_finish_reason_of_the_contract_is_known() -> None:
    assert {value.number for value in pb.FinishReason.DESCRIPTOR.values} == {0, *map(int, FinishReason)}


@pytest.mark.parametrize(
    ("finish", "matched"),
    [
        (Finish(FinishReason.STOP, stop_string="x"), "stop_string"),
        (Finish(FinishReason.STOP, stop_token_id=0), "stop_token_id"),
        (Finish(FinishReason.EOS, eos_token_id=0), "eos_token_id"),
        (Finish(FinishReason.MAX_TOKENS), None),
    ],
)
def test_what_matched(finish: Finish, matched: str | None) -> None:
    assert convert.encode_event(Finished(2, finish), "id", 1).finished.finish.WhichOneof("matched") == matched


def test_summary_and_result() -> None:
    summary = convert.encode_event(Summary(Usage(4, 1, 3), TIMINGS), "id", 9).summary
    assert (summary.usage.prompt_tokens, summary.usage.cached_prompt_tokens, summary.usage.output_tokens) == (
        4,
        1,
        3,
    )
    assert summary.timings.prefill.ToMilliseconds() == 250
    assert summary.timings.preemptions == 2
    completion = Completion(1, "t", (1,), (TokenLogprobs(-1.0),), Finish(FinishReason.EOS, eos_token_id=2))
    result = GenerationResult("id", (completion,), PromptInfo(4), Usage(4, 1, 1), TIMINGS, EFFECTIVE)
    response = convert.encode_result(result)
    assert response.completions[0].index == 1
    assert response.completions[0].finish.eos_token_id == 2
    assert response.timings == summary.timings


def test_tokenized_offsets_are_flat_pairs() -> None:
    response = convert.encode_tokenized(Tokenized((8, 9), ((0, 3), (3, 5))), 256)
    assert list(response.offsets) == [0, 3, 3, 5]
    assert (response.num_tokens, response.max_context_tokens) == (2, 256)


def test_load_leaves_out_what_is_not_known() -> None:
    load = convert.encode_load(EngineLoad(EngineStats()))
    assert load.HasField("running")
    for name in ("kv_utilization", "prefix_hit_rate", "output_tokens_per_second", "estimated_queue_wait"):
        assert not load.HasField(name)
