"""Calls of every kind at once, each fixed by its number, and what of their answers is wrong.

Prompts and outputs of random length, greedy and sampled, penalties, biases, several completions, stop
strings and ids, log-probabilities, chunk policies, deadlines, prefixes shared and not; and clients that
cancel, before the first token or in the middle. Every answer is checked against what was asked: what
must be counted is counted, what must come once comes once, and the status is one that was called for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from photon_grpc.v1 import inference_pb2
from tools.bench.figures import Refusal
from tools.bench.load import read_refusal

__all__ = ["End", "MixedLoad", "Scenario", "Tally", "drive", "request_id", "scenario"]

_SERVICE = "/photon.v1.InferenceService"
_TIMEOUT_S = 300.0
_NUM_PREFIXES = 4
_STREAMS_PER_CHANNEL = 64
_MAX_KEPT_PROBLEMS = 50
_CHANNEL_READY_S = 30.0
_WORDS = ("the", "river", "def", "return", "value", " ", "\n", "é", "server", "1", "class", "für")


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """Bounds of what is asked for. Token ids are from [`first_id`, `vocab_size`)."""

    first_id: int
    vocab_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One call. `cancel_after` counts messages; 0: the call is cancelled `cancel_delay_s` after it began."""

    spec: inference_pb2.GenerationSpec
    chunk_policy: inference_pb2.ChunkPolicy | None
    unary: bool
    timeout_s: float
    cancel_after: int | None
    cancel_delay_s: float
    allowed: frozenset[str]


@dataclass(frozen=True, slots=True)
class End:
    """How a call ended. `refusal` is there where the server said so in trailers of its own."""

    code: str
    text: str = ""
    refusal: Refusal | None = None

    @classmethod
    def of(cls, error: Any) -> End:
        """What a failed call of grpc.aio tells."""
        refusal = read_refusal(error.trailing_metadata() or ())
        return cls(error.code().name, str(error.details()), refusal if refusal.reason else None)

    @property
    def reason(self) -> str:
        """The server's, empty without one."""
        return "" if self.refusal is None else self.refusal.reason


@dataclass(slots=True)
class Tally:
    """What came of the calls so far; `ends` has status and reason of each by its number."""

    begun: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    ends: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def ended(self) -> int:
        """Calls that have a status."""
        return sum(self.codes.values())

    def complain(self, number: int, problem: str) -> None:
        """Note that call `number` went wrong; the first of them in words."""
        self.num_problems += 1
        if len(self.problems) < _MAX_KEPT_PROBLEMS:
            self.problems.append(f"call {number}: {problem}")


def request_id(number: int) -> str:
    """Under which call number `number` is sent."""
    return f"soak-{number}"


def scenario(load: MixedLoad, number: int) -> Scenario:
    """Call number `number`; the same for the same load."""
    pick = random.Random(f"{load.seed} {number}")
    spec = inference_pb2.GenerationSpec()
    _set_prompt(load, pick, spec)
    spec.stop.max_tokens = _log_uniform(pick, load.max_new_tokens)
    _set_sampling(load, pick, spec.sampling)
    _set_stop(load, pick, spec.stop)
    _set_output(pick, spec)
    if pick.random() < 0.3:
        spec.cache.bypass_prefix_cache = True
    if pick.random() < 0.1:
        spec.cache.cache_salt = pick.choice("ab")
    if pick.random() < 0.2:
        spec.scheduling.priority = pick.randrange(4)
    policy = None
    unary = pick.random() < 0.2
    if not unary and pick.random() < 0.2:
        policy = inference_pb2.ChunkPolicy(max_tokens=pick.randrange(1, 16))
        policy.max_delay.FromMilliseconds(pick.randrange(1, 100))
    allowed, cancel_after, timeout_s = {"OK"}, None, _TIMEOUT_S
    if pick.random() < 0.15:
        cancel_after = 0 if unary else pick.randrange(6)
        allowed.add("CANCELLED")
    elif pick.random() < 0.05:
        timeout_s = pick.uniform(0.003, 0.2)
        allowed |= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    elif pick.random() < 0.03:
        spec.scheduling.queue_timeout.FromMilliseconds(pick.randrange(1, 50))
        allowed |= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
    return Scenario(
        spec,
        policy,
        unary,
        timeout_s,
        cancel_after,
        pick.choice((0.0, pick.uniform(0, 0.1))),
        frozenset(allowed),
    )


def _log_uniform(pick: random.Random, most: int) -> int:
    """From 1 to `most`, as often below its root as above."""
    return max(1, min(most, round(most ** pick.random())))


def _ids(load: MixedLoad, pick: random.Random, count: int) -> list[int]:
    return [pick.randrange(load.first_id, load.vocab_size) for _ in range(count)]


def _set_prompt(load: MixedLoad, pick: random.Random, spec: inference_pb2.GenerationSpec) -> None:
    if pick.random() < 0.1:
        # A word has at most a few tokens.
        spec.text = " ".join(pick.choices(_WORDS, k=_log_uniform(pick, max(1, load.max_prompt_tokens // 8))))
        return
    count = _log_uniform(pick, load.max_prompt_tokens)
    ids = _ids(load, pick, count)
    if pick.random() < 0.3:
        prefix = random.Random(f"prefix {pick.randrange(_NUM_PREFIXES)}")
        shared = _ids(load, prefix, load.max_prompt_tokens)
        start = pick.randrange(count)
        ids = [*shared[: count - start], *ids[count - start :]]
    spec.token_ids.ids.extend(ids)


def _set_sampling(load: MixedLoad, pick: random.Random, sampling: inference_pb2.SamplingParams) -> None:
    if pick.random() < 0.2:
        sampling.n = pick.randrange(2, 5)
    if pick.random() < 0.4:
        sampling.temperature = 0.0
    else:
        sampling.temperature = pick.uniform(0.1, 1.5)
        sampling.top_p = pick.choice((1.0, 0.95, 0.5))
        sampling.top_k = pick.choice((0, 1, 5, 50))
        sampling.min_p = pick.choice((0.0, 0.0, 0.05))
        if pick.random() < 0.7:
            sampling.seed = pick.randrange(1 << 63)
    if pick.random() < 0.2:
        sampling.presence_penalty = pick.uniform(-1, 2)
        sampling.frequency_penalty = pick.uniform(-1, 2)
        sampling.repetition_penalty = pick.uniform(0.8, 1.5)
    if pick.random() < 0.1:
        for token_id in _ids(load, pick, 8):
            sampling.logit_bias[token_id] = pick.uniform(-20, 20)
    if pick.random() < 0.05:
        sampling.allowed_token_ids.extend(sorted(set(_ids(load, pick, 32))))


def _set_stop(load: MixedLoad, pick: random.Random, stop: inference_pb2.StopParams) -> None:
    stop.ignore_eos = pick.random() < 0.5
    if pick.random() < 0.15:
        stop.strings.extend(pick.sample((" a", "e", "\n\n", "zz", "return", "é"), k=2))
        stop.include_stop = pick.random() < 0.5
    if pick.random() < 0.1:
        stop.token_ids.extend(sorted(set(_ids(load, pick, 16))))
    if pick.random() < 0.1:
        stop.min_tokens = pick.randrange(stop.max_tokens + 1)
    if pick.random() < 0.03:
        stop.time_limit.CopyFrom(Duration(nanos=pick.randrange(1, 200) * 1_000_000))


def _set_output(pick: random.Random, spec: inference_pb2.GenerationSpec) -> None:
    output = spec.output
    output.text = pick.random() < 0.6
    output.token_ids = pick.random() < 0.5
    if pick.random() < 0.15:
        output.top_logprobs = pick.randrange(6)
    if pick.random() < 0.05 and len(spec.token_ids.ids) < 200:
        output.prompt_top_logprobs = pick.randrange(4)
    if pick.random() < 0.05:
        output.echo_prompt = True


async def drive(
    load: MixedLoad,
    address: str,
    concurrency: int,
    keep_on: Callable[[], bool],
    tally: Tally,
    expected: frozenset[tuple[str, str]] = frozenset(),
) -> None:
    """`concurrency` callers, each with one call after the other while `keep_on` says so.

    Any call may end with one of the `expected` statuses and reasons. Who is told when to come back waits.
    """
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    num_channels = -(-concurrency // _STREAMS_PER_CHANNEL)
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(num_channels)]

    async def caller(index: int) -> None:
        channel = channels[index % num_channels]
        while keep_on():
            number, tally.begun = tally.begun, tally.begun + 1
            await _call(channel, scenario(load, number), number, load, tally, expected)

    try:
        async with asyncio.timeout(_CHANNEL_READY_S):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
        await asyncio.gather(*(caller(index) for index in range(concurrency)))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _call(
    channel: Any,
    one: Scenario,
    number: int,
    load: MixedLoad,
    tally: Tally,
    expected: frozenset[tuple[str, str]],
) -> None:
    began = time.monotonic()
    received: list[Any] = []
    end = await (_unary if one.unary else _stream)(channel, one, number, received)
    tally.codes[end.code] += 1
    tally.ends[number] = end.code, end.reason
    if end.code not in one.allowed and (end.code, end.reason) not in expected:
        took = time.monotonic() - began
        tally.complain(number, f"ended with {end.code} {end.reason} after {took:.3f} s: {end.text}")
    elif end.code == "OK":
        check = check_response if one.unary else check_stream
        problem, tokens = check(one.spec, received, load.vocab_size)
        tally.tokens += tokens
        if problem:
            tally.complain(number, problem)
    elif end.code == "UNAVAILABLE":
        if end.refusal is None or not end.refusal.says_when:
            tally.complain(number, f"UNAVAILABLE does not say when to come back: {end.text}")
            return
        assert end.refusal.pushback_ms is not None
        await asyncio.sleep(end.refusal.pushback_ms / 1e3)


async def _unary(channel: Any, one: Scenario, number: int, received: list[Any]) -> End:
    method = channel.unary_unary(
        f"{_SERVICE}/Generate",
        request_serializer=inference_pb2.GenerateRequest.SerializeToString,
        response_deserializer=inference_pb2.GenerateResponse.FromString,
    )
    request = inference_pb2.GenerateRequest(spec=one.spec)
    call = method(request, timeout=one.timeout_s, metadata=_metadata(number))
    if one.cancel_after is not None:
        await asyncio.sleep(one.cancel_delay_s)
        call.cancel()
    try:
        received.append(await call)
    except grpc.aio.AioRpcError as error:
        return End.of(error)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return End("CANCELLED")
    return End("OK")


async def _stream(channel: Any, one: Scenario, number: int, received: list[Any]) -> End:
    method = channel.unary_stream(
        f"{_SERVICE}/StreamGenerate",
        request_serializer=inference_pb2.StreamGenerateRequest.SerializeToString,
        response_deserializer=inference_pb2.StreamGenerateResponse.FromString,
    )
    request = inference_pb2.StreamGenerateRequest(spec=one.spec, chunk_policy=one.chunk_policy)
    call = method(request, timeout=one.timeout_s, metadata=_metadata(number))
    if one.cancel_after == 0:
        await asyncio.sleep(one.cancel_delay_s)
        call.cancel()
    try:
        async for response in call:
            received.append(response)
            if one.cancel_after is not None and len(received) >= one.cancel_after:
                call.cancel()
    except grpc.aio.AioRpcError as error:
        return End.of(error)
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
        return End("CANCELLED")
    return End("OK")


def _metadata(number: int) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", request_id(number)),)


def check_stream(
    spec: inference_pb2.GenerationSpec,
    responses: Sequence[inference_pb2.StreamGenerateResponse],
    vocab_size: int,
) -> tuple[str, int]:
    """What is wrong with a stream that ended OK (empty: nothing), and its output tokens."""
    kinds = [response.WhichOneof("event") for response in responses]
    if [response.seq for response in responses] != list(range(1, len(responses) + 1)):
        return "seq is not 1, 2, 3, ...", 0
    if not kinds or kinds[0] != "started" or kinds[-1] != "summary":
        return f"events are not started ... summary: {kinds[:1]} ... {kinds[-1:]}", 0
    if kinds.count("started") != 1 or kinds.count("summary") != 1:
        return "started or summary came twice", 0
    n = spec.sampling.n or 1
    finished = sorted(response.finished.index for response in responses if response.HasField("finished"))
    if finished != list(range(n)):
        return f"finished for {finished}, n is {n}", 0
    tokens: Counter[int] = Counter()
    for response in responses:
        if response.HasField("delta"):
            delta = response.delta
            problem = _check_part(spec, delta.token_ids, delta.logprobs, delta.num_tokens, vocab_size)
            if problem:
                return problem, 0
            if delta.text and not spec.output.text:
                return "text that nobody asked for", 0
            tokens[delta.index] += delta.num_tokens
    return _check_totals(spec, [tokens[i] for i in range(n)], responses[-1].summary.usage), tokens.total()


def check_response(
    spec: inference_pb2.GenerationSpec, responses: Sequence[inference_pb2.GenerateResponse], vocab_size: int
) -> tuple[str, int]:
    """The same for a unary answer. Its tokens are counted only where their ids were asked for."""
    (response,) = responses
    n = spec.sampling.n or 1
    if [completion.index for completion in response.completions] != list(range(n)):
        return f"{len(response.completions)} completions, n is {n}", 0
    total = response.usage.output_tokens
    if spec.output.token_ids:
        for completion in response.completions:
            count = len(completion.token_ids)
            problem = _check_part(spec, completion.token_ids, completion.logprobs, count, vocab_size)
            if problem:
                return problem, 0
        counts = [len(completion.token_ids) for completion in response.completions]
        return _check_totals(spec, counts, response.usage), total
    least = 0 if spec.stop.HasField("time_limit") else n
    return ("" if total >= least else f"{total} output tokens of {n} completions"), total


def _check_part(
    spec: inference_pb2.GenerationSpec, ids: Sequence[int], logprobs: Any, count: int, vocab_size: int
) -> str:
    if spec.output.token_ids and len(ids) != count:
        return f"{len(ids)} token ids, num_tokens is {count}"
    if not spec.output.token_ids and ids:
        return "token ids that nobody asked for"
    if any(token_id >= vocab_size for token_id in ids):
        return "a token id outside of the vocabulary"
    wanted = count if spec.output.HasField("top_logprobs") else 0
    if len(logprobs.values) != wanted:
        return f"{len(logprobs.values)} log-probabilities, {wanted} are due"
    if any(not -1e6 < value <= 1e-3 for value in logprobs.values):
        return "a log-probability that is none"
    return ""


def _check_totals(
    spec: inference_pb2.GenerationSpec, counts: Sequence[int], usage: inference_pb2.Usage
) -> str:
    if sum(counts) != usage.output_tokens:
        return f"{sum(counts)} tokens came, usage says {usage.output_tokens}"
    # A time limit may end a completion before its first token.
    least = 0 if spec.stop.HasField("time_limit") else 1
    if any(not least <= count <= spec.stop.max_tokens for count in counts):
        return f"{list(counts)} tokens, max_tokens is {spec.stop.max_tokens}"
    if spec.token_ids.ids and usage.prompt_tokens != len(spec.token_ids.ids):
        return f"usage says {usage.prompt_tokens} prompt tokens of {len(spec.token_ids.ids)}"
    return ""
