"""Client processes that are stopped with open streams: when the server gives up on them, by keepalive."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import grpc

from photon_grpc.v1 import control_pb2, control_pb2_grpc
from tools.bench.bars import Bar
from tools.bench.server_handle import ServerHandle
from tools.bench.server_process import ServerSpec

__all__ = ["FrozenPlan", "FrozenResult", "headline", "promises", "run"]

_BOUND_S = 35.0
_GIVE_UP_S = 90.0
_LOOK_S = 0.02
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class FrozenPlan:
    """`clients` processes of a stream each, one of which goes on; the server's keepalive is the default."""

    clients: int = 5
    step_s: float = 0.025
    tokens: int = 4000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FrozenResult:
    """Seconds from the freeze to the end of each frozen client's request, and blocks in use afterwards
    beyond those of the one that goes on. `None` for a request that was never given up."""

    reclaimed_s: list[float | None]
    healthy_goes_on: bool


def run(plan: FrozenPlan) -> FrozenResult:
    """Raises RuntimeError when the clients do not get going."""
    with ServerHandle(ServerSpec(step_s=plan.step_s, admin=True)) as server:
        assert server.admin_address is not None
        clients = [_client(server.address, number, plan) for number in range(plan.clients)]
        try:
            with grpc.insecure_channel(server.admin_address) as channel:
                control = control_pb2_grpc.ControlServiceStub(channel)
                return _freeze(plan, control, clients)
        finally:
            for client in clients:
                client.kill()
                client.wait()
                assert client.stdout is not None
                client.stdout.close()


def _client(address: str, number: int, plan: FrozenPlan) -> subprocess.Popen[str]:
    arguments = [address, f"client-{number}", "1", "1", str(plan.tokens), str(plan.seed + number)]
    return subprocess.Popen(
        [sys.executable, "-m", "tools.bench.bad_client", *arguments], stdout=subprocess.PIPE, text=True
    )


def _freeze(
    plan: FrozenPlan, control: control_pb2_grpc.ControlServiceStub, clients: list[subprocess.Popen[str]]
) -> FrozenResult:
    deadline = time.monotonic() + _START_S
    while _running(control) < plan.clients:
        if time.monotonic() > deadline:
            raise RuntimeError("the clients' calls do not run")
        time.sleep(_LOOK_S)
    for client in clients[1:]:
        client.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    reclaimed: list[float | None] = []
    num_frozen = plan.clients - 1
    while len(reclaimed) < num_frozen and time.monotonic() < frozen + _GIVE_UP_S:
        gone = plan.clients - _running(control)
        reclaimed += [time.monotonic() - frozen] * (gone - len(reclaimed))
        time.sleep(_LOOK_S)
    healthy = _running(control) == 1
    return FrozenResult(reclaimed + [None] * (num_frozen - len(reclaimed)), healthy)


def _running(control: control_pb2_grpc.ControlServiceStub) -> int:
    return int(control.GetLoad(control_pb2.GetLoadRequest(), timeout=_START_S).running)


def promises(result: FrozenResult) -> list[Bar]:
    """All of them are given up, in time, and nobody else."""
    longest = max(float("inf") if seconds is None else seconds for seconds in result.reclaimed_s)
    return [
        Bar("frozen client given up, longest, s", longest, _BOUND_S, at_least=False),
        Bar("frozen: the client that reads goes on", result.healthy_goes_on, 1, at_least=True),
    ]


def headline(result: FrozenResult) -> str:
    """In one line."""
    moments = ", ".join("never" if seconds is None else f"{seconds:.1f}" for seconds in result.reclaimed_s)
    return f"frozen clients were given up after {moments} s, default keepalive (20 s + 10 s)"
