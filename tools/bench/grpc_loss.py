"""What grpc loses of a message that is cut short, so that a soak need not count it as the server's growth.

grpc keeps the operation, the buffer and the bytes of a message whose call ends while it is being written
(https://github.com/grpc/grpc/issues/43360). `measure` has a `grpc.aio` server without anything of this
project (`python -m tools.bench.grpc_loss BYTES`) write messages of BYTES without an end to clients that leave
after the first one, and counts the bytes in use at its malloc for each write that was cut. `CutWrites` counts
such writes in a server of this project. What lost blocks keep from being given back is in neither.
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

from photon_grpc.server.calls import Call

__all__ = ["CutWrites", "GrpcLoss", "heap_bytes", "measure"]

_SERVICE, _FLOOD, _LOSS = "bench.Loss", "Flood", "Loss"
_CALLERS = 16
_WARM_UP_CALLS, _CALLS = 2000, 4000
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class GrpcLoss:
    """The mean over `num_cut` writes that were cut short, of messages of `message_bytes`."""

    bytes_per_write: float
    num_cut: int
    message_bytes: int


class CutWrites:
    """Counts the writes of this process's server that did not come to their end."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> None:
        """Count from now on, for good."""
        write = Call.write

        async def counted(call: Call, context: Any, message: Any) -> None:
            try:
                await write(call, context, message)
            except BaseException:
                self.count += 1
                raise

        Call.write = counted  # type: ignore[method-assign]  # what it is for


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


def measure(message_bytes: int) -> GrpcLoss | None:
    """A few seconds; None where malloc does not tell. Raises RuntimeError where the server does not serve."""
    if heap_bytes() is None:
        return None
    command = [sys.executable, "-m", "tools.bench.grpc_loss", str(message_bytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the server that shows what grpc loses did not start")
        return asyncio.run(_measure(f"127.0.0.1:{port}", message_bytes))
    finally:
        process.kill()
        process.communicate()


async def _measure(address: str, message_bytes: int) -> GrpcLoss:
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
    return GrpcLoss((heap - heap_before) / num_cut, num_cut, message_bytes)


class _Flood:
    def __init__(self, message_bytes: int) -> None:
        self._message = b"x" * message_bytes
        self._num_cut = 0
        self._num_live = 0
        self._idle = asyncio.Event()

    async def flood(self, request: bytes, context: Any) -> None:
        self._num_live += 1
        self._idle.clear()
        try:
            while True:
                await context.write(self._message)
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


async def _serve(message_bytes: int) -> None:
    flood = _Flood(message_bytes)
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
    uvloop.run(_serve(int(sys.argv[1])))
