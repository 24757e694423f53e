"""What a `grpc.aio` server without anything of this project keeps of calls that are given up at once.

`python -m tests.support.lost_requests HOW` serves a method that reads one request: grpc reads it before
the handler runs (`plain`), or the handler does by `photon_grpc.server.sends` (`apart`). `measure` starts
it, makes calls that are cancelled in the turn in which they begin, and counts the bytes in use at its malloc.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import subprocess
import sys
from typing import Any

import grpc
import uvloop

from photon_grpc.server.sends import read_request
from tests.support.cut_writes import heap_bytes
from tests.support.grpc_harness import until

_SERVICE, _WAIT, _LOSS = "test.Loss", "Wait", "Loss"
_ROUNDS, _CALLERS = 20, 50
_TIMEOUT_S = 60.0


def measure(*, apart: bool) -> float:
    """Bytes per call, the mean over a thousand. Raises RuntimeError where the server does not serve."""
    command = [sys.executable, "-m", "tests.support.lost_requests", "apart" if apart else "plain"]
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


async def _measure(address: str) -> float:
    async with grpc.aio.insecure_channel(address) as channel:
        wait = channel.unary_stream(f"/{_SERVICE}/{_WAIT}")
        loss = channel.unary_unary(f"/{_SERVICE}/{_LOSS}")

        async def run() -> int:
            for _ in range(_ROUNDS):
                calls = [wait(b"request", timeout=_TIMEOUT_S) for _ in range(_CALLERS)]
                await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
            return int(json.loads(await loss(b"", timeout=_TIMEOUT_S)))

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


# `_serve`, what takes calls, what takes the next one, and of `_loss` the handler and its call's end.
_OWN_TASKS = 5


async def _serve(how: str) -> None:
    server = grpc.aio.server()
    if how == "apart":
        wait = grpc.stream_stream_rpc_method_handler(_read)
    else:
        wait = grpc.unary_stream_rpc_method_handler(_has_read)
    handlers = {_WAIT: wait, _LOSS: grpc.unary_unary_rpc_method_handler(_loss)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(_serve(sys.argv[1]))
