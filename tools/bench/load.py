"""The load: client processes that stream from a server and note when each message came.

Each process is spawned (gRPC does not survive a fork), opens its channels, says that it is ready, and
starts at the moment the parent names. While the load runs a client only keeps bytes and moments; the
messages are parsed afterwards, so that measuring costs the clients, which share the machine with the
server, as little as possible.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
import uvloop
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from photon_grpc.v1 import inference_pb2
from tools.bench.figures import CallRecord, Refusal

__all__ = ["Load", "LoadResult", "poisson_arrivals", "read_refusal", "run_load", "run_loads"]

_METHOD = "/photon.v1.InferenceService/StreamGenerate"
_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_CHANNEL_READY_S = 30.0
# Between the last client's "ready" and the start, so that the message has reached all of them.
_LEAD_S = 0.2


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where.

    With `arrivals` (seconds from the start) an open loop: each call begins at its moment, whatever
    became of the others. Without, a closed loop: `concurrency` callers, each beginning its next call
    when the last has ended, until `num_requests` have begun or `duration_s` has passed, whichever is
    set. Request number i has the same prompt in every load of the same `seed`. Prompts are random ids
    in [`first_id`, `vocab_size`) and generation is greedy, to exactly `new_tokens`; the prefix cache
    is bypassed, or a repeated load would measure it. `sampled` draws instead (temperature 0.8, top_p
    0.95, top_k 50, seeded by the request's number). Without `text` token ids come back in its place.
    """

    address: str
    prompt_tokens: int
    new_tokens: int
    first_id: int
    vocab_size: int
    concurrency: int = 1
    arrivals: tuple[float, ...] = ()
    num_requests: int | None = None
    duration_s: float | None = None
    timeout_s: float = 120.0
    seed: int = 0
    sampled: bool = False
    text: bool = True
    streams_per_channel: int = 64
    """One HTTP/2 connection has one receive window; many streams share it badly."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Goes with every call."""
    spread: int = 0
    """Outputs have up to that many tokens more or less, each number as likely, by the request's number."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All calls of a load, and the CPU seconds its client processes used."""

    records: tuple[CallRecord, ...]
    client_cpu_s: float


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Moments in [0, `duration_s`) of a Poisson process of `rate` per second; fixed by the seed."""
    generator = np.random.default_rng(seed)
    moments: list[float] = []
    moment = float(generator.exponential(1 / rate))
    while moment < duration_s:
        moments.append(moment)
        moment += float(generator.exponential(1 / rate))
    return tuple(moments)


def split(load: Load, num_processes: int) -> list[tuple[Load, int, int]]:
    """`(its part of the load, first request number, step)` for each process that has something to do."""
    parts = []
    for number in range(num_processes):
        part = replace(
            load,
            arrivals=load.arrivals[number::num_processes],
            concurrency=len(range(number, load.concurrency, num_processes)),
            num_requests=(
                None if load.num_requests is None else len(range(number, load.num_requests, num_processes))
            ),
        )
        busy = part.arrivals if load.arrivals else part.concurrency and part.num_requests != 0
        if busy:
            parts.append((part, number, num_processes))
    return parts


def request_bytes(load: Load, number: int) -> bytes:
    """The serialised request number `number` of the load."""
    generator = np.random.default_rng((load.seed, number))
    ids = generator.integers(load.first_id, load.vocab_size, load.prompt_tokens).tolist()
    max_tokens = load.new_tokens
    if load.spread:
        max_tokens += int(generator.integers(-load.spread, load.spread + 1))
    spec = inference_pb2.GenerationSpec(
        token_ids=inference_pb2.TokenIds(ids=ids),
        sampling=(
            inference_pb2.SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=number)
            if load.sampled
            else inference_pb2.SamplingParams(temperature=0.0)
        ),
        stop=inference_pb2.StopParams(max_tokens=max_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(text=load.text, token_ids=not load.text),
        cache=inference_pb2.CacheOptions(bypass_prefix_cache=True),
        # Without it, a load above the server's capacity would wait for places up to the call's deadline.
        scheduling=inference_pb2.SchedulingOptions(queue_timeout=Duration(seconds=int(load.timeout_s))),
    )
    return inference_pb2.StreamGenerateRequest(spec=spec).SerializeToString()


def run_load(load: Load, num_processes: int, *, before: Any, after: Any) -> LoadResult:
    """Run the load from `num_processes` processes.

    `before` is called once all of them are connected, `after` when the last call has ended.
    """
    results = _run(split(load, num_processes), before, after)
    return LoadResult(
        tuple(record for result in results for record in result.records),
        sum(result.client_cpu_s for result in results),
    )


def run_loads(loads: Sequence[Load], *, before: Any, after: Any) -> list[LoadResult]:
    """Run several loads side by side, each from a process of its own; their results in that order."""
    return _run([(load, 0, 1) for load in loads], before, after)


def _run(parts: Sequence[tuple[Load, int, int]], before: Any, after: Any) -> list[LoadResult]:
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    try:
        for part, first, step in parts:
            ours, theirs = context.Pipe()
            process = context.Process(target=_client_process, args=(theirs, part, first, step), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
        for _, connection in workers:
            connection.recv()
        before()
        start = time.monotonic() + _LEAD_S
        for _, connection in workers:
            connection.send(start)
        for _, connection in workers:
            connection.recv()
        after()
        results: list[LoadResult] = []
        for _, connection in workers:
            connection.send(None)
            results.append(connection.recv())
    finally:
        for process, connection in workers:
            connection.close()
            process.join(_CHANNEL_READY_S)
            if process.is_alive():
                process.kill()
    return results


def read_refusal(trailers: Iterable[tuple[str, Any]], text: str = "") -> Refusal:
    """What the trailers of a failed call say, and its message where there is nobody else to ask."""
    found = dict(trailers)
    reason, retry_after_ms = "", None
    for detail in status_pb2.Status.FromString(found.get(_DETAILS_KEY, b"")).details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    pushback = found.get(_PUSHBACK_KEY)
    pushback_ms = None if pushback is None else int(pushback)
    return Refusal(reason, retry_after_ms, pushback_ms, "" if reason else text)


@dataclass(slots=True)
class _RawCall:
    intended: float
    sent: float
    ended: float = 0.0
    code: str = ""
    messages: list[tuple[float, bytes]] | None = None
    trailers: tuple[tuple[str, Any], ...] | None = None
    text: str = ""


def _client_process(connection: Connection, load: Load, first: int, step: int) -> None:
    calls, cpu_s = uvloop.run(_drive(connection, load, first, step))
    connection.send("done")
    connection.recv()
    connection.send(LoadResult(tuple(_record(call) for call in calls), cpu_s))


async def _drive(
    connection: Connection, load: Load, first: int, step: int
) -> tuple[Sequence[_RawCall], float]:
    num_channels = -(-max(load.concurrency, 1) // load.streams_per_channel)
    channels = [
        grpc.aio.insecure_channel(load.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(num_channels)
    ]
    try:
        async with asyncio.timeout(_CHANNEL_READY_S):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
        methods = [channel.unary_stream(_METHOD) for channel in channels]
        _stop_collector()
        connection.send("ready")
        start = await asyncio.get_running_loop().run_in_executor(None, connection.recv)
        cpu_before = time.process_time()
        if load.arrivals:
            calls = await _open_loop(methods, load, first, step, start)
        else:
            calls = await _closed_loop(methods, load, first, step, start)
        return calls, time.process_time() - cpu_before
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _stop_collector() -> None:
    """A full round of the collector walks all that has been kept: with 50,000 messages it takes 0.1 to 0.3 s,
    for which every stream of this process would seem to stand still."""
    gc.collect()
    gc.freeze()
    gc.disable()


async def _open_loop(
    methods: Sequence[Any], load: Load, first: int, step: int, start: float
) -> list[_RawCall]:
    requests = [request_bytes(load, first + i * step) for i in range(len(load.arrivals))]

    async def arrive(index: int) -> _RawCall:
        intended = start + load.arrivals[index]
        await asyncio.sleep(intended - time.monotonic())
        return await _call(methods[index % len(methods)], requests[index], intended, load)

    return await asyncio.gather(*(arrive(index) for index in range(len(requests))))


async def _closed_loop(
    methods: Sequence[Any], load: Load, first: int, step: int, start: float
) -> list[_RawCall]:
    calls: list[_RawCall] = []
    stop_at = None if load.duration_s is None else start + load.duration_s
    num_begun = 0

    async def caller(index: int) -> None:
        nonlocal num_begun
        while load.num_requests is None or num_begun < load.num_requests:
            if stop_at is not None and time.monotonic() >= stop_at:
                return
            request = request_bytes(load, first + num_begun * step)
            num_begun += 1
            calls.append(await _call(methods[index % len(methods)], request, time.monotonic(), load))

    await asyncio.sleep(start - time.monotonic())
    await asyncio.gather(*(caller(index) for index in range(load.concurrency)))
    return calls


async def _call(method: Any, request: bytes, intended: float, load: Load) -> _RawCall:
    messages: list[tuple[float, bytes]] = []
    now = time.monotonic
    call = _RawCall(intended=intended, sent=now(), messages=messages)
    stream = method(request, timeout=load.timeout_s, metadata=load.metadata)
    try:
        async for message in stream:
            messages.append((now(), message))
        call.code = "OK"
    except grpc.aio.AioRpcError as error:
        call.code = error.code().name
        call.trailers = tuple(error.trailing_metadata() or ())
        call.text = error.details() or ""
    call.ended = now()
    return call


def _record(call: _RawCall) -> CallRecord:
    tokens = []
    messages = call.messages or []
    for received, data in messages:
        response = inference_pb2.StreamGenerateResponse.FromString(data)
        if response.delta.num_tokens:
            tokens.append((received, response.delta.num_tokens))
    refusal = None if call.trailers is None else read_refusal(call.trailers, call.text)
    return CallRecord(call.intended, call.sent, call.ended, call.code, len(messages), tuple(tokens), refusal)
