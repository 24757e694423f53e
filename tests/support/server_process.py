"""A real server in a process of its own, and a client in another that can be frozen or killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from photon_grpc.engine.host import RunnerFactory
from photon_grpc.v1 import control_pb2, control_pb2_grpc
from tests.support.scripted_main import encode_factory

_READY = re.compile(r"serving \S+ at (\S+) \(admin ([^\s,)]+)(?:, metrics ([^\s,)]+))?\)")
_START_S = 90.0
_STOP_S = 60.0


@dataclass
class ServerProcess:
    """Addresses of a running server, and its process. `metrics` is None for a server without."""

    process: subprocess.Popen[str]
    address: str
    admin: str
    metrics: str | None
    log: Path
    is_scripted: bool = False

    def load(self) -> control_pb2.GetLoadResponse:
        """GetLoad, over a connection of its own."""
        with grpc.insecure_channel(self.admin) as channel:
            return control_pb2_grpc.ControlServiceStub(channel).GetLoad(
                control_pb2.GetLoadRequest(), timeout=30
            )

    def wait_for(self, what: str, condition: Callable[[control_pb2.GetLoadResponse], bool]) -> None:
        """Poll GetLoad until `condition`; fails with the last answer."""
        deadline = time.monotonic() + 60
        while not condition(load := self.load()):
            assert time.monotonic() < deadline, f"never {what}: {load}\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)

    def wait_until_idle(self) -> None:
        """No request lives and no block is held."""
        self.wait_for("idle", lambda load: load.running == load.queued == load.used_kv_blocks == 0)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the server and wait for its exit code."""
        self.process.send_signal(number)
        return self.process.wait(_STOP_S)


@contextmanager
def server_process(
    folder: Path,
    log: Path,
    *,
    stderr: int = subprocess.STDOUT,
    runner: RunnerFactory | None = None,
    **settings: object,
) -> Iterator[ServerProcess]:
    """`photon-grpc serve` on free loopback ports; `settings` are `section__key=value`.

    `log` gets what it writes, but for `stderr` where that is a descriptor. With `runner`, which must pickle,
    the process is that of `scripted_main`, and `folder` needs a tokenizer only.
    """
    arguments = serve_command(folder, runner, **settings)
    with log.open("w") as sink:
        process = subprocess.Popen(arguments, stdout=sink, stderr=stderr, text=True)
    try:
        yield ServerProcess(process, *wait_until_ready(process, log), log, runner is not None)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def serve_command(folder: Path, runner: RunnerFactory | None = None, **settings: object) -> list[str]:
    """The command line of `server_process`."""
    values = {
        "server.port": 0,
        "server.admin_port": 0,
        "server.drain_propagation_s": 0.1,
        "engine.num_threads": 1,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    program = ["photon_grpc"] if runner is None else ["tests.support.scripted_main", encode_factory(runner)]
    arguments = [sys.executable, "-m", *program, "serve", "--model", str(folder)]
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


def wait_until_ready(process: subprocess.Popen[str], log: Path) -> tuple[str, str, str | None]:
    """Public, admin and metrics address of a server that writes to `log`, once it serves."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if match := _READY.search(log.read_text()):
            return match[1], match[2], match[3]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()[-4000:]}")


_CLIENT = """
import signal
import sys
import grpc
from photon_grpc.v1 import inference_pb2, inference_pb2_grpc
address, count, max_tokens, prompt_tokens, read, first = sys.argv[1], *map(int, sys.argv[2:])
# A job of a shell that is not interactive begins with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
channel = grpc.insecure_channel(address)
stub = inference_pb2_grpc.InferenceServiceStub(channel)
spec = inference_pb2.GenerationSpec()
spec.token_ids.ids.extend([first, *(5 + i % 90 for i in range(prompt_tokens - 1))])
spec.stop.max_tokens, spec.stop.ignore_eos = max_tokens, True
calls = [stub.StreamGenerate(inference_pb2.StreamGenerateRequest(spec=spec)) for _ in range(count)]
if read:
    for call in calls:
        next(call)
print("ready", flush=True)
for call in calls:
    for message in call:
        pass
"""


class ClientProcess:
    """`count` streams in a process of its own; with `read` each has brought a message when it is ready.

    `first_token` begins the prompt: prompts with another one have no cached prefix in common.
    """

    def __init__(
        self,
        address: str,
        *,
        count: int = 1,
        max_tokens: int,
        prompt_tokens: int = 4,
        read: bool = True,
        first_token: int = 5,
    ) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _CLIENT,
                address,
                str(count),
                str(max_tokens),
                str(prompt_tokens),
                str(int(read)),
                str(first_token),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def send(self, number: signal.Signals) -> None:
        """Freeze, thaw, interrupt or kill it."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End it whatever state it is in."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
