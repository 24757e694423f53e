"""What happens to a server under a soak beside its load: an operator's commands, and clients that vanish.

One disturbance after the other, in an order fixed by the seed, at random intervals: a drain that is taken
back, the prefix cache flushed, a request or all of them aborted, and processes with open streams that are
killed, with or without having been frozen, having read or not.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

from photon_grpc.v1 import control_pb2
from tools.bench.mixed_load import Tally, request_id

__all__ = ["EXPECTED", "KINDS", "disturb"]

# What disturbances, and the runner's faults, end calls with: status and reason.
EXPECTED = frozenset(
    {
        ("UNAVAILABLE", "DRAINING"),
        ("ABORTED", "ABORTED_BY_OPERATOR"),
        ("INTERNAL", "REQUEST_FAULT"),
    }
)
KINDS = ("drain", "flush", "abort", "abort all", "killed", "frozen", "not reading")
_WEIGHTS = (2, 2, 6, 1, 3, 1, 3)
_ANSWER_S = 60.0
_MAX_STREAMS = 4


async def disturb(
    control: Any, address: str, seed: int, mean_s: float, keep_on: Callable[[], bool], tally: Tally
) -> Counter[str]:
    """Until `keep_on` says otherwise, every `mean_s` seconds on average; how many there were, by kind.

    Raises grpc.RpcError when a command is answered with what it must not be.
    """
    pick = random.Random(f"disturbances {seed}")
    done: Counter[str] = Counter()
    while keep_on():
        await asyncio.sleep(pick.expovariate(1 / mean_s))
        kind = pick.choices(KINDS, _WEIGHTS)[0]
        match kind:
            case "drain":
                await _drain(control, pick)
            case "flush":
                await control.FlushCache(control_pb2.FlushCacheRequest(), timeout=_ANSWER_S)
            case "abort":
                await _abort(control, pick, tally)
            case "abort all":
                everybody = control_pb2.AbortRequest(all=control_pb2.AllRequests(), reason="soak")
                await control.Abort(everybody, timeout=_ANSWER_S)
            case _:
                await _bad_client(address, f"lost-{done.total()}", kind, pick)
        done[kind] += 1
    return done


async def _drain(control: Any, pick: random.Random) -> None:
    """The undo comes in any case: a server that stays drained would serve nobody."""
    await control.Drain(control_pb2.DrainRequest(), timeout=_ANSWER_S)
    try:
        await asyncio.sleep(pick.uniform(0.05, 1.0))
    finally:
        await control.Drain(control_pb2.DrainRequest(undo=True), timeout=_ANSWER_S)


async def _abort(control: Any, pick: random.Random, tally: Tally) -> None:
    """One of the latest calls, which may have ended."""
    number = max(0, tally.begun - 1 - pick.randrange(48))
    try:
        await control.Abort(
            control_pb2.AbortRequest(request_id=request_id(number), reason="soak"), timeout=_ANSWER_S
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise


async def _bad_client(address: str, name: str, kind: str, pick: random.Random) -> None:
    arguments = [
        address,
        name,
        str(pick.randrange(1, _MAX_STREAMS + 1)),
        "0" if kind == "not reading" else "1",
        str(pick.randrange(50, 500)),
        str(pick.randrange(1 << 30)),
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tools.bench.bad_client", *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_ANSWER_S):
            await process.stdout.readline()
        await asyncio.sleep(pick.uniform(0.0, 2.0))
        if kind == "frozen":
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(pick.uniform(0.5, 3.0))
    finally:
        process.kill()
        await process.wait()
