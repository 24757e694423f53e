"""Advisories of servers of this kind, each as tests of ours: of a real process over gRPC, and of `LLM`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.llm import LLM
from photon_grpc.offline import OfflineSource
from photon_grpc.options import EngineOptions, KVCacheOptions, LimitOptions, ModelOptions, Options
from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc
from tests.fuzzing.bounds import bounds, plain, with_value
from tests.fuzzing.wire import LENGTH, tagged
from tests.security.ways import BatchWay, GenerateWay, LlmWay, OfflineWay, StreamWay, Way
from tests.support.grpc_harness import rich_error
from tests.support.server_process import ServerProcess, server_process
from tests.support.tiny_model import CHAT_TEMPLATE, tiny_model_folder

PACKAGE = Path(__file__).parents[2] / "photon_grpc"
MAX_MODEL_LEN = 192
# Of the tiny models.
VOCAB_SIZE = 512
LIMITS = {
    "max_text_bytes": 128,
    "max_chat_messages": 6,
    "max_template_args_bytes": 96,
    "max_template_args_depth": 6,
    "max_deadline_s": 600.0,
}
# What the template of the model here takes from a caller.
VARIABLE = "note"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    config = folder / "tokenizer_config.json"
    template = CHAT_TEMPLATE + "{{ " + VARIABLE + " }}"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    settings = {f"limits__{name}": value for name, value in LIMITS.items()}
    log = tmp_path_factory.mktemp("log") / "log"
    with server_process(model, log, model__max_model_len=MAX_MODEL_LEN, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture(autouse=True)
def _alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After whatever a test of the server did, all blocks are free and it really serves."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.wait_until_idle()
        # A sampled token may be the end of the sequence.
        spec = plain().spec
        spec.stop.ignore_eos = True
        answer = request.getfixturevalue("stub").Generate(pb.GenerateRequest(spec=spec), timeout=60)
        assert answer.usage.output_tokens == 2
        assert server.process.poll() is None


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, list[str]]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    rich = rich_error(raised.value)
    return rich.code, rich.reason, rich.fields


def of_both(
    stub: inference_pb2_grpc.InferenceServiceStub, request: pb.StreamGenerateRequest
) -> list[Callable[[], object]]:
    """The request by either method."""
    unary = pb.GenerateRequest(request_id=request.request_id, spec=request.spec)
    return [
        lambda: stub.Generate(unary, timeout=60),
        lambda: list(stub.StreamGenerate(request, timeout=60)),
    ]


# --- CVE-2026-116173: a limit that one front end skips ------------------------------------------------


def generate_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    yield GenerateWay(request.getfixturevalue("stub"))


def stream_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    yield StreamWay(request.getfixturevalue("stub"))


def batch_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    yield BatchWay(request.getfixturevalue("stub"))


def options_of(model: Path) -> Options:
    return Options(
        model=ModelOptions(path=str(model), max_model_len=MAX_MODEL_LEN),
        cache=KVCacheOptions(kv_cache_memory_bytes=8 << 20),
        engine=EngineOptions(num_threads=1),
        limits=replace(LimitOptions(), **LIMITS),
    )


def llm_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    model = request.getfixturevalue("model")
    with LLM(str(model), options=options_of(model)) as llm:
        yield LlmWay(llm)


def offline_way(request: pytest.FixtureRequest) -> Iterator[Way]:
    source = OfflineSource(options_of(request.getfixturevalue("model")))
    yield OfflineWay(source)
    source.close()


# Every way in, and the limits of which it can say nothing.
WAYS: dict[str, tuple[Callable[[pytest.FixtureRequest], Iterator[Way]], set[str]]] = {
    "Generate": (generate_way, {"max_chunk_tokens", "max_chunk_delay_s"}),
    "StreamGenerate": (stream_way, set()),
    "BatchGenerate": (batch_way, {"max_chunk_tokens", "max_chunk_delay_s", "max_request_id_chars"}),
    "LLM": (
        llm_way,
        {
            *("max_chunk_tokens", "max_chunk_delay_s", "max_request_id_chars", "max_cache_salt_chars"),
            "max_priority",
        },
    ),
    "offline": (
        offline_way,
        {
            *("max_chunk_tokens", "max_chunk_delay_s", "max_request_id_chars", "max_cache_salt_chars"),
            *("max_priority", "max_n", "max_logit_bias", "max_allowed_token_ids", "max_stop_token_ids"),
            *("max_tokens", "max_deadline_s", "max_top_logprobs", "max_prompt_top_logprobs"),
            *("max_template_args_bytes", "max_template_args_depth"),
        },
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_cve_2026_116173_every_limit_holds_on_every_way_in(name: str, request: pytest.FixtureRequest) -> None:
    """On the last value that may be, and on the first that may not."""
    make_way, silent = WAYS[name]
    making = make_way(request)
    way = next(making)
    wrong: list[str] = []
    checked: set[str] = set()
    all_bounds = bounds(replace(LimitOptions(), **LIMITS), MAX_MODEL_LEN, VOCAB_SIZE, VARIABLE)
    for bound in all_bounds:
        for good in filter(way.can_say, bound.good):
            fields = way.refused_fields(good)
            if fields is not None:
                wrong.append(f"{bound.limit}: {bound.field}: refused for {fields}: {str(good)[:200]}")
        for bad in filter(way.can_say, bound.bad):
            checked.add(bound.limit)
            fields = way.refused_fields(bad)
            if fields is None or not any(f.split("[")[0] == bound.field for f in fields):
                wrong.append(f"{bound.limit}: {bound.field}: {fields}: {str(bad)[:200]}")
    for _ in making:
        pass
    assert not wrong, "\n".join(wrong)
    assert {bound.limit for bound in all_bounds} - checked == silent


# --- CVE-2026-105757: a constraint's error escapes its request ----------------------------------------

CONSTRAINTS = {
    "json_schema": pb.Constraint(json_schema='{"$ref": "#"}'),
    "json_schema_no_json": pb.Constraint(json_schema="{" * 5000),
    "regex": pb.Constraint(regex="(a|a)*$" * 100),
    "regex_invalid": pb.Constraint(regex="["),
    "grammar": pb.Constraint(grammar="root ::= root"),
    "choice": pb.Constraint(choice=pb.Choices(values=[""] * 1000)),
    "json_object": pb.Constraint(json_object=pb.JsonObject()),
    "empty": pb.Constraint(),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_cve_2026_105757_a_constraint_ends_its_own_request_alone(
    kind: str, server: ServerProcess, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    other = plain()
    other.spec.stop.max_tokens, other.spec.stop.ignore_eos = 150, True
    running = stub.StreamGenerate(other, timeout=60)
    next(running)
    constrained = plain()
    constrained.spec.constraint.CopyFrom(CONSTRAINTS[kind])
    for call in of_both(stub, constrained):
        assert refusal(call) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "UNSUPPORTED_FEATURE",
            ["spec.constraint"],
        )
    assert list(running)[-1].summary.usage.output_tokens == 150


# --- CVE-2026-105756: a cache salt that nobody checks -------------------------------------------------


@pytest.mark.parametrize("salt", ["a" * 65, "a b", "a/../b", "\x00", "ключ", "a\n", "😀", "a" * 4096])
def test_cve_2026_105756_a_salt_is_checked_like_a_name(
    salt: str, server: ServerProcess, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    request = with_value("spec.cache.cache_salt", salt)
    for call in of_both(stub, request):
        code, _, fields = refusal(call)
        assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["spec.cache.cache_salt"])


def test_cve_2026_105756_a_salt_that_is_no_text_is_no_request(
    server: ServerProcess, stub: inference_pb2_grpc.InferenceServiceStub, channel: grpc.Channel
) -> None:
    """A lone surrogate: spec.cache.cache_salt, fields 2, 10 and 2."""
    raw = tagged(2, LENGTH, tagged(10, LENGTH, tagged(2, LENGTH, b"\xed\xa0\x80")))
    call = channel.unary_unary("/photon.v1.InferenceService/Generate")
    code, reason, _ = refusal(lambda: call(raw, timeout=60))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def test_cve_2026_105756_a_salt_narrows_what_is_shared(
    server: ServerProcess, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    def cached(salt: str) -> int:
        request = with_value("spec.cache.cache_salt", salt)
        request.spec.token_ids.ids[:] = [11 + i % 90 for i in range(64)]
        return stub.Generate(pb.GenerateRequest(spec=request.spec), timeout=60).usage.cached_prompt_tokens

    assert [cached(salt) for salt in ("", "a", "b", "A")] == [0, 0, 0, 0]
    assert all(cached(salt) > 0 for salt in ("", "a", "b", "A"))


# --- CVE-2026-114051: min_tokens above max_tokens kills a thread, and health stays green --------------


@pytest.mark.parametrize(
    ("max_tokens", "min_tokens"),
    # The last three against what is left of the context, which is known once the prompt is tokenised.
    [(1, 2), (2, 3), (2, 2**32 - 1), (None, MAX_MODEL_LEN), (None, MAX_MODEL_LEN - 2), (None, 2**31)],
)
def test_cve_2026_114051_more_tokens_at_least_than_at_most(
    max_tokens: int | None,
    min_tokens: int,
    server: ServerProcess,
    stub: inference_pb2_grpc.InferenceServiceStub,
    channel: grpc.Channel,
) -> None:
    threads = psutil.Process(server.process.pid).num_threads()
    request = with_value("spec.stop.min_tokens", min_tokens)
    request.spec.stop.ClearField("max_tokens")
    if max_tokens is not None:
        request.spec.stop.max_tokens = max_tokens
    for call in of_both(stub, request):
        code, _, fields = refusal(call)
        assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["spec.stop.min_tokens"])
    # Green, and true: the engine's thread still makes tokens, as many as a minimum asks for.
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "photon.liveness"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    least = with_value("spec.stop.min_tokens", 5)
    least.spec.stop.max_tokens = 5
    assert stub.Generate(pb.GenerateRequest(spec=least.spec), timeout=60).usage.output_tokens == 5
    assert psutil.Process(server.process.pid).num_threads() >= threads


# --- CVE-2026-34756: any number of completions --------------------------------------------------------


@pytest.mark.parametrize("n", [LimitOptions().max_n + 1, 100_000, 2**31, 2**32 - 1])
def test_cve_2026_34756_the_number_of_completions_is_bounded(
    n: int, server: ServerProcess, stub: inference_pb2_grpc.InferenceServiceStub
) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    request = with_value("spec.sampling.n", n)
    request.spec.sampling.logit_bias.update(dict.fromkeys(range(300), 1.0))
    for call in of_both(stub, request):
        code, _, fields = refusal(call)
        assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["spec.sampling.n"])
    # A hundred thousand of anything would show.
    assert psutil.Process(server.process.pid).memory_info().rss - before < 32 << 20


# --- CVE-2025-4565: protobuf in pure Python recurses as deep as it is told ----------------------------


def test_cve_2025_4565_no_server_starts_over_protobuf_in_pure_python(model: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "photon_grpc", "serve", "--model", str(model), "--port", "0"],
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- CVE-2026-0994: JSON and protobuf into each other, without a bound --------------------------------


def test_cve_2026_0994_nothing_of_ours_turns_protobuf_into_json_or_back() -> None:
    found = [path.name for path in PACKAGE.rglob("*.py") if "json_format" in path.read_text()]
    assert found == []


def nested(depth: int, *, lists: bool) -> bytes:
    """A Struct of one key that nests lists or structs, made from the inside out."""
    value = b""
    for _ in range(depth):
        value = tagged(6, LENGTH, tagged(1, LENGTH, value)) if lists else tagged(5, LENGTH, entry(value))
    return entry(value)


def entry(value: bytes) -> bytes:
    return tagged(1, LENGTH, tagged(1, LENGTH, VARIABLE.encode()) + tagged(2, LENGTH, value))


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("depth", [6, 9, 20, 24, 32, 33, 48, 49, 100, 1000, 20_000])
@pytest.mark.parametrize("field", ["template_args", "experimental"])
def test_cve_2026_0994_structs_of_any_depth_are_refused_before_they_are_followed(
    field: str, depth: int, lists: bool, server: ServerProcess, channel: grpc.Channel, stub: object
) -> None:
    struct = nested(depth, lists=lists)
    if field == "template_args":
        hello = tagged(1, LENGTH, tagged(1, 0, b"\x02") + tagged(2, LENGTH, b"hello"))
        spec = tagged(4, LENGTH, hello + tagged(2, LENGTH, struct))
    else:
        spec = plain().spec.SerializeToString() + tagged(15, LENGTH, struct)
    message = tagged(2, LENGTH, spec)
    unary = channel.unary_unary("/photon.v1.InferenceService/Generate")
    stream = channel.unary_stream("/photon.v1.InferenceService/StreamGenerate")
    calls: list[Callable[[], object]] = [
        lambda: unary(message, timeout=60),
        lambda: list(stream(message, timeout=60)),
    ]
    for call in calls:
        code, reason, fields = refusal(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        # Protobuf itself goes no deeper than a hundred messages, of which a level takes two or three.
        if depth < 30:
            assert fields == [f"spec.{'chat.' * (field == 'template_args')}{field}"]
        elif depth >= 50:
            assert reason == "MALFORMED_MESSAGE"
