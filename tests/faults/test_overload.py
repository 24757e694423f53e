"""Fault 34: far more calls than a server can serve. What must hold of every call, at whatever speed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from photon_grpc.v1 import control_pb2, control_pb2_grpc
from tools.bench import overload
from tools.bench.figures import CallRecord
from tools.bench.load import Load, run_loads
from tools.bench.server_handle import ServerHandle

_IDLE_S = 60.0
# 8 places of 40 steps a second make 16 calls a second of 20 tokens.
_PLAN = overload.OverloadPlan(
    duration_s=3.0, step_s=0.025, max_num_seqs=8, max_queued_requests=8, new_tokens=20, spread=0
)
_CAPACITY = _PLAN.max_num_seqs / _PLAN.step_s / _PLAN.new_tokens


def load_once_idle(admin: str) -> control_pb2.GetLoadResponse:
    """GetLoad as soon as nothing runs, waits or holds a block; fails with the last answer."""
    with grpc.insecure_channel(admin) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        deadline = time.monotonic() + _IDLE_S
        while True:
            load = control.GetLoad(control_pb2.GetLoadRequest(), timeout=_IDLE_S)
            if load.running == load.queued == load.used_kv_blocks == 0:
                return load
            assert time.monotonic() < deadline, f"not idle after the load: {load}"
            time.sleep(0.05)


def check_calls(tenants: Sequence[Sequence[CallRecord]], loads: Sequence[Load]) -> None:
    for name, load, records in zip(overload.TENANTS, loads, tenants, strict=True):
        assert len(records) == len(load.arrivals), name
        assert any(record.code == "OK" for record in records), f"{name} was not served"
        for record in records:
            assert overload.is_told_when(record), f"{name}: {record}"
            if record.code == "OK":
                assert record.num_tokens == _PLAN.new_tokens
            else:
                assert record.num_messages == 0, "refused after it had begun"


@pytest.mark.parametrize("engine_process", ["shared", "own"])
def test_fault_34_every_call_under_overload_is_served_or_told_when_to_come_back(
    tmp_path: Path, engine_process: str
) -> None:
    spec = replace(_PLAN, engine_process=engine_process).server(overload.callers_file(tmp_path))
    with ServerHandle(spec) as server, overload.HealthCaller(server.address) as health:
        assert server.admin_address is not None
        for factor in (2.0, 10.0):
            loads = overload.arrivals_of(_PLAN, server.address, factor * _CAPACITY)
            results = run_loads(loads, before=lambda: None, after=lambda: None)
            check_calls([result.records for result in results], loads)
            refused = [r for result in results for r in result.records if r.code != "OK"]
            assert refused, f"{factor:g} x the capacity, and nobody was refused"
            assert load_once_idle(server.admin_address).total_kv_blocks > 0
    assert health.answers
    assert all(math.isfinite(seconds) for _, seconds in health.answers), "health was not SERVING"
