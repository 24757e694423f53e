"""What a proxy's access log can print of a call: the trailers, against the message of the same call.

Over the whole service with the scripted runner, so that the figures are the engine's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from photon_grpc.server.status import REQUEST_ID_KEY
from photon_grpc.v1 import control_pb2
from photon_grpc.v1 import inference_pb2 as pb
from tests.support.grpc_harness import Harness, rich_error
from tests.support.scripted_service import scripted_service

pytestmark = pytest.mark.usefixtures("each_listener")

SUCCESS_KEYS = {
    REQUEST_ID_KEY,
    "photon-finish-reason",
    "photon-prompt-tokens",
    "photon-output-tokens",
    "photon-queue-ms",
    "photon-ttft-ms",
    "photon-total-ms",
}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with scripted_service(tmp_path, step_s=0.002) as harness:
        yield harness


def spec(max_tokens: int = 7) -> pb.GenerationSpec:
    made = pb.GenerationSpec(token_ids=pb.TokenIds(ids=[5, 6, 7, 8]))
    made.stop.max_tokens, made.stop.ignore_eos = max_tokens, True
    return made


async def read_all(call: Any) -> None:
    async for _ in call:
        pass


async def trailers_of(call: Any) -> dict[str, Any]:
    return dict(list(await call.trailing_metadata()))


def check(trailers: dict[str, Any], usage: pb.Usage, timings: pb.Timings) -> None:
    assert set(trailers) == SUCCESS_KEYS
    assert trailers[REQUEST_ID_KEY] == "mine"
    assert trailers["photon-finish-reason"] == "MAX_TOKENS"
    assert (trailers["photon-prompt-tokens"], trailers["photon-output-tokens"]) == ("4", "7")
    assert (usage.prompt_tokens, usage.output_tokens) == (4, 7)
    spans = {"queue": timings.queue, "ttft": timings.first_token, "total": timings.total}
    for name, duration in spans.items():
        milliseconds = duration.ToTimedelta().total_seconds() * 1000
        assert float(trailers[f"photon-{name}-ms"]) == pytest.approx(milliseconds, abs=0.06)
    # Seven steps of two milliseconds at the least: a clock that stands still would be seen.
    assert float(trailers["photon-total-ms"]) >= 13


async def test_of_a_unary_call(harness: Harness) -> None:
    call = harness.inference.Generate(pb.GenerateRequest(request_id="mine", spec=spec()))
    response = await call
    check(await trailers_of(call), response.usage, response.timings)


async def test_of_a_stream(harness: Harness) -> None:
    call = harness.inference.StreamGenerate(pb.StreamGenerateRequest(request_id="mine", spec=spec()))
    *_, last = [message async for message in call]
    check(await trailers_of(call), last.summary.usage, last.summary.timings)


async def test_of_a_batch_of_one(harness: Harness) -> None:
    """As of its item, counted from the call; of more items see `test_batch.py`."""
    call = harness.inference.BatchGenerate(pb.BatchGenerateRequest(request_id="mine", specs=[spec()]))
    (item,) = [message async for message in call]
    trailers = await trailers_of(call)
    assert (trailers.pop("photon-items"), trailers.pop("photon-failed-items")) == ("1", "0")
    since_the_call = pb.Timings()
    for name, key in (("queue", "queue"), ("first_token", "ttft"), ("total", "total")):
        figure = float(trailers[f"photon-{key}-ms"])
        own: Duration = getattr(item.response.timings, name)
        assert figure >= own.ToTimedelta().total_seconds() * 1000 - 0.06
        getattr(since_the_call, name).FromMicroseconds(round(figure * 1000))
    check(trailers, item.response.usage, since_the_call)


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize("fault", ["refused", "malformed", "draining", "aborted"])
async def test_of_a_failure(harness: Harness, method: str, fault: str) -> None:
    """The id and the details, and no figure of a success; the id is the caller's wherever it is known."""
    streams = method == "StreamGenerate"
    request_class = pb.StreamGenerateRequest if streams else pb.GenerateRequest
    request = request_class(request_id="mine", spec=spec(4000))
    if fault == "refused":
        request.spec.sampling.temperature = -1.0
    if fault == "draining":
        await harness.control.Drain(control_pb2.DrainRequest())
        # The tests' servers refuse with the next turn of the loop.
        await harness.control.GetLoad(control_pb2.GetLoadRequest())
    path = f"/photon.v1.InferenceService/{method}"
    kind = harness.public.unary_stream if streams else harness.public.unary_unary
    bytes_sent = b"\xff\xff" if fault == "malformed" else request.SerializeToString()
    call = kind(path)(bytes_sent, metadata=(("x-request-id", "mine"),))
    if fault == "aborted":
        await abort_once_live(harness)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (read_all(call) if streams else call)
    rich = rich_error(caught.value)
    assert rich.trailers[REQUEST_ID_KEY] == "mine"
    assert not (SUCCESS_KEYS - {REQUEST_ID_KEY}) & set(rich.trailers)
    assert (
        rich.reason
        == {
            "refused": "INVALID_FIELD",
            "malformed": "MALFORMED_MESSAGE",
            "draining": "DRAINING",
            "aborted": "ABORTED_BY_OPERATOR",
        }[fault]
    )


async def abort_once_live(harness: Harness) -> None:
    while (await harness.control.GetLoad(control_pb2.GetLoadRequest())).running == 0:
        pass
    await harness.control.Abort(control_pb2.AbortRequest(request_id="mine"))
