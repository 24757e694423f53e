"""A `grpc.aio` server in a process of its own, whose heap is counted: for what grpc keeps of calls.

A module serves by `serve` where it is run with `-m`, and asks of itself by `measured`. Its method `LOSS`
answers with what the measurement compares: bytes in use at malloc (`heap_bytes.py`).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import grpc
import uvloop

SERVICE, LOSS = "test.Loss", "Loss"
TIMEOUT_S = 60.0

_Result = TypeVar("_Result")


def measured(
    module: str, arguments: list[str], measure: Callable[[grpc.aio.Channel], Awaitable[_Result]]
) -> _Result:
    """What `measure` finds by a channel to `module`'s server. Raises RuntimeError where it does not serve."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the server that shows what grpc keeps did not start")

        async def run() -> _Result:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await measure(channel)

        return asyncio.run(run())
    finally:
        process.kill()
        process.communicate()


def serve(handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
    """Serve methods of `SERVICE` until the process is killed; the port goes to standard output."""

    async def run() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, dict(handlers)),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        await server.wait_for_termination()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(run())
