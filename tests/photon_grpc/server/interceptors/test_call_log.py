"""One line per finished call, and never a word of what was said in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from structlog.testing import capture_logs

from photon_grpc import errors
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.fake_front_door import FakeFrontDoor, Script
from tests.support.grpc_harness import running_server, until
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.usefixtures("each_listener")

CANARY = "canary-7f3a"
SPEC = pb.GenerationSpec(text=CANARY)


def finished(records: list[Any]) -> list[Any]:
    return [record for record in records if record["event"] == "call finished"]


async def test_each_call_leaves_one_line() -> None:
    front_door = FakeFrontDoor(Script(text=CANARY))
    with capture_logs() as records:
        async with running_server(front_door) as harness:
            await harness.inference.Generate(pb.GenerateRequest(request_id="a", spec=SPEC))
            stream = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="b", spec=SPEC))
            while await stream.read() is not grpc.aio.EOF:
                pass
            front_door.script = Script(error=errors.QueueTimeoutError())
            with pytest.raises(grpc.aio.AioRpcError):
                await harness.inference.Generate(pb.GenerateRequest(request_id="c", spec=SPEC))
            front_door.script = Script(hang=True)
            cancelled = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="d", spec=SPEC))
            await until(lambda: len(front_door.streams) == 2)
            cancelled.cancel()
            await until(lambda: harness.server.num_live_calls == 0)
            await harness.health.Check(health_pb2.HealthCheckRequest())
            await until(lambda: len(finished(records)) == 4)
    lines = {
        line["request_id"]: (line["code"], line["method"].rpartition("/")[2]) for line in finished(records)
    }
    assert lines == {
        "a": ("OK", "Generate"),
        "b": ("OK", "StreamGenerate"),
        "c": ("DEADLINE_EXCEEDED", "Generate"),
        "d": ("CANCELLED", "StreamGenerate"),
    }
    assert len(finished(records)) == 4
    assert CANARY not in repr(records)


async def test_a_batch_leaves_one_line_with_the_sums_of_its_items(tmp_path: Path) -> None:
    spec = pb.GenerationSpec(text=CANARY)
    spec.stop.max_tokens, spec.stop.ignore_eos = 5, True
    wrong = pb.GenerationSpec(text=CANARY, adapter=CANARY)
    with capture_logs() as records:
        async with scripted_service(tmp_path) as harness:
            request = pb.BatchGenerateRequest(request_id="b", specs=[spec, wrong, spec])
            messages = [message async for message in harness.inference.BatchGenerate(request)]
            await until(lambda: finished(records))
    (line,) = finished(records)
    assert (line["code"], line["request_id"], line["items"], line["failed_items"]) == ("OK", "b", 3, 1)
    assert line["output_tokens"] == 10
    assert line["prompt_tokens"] == sum(message.response.usage.prompt_tokens for message in messages) > 0
    assert CANARY not in repr(records)
    assert CANARY not in repr([message.error for message in messages])


async def test_no_refusal_repeats_the_prompt() -> None:
    """Bytes that do not parse, unknown models and unsupported fields: neither logs nor errors quote text."""
    with capture_logs() as records:
        async with running_server(FakeFrontDoor()) as harness:
            broken = pb.GenerateRequest(spec=SPEC).SerializeToString()[:-1]
            constrained = pb.GenerationSpec(text=CANARY, constraint=pb.Constraint(regex=CANARY))
            experimental = pb.GenerationSpec(text=CANARY)
            experimental.experimental[CANARY] = CANARY
            method = "/photon.v1.InferenceService/Generate"
            for data in (
                broken,
                pb.GenerateRequest(spec=constrained).SerializeToString(),
                pb.GenerateRequest(spec=experimental).SerializeToString(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await harness.public.unary_unary(method)(data)
                trailers = list(caught.value.trailing_metadata() or ())
                assert CANARY not in repr((caught.value.details(), trailers))
    assert len(finished(records)) == 3
    assert CANARY not in repr(records)
