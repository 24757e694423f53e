"""What a `grpc.aio` server without anything of this project keeps of writes that are cut short.

`python -m tests.support.cut_writes BYTES HOW` writes messages of BYTES without an end to clients that leave
after the first one: in the task of their call (`plain`), as grpc is meant to be used, or apart from it
(`apart`), by `photon_grpc.server.sends`. `measure` starts it and counts the bytes in use at its malloc.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from dataclasses import dataclass
from typing import Any

import grpc

from photon_grpc.server.sends import send
from tests.support.grpc_losses import LOSS, SERVICE, TIMEOUT_S, measured, serve
from tests.support.heap_bytes import heap_bytes

_FLOOD = "Flood"
_CALLERS = 16
_WARM_UP_CALLS, _CALLS = 1000, 1000


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean over `num_cut` writes that were cut short."""

    bytes_per_write: float
    num_cut: int


def measure(message_bytes: int, *, apart: bool) -> Loss:
    """Raises RuntimeError where the server does not serve."""
    arguments = [str(message_bytes), "apart" if apart else "plain"]
    return measured("tests.support.cut_writes", arguments, _measure)


async def _measure(channel: grpc.aio.Channel) -> Loss:
    flood = channel.unary_stream(f"/{SERVICE}/{_FLOOD}")
    loss = channel.unary_unary(f"/{SERVICE}/{LOSS}")

    async def run(num_calls: int) -> tuple[int, int]:
        numbers = iter(range(num_calls))

        async def caller() -> None:
            for _ in numbers:
                call = flood(b"", timeout=TIMEOUT_S)
                await call.read()
                call.cancel()

        async with asyncio.TaskGroup() as group:
            for _ in range(_CALLERS):
                group.create_task(caller())
        heap, num_cut = json.loads(await loss(b"", timeout=TIMEOUT_S))
        return heap, num_cut

    heap_before, cut_before = await run(_WARM_UP_CALLS)
    heap, cut = await run(_CALLS)
    num_cut = cut - cut_before
    return Loss((heap - heap_before) / num_cut, num_cut)


class _Flood:
    def __init__(self, message_bytes: int, *, apart: bool) -> None:
        self._message = b"x" * message_bytes
        self._apart = apart
        self._num_cut = 0
        self._num_live = 0
        self._idle = asyncio.Event()

    async def flood(self, request: bytes, context: Any) -> None:
        self._num_live += 1
        self._idle.clear()
        try:
            while True:
                work = context.write(self._message)
                await (send(work) if self._apart else work)
        finally:
            # It never ends otherwise.
            self._num_cut += 1
            self._num_live -= 1
            if not self._num_live:
                self._idle.set()

    async def loss(self, request: bytes, context: Any) -> bytes:
        await self._idle.wait()
        gc.collect()
        return json.dumps([heap_bytes(), self._num_cut]).encode()


if __name__ == "__main__":
    shown = _Flood(int(sys.argv[1]), apart=sys.argv[2] == "apart")
    serve(
        {
            _FLOOD: grpc.unary_stream_rpc_method_handler(shown.flood),
            LOSS: grpc.unary_unary_rpc_method_handler(shown.loss),
        }
    )
