"""`photon-grpc` over a given runner instead of a model, with an eye inside.

`python -m tests.support.scripted_main FACTORY serve ...`: FACTORY is a RunnerFactory, pickled and in base64.
On SIGUSR1 the process writes a line `census {...}` to its standard output: its asyncio tasks, by what they
run, how many objects live that belong to one call, and how many calls wait for their client to read. Real
listeners, front end and engine; no torch.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import pickle
import signal
import sys
import time
from collections import Counter
from types import FrameType

from photon_grpc import cli, engine_place
from photon_grpc.engine.client import RequestStream
from photon_grpc.engine.host import RunnerFactory
from photon_grpc.frontend.generator import TextStream
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.scheduler.request import Request
from photon_grpc.server.calls import Call

# A response that is pending for longer waits for its client, not for its turn.
_PENDING_S = 0.25
_OF_ONE_CALL = (Call, TextStream, RequestStream, Request)


def encode_factory(factory: RunnerFactory) -> str:
    """FACTORY for the command line."""
    return base64.b64encode(pickle.dumps(factory)).decode("ascii")


def _write_census(number: int, frame: FrameType | None) -> None:
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, _OF_ONE_CALL)]
    objects = Counter(type(item).__name__ for item in found)
    moment = time.monotonic() - _PENDING_S
    coroutines = (task.get_coro() for task in asyncio.all_tasks())
    tasks = Counter(str(getattr(coroutine, "__qualname__", coroutine)) for coroutine in coroutines)
    census = {
        "tasks": tasks,
        "objects": {kind.__name__: objects[kind.__name__] for kind in _OF_ONE_CALL},
        "stalled": sum(isinstance(item, Call) and item.stalled_since(moment) for item in found),
    }
    os.write(sys.stdout.fileno(), f"census {json.dumps(census)}\n".encode())


def main() -> None:
    """Run the command line."""
    factory: RunnerFactory = pickle.loads(base64.b64decode(sys.argv[1]))
    load = Tokenizer.load
    # No torch for the tokenizer's sake, wherever the engine runs: most of the start is its import.
    Tokenizer.load = lambda folder, **_: load(folder, spare_torch=True)  # type: ignore[method-assign]
    engine_place.RunnerFactory = lambda folder, options, own_process: factory  # type: ignore[misc,assignment]
    signal.signal(signal.SIGUSR1, _write_census)
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
