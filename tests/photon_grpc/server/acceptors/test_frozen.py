"""An acceptor that hangs is found, and another takes its place."""

from __future__ import annotations

import os
import signal

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from photon_grpc.server.acceptors import pool
from photon_grpc.server.server import Server
from tests.support.fake_front_door import FakeFrontDoor
from tests.support.grpc_harness import open_channel, quick_options, until


async def test_a_frozen_acceptor_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody is silent for too long but the frozen one, however slowly another starts.
    monkeypatch.setattr(pool, "_PING_S", 0.02)
    most = pool._MOST_UNANSWERED
    monkeypatch.setattr(pool, "_MOST_UNANSWERED", 10**9)
    deaths: list[None] = []
    server = Server(
        FakeFrontDoor(), quick_options(), num_acceptors=1, on_acceptor_death=lambda: deaths.append(None)
    )
    ports = await server.start()
    try:
        server.set_serving()
        (frozen,) = server.acceptor_process_ids
        os.kill(frozen, signal.SIGSTOP)
        monkeypatch.setattr(pool, "_MOST_UNANSWERED", most)
        await until(lambda: deaths)
        monkeypatch.setattr(pool, "_MOST_UNANSWERED", 10**9)
        await until(lambda: server.acceptor_process_ids not in ([], [frozen]))
        assert len(deaths) == 1
        channel = open_channel(ports.public)
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=30
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await channel.close()
    finally:
        await server.stop()
    assert server.acceptor_process_ids == []
