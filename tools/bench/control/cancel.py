"""From the cancel of a call at its client to the moment at which its KV blocks are free.

The runner hears of a sequence that has left with the next step, which is planned right after its blocks
were given back; that moment is in the server's log. GetLoad tells of it with the end of that step.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from photon_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tools.bench.bars import Bar
from tools.bench.figures import Distribution
from tools.bench.scripted_factory import REMOVED
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import ServerSpec

__all__ = ["CancelPlan", "CancelResult", "headline", "promises", "run"]

_BLOCK_TOKENS = 16
_BACKGROUND_TOKENS = 3500
_TIMEOUT_S = 300.0
_SEEN_S = 30.0


@dataclass(frozen=True, slots=True)
class CancelPlan:
    """`cancels` one after the other, at moments that have nothing to do with the steps."""

    cancels: int = 300
    step_s: float = 0.025
    background_streams: int = 8
    prompt_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CancelResult:
    """Seconds since the cancel."""

    freed: Distribution
    seen: Distribution
    """By GetLoad, asked again and again."""


def run(plan: CancelPlan) -> CancelResult:
    """Raises RuntimeError when a cancel is never seen to free anything."""
    spec = ServerSpec(
        step_s=plan.step_s,
        max_num_seqs=64,
        max_num_batched_tokens=2 * plan.prompt_tokens,
        admin=True,
        log_removals=True,
    )
    with ServerHandle(spec) as server:
        assert server.admin_address is not None
        cancelled, seen = asyncio.run(_cancel(plan, server.address, server.admin_address))
        server.stop()
        freed = first_after(cancelled, _removals(server.log_lines()))
    delays = [moment - cancel for cancel, moment in zip(cancelled, freed, strict=True)]
    of_freed, of_seen = Distribution.of(delays), Distribution.of(seen)
    assert of_freed is not None
    assert of_seen is not None
    return CancelResult(of_freed, of_seen)


def _removals(lines: Iterable[str]) -> list[float]:
    records = (json.loads(line) for line in lines if line.startswith("{"))
    return sorted(record["moment"] for record in records if record.get("event") == REMOVED)


def first_after(moments: Iterable[float], events: list[float]) -> list[float]:
    """For each moment the first of the sorted `events` that is not before it. Raises RuntimeError."""
    found = []
    for moment in moments:
        place = bisect.bisect_left(events, moment)
        if place == len(events):
            raise RuntimeError("a cancelled call was never removed")
        found.append(events[place])
    return found


def _request(num_tokens: int, max_tokens: int) -> inference_pb2.StreamGenerateRequest:
    spec = inference_pb2.GenerationSpec(
        token_ids=inference_pb2.TokenIds(ids=[5 + i % 90 for i in range(num_tokens)]),
        stop=inference_pb2.StopParams(max_tokens=max_tokens, ignore_eos=True),
        cache=inference_pb2.CacheOptions(bypass_prefix_cache=True),
    )
    return inference_pb2.StreamGenerateRequest(spec=spec)


async def _cancel(plan: CancelPlan, address: str, admin: str) -> tuple[list[float], list[float]]:
    """The moments of the cancels, and how long after each GetLoad told of it."""
    pick = random.Random(plan.seed)
    cancelled, seen = [], []
    async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(admin) as other:
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        control = control_pb2_grpc.ControlServiceStub(other)
        background = asyncio.create_task(_background(plan, inference))
        for _ in range(plan.cancels):
            call = inference.StreamGenerate(_request(plan.prompt_tokens, 1000), timeout=_TIMEOUT_S)
            for _ in range(2):  # Started, then the first token
                await call.read()
            await asyncio.sleep(pick.uniform(plan.step_s, 2 * plan.step_s))
            held = await _used_blocks(control)
            assert held > plan.prompt_tokens // _BLOCK_TOKENS, "GetLoad does not know the call yet"
            cancelled.append(time.monotonic())
            call.cancel()
            # Background streams take a block now and then, a cancelled call gives back many.
            enough = held - plan.prompt_tokens // _BLOCK_TOKENS // 2
            while await _used_blocks(control) > enough:
                if time.monotonic() - cancelled[-1] > _SEEN_S:
                    raise RuntimeError("the blocks of a cancelled call were never free")
            seen.append(time.monotonic() - cancelled[-1])
            assert not background.done(), "the background has ended too early"
        background.cancel()
    return cancelled, seen


async def _used_blocks(control: Any) -> int:
    load = await control.GetLoad(control_pb2.GetLoadRequest(), timeout=_SEEN_S)
    return int(load.used_kv_blocks)


async def _background(plan: CancelPlan, inference: Any) -> None:
    """Streams that keep the engine stepping; a new one where one ends would be a removal of its own."""

    async def read() -> None:
        async for _ in inference.StreamGenerate(_request(16, _BACKGROUND_TOKENS), timeout=_TIMEOUT_S):
            pass

    async with asyncio.TaskGroup() as group:
        for _ in range(plan.background_streams):
            group.create_task(read())


def promises(plan: CancelPlan, result: CancelResult) -> list[Bar]:
    """One step and ten milliseconds."""
    bound = plan.step_s * 1e3 + 10
    return [Bar("cancel to free blocks p99, ms", result.freed.p99 * 1e3, bound, at_least=False)]


def headline(plan: CancelPlan, result: CancelResult) -> str:
    """In one line."""
    return (
        f"{plan.cancels} cancels, steps of {plan.step_s * 1e3:g} ms: blocks free after p50 "
        f"{result.freed.p50 * 1e3:.1f}, p99 {result.freed.p99 * 1e3:.1f} ms; GetLoad says so after p50 "
        f"{result.seen.p50 * 1e3:.1f}, p99 {result.seen.p99 * 1e3:.1f} ms"
    )
