"""A client in another language: Node reads the .proto itself, streams, and decodes rich errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from photon_grpc import errors
from photon_grpc.errors import FieldViolation
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import running_server

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def client() -> Path:
    """A folder with the client and its packages, kept between runs while the lock file is the same."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    lock = hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = ROOT / ".cache" / f"node-{lock}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "client.js"):
        shutil.copyfile(SOURCES / name, folder / name)
    installed = folder / "installed"
    if not installed.exists():
        command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
        if result.returncode != 0:
            pytest.skip(f"npm ci failed: {result.stderr.strip()[-200:]}")
        installed.touch()
    return folder


async def stream(
    client: Path, front_door: FakeFrontDoor, request: dict[str, Any], method: str = "StreamGenerate"
) -> Any:
    """What the Node client printed after one call."""
    async with running_server(front_door) as harness:
        process = await asyncio.create_subprocess_exec(
            "node",
            str(client / "client.js"),
            str(ROOT / "proto"),
            harness.target,
            json.dumps(request),
            method,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "NODE_OPTIONS": ""},
        )
        output, complaints = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, complaints.decode()
    return json.loads(output)


async def test_node_streams(client: Path) -> None:
    front_door = FakeFrontDoor(Script(num_deltas=5, text=" tök"))
    request = {
        "request_id": "from-node",
        "spec": {
            "chat": {"messages": [{"role": "ROLE_USER", "content": "grüße"}]},
            "sampling": {"temperature": 0, "seed": 7},
            "stop": {"max_tokens": 5, "strings": ["stop"]},
        },
    }
    result = await stream(client, front_door, request)
    assert result["error"] is None
    assert result["code"] == 0
    assert result["events"] == ["started", *["delta"] * 5, "finished", "summary"]
    assert result["seqs"] == list(range(1, 9))
    assert result["text"] == " tök" * 5
    assert result["finish"]["reason"] == "FINISH_REASON_STOP"
    assert result["finish"]["stop_string"] == "stop"
    assert result["summary"]["usage"]["output_tokens"] == 5
    assert result["trailers"]["photon-request-id"] == "from-node"
    assert result["trailers"]["photon-output-tokens"] == "5"
    (received,) = front_door.requests
    assert received.sampling.temperature == 0.0
    assert received.sampling.top_p is None
    assert received.stop.strings == ("stop",)


async def test_node_reads_rich_errors(client: Path) -> None:
    error = errors.InvalidRequestError([FieldViolation("spec.sampling.top_p", "must be above 0")])
    result = await stream(client, FakeFrontDoor(Script(error=error)), {"spec": {"text": "x"}})
    status = result["error"]["status"]
    assert result["error"]["code"] == status["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status["message"] == "invalid request: spec.sampling.top_p: must be above 0"
    info = status["details"]["google.rpc.ErrorInfo"]
    assert (info["reason"], info["domain"]) == ("INVALID_FIELD", "photon.v1")
    assert status["details"]["google.rpc.BadRequest"]["field_violations"] == [
        {"field": "spec.sampling.top_p", "description": "must be above 0"}
    ]
    request_id = status["details"]["google.rpc.RequestInfo"]["request_id"]
    assert request_id == result["trailers"]["photon-request-id"]


async def test_node_is_told_when_to_come_back(client: Path) -> None:
    front_door = FakeFrontDoor(Script(error=errors.EngineStartingError()))
    result = await stream(client, front_door, {"spec": {"text": "x"}})
    assert result["error"]["code"] == grpc.StatusCode.UNAVAILABLE.value[0]
    assert result["error"]["pushback"] == ["1000"]
    retry = result["error"]["status"]["details"]["google.rpc.RetryInfo"]["retry_delay"]
    assert retry == {"seconds": 1}


async def test_node_runs_a_batch(client: Path) -> None:
    """Its messages hold one of another package, `google.rpc.Status`, whose file lies beside ours."""
    request = {
        "request_id": "from-node",
        "specs": [{"text": "hi"}, {"text": "hi", "adapter": "lora"}, {"token_ids": {"ids": [5]}}],
    }
    result = await stream(client, FakeFrontDoor(), request, "BatchGenerate")
    assert (result["error"], result["code"]) == (None, 0)
    items = {item["item"]: item for item in result["items"]}
    assert sorted(items) == [0, 1, 2]
    for number in (0, 2):
        assert (items[number]["kind"], items[number]["text"]) == ("response", " tok tok tok")
    status = items[1]["error"]
    assert (items[1]["kind"], status["code"]) == ("error", grpc.StatusCode.UNIMPLEMENTED.value[0])
    assert status["details"]["google.rpc.ErrorInfo"]["reason"] == "UNSUPPORTED_FEATURE"
    assert status["details"]["google.rpc.RequestInfo"]["request_id"] == "from-node.1"
    (violation,) = status["details"]["google.rpc.BadRequest"]["field_violations"]
    assert violation["field"] == "specs[1].adapter"
    assert result["trailers"]["photon-failed-items"] == "1"
