"""InferenceService: decode, iterate, encode. Text and engine are behind the front door. Event loop only."""

from __future__ import annotations

from typing import Any

from photon_grpc.errors import InternalError
from photon_grpc.frontend.base import FrontDoor, GenerationStream
from photon_grpc.frontend.events import Delta, Event, Finished, Summary
from photon_grpc.options import LimitOptions
from photon_grpc.server import convert
from photon_grpc.server.batch import Batch, BatchTotals, check_batch
from photon_grpc.server.calls import Call, Calls
from photon_grpc.server.interceptors.errors import is_usable_id, request_id_of, set_request_id
from photon_grpc.server.interceptors.tenant import current_origin
from photon_grpc.server.status import REQUEST_ID_KEY
from photon_grpc.types import Finish, Timings, Usage
from photon_grpc.v1 import inference_pb2


def _adopt_request_id(context: Any, request_id: str) -> str:
    """The id in the body when there is one, else the call's.

    An id unfit for metadata keeps out of it and is refused later, with its field path.
    """
    if not request_id:
        return request_id_of(context)
    if is_usable_id(request_id):
        set_request_id(context, request_id)
    return request_id


def _set_success_trailers(
    context: Any, finishes: list[Finish], usage: Usage, timings: Timings, *more: tuple[str, str]
) -> None:
    context.set_trailing_metadata(
        (
            (REQUEST_ID_KEY, request_id_of(context)),
            ("photon-finish-reason", convert.encode_finish_reasons(finishes)),
            ("photon-prompt-tokens", str(usage.prompt_tokens)),
            ("photon-output-tokens", str(usage.output_tokens)),
            ("photon-queue-ms", _milliseconds(timings.queue)),
            ("photon-ttft-ms", _milliseconds(timings.first_token)),
            ("photon-total-ms", _milliseconds(timings.total)),
            *more,
        )
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


class _EventWriter:
    """Writes the events of one stream, numbered. Implements `frontend.base.DeltaSink` for a context that can
    write without waiting."""

    def __init__(self, call: Call, context: Any, stream: GenerationStream, request_id: str) -> None:
        self._call = call
        self._context = context
        self._stream = stream
        self._encoder = convert.EventEncoder(request_id)

    async def write(self, event: Event) -> None:
        await self._call.write(self._context, self._encoder.encode(event))

    def has_room(self) -> bool:
        has_room: bool = self._context.has_room(self._on_room)
        if not has_room:
            self._call.begin_wait()
        return has_room

    def write_now(self, delta: Delta) -> None:
        self._context.write_now(self._encoder.encode_delta(delta))

    def _on_room(self) -> None:
        self._call.end_wait()
        self._stream.resume()


class InferenceServicer:
    """The methods of photon.v1.InferenceService, for `deserialize.add_service`."""

    def __init__(self, front_door: FrontDoor, calls: Calls, limits: LimitOptions) -> None:
        self._front_door = front_door
        self._calls = calls
        self._limits = limits

    async def StreamGenerate(self, message: inference_pb2.StreamGenerateRequest, context: Any) -> None:
        """Write the events of one generation as they come.

        Nothing is written before the first event, which comes with the first token: until then a
        failure ends the call with trailers alone and can be retried.
        """
        with self._calls.open(context) as call:
            request_id = _adopt_request_id(context, message.request_id)
            request = convert.decode_stream_generate(message, request_id, self._limits)
            origin = current_origin.get()
            request = origin.stamp(request)
            await call.take_id(origin.tenant, request_id)
            finishes: dict[int, Finish] = {}
            summary: Summary | None = None
            with await self._front_door.open(request, deadline=call.deadline, tenant=origin.tenant) as stream:
                writer = _EventWriter(call, context, stream, request_id)
                if hasattr(context, "write_now"):
                    stream.offer(writer)
                async for event in stream:
                    if isinstance(event, Finished):
                        finishes[event.index] = event.finish
                    elif isinstance(event, Summary):
                        summary = event
                    await writer.write(event)
            await call.flush(context)
            if summary is None:
                raise InternalError("the stream ended without a summary")
            ordered = [finishes[index] for index in sorted(finishes)]
            _set_success_trailers(context, ordered, summary.usage, summary.timings)

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: Any
    ) -> inference_pb2.GenerateResponse:
        with self._calls.open(context) as call:
            request_id = _adopt_request_id(context, message.request_id)
            request = convert.decode_generate(message, request_id, self._limits)
            origin = current_origin.get()
            request = origin.stamp(request)
            await call.take_id(origin.tenant, request_id)
            result = await self._front_door.generate(
                request, deadline=call.deadline, tenant=origin.tenant, validate_only=message.validate_only
            )
            finishes = [completion.finish for completion in result.completions]
            _set_success_trailers(context, finishes, result.usage, result.timings)
            return convert.encode_result(result)

    async def BatchGenerate(self, message: inference_pb2.BatchGenerateRequest, context: Any) -> None:
        """Run every spec as a Generate of its own would run, and write each result or error as it comes."""
        with self._calls.open(context) as call:
            totals = BatchTotals()
            request_id = _adopt_request_id(context, message.request_id)
            check_batch(message, request_id, self._limits)
            origin = current_origin.get()
            call.is_batch = True
            await call.take_id(origin.tenant, request_id)
            async with Batch(
                self._front_door,
                self._limits,
                message.specs,
                request_id,
                deadline=call.deadline,
                origin=origin,
            ) as batch:
                async for ended in batch:
                    totals.add(ended)
                    await call.write(context, ended.encode())
                await call.flush(context)
            _set_success_trailers(
                context,
                totals.finishes,
                totals.usage,
                totals.timings,
                ("photon-items", str(totals.num_items)),
                ("photon-failed-items", str(totals.num_failed)),
            )

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        with self._calls.open(context):
            prompt = convert.decode_tokenize(message, self._limits)
            tokenized = await self._front_door.tokenize(
                prompt,
                model=message.model,
                add_special_tokens=(
                    message.add_special_tokens if message.HasField("add_special_tokens") else None
                ),
                return_offsets=message.return_offsets,
            )
            return convert.encode_tokenized(tokenized, self._front_door.model.max_model_len)

    async def Detokenize(
        self, message: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        with self._calls.open(context):
            token_ids = convert.decode_token_ids(message, self._front_door.model.max_model_len)
            text = await self._front_door.detokenize(
                token_ids,
                model=message.model,
                skip_special_tokens=(
                    message.skip_special_tokens if message.HasField("skip_special_tokens") else True
                ),
            )
            return inference_pb2.DetokenizeResponse(text=text)
