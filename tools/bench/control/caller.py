"""Asks for token counts at a fixed rate: `python -m tools.bench.control.caller ADDRESS RATE`.

An open loop. Prints a line when it has begun; goes on until its standard input ends, and then prints how many
calls per second ended OK. Exit code 1 when one did not.
"""

from __future__ import annotations

import asyncio
import sys
import time

import grpc
import uvloop

from photon_grpc.v1 import inference_pb2

_METHOD = "/photon.v1.InferenceService/Tokenize"
_TIMEOUT_S = 60.0


async def main(address: str, rate: float) -> None:
    request = inference_pb2.TokenizeRequest(text="def main(argv):\n    return 0\n").SerializeToString()
    leave = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        method = channel.unary_unary(_METHOD)
        await method(request, timeout=_TIMEOUT_S)
        print("begun", flush=True)
        start, num_calls = time.monotonic(), 0

        async def call() -> None:
            await method(request, timeout=_TIMEOUT_S)

        while not leave.done():
            await asyncio.sleep(max(0.0, start + num_calls / rate - time.monotonic()))
            group.create_task(call())
            num_calls += 1
        seconds = time.monotonic() - start
    print(num_calls / seconds, flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], float(sys.argv[2])))
