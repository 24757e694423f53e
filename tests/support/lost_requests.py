"""What a `grpc.aio` server without anything of this project keeps of calls that are given up at once.

`python -m tests.support.lost_requests HOW` serves a method that reads one request: grpc reads it before
the handler runs (`plain`), or the handler does by `photon_grpc.server.sends` (`apart`). `measure` starts
it, makes calls that are cancelled in the turn in which they begin, and counts the bytes in use at its malloc.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

import grpc

from photon_grpc.server.sends import read_request
from tests.support.grpc_harness import until
from tests.support.grpc_losses import LOSS, SERVICE, TIMEOUT_S, measured, serve
from tests.support.heap_bytes import heap_bytes

_WAIT = "Wait"
_ROUNDS, _CALLERS = 20, 50


def measure(*, apart: bool) -> float:
    """Bytes per call, the mean over a thousand. Raises RuntimeError where the server does not serve."""
    how = "apart" if apart else "plain"
    return measured("tests.support.lost_requests", [how], _measure)


async def _measure(channel: grpc.aio.Channel) -> float:
    wait = channel.unary_stream(f"/{SERVICE}/{_WAIT}")
    loss = channel.unary_unary(f"/{SERVICE}/{LOSS}")

    async def run() -> int:
        for _ in range(_ROUNDS):
            calls = [wait(b"request", timeout=TIMEOUT_S) for _ in range(_CALLERS)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
        return int(json.loads(await loss(b"", timeout=TIMEOUT_S)))

    before = await run()
    return (await run() - before) / (_ROUNDS * _CALLERS)


async def _has_read(request: bytes, context: Any) -> None:
    await asyncio.Future()


async def _read(_: Any, context: Any) -> None:
    await read_request(context)
    await asyncio.Future()


async def _loss(request: bytes, context: Any) -> bytes:
    """Once no other call is left."""
    await until(lambda: len(asyncio.all_tasks()) <= _OWN_TASKS)
    gc.collect()
    return json.dumps(heap_bytes()).encode()


# What serves, what takes calls, what takes the next one, and of `_loss` the handler and its call's end.
_OWN_TASKS = 5


if __name__ == "__main__":
    apart = sys.argv[1] == "apart"
    serve(
        {
            _WAIT: (
                grpc.stream_stream_rpc_method_handler(_read)
                if apart
                else grpc.unary_stream_rpc_method_handler(_has_read)
            ),
            LOSS: grpc.unary_unary_rpc_method_handler(_loss),
        }
    )
