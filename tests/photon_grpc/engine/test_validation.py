"""Each limit at its edge, with the field path a client sees; and what a checked request guarantees."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.messages import EngineRequest
from photon_grpc.engine.validation import CheckedRequest, Validator
from photon_grpc.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestError,
)
from photon_grpc.options import LimitOptions
from photon_grpc.types import (
    CacheOptions,
    ChatInput,
    ChatMessage,
    ChunkPolicy,
    FinishReason,
    GenerationRequest,
    OutputOptions,
    Role,
    SamplingParams,
    SchedulingOptions,
    StopParams,
)
from tests.support.builders import model_info

LIMITS = LimitOptions()
MODEL = model_info(vocab_size=1000, max_model_len=512)
VALIDATOR = Validator(MODEL, LIMITS)
PLAIN = GenerationRequest(prompt=(5, 6, 7))
NAN, INF = math.nan, math.inf


def of(section: str, **values: Any) -> GenerationRequest:
    sections = {
        "sampling": SamplingParams,
        "stop": StopParams,
        "output": OutputOptions,
        "scheduling": SchedulingOptions,
        "cache": CacheOptions,
        "chunk_policy": ChunkPolicy,
    }
    return replace(PLAIN, **{section: sections[section](**values)})


def fields(error: RequestError) -> list[str]:
    return [violation.field for violation in error.violations]


def violations(request: GenerationRequest) -> list[str]:
    """Field paths that `check` objects to."""
    try:
        VALIDATOR.check(request)
    except InvalidRequestError as error:
        return fields(error)
    return []


def resolve(request: GenerationRequest, ids: Iterable[int] = (5, 6, 7), **values: Any) -> CheckedRequest:
    VALIDATOR.check(request)
    return VALIDATOR.resolve(request, tuple(ids), **({"arrival_time": 100.0, "deadline": None} | values))


def test_a_plain_request_passes() -> None:
    assert violations(PLAIN) == []


# --- numbers --------------------------------------------------------------------------------------

EPSILON = 1e-6
NUMBERS: list[tuple[str, str, list[float], list[float]]] = [
    ("sampling", "temperature", [0, 1e-9, 1, 2], [-EPSILON, 2 + EPSILON]),
    ("sampling", "top_p", [EPSILON, 0.5, 1], [0, -EPSILON, 1 + EPSILON]),
    ("sampling", "top_k", [0, 1, 1000], [-1, 1001, 10**400]),
    ("sampling", "min_p", [0, 1], [-EPSILON, 1 + EPSILON]),
    ("sampling", "presence_penalty", [-2, 0, 2], [-2 - EPSILON, 2 + EPSILON]),
    ("sampling", "frequency_penalty", [-2, 0, 2], [-2 - EPSILON, 2 + EPSILON]),
    ("sampling", "repetition_penalty", [EPSILON, 1, 2], [0, -1, 2 + EPSILON]),
    ("sampling", "n", [1, 7, 8], [0, -1, 9]),
    ("sampling", "seed", [0, 1, 2**64 - 1], [-1, 2**64]),
    ("stop", "max_tokens", [1, 508], [0, -1]),
    ("stop", "min_tokens", [0, 1, 508], [-1]),
    ("stop", "time_limit", [EPSILON, 900], [0, -1, 900.001]),
    ("output", "top_logprobs", [0, 20], [-1, 21]),
    ("output", "prompt_top_logprobs", [0, 20], [-1, 21]),
    ("scheduling", "priority", [0, 9], [-1, 10]),
    ("scheduling", "queue_timeout", [EPSILON, 900], [0, -1, 900.001]),
    ("scheduling", "first_token_budget", [EPSILON, 900], [0, -1, 900.001]),
]


@pytest.mark.parametrize(("section", "name", "good", "bad"), NUMBERS, ids=[row[1] for row in NUMBERS])
def test_numbers_at_their_edges(section: str, name: str, good: list[float], bad: list[float]) -> None:
    for value in good:
        assert violations(of(section, **{name: value})) == [], value
    for value in bad:
        assert violations(of(section, **{name: value})) == [f"spec.{section}.{name}"], value


@pytest.mark.parametrize(
    ("section", "name"),
    # The others are whole numbers on every way in.
    [(s, n) for s, n, *_ in NUMBERS if n not in ("seed", "max_tokens", "min_tokens")],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_no_number_may_be_nan_or_infinite(section: str, name: str, value: float) -> None:
    assert violations(of(section, **{name: value})) == [f"spec.{section}.{name}"]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("max_tokens", [1, 256], [0, 257]), ("max_delay", [EPSILON, 1.0], [0, -1, 1.001, NAN, INF])],
)
def test_chunk_policy_is_named_outside_of_the_spec(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert violations(of("chunk_policy", **{name: value})) == []
    for value in bad:
        assert violations(of("chunk_policy", **{name: value})) == [f"chunk_policy.{name}"]


# --- collections ----------------------------------------------------------------------------------


def test_stop_strings() -> None:
    assert violations(of("stop", strings=("x",) * 16)) == []
    assert violations(of("stop", strings=("x",) * 17)) == ["spec.stop.strings"]
    assert violations(of("stop", strings=("x" * 128, "é" * 64))) == []
    assert violations(of("stop", strings=("ok", "x" * 129))) == ["spec.stop.strings[1]"]
    assert violations(of("stop", strings=("é" * 64 + "x",))) == ["spec.stop.strings[0]"]
    assert violations(of("stop", strings=("", "ok"))) == ["spec.stop.strings[0]"]
    assert set(violations(of("stop", strings=("ok", "\ud800")))) == {"spec.stop.strings[1]"}


def test_stop_token_ids() -> None:
    assert violations(of("stop", token_ids=(999,) * 64)) == []
    assert violations(of("stop", token_ids=(1,) * 65)) == ["spec.stop.token_ids"]
    assert violations(of("stop", token_ids=(0, 1000))) == ["spec.stop.token_ids[1]"]
    assert violations(of("stop", token_ids=(-1,))) == ["spec.stop.token_ids[0]"]


def test_logit_bias() -> None:
    assert violations(of("sampling", logit_bias=dict.fromkeys(range(300), 100.0))) == []
    assert violations(of("sampling", logit_bias={0: -100.0, 999: 0.0})) == []
    assert violations(of("sampling", logit_bias=dict.fromkeys(range(301), 1.0))) == [
        "spec.sampling.logit_bias"
    ]
    for value in (100.001, -100.001, NAN, INF, -INF):
        assert violations(of("sampling", logit_bias={7: value})) == ["spec.sampling.logit_bias[7]"]
    assert violations(of("sampling", logit_bias={1000: 1.0})) == ["spec.sampling.logit_bias[1000]"]


def test_allowed_token_ids() -> None:
    assert violations(of("sampling", allowed_token_ids=(3,) * 1024)) == []
    assert violations(of("sampling", allowed_token_ids=(3,) * 1025)) == ["spec.sampling.allowed_token_ids"]
    assert violations(of("sampling", allowed_token_ids=(1, 2, 1000))) == [
        "spec.sampling.allowed_token_ids[2]"
    ]


def test_names() -> None:
    every = "AZaz09._:-"
    assert violations(replace(PLAIN, request_id=every)) == []
    assert violations(replace(PLAIN, request_id="x" * 128)) == []
    for bad in ("x" * 129, "a b", "a/b", "ä", "a\n", "\x00"):
        assert violations(replace(PLAIN, request_id=bad)) == ["request_id"]
    assert violations(of("cache", cache_salt="x" * 64)) == []
    for bad in ("x" * 65, "a b", "a\n"):
        assert violations(of("cache", cache_salt=bad)) == ["spec.cache.cache_salt"]


# --- prompts --------------------------------------------------------------------------------------


def chat(*contents: str, **values: Any) -> GenerationRequest:
    messages = tuple(ChatMessage(Role.USER, content) for content in contents)
    return replace(PLAIN, prompt=ChatInput(messages, **values))


def test_an_empty_prompt_in_each_form() -> None:
    assert violations(replace(PLAIN, prompt=None)) == ["spec.input"]
    assert violations(replace(PLAIN, prompt="")) == ["spec.text"]
    assert violations(replace(PLAIN, prompt=())) == ["spec.token_ids.ids"]
    assert violations(chat()) == ["spec.chat.messages"]
    for prompt, field in (("x", "text"), (chat("").prompt, "chat.messages")):
        with pytest.raises(InvalidRequestError) as caught:
            resolve(replace(PLAIN, prompt=prompt), ())
        assert fields(caught.value) == [f"spec.{field}"]


def test_text_is_counted_in_bytes() -> None:
    limit = LIMITS.max_text_bytes
    assert violations(replace(PLAIN, prompt="x" * limit)) == []
    assert violations(replace(PLAIN, prompt="x" * (limit + 1))) == ["spec.text"]
    assert violations(replace(PLAIN, prompt="é" * (limit // 2))) == []
    assert violations(replace(PLAIN, prompt="é" * (limit // 2) + "x")) == ["spec.text"]
    assert violations(replace(PLAIN, prompt="a\udc80")) == ["spec.text"]


def test_chat_is_counted_as_a_whole() -> None:
    half = "x" * (LIMITS.max_text_bytes // 2)
    assert violations(chat(half, half)) == []
    assert violations(chat(half, half, "x")) == ["spec.chat.messages"]
    assert violations(chat(*["x"] * 256)) == []
    assert violations(chat(*["x"] * 257)) == ["spec.chat.messages"]
    assert violations(chat("ok", "\ud800")) == ["spec.chat.messages[1].content"]


def nested(depth: int) -> dict[str, Any]:
    """So many containers, the outermost included."""
    value: Any = 1
    for level in range(depth - 1):
        value = [value] if level % 2 else {"k": value}
    return {"k": value}


def test_template_arguments() -> None:
    assert violations(chat("x", template_args=nested(8))) == []
    assert violations(chat("x", template_args=nested(9))) == ["spec.chat.template_args"]
    assert violations(chat("x", template_args=nested(5000))) == ["spec.chat.template_args"]
    # {"k":"…"} is eight characters around the text.
    limit = LIMITS.max_template_args_bytes
    assert violations(chat("x", template_args={"k": "x" * (limit - 8)})) == []
    assert violations(chat("x", template_args={"k": "x" * (limit - 7)})) == ["spec.chat.template_args"]
    assert violations(chat("x", template_args={"k": "é" * (limit // 2 - 4)})) == []
    assert violations(chat("x", template_args={"k": "é" * (limit // 2 - 3)})) == ["spec.chat.template_args"]
    assert violations(chat("x", template_args={"k": "\ud800"})) == ["spec.chat.template_args"]
    assert violations(chat("x", template_args={"k": object()})) == ["spec.chat.template_args"]


def test_fault_09_token_ids_are_of_the_vocabulary() -> None:
    assert violations(replace(PLAIN, prompt=(0, 999))) == []
    assert violations(replace(PLAIN, prompt=(0, 1000))) == ["spec.token_ids.ids[1]"]
    assert violations(replace(PLAIN, prompt=(-1,))) == ["spec.token_ids.ids[0]"]


@pytest.mark.parametrize("length", [511, 512, 513])
def test_a_prompt_must_leave_room_for_a_token(length: int) -> None:
    request = replace(PLAIN, prompt=(5,) * length)
    if length < 512:
        assert resolve(request, (5,) * length).engine_request.max_tokens == 1
        return
    with pytest.raises(ContextLengthError) as caught:
        VALIDATOR.check(request)
    assert (caught.value.num_tokens, caught.value.limit) == (length, 511)
    assert fields(caught.value) == ["spec.token_ids.ids"]
    with pytest.raises(ContextLengthError) as caught:
        resolve(replace(PLAIN, prompt="long"), (5,) * length)
    assert fields(caught.value) == ["spec.text"]
    assert str(length) in str(caught.value)
    assert "511" in str(caught.value)


def test_truncation_keeps_the_last_tokens() -> None:
    ids = tuple(range(600))
    request = replace(PLAIN, prompt=ids, truncate_input_tokens=4)
    assert resolve(request, ids).engine_request.prompt_token_ids == (596, 597, 598, 599)
    whole = replace(request, truncate_input_tokens=511)
    assert resolve(whole, ids[:10]).engine_request.prompt_token_ids == ids[:10]
    assert violations(replace(PLAIN, truncate_input_tokens=1)) == []
    for bad in (0, -1, 512):
        assert violations(replace(PLAIN, truncate_input_tokens=bad)) == ["spec.truncate_input_tokens"]


# --- the whole request ----------------------------------------------------------------------------


def test_the_model_s_name() -> None:
    """Bug of two ancestors: the model name was ignored, or fixed."""
    for name in ("", "scripted"):
        VALIDATOR.check(replace(PLAIN, model=name))
    for name in ("other", "Scripted", "scripted "):
        with pytest.raises(ModelNotFoundError):
            VALIDATOR.check(replace(PLAIN, model=name))
        with pytest.raises(ModelNotFoundError):
            VALIDATOR.check_model(name)


def test_all_violations_are_listed_together_and_described() -> None:
    request = GenerationRequest(
        prompt="",
        request_id="a b",
        sampling=SamplingParams(temperature=NAN, top_p=0, n=99),
        stop=StopParams(strings=("",), max_tokens=0, time_limit=-1),
        output=OutputOptions(top_logprobs=21),
        scheduling=SchedulingOptions(priority=10),
        cache=CacheOptions(cache_salt="!"),
        chunk_policy=ChunkPolicy(max_tokens=0),
    )
    with pytest.raises(InvalidRequestError) as caught:
        VALIDATOR.check(request)
    assert sorted(fields(caught.value)) == [
        "chunk_policy.max_tokens",
        "request_id",
        "spec.cache.cache_salt",
        "spec.output.top_logprobs",
        "spec.sampling.n",
        "spec.sampling.temperature",
        "spec.sampling.top_p",
        "spec.scheduling.priority",
        "spec.stop.max_tokens",
        "spec.stop.strings[0]",
        "spec.stop.time_limit",
        "spec.text",
    ]
    assert all(violation.description for violation in caught.value.violations)


def test_paths_begin_at_the_root_of_the_caller() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        VALIDATOR.check(of("sampling", top_p=0), root="")
    assert fields(caught.value) == ["sampling.top_p"]
    with pytest.raises(ContextLengthError) as too_long:
        VALIDATOR.check(replace(PLAIN, prompt=(1,) * 600), root="")
    assert fields(too_long.value) == ["token_ids.ids"]


def test_min_tokens_against_max_tokens() -> None:
    assert violations(of("stop", min_tokens=5, max_tokens=5)) == []
    assert violations(of("stop", min_tokens=6, max_tokens=5)) == ["spec.stop.min_tokens"]
    assert resolve(of("stop", min_tokens=509)).engine_request.min_tokens == 509
    with pytest.raises(InvalidRequestError) as caught:
        resolve(of("stop", min_tokens=510))
    assert fields(caught.value) == ["spec.stop.min_tokens"]


@pytest.mark.parametrize("max_tokens", [508, 509, 510])
def test_max_tokens_is_what_the_context_leaves(max_tokens: int) -> None:
    request = of("stop", max_tokens=max_tokens)
    if max_tokens <= 509:
        assert resolve(request).engine_request.max_tokens == max_tokens
        return
    with pytest.raises(InvalidRequestError) as caught:
        resolve(request)
    assert fields(caught.value) == ["spec.stop.max_tokens"]


def test_what_only_tokenises_is_checked_too() -> None:
    VALIDATOR.check_prompt("text")
    with pytest.raises(InvalidRequestError) as caught:
        VALIDATOR.check_prompt("")
    assert fields(caught.value) == ["text"]
    VALIDATOR.check_token_ids("token_ids", (999,) * 512)
    VALIDATOR.check_token_ids("token_ids", ())
    for ids, field in (((1,) * 513, "token_ids"), ((1, 1000), "token_ids[1]")):
        with pytest.raises(InvalidRequestError) as caught:
            VALIDATOR.check_token_ids("token_ids", ids)
        assert fields(caught.value) == [field]


# --- defaults -------------------------------------------------------------------------------------


def test_defaults_come_from_the_model() -> None:
    model = model_info(
        default_temperature=0.6,
        default_top_p=0.9,
        default_top_k=50,
        default_min_p=0.05,
        default_repetition_penalty=1.1,
        eos_token_ids=(1, 9),
    )
    checked = Validator(model, LIMITS).resolve(PLAIN, (5, 6, 7), arrival_time=100.0, deadline=None)
    sampling, stop = checked.effective.sampling, checked.effective.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 50)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.n) == (0.0, 0.0, 1)
    assert (stop.max_tokens, stop.min_tokens, stop.ignore_eos, stop.include_stop) == (509, 0, False, False)
    assert stop.time_limit is None
    assert checked.effective.model_fingerprint == model.fingerprint
    engine = checked.engine_request
    assert engine.sampling == sampling
    assert engine.eos_token_ids == (1, 9)
    assert engine.length_finish is FinishReason.CONTEXT_LIMIT
    assert (engine.priority, engine.cache_salt, engine.bypass_prefix_cache) == (0, "", False)
    assert (engine.top_logprobs, engine.prompt_top_logprobs) == (None, None)


def test_zero_is_a_value_and_not_a_default() -> None:
    model = model_info(default_temperature=0.6, default_top_k=50, default_min_p=0.05)
    request = of("sampling", temperature=0.0, top_k=0, min_p=0.0, seed=0)
    checked = Validator(model, LIMITS).resolve(request, (5,), arrival_time=0.0, deadline=None)
    sampling = checked.effective.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.seed) == (0.0, 0, 0.0, 0)


def test_what_was_asked_for_is_what_is_used_and_told() -> None:
    request = GenerationRequest(
        prompt=(5, 6, 7),
        sampling=SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            seed=77,
            n=3,
            logit_bias={4: 1.5},
            allowed_token_ids=(4, 5),
        ),
        stop=StopParams(
            max_tokens=9,
            min_tokens=2,
            strings=("a", "b"),
            token_ids=(8,),
            ignore_eos=True,
            include_stop=True,
            time_limit=5.0,
        ),
        output=OutputOptions(top_logprobs=0, prompt_top_logprobs=2),
        scheduling=SchedulingOptions(priority=4, queue_timeout=1.0, first_token_budget=2.0),
        cache=CacheOptions(bypass_prefix_cache=True, cache_salt="salt"),
    )
    checked = resolve(request, deadline=150.0)
    effective, engine = checked.effective, checked.engine_request
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        assert getattr(effective.sampling, name) == getattr(request.sampling, name)
    assert (effective.sampling.repetition_penalty, effective.sampling.seed) == (1.5, 77)
    assert effective.sampling.logit_bias == ((4, 1.5),)
    assert effective.sampling.allowed_token_ids == (4, 5)
    for name in (
        "max_tokens",
        "min_tokens",
        "strings",
        "token_ids",
        "ignore_eos",
        "include_stop",
        "time_limit",
    ):
        assert getattr(effective.stop, name) == getattr(request.stop, name)
    assert (engine.max_tokens, engine.min_tokens, engine.stop_token_ids) == (9, 2, (8,))
    assert engine.eos_token_ids == ()
    assert engine.length_finish is FinishReason.MAX_TOKENS
    assert (engine.priority, engine.cache_salt, engine.bypass_prefix_cache) == (4, "salt", True)
    assert (engine.top_logprobs, engine.prompt_top_logprobs) == (0, 2)
    clocks = engine.deadlines
    assert (clocks.start_by, clocks.first_token_by, clocks.finish_by, clocks.end_by) == (101, 102, 105, 150)


def test_a_seed_is_drawn_anew_for_each_request_without_one() -> None:
    seeds = {resolve(PLAIN).effective.sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [(None, 400.0), (100.5, 100.5), (999.9, 999.9), (1000.0, 1000.0), (1000.1, 1000.0), (5000.0, 1000.0)],
)
def test_no_call_runs_past_the_server_s_maximum(deadline: float | None, expected: float) -> None:
    assert resolve(PLAIN, deadline=deadline).engine_request.deadlines.end_by == expected


# --- whatever comes in ----------------------------------------------------------------------------

short_text = st.text(max_size=20)


def requests(
    floats: st.SearchStrategy[Any], counts: st.SearchStrategy[Any], names: list[str], largest_id: int
) -> st.SearchStrategy[GenerationRequest]:
    ids = st.integers(0, largest_id)
    chats = st.builds(
        ChatInput,
        st.lists(st.builds(ChatMessage, st.sampled_from(Role), short_text), max_size=3).map(tuple),
        st.dictionaries(short_text, st.integers() | short_text | st.floats(), max_size=3),
    )
    return st.builds(
        GenerationRequest,
        prompt=st.none()
        | short_text
        | st.lists(ids, max_size=30).map(tuple)
        | st.integers(1, 600).map(lambda length: (5,) * length)
        | chats,
        request_id=st.sampled_from(names),
        model=st.sampled_from(["", "", "scripted", *(name for name in names if " " in name)]),
        sampling=st.builds(
            SamplingParams,
            temperature=floats,
            top_p=floats,
            top_k=counts,
            min_p=floats,
            presence_penalty=floats,
            frequency_penalty=floats,
            repetition_penalty=floats,
            seed=counts,
            n=counts,
            logit_bias=st.dictionaries(ids, st.floats(-largest_id, largest_id), max_size=3),
            allowed_token_ids=st.lists(ids, max_size=3).map(tuple),
        ),
        stop=st.builds(
            StopParams,
            max_tokens=counts,
            min_tokens=counts,
            strings=st.lists(st.text(min_size=largest_id < 100, max_size=9), max_size=3).map(tuple),
            token_ids=st.lists(ids, max_size=3).map(tuple),
            ignore_eos=st.none() | st.booleans(),
            time_limit=floats,
        ),
        output=st.builds(OutputOptions, top_logprobs=counts, prompt_top_logprobs=counts),
        scheduling=st.builds(
            SchedulingOptions, priority=counts, queue_timeout=floats, first_token_budget=floats
        ),
        cache=st.builds(CacheOptions, st.booleans(), st.sampled_from(names)),
        chunk_policy=st.builds(ChunkPolicy, counts, floats),
        truncate_input_tokens=counts,
    )


wild = requests(
    floats=st.none() | st.floats() | st.floats(-3, 3),
    counts=st.none() | st.integers(-2, 30) | st.integers(0, 600) | st.integers(),
    names=["", "abc", "a b"],
    largest_id=1001,
)
modest = requests(
    floats=st.none() | st.floats(0.001, 1.0),
    counts=st.none() | st.integers(1, 8),
    names=["", "abc"],
    largest_id=99,
)


def assert_takeable(request: EngineRequest) -> None:
    """Everything that scheduler, runner and sampler take for granted."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    assert 1 <= len(prompt) <= MODEL.max_model_len - 1
    assert all(0 <= token_id < MODEL.vocab_size for token_id in prompt)
    assert 1 <= request.max_tokens <= MODEL.max_model_len - len(prompt)
    assert 0 <= request.min_tokens <= request.max_tokens
    assert 0 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k <= MODEL.vocab_size
    assert 0 <= sampling.min_p <= 1
    assert -2 <= sampling.presence_penalty <= 2
    assert -2 <= sampling.frequency_penalty <= 2
    assert 0 < sampling.repetition_penalty <= 2
    assert 0 <= sampling.seed < 2**64
    assert 1 <= sampling.n <= LIMITS.max_n
    assert all(0 <= i < MODEL.vocab_size and -100 <= b <= 100 for i, b in sampling.logit_bias)
    for token_id in (*sampling.allowed_token_ids, *request.stop_token_ids):
        assert 0 <= token_id < MODEL.vocab_size
    for top in (request.top_logprobs, request.prompt_top_logprobs):
        assert top is None or 0 <= top <= 20
    assert 0 <= request.priority <= LIMITS.max_priority
    assert request.deadlines.end_by is not None
    assert request.deadlines.end_by <= request.arrival_time + LIMITS.max_deadline_s
    for moment in (request.deadlines.start_by, request.deadlines.first_token_by, request.deadlines.finish_by):
        assert moment is None or request.arrival_time <= moment <= request.arrival_time + 900


@settings(max_examples=200, deadline=None)
@given(wild | modest)
def test_anything_is_refused_with_a_typed_error_or_can_be_taken(request: GenerationRequest) -> None:
    ids = request.prompt if isinstance(request.prompt, tuple) else (5, 6, 7)
    checked: CheckedRequest | None = None
    refused: RequestError | None = None
    try:
        checked = resolve(request, ids)
    except RequestError as error:
        refused = error
    if checked is not None:
        assert_takeable(checked.engine_request)
    else:
        assert refused is not None
        assert refused.message
        assert all(violation.field and violation.description for violation in refused.violations)
