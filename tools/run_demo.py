"""What tools/demo does once it has an environment: a server on the embedded model, and one completion.

Server and client are processes of their own and speak gRPC over loopback, as in production. Standard
library only. Whatever happens, the server does not outlive this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "photon_grpc"]
PROMPT = "def read_lines(path):\n"
MAX_TOKENS = 160
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Server:
    """A `photon-grpc serve` process and the address it announced."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log
        self.address = ""

    def wait_until_ready(self) -> None:
        """Wait for the line with the address. Raises DemoError with the end of the log."""
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        def read() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                lines.put(line)
            lines.put("")

        # The reader lives as long as the pipe, so that the server never blocks on it.
        threading.Thread(target=read, daemon=True).start()
        try:
            line = lines.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            raise DemoError(f"the server was not ready in {START_TIMEOUT_S:.0f} s{self.log_tail()}") from None
        match = re.fullmatch(r"serving .* at (\S+:\d+)( .*)?\n", line)
        if match is None:
            raise DemoError(f"the server did not start{self.log_tail()}")
        self.address = match[1]

    def log_tail(self) -> str:
        """The last lines of the server's log, set off from the message before them."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        return "".join(f"\n  | {line}" for line in text)

    def stop(self) -> int:
        """SIGTERM, wait, and kill if it does not end; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise DemoError(f"the server did not stop in {STOP_TIMEOUT_S:.0f} s{self.log_tail()}") from None


@contextlib.contextmanager
def running_server(port: int) -> Iterator[Server]:
    """A ready server; stopped on the way out, whichever way that is."""
    settings = {"server.admin_port": "0", "server.drain_propagation_s": "0", "server.drain_max_s": "5"}
    command = [*COMMAND, "serve", "--model", "demo", "--dev", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    with tempfile.TemporaryDirectory(prefix="photon-demo-") as folder:
        log = Path(folder, "server.log")
        with log.open("wb") as sink:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the server.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                start_new_session=True,
            )
        server = Server(process, log)
        try:
            server.wait_until_ready()
            yield server
        except BaseException:
            with contextlib.suppress(DemoError):
                server.stop()
            raise
        code = server.stop()
        if code != 0:
            raise DemoError(f"the server ended with exit code {code}{server.log_tail()}")


def demonstrate() -> None:
    """One completion, streamed to standard output by the real client."""
    print("Starting photon-grpc on the embedded demo model.", flush=True)
    with running_server(port=0) as server:
        subprocess.run([*COMMAND, "health", "--address", server.address, "--wait", "10"], check=True)
        print(f"\n--- streaming from {server.address}", flush=True)
        command = [*COMMAND, "generate", "--address", server.address, "--echo"]
        command += ["--temperature", "0", "--max-tokens", str(MAX_TOKENS), PROMPT]
        # The figures go to standard error, which a reader of this output wants in the same place.
        subprocess.run(command, check=True, stderr=subprocess.STDOUT)
        print("---\nStopping the server.", flush=True)
    print("The server has stopped cleanly.", flush=True)


def serve(port: int) -> None:
    """Leave the server running and say how to talk to it."""
    with running_server(port) as server:
        program = Path(sys.executable).with_name("photon-grpc")
        body = json.dumps({"spec": {"text": PROMPT, "stop": {"max_tokens": 64}}})
        service = "photon.v1.InferenceService/StreamGenerate"
        print(f"Serving the demo model at {server.address}. Try, from another terminal:\n")
        print(f"  {shlex.quote(str(program))} generate --address {server.address} 'class Stack:'")
        print(f"  {shlex.quote(str(program))} chat --address {server.address}")
        print(f"  {shlex.quote(str(program))} bench --address {server.address}")
        print(f"  grpcurl -plaintext -d {shlex.quote(body)} {server.address} {service}")
        print(f"  grpcurl -plaintext {server.address} list\n")
        print("Ctrl-C stops it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            code = server.process.wait()
            raise DemoError(f"the server ended by itself with exit code {code}{server.log_tail()}")
        print("\nStopping the server.", flush=True)


def leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description="Try photon-grpc on its embedded model.")
    parser.add_argument("--serve", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="port for --serve; 0, the default: a free one")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        if arguments.serve:
            serve(arguments.port)
        else:
            demonstrate()
    except DemoError as error:
        print(f"tools/demo: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"tools/demo: {shlex.join(error.cmd[2:])} ended with {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
