"""The front door: all that a transport (gRPC today, HTTP later) needs of the house behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from photon_grpc.engine.load import EngineLoad
from photon_grpc.engine.messages import EngineStats
from photon_grpc.frontend.events import Delta, Event, GenerationResult, Tokenized
from photon_grpc.types import ChatInput, GenerationRequest, ModelInfo


class DeltaSink(Protocol):
    """Writes deltas at once, where the reader of a stream would have to be woken for each."""

    def has_room(self) -> bool:
        """Whether a delta can be written without waiting; after a False it calls the stream's `resume` once
        that has changed."""

    def write_now(self, delta: Delta) -> None:
        """Write a delta, behind all that the reader has written. Only while there is room."""


class GenerationStream(Protocol):
    """A running generation. Iterate inside `with`; leaving it early aborts the request.

    Leaving is synchronous and idempotent because grpc.aio ends a handler with CancelledError when it
    awaits and with GeneratorExit when it is suspended in `yield`; a plain context manager sees both.
    Each event is made when it is asked for, so tokens that arrive during a slow write merge into the
    next delta.
    """

    request_id: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def offer(self, sink: DeltaSink) -> None:
        """While the reader waits for the next event, a delta may go to `sink` and not to it. Any other event
        is the reader's, and nothing goes to `sink` before the reader asks for what follows it."""

    def resume(self) -> None:
        """The sink has room again."""


class FrontDoor(Protocol):
    """Submits requests and answers questions about text. Lives on the event loop.

    `deadline` is a moment of `time.monotonic()`; `tenant` for whom a generation is, as the transport has
    made sure: quotas, request ids and the prefix cache are kept apart by it. Every method raises errors of
    `errors.py` only.
    """

    @property
    def model(self) -> ModelInfo:
        """The served model. Raises EngineStartingError before it is known."""

    async def open(
        self, request: GenerationRequest, *, deadline: float | None = None, tenant: str = ""
    ) -> GenerationStream:
        """Check, tokenise and submit `request`. Errors before the first token are raised here or by
        the first iteration."""

    async def generate(
        self,
        request: GenerationRequest,
        *,
        deadline: float | None = None,
        tenant: str = "",
        validate_only: bool = False,
        field_root: str | None = None,
    ) -> GenerationResult:
        """Run `request` to its end; with `validate_only` check and count tokens, and stop there.

        `field_root` stands before the paths of fields in errors; None is the transport's usual one.
        """

    async def tokenize(
        self,
        prompt: str | ChatInput,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        return_offsets: bool = False,
    ) -> Tokenized: ...

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str: ...

    def stats(self) -> EngineStats:
        """The engine's latest snapshot."""

    def load(self) -> EngineLoad:
        """The latest snapshot, and what it comes to."""

    async def flush_cache(self, *, wait_idle: bool) -> int:
        """Forget every cached prefix, with `wait_idle` once no request lives; the blocks that gave room."""

    def abort(self, request_id: str, *, tenant: str = "") -> int:
        """End a live request for an operator; the number ended. An empty tenant stands for all of them.

        Raises RequestNotFoundError, and InvalidRequestError for an id that several tenants use.
        """

    def abort_all(self, *, tenant: str = "") -> int:
        """End every live request, or every one of a tenant, for an operator; the number ended."""
