"""The items of one BatchGenerate: each runs as a Generate of its own would, a few at a time.

What goes wrong with one item is that item's status and touches no other; what is wrong with the server or
with the call itself ends the call. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from photon_grpc.errors import InvalidRequestError, LifecycleError, MaxDurationError
from photon_grpc.frontend.base import FrontDoor
from photon_grpc.frontend.events import GenerationResult
from photon_grpc.options import LimitOptions
from photon_grpc.server import convert
from photon_grpc.server.interceptors.errors import is_usable_id
from photon_grpc.server.interceptors.tenant import Origin
from photon_grpc.server.status import code_of, is_foreseen, reason_of, to_message
from photon_grpc.telemetry.call_record import CallRecord, current_call
from photon_grpc.telemetry.tracebacks import without_words
from photon_grpc.types import Finish, GenerationRequest, Timings, Usage
from photon_grpc.v1 import inference_pb2

_log = structlog.get_logger(__name__)

# The server's condition, and the call's one deadline: no item's own doing.
_OF_THE_CALL = (LifecycleError, MaxDurationError)


@dataclass(frozen=True, slots=True)
class EndedItem:
    """What the item `index` came to. `began_s` is how long after the batch it was begun."""

    index: int
    request_id: str
    began_s: float
    outcome: GenerationResult | Exception

    def encode(self) -> inference_pb2.BatchGenerateResponse:
        """The message that tells it."""
        if isinstance(self.outcome, GenerationResult):
            return inference_pb2.BatchGenerateResponse(
                item=self.index, response=convert.encode_result(self.outcome)
            )
        return inference_pb2.BatchGenerateResponse(
            item=self.index, error=to_message(self.outcome, self.request_id)
        )


def item_id(request_id: str, index: int) -> str:
    """The id under which the item `index` of the call `request_id` runs."""
    return f"{request_id}.{index}"


def check_batch(message: inference_pb2.BatchGenerateRequest, request_id: str, limits: LimitOptions) -> None:
    """What can be said of the call without a look at its items. Raises InvalidRequestError."""
    num_items = len(message.specs)
    if not num_items:
        raise InvalidRequestError.of("specs", "must not be empty")
    if num_items > limits.max_batch_items:
        raise InvalidRequestError.of(
            "specs", f"has {num_items} elements, at most {limits.max_batch_items} are allowed"
        )
    # The items' ids have to be valid too.
    max_chars = limits.max_request_id_chars - len(item_id("", num_items - 1))
    if len(request_id) > max_chars or not is_usable_id(request_id):
        raise InvalidRequestError.of(
            "request_id", f"at most {max_chars} characters of A-Z a-z 0-9 . _ : - with so many items"
        )


class Batch:
    """The items of one call. Iterate inside `async with`; leaving it ends every item that still runs."""

    def __init__(
        self,
        front_door: FrontDoor,
        limits: LimitOptions,
        specs: Sequence[inference_pb2.GenerationSpec],
        request_id: str,
        *,
        deadline: float,
        origin: Origin,
    ) -> None:
        self._front_door = front_door
        self._limits = limits
        self._specs = specs
        self._request_id = request_id
        self._deadline = deadline
        self._origin = origin
        self._start = time.monotonic()
        self._num_left = len(specs)
        self._call = current_call.get()
        self._ended: asyncio.Queue[EndedItem] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Check every item, then begin. Raises InvalidRequestError when all together ask for too much."""
        requests = await self._check_items()
        waiting = iter(requests.items())
        self._workers = [
            asyncio.create_task(self._work(waiting))
            for _ in range(min(self._limits.max_batch_concurrency, len(requests)))
        ]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.cancel()
        # Nothing of the batch lives on when its call is over.
        await asyncio.gather(*self._workers, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[EndedItem]:
        return self

    async def __anext__(self) -> EndedItem:
        """Each item once, in the order in which they end.

        Raises what ends the call: LifecycleError, MaxDurationError.
        """
        if not self._num_left:
            raise StopAsyncIteration
        ended = await self._ended.get()
        if isinstance(ended.outcome, _OF_THE_CALL):
            raise ended.outcome
        self._num_left -= 1
        return ended

    async def _check_items(self) -> dict[int, GenerationRequest]:
        """The requests that are in order, by index; the others have ended."""
        requests: dict[int, GenerationRequest] = {}
        num_tokens = 0
        for index, spec in enumerate(self._specs):
            try:
                request = convert.decode_item(
                    spec, item_id(self._request_id, index), _root(index), self._limits
                )
                request = self._origin.stamp(request)
                checked = await self._generate(index, request, validate_only=True)
            except _OF_THE_CALL:
                raise
            except Exception as error:  # noqa: BLE001  # told as the item's status
                self._end(index, 0.0, error, self._open_record(index))
            else:
                effective = checked.effective
                num_tokens += checked.usage.prompt_tokens + effective.sampling.n * effective.stop.max_tokens
                requests[index] = request
            # Short texts are tokenised on the loop: others get their turn in between.
            await asyncio.sleep(0)
        if num_tokens > self._limits.max_batch_tokens:
            raise InvalidRequestError.of(
                "specs",
                f"prompts and max_tokens come to {num_tokens} tokens in all, at most "
                f"{self._limits.max_batch_tokens} are allowed",
            )
        return requests

    async def _generate(
        self, index: int, request: GenerationRequest, *, validate_only: bool = False
    ) -> GenerationResult:
        return await self._front_door.generate(
            request,
            deadline=self._deadline,
            tenant=self._origin.tenant,
            validate_only=validate_only,
            field_root=f"{_root(index)}.",
        )

    async def _work(self, waiting: Iterator[tuple[int, GenerationRequest]]) -> None:
        """Run one item after another until none waits."""
        for index, request in waiting:
            record = self._open_record(index)
            # A task has a context of its own: what is put into the record is about this item.
            current_call.set(record)
            began_s = time.monotonic() - self._start
            outcome: GenerationResult | Exception
            try:
                outcome = await self._generate(index, request)
            except Exception as error:  # noqa: BLE001  # told as the item's status
                outcome = error
            finally:
                record.seconds = time.monotonic() - record.started
            self._end(index, began_s, outcome, record)

    def _end(
        self, index: int, began_s: float, outcome: GenerationResult | Exception, record: CallRecord
    ) -> None:
        request_id = item_id(self._request_id, index)
        if isinstance(outcome, GenerationResult):
            record.code = "OK"
        else:
            record.code, record.reason = code_of(outcome).name, reason_of(outcome)
            if not is_foreseen(outcome):
                _log.error("item failed", request_id=request_id, traceback=without_words(outcome))
        self._ended.put_nowait(EndedItem(index, request_id, began_s, outcome))

    def _open_record(self, index: int) -> CallRecord:
        """A record of the item, kept in that of the call."""
        method = "" if self._call is None else self._call.method
        record = CallRecord(method, time.monotonic(), request_id=item_id(self._request_id, index))
        if self._call is not None:
            self._call.items.append(record)
        return record


def _root(index: int) -> str:
    return f"specs[{index}]"


class BatchTotals:
    """What all items come to, for the call's trailers."""

    def __init__(self) -> None:
        self.num_items = 0
        self.num_failed = 0
        self._start = time.monotonic()
        self._finishes: dict[int, Finish] = {}
        self._results: list[tuple[float, GenerationResult]] = []

    def add(self, ended: EndedItem) -> None:
        """Count an item."""
        self.num_items += 1
        if isinstance(ended.outcome, GenerationResult):
            self._results.append((ended.began_s, ended.outcome))
            self._finishes |= {int(c.finish.reason): c.finish for c in ended.outcome.completions}
        else:
            self.num_failed += 1

    @property
    def finishes(self) -> list[Finish]:
        """One finish of each reason there was: one for every completion could be more than metadata holds."""
        return [self._finishes[reason] for reason in sorted(self._finishes)]

    @property
    def usage(self) -> Usage:
        """The sums."""
        usages = [result.usage for _, result in self._results]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
            output_tokens=sum(usage.output_tokens for usage in usages),
        )

    @property
    def timings(self) -> Timings:
        """As of one request with many completions: the first item to get anywhere counts, since the call."""
        total = time.monotonic() - self._start
        queue = min((began + r.timings.queue for began, r in self._results), default=0.0)
        first_token = min((began + r.timings.first_token for began, r in self._results), default=0.0)
        return Timings(
            queue=queue,
            prefill=max(0.0, first_token - queue),
            first_token=first_token,
            decode=max(0.0, total - first_token),
            total=total,
            preemptions=sum(r.timings.preemptions for _, r in self._results),
        )
