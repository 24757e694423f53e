"""What a `grpc.aio` server without anything of this project keeps of writes that are cut short.

`python -m tests.support.cut_writes BYTES HOW` writes messages of BYTES without an end to clients that leave
after the first one: in the task of their call (`plain`), as grpc is meant to be used, or apart from it
(`apart`), by `photon_grpc.server.sends`. `measure` starts it and counts the bytes in use at its malloc.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import grpc
import uvloop

from photon_grpc.server.sends import send

_SERVICE, _FLOOD, _LOSS = "test.Loss", "Flood", "Loss"
_CALLERS = 16
_WARM_UP_CALLS, _CALLS = 1000, 1000
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Loss:
    """The mean over `num_cut` writes that were cut short."""

    bytes_per_write: float
    num_cut: int


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap_bytes() -> int | None:
    """Bytes in use at this process's malloc, in all arenas and mapped; None where nothing tells."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    ask.restype = _MallocInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def measure(message_bytes: int, *, apart: bool) -> Loss:
    """Raises RuntimeError where the server does not serve."""
    how = "apart" if apart else "plain"
    command = [sys.executable, "-m", "tests.support.cut_writes", str(message_bytes), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the server that shows what grpc keeps did not start")
        return asyncio.run(_measure(f"127.0.0.1:{port}"))
    finally:
        process.kill()
        process.communicate()


async def _measure(address: str) -> Loss:
    async with grpc.aio.insecure_channel(address) as channel:
        flood = channel.unary_stream(f"/{_SERVICE}/{_FLOOD}")
        loss = channel.unary_unary(f"/{_SERVICE}/{_LOSS}")

        async def run(num_calls: int) -> tuple[int, int]:
            numbers = iter(range(num_calls))

            async def caller() -> None:
                for _ in numbers:
                    call = flood(b"", timeout=_TIMEOUT_S)
                    await call.read()
                    call.cancel()

            async with asyncio.TaskGroup() as group:
                for _ in range(_CALLERS):
                    group.create_task(caller())
            heap, num_cut = json.loads(await loss(b"", timeout=_TIMEOUT_S))
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


async def _serve(message_bytes: int, how: str) -> None:
    flood = _Flood(message_bytes, apart=how == "apart")
    handlers = {
        _FLOOD: grpc.unary_stream_rpc_method_handler(flood.flood),
        _LOSS: grpc.unary_unary_rpc_method_handler(flood.loss),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
