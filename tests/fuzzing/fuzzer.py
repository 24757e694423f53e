"""Hostile messages to every method of a served house, and what may come back.

One message is a pure function of a seed and its number, so that a finding is repeated by both.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from photon_grpc.server.reflection import v1_descriptor
from photon_grpc.server.status import TABLE
from photon_grpc.v1 import control_pb2, inference_pb2, model_pb2
from tests.fuzzing.bounds import bounds, plain
from tests.fuzzing.wire import LENGTH, mutate, random_message, tagged
from tests.support.grpc_harness import Harness, quick_options, rich_error, rich_item_error, until
from tests.support.scripted_service import VOCAB_SIZE, scripted_service

__all__ = [
    "ALLOWED",
    "BOUNDS",
    "LIMITS",
    "METHODS",
    "Case",
    "Fuzzer",
    "Method",
    "fuzzed_service",
    "make_case",
    "padded",
]

_Code = grpc.StatusCode
# What a caller may be told of a message, whatever is in it. Nothing of a fault of ours; of the reader's
# own end CANCELLED would be, and nobody here cancels before an answer.
ALLOWED = {
    _Code.OK,
    _Code.INVALID_ARGUMENT,
    _Code.UNIMPLEMENTED,
    _Code.NOT_FOUND,
    _Code.ALREADY_EXISTS,
    _Code.RESOURCE_EXHAUSTED,
    _Code.UNAVAILABLE,
    _Code.DEADLINE_EXCEEDED,
    _Code.ABORTED,
}
_REASONS = {row.reason for row in TABLE.values()} - {"ENGINE_DEAD", "STARTING", "INTERNAL", "REQUEST_FAULT"}
# Who answers a question with a plain status, as the protocols of others say.
_PLAIN = {("/grpc.health.v1.Health/Check", _Code.NOT_FOUND)}
_PYTHON = re.compile(r"Traceback|[A-Za-z]+(?:Error|Exception)\b|<class|object at 0x|google\.protobuf|\.py\b")

# Small, so that messages on both sides of each are cheap.
LIMITS = {
    "max_message_bytes": 32 << 10,
    "max_text_bytes": 128,
    "max_chat_messages": 12,
    "max_template_args_bytes": 128,
    "max_logit_bias": 40,
    "max_allowed_token_ids": 100,
    "max_deadline_s": 600.0,
    "max_queued_requests": 64,
    "max_batch_items": 8,
    "max_batch_concurrency": 3,
}
MAX_MODEL_LEN = 160
# No message takes this long; a call that does is a finding.
_ANSWER_S = 120.0
_ROUND = 24

FILES: tuple[FileDescriptor, ...] = (
    inference_pb2.DESCRIPTOR,
    model_pb2.DESCRIPTOR,
    control_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
    v1_descriptor(),
)


@dataclass(frozen=True, slots=True)
class Method:
    """One method of one service. `is_endless`: its stream goes on until the caller leaves."""

    path: str
    input_type: Descriptor
    output_type: Descriptor
    takes_stream: bool
    gives_stream: bool

    @property
    def is_endless(self) -> bool:
        return self.path.endswith(("/Watch", "/WatchState"))

    @property
    def is_admin(self) -> bool:
        return self.path.startswith(("/photon.v1.ControlService/", "/grpc.reflection."))

    @classmethod
    def of(cls, method: MethodDescriptor) -> Method:
        return cls(
            f"/{method.containing_service.full_name}/{method.name}",
            method.input_type,
            method.output_type,
            bool(method.client_streaming),
            bool(method.server_streaming),
        )


def _methods() -> Iterator[Method]:
    for file in FILES:
        for service in file.services_by_name.values():
            # What the installed package knows and a server of ours need not have.
            names = {"Check", "Watch"} if service.full_name == "grpc.health.v1.Health" else None
            yield from (Method.of(m) for m in service.methods if names is None or m.name in names)


METHODS: dict[str, Method] = {method.path: method for method in _methods()}
_GENERATE = "/photon.v1.InferenceService/Generate"
_STREAM = "/photon.v1.InferenceService/StreamGenerate"
_BATCH = "/photon.v1.InferenceService/BatchGenerate"
# The first carry most of what a stranger can say.
_OFTEN = (_GENERATE, _STREAM, _STREAM, _BATCH, "/photon.v1.InferenceService/Tokenize")


@dataclass(frozen=True, slots=True)
class Case:
    """One message; `kind` says how it was made."""

    method: Method
    kind: str
    data: bytes


def make_case(rng: random.Random, path: str | None = None) -> Case:
    """A message to the method at `path`, or to one by chance."""
    if path is None:
        path = rng.choice(_OFTEN if rng.random() < 0.5 else tuple(METHODS))
    method = METHODS[path]
    kind = rng.choice(("valid", "bound", "described", "merged", "mutated", "mutated"))
    return Case(method, kind, _data(rng, method, kind))


def _data(rng: random.Random, method: Method, kind: str) -> bytes:
    match kind:
        case "valid":
            return _valid(rng, method).SerializeToString()
        case "bound":
            return _at_a_bound(rng, method)
        case "described":
            return random_message(rng, method.input_type)
        case "merged":
            # Concatenated messages are one: the sensible one with some fields replaced or added.
            return _valid(rng, method).SerializeToString() + random_message(rng, method.input_type)
        case _:
            return mutate(rng, _data(rng, method, rng.choice(("valid", "bound", "described", "merged"))))


def _as(method: Method, request: inference_pb2.StreamGenerateRequest) -> bytes:
    if method.path == _STREAM:
        return request.SerializeToString()
    if method.path == _BATCH:
        return inference_pb2.BatchGenerateRequest(
            request_id=request.request_id, specs=[plain().spec, request.spec]
        ).SerializeToString()
    return inference_pb2.GenerateRequest(request_id=request.request_id, spec=request.spec).SerializeToString()


# The tokenizer has no BOS, so that its template's `bos_token` is anybody's to set.
BOUNDS = bounds(quick_options(limits=LIMITS).limits, MAX_MODEL_LEN, VOCAB_SIZE, "bos_token")
_AT_BOUNDS = [request for bound in BOUNDS for request in (*bound.good, *bound.bad)]


def _at_a_bound(rng: random.Random, method: Method) -> bytes:
    if method.path in (_GENERATE, _STREAM, _BATCH):
        data = _as(method, rng.choice(_AT_BOUNDS))
        if rng.random() < 0.25:
            data += _as(method, rng.choice(_AT_BOUNDS))
        return data
    data = _valid(rng, method).SerializeToString()
    if rng.random() < 0.95:
        return data + random_message(rng, method.input_type)
    # Just about as large as a message may be, by a field that nobody knows.
    missing = LIMITS["max_message_bytes"] + rng.choice((-1, 0, 1, 2)) - len(data)
    return padded(data, int(missing))


def padded(data: bytes, num_bytes: int) -> bytes:
    """`data` made `num_bytes` longer, at least 16,389, by a field that nobody knows."""
    # Two bytes of tag, three of length.
    return data + tagged(2047, LENGTH, b"x" * (num_bytes - 5))


_TEXTS = ("hello world", "ünïcödé ☃", "a", "def f(x):\n    return x", "<|im_start|>user", "\x00", "😀" * 20)


def _valid(rng: random.Random, method: Method) -> Message:
    """What a good client might send."""
    message: Any = GetMessageClass(method.input_type)()
    match method.path.rpartition("/")[2]:
        case "Generate" | "StreamGenerate":
            _fill_generation(rng, message)
        case "BatchGenerate":
            for _ in range(rng.choice((1, 2, 5, 9))):
                one = inference_pb2.GenerateRequest()
                _fill_generation(rng, one)
                message.specs.append(one.spec)
            message.request_id = one.request_id
        case "Tokenize" if rng.random() < 0.7:
            message.text = rng.choice(_TEXTS)
            message.return_offsets = rng.random() < 0.5
        case "Tokenize":
            _fill_chat(rng, message.chat)
        case "Detokenize":
            message.token_ids.extend(rng.choices(range(VOCAB_SIZE), k=rng.randrange(MAX_MODEL_LEN + 1)))
        case "Abort" if rng.random() < 0.5:
            message.request_id = rng.choice(("r1", "r2", "unknown"))
        case "Abort":
            message.all.SetInParent()
        case "Drain" if rng.random() < 0.5:
            message.grace.seconds = rng.choice((0, 1, 60))
        case "Drain":
            message.undo = True
        case "FlushCache":
            message.wait_idle = rng.random() < 0.5
        case "WatchState":
            message.load_interval.nanos = 200_000_000
        case "Check" | "Watch":
            message.service = rng.choice(("", "photon.v1.InferenceService", "photon.liveness", "unknown"))
        case "ServerReflectionInfo":
            field_name = rng.choice(("list_services", "file_by_filename", "file_containing_symbol"))
            setattr(
                message, field_name, rng.choice(("", "photon.v1.ControlService", "photon/v1/control.proto"))
            )
    return message


def _fill_generation(rng: random.Random, message: Any) -> None:
    spec = message.spec
    spec.stop.max_tokens = rng.choice((1, 2, 5, 20))
    match rng.randrange(3):
        case 0:
            spec.text = rng.choice(_TEXTS)
        case 1:
            spec.token_ids.ids.extend(rng.choices(range(VOCAB_SIZE), k=rng.choice((1, 3, 16, 17, 100))))
        case 2:
            _fill_chat(rng, spec.chat)
    if rng.random() < 0.3:
        message.request_id = rng.choice(("r1", "r2", "r3"))
    if rng.random() < 0.3:
        spec.sampling.n = rng.choice((1, 2, 8))
    if rng.random() < 0.3:
        spec.output.top_logprobs = rng.choice((0, 1, 20))
    if rng.random() < 0.2:
        spec.output.prompt_top_logprobs = rng.choice((0, 3))
    if rng.random() < 0.2:
        spec.stop.strings.extend(rng.sample(("a", "lo w", "☃", "\n"), 2))
    if rng.random() < 0.1:
        spec.scheduling.queue_timeout.nanos = rng.choice((1, 1_000_000, 999_999_999))


def _fill_chat(rng: random.Random, chat: Any) -> None:
    for _ in range(rng.choice((1, 2, 5))):
        chat.messages.add(role=rng.choice((1, 2, 3)), content=rng.choice(_TEXTS))
    if rng.random() < 0.3:
        name = rng.choice(("bos_token", "bos_token", "tools", "messages"))
        chat.template_args.update({name: [1, "x", {"deep": [None, True, 1.5]}]})


# --- sending and judging ----------------------------------------------------------------------------


@dataclass
class Fuzzer:
    """Sends cases to a running service and keeps what should not have come back."""

    harness: Harness
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each (kind, status) was seen."""
    findings: list[str] = field(default_factory=list)

    async def send(self, cases: Iterable[Case], describe: Callable[[Case], str] = repr) -> None:
        """All of `cases` at the same time; a finding is told as `describe` says."""
        await asyncio.gather(*(self._send(case, describe) for case in cases))

    async def run(
        self, seed: int, numbers: Iterable[int], progress: Callable[[int], None] | None = None
    ) -> None:
        """The messages of these numbers under `seed`, a few at a time."""
        pending: list[tuple[int, Case]] = []

        async def flush() -> None:
            named = {id(case): number for number, case in pending}
            await self.send(
                (case for _, case in pending),
                lambda case: (
                    f"tools/fuzz --seed {seed} --only {named[id(case)]}: {case.kind} message "
                    f"to {case.method.path}, {len(case.data)} bytes {case.data[:200].hex()}"
                ),
            )
            if progress is not None:
                progress(len(pending))
            pending.clear()

        for number in numbers:
            pending.append((number, make_case(random.Random(f"{seed}/{number}"))))
            if len(pending) == _ROUND:
                await flush()
        await flush()

    async def _send(self, case: Case, describe: Callable[[Case], str]) -> None:
        problem = ""
        try:
            async with asyncio.timeout(_ANSWER_S):
                code = await _call(self.harness, case)
        except grpc.aio.AioRpcError as error:
            code, problem = error.code(), _problem_of(case, error)
        except TimeoutError:
            code, problem = _Code.DEADLINE_EXCEEDED, f"no answer within {_ANSWER_S:g} s"
        except ValueError as error:
            code, problem = _Code.OK, f"an answer that breaks its own rules: {error}"
        self.ends[case.kind, code.name] += 1
        if problem:
            self.findings.append(f"{describe(case)}\n  {problem}")
        if case.method.path.endswith("/Drain"):
            await self.harness.control.Drain(control_pb2.DrainRequest(undo=True), timeout=_ANSWER_S)

    async def check_rest(self) -> None:
        """Everything is given back, and a good request is served. Raises AssertionError or an RpcError."""
        harness = self.harness
        await until(lambda: harness.server.num_live_calls == 0, 60)
        async with asyncio.timeout(60):
            while True:
                load = await harness.control.GetLoad(control_pb2.GetLoadRequest())
                if load.running == load.queued == load.used_kv_blocks == 0:
                    break
                await asyncio.sleep(0.02)
        answer = await harness.inference.Generate(
            inference_pb2.GenerateRequest(spec=plain().spec), timeout=_ANSWER_S
        )
        assert answer.usage.output_tokens == 2


async def _call(harness: Harness, case: Case) -> grpc.StatusCode:
    """OK, or raises what grpc does. Raises ValueError for an answer that is none."""
    method = case.method
    channel = harness.admin if method.is_admin else harness.public
    response_class = GetMessageClass(method.output_type)
    if method.takes_stream:
        call = channel.stream_stream(method.path)(timeout=_ANSWER_S)
        await call.write(case.data)
        await call.done_writing()
    elif method.gives_stream:
        call = channel.unary_stream(method.path)(case.data, timeout=_ANSWER_S)
    else:
        response_class.FromString(await channel.unary_unary(method.path)(case.data, timeout=_ANSWER_S))
        return _Code.OK
    seq = 0
    items: list[int] = []
    async for data in call:
        response: Any = response_class.FromString(data)
        seq += 1
        if method.path == _STREAM and response.seq != seq:
            raise ValueError(f"message {seq} of the stream is numbered {response.seq}")
        if method.path == _BATCH:
            items.append(response.item)
            if response.HasField("error"):
                _judge_item(response.error)
        if method.is_endless:
            call.cancel()
            return _Code.OK
    if sorted(items) != list(range(len(items))):
        raise ValueError(f"items {items}")
    return _Code(await call.code())


def _judge_item(status: status_pb2.Status) -> None:
    """Raises ValueError unless an item of a batch may end so."""
    rich = rich_item_error(status)
    if rich.code not in ALLOWED or rich.reason not in _REASONS or _PYTHON.search(rich.message):
        raise ValueError(f"an item ends {rich.code.name}, {rich.reason}: {rich.message}")


def _problem_of(case: Case, error: grpc.aio.AioRpcError) -> str:
    """Why this is no way to refuse a message; empty if it is one."""
    code, details = error.code(), error.details() or ""
    if code not in ALLOWED:
        return f"{code.name}: {details}"
    if _PYTHON.search(details):
        return f"{code.name} tells of the inside: {details}"
    if (case.method.path, code) in _PLAIN:
        return ""
    if code is _Code.RESOURCE_EXHAUSTED and len(case.data) > LIMITS["max_message_bytes"]:
        return ""  # grpc's own refusal
    try:
        reason = rich_error(error).reason
    except AssertionError as problem:
        return f"{code.name}: {details}: {problem}"
    return "" if reason in _REASONS else f"{code.name} with reason {reason}"


@asynccontextmanager
async def fuzzed_service(folder: Path) -> AsyncIterator[Fuzzer]:
    """A fuzzer over a whole service with a scripted engine; `folder` takes its tokenizer."""
    options = quick_options({"drain_propagation_s": 0.0}, LIMITS)
    async with scripted_service(folder, options, max_model_len=MAX_MODEL_LEN) as harness:
        yield Fuzzer(harness)
