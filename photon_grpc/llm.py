"""The same engine without a server: `LLM(model).generate(prompts, params)`.

A blocking face for scripts and notebooks. Behind it run an event loop on a thread of its own, the same
front door as the gRPC service and the same engine thread, so results are those of the service.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import photon_grpc
from photon_grpc.app import InferenceStack
from photon_grpc.engine.host import Progress
from photon_grpc.errors import PhotonError
from photon_grpc.frontend.base import GenerationStream
from photon_grpc.frontend.events import Event, GenerationResult
from photon_grpc.options import Options
from photon_grpc.telemetry.metrics import Metrics
from photon_grpc.types import (
    ChatInput,
    ChatMessage,
    GenerationRequest,
    ModelInfo,
    OutputOptions,
    Prompt,
    SamplingParams,
    StopParams,
)

__all__ = ["LLM", "GenerationParams"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What to do with a prompt. An absent value takes the model's default; limits are the service's.

    `stop` ends a completion at one of these strings; `logprobs` asks for that many alternatives per
    token (0: the token's own log-probability alone).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    include_stop: bool | None = None
    time_limit: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def request(self, prompt: Prompt) -> GenerationRequest:
        """The service's request for `prompt`, with token ids in the answer."""
        return GenerationRequest(
            prompt=prompt,
            sampling=SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed,
                n=self.n,
                logit_bias=self.logit_bias,
                allowed_token_ids=self.allowed_token_ids,
            ),
            stop=StopParams(
                max_tokens=self.max_tokens,
                min_tokens=self.min_tokens,
                strings=self.stop,
                token_ids=self.stop_token_ids,
                ignore_eos=self.ignore_eos,
                include_stop=self.include_stop,
                time_limit=self.time_limit,
            ),
            output=OutputOptions(
                token_ids=True,
                top_logprobs=self.logprobs,
                prompt_top_logprobs=self.prompt_logprobs,
                skip_special_tokens=self.skip_special_tokens,
            ),
        )


class LLM:
    """A loaded model. Use inside `with`, or call `close`.

    `model` is a model folder or `demo`; `options` carries every other setting, for example
    `Options(model=ModelOptions(dtype="bfloat16"))`. Raises StartupError.
    """

    def __init__(
        self,
        model: str,
        *,
        options: Options | None = None,
        progress: Progress | None = None,
    ) -> None:
        options = options or Options()
        if options.engine.process == "auto":
            # A program that computes beside us has its own use for torch, and no event loop to spare for.
            options = replace(options, engine=replace(options.engine, process="shared"))
        # A program waits for itself: how many it has waiting is bounded, not how much.
        limits = replace(options.limits, max_queued_tokens=sys.maxsize)
        self._options = replace(options, model=replace(options.model, path=model), limits=limits)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="photon-llm", daemon=True)
        self._thread.start()
        try:
            self._stack = self._call(self._open(progress))
        except BaseException:
            self._stop_loop()
            raise

    async def _open(self, progress: Progress | None) -> InferenceStack:
        def on_stopped(error: PhotonError | None) -> None:
            # Each live call is told by its own stream; later ones are refused by the front door.
            del error

        stack = InferenceStack(
            self._options,
            on_stopped=on_stopped,
            metrics=Metrics(photon_grpc.__version__),
            field_root="",
            progress=progress,
        )
        try:
            await stack.start()
        except BaseException:
            await stack.stop()
            raise
        return stack

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._stack.generator.model

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: GenerationParams | None = None
    ) -> list[GenerationResult]:
        """Complete all prompts, batched together; results in the order of the prompts.

        A prompt is a text, a tuple of token ids or a ChatInput; a lone one counts as a list of one.
        Raises errors of `photon_grpc.errors`.
        """
        several = [prompts] if isinstance(prompts, str | tuple | ChatInput) else list(prompts)
        params = params or GenerationParams()
        return self._call(self._generate([params.request(prompt) for prompt in several]))

    async def _generate(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        # A batch, and as many to follow; the rest of a long list waits here, where no clock runs.
        running = self._options.scheduler.max_num_seqs or self._stack.engine.info.model.max_num_seqs
        admitted = running + min(running, self._options.limits.max_queued_requests)
        num_completions = max((request.sampling.n or 1 for request in requests), default=1)
        places = asyncio.Semaphore(max(1, admitted // num_completions))

        async def one(request: GenerationRequest) -> GenerationResult:
            async with places:
                return await self._stack.generator.generate(request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in requests]
        return [task.result() for task in tasks]

    def chat(
        self, messages: Sequence[ChatMessage], params: GenerationParams | None = None
    ) -> GenerationResult:
        """The next message of a conversation, by the model's own chat template."""
        return self.generate(ChatInput(tuple(messages)), params)[0]

    def stream(self, prompt: Prompt, params: GenerationParams | None = None) -> Iterator[Event]:
        """The events of one generation as they come; closing the iterator aborts the request."""
        request = (params or GenerationParams()).request(prompt)
        stream: GenerationStream = self._call(self._stack.generator.open(request))
        events = aiter(stream)
        try:
            while (event := self._call(_next(events))) is not None:
                yield event
        finally:
            self._call(_leave(stream))

    def close(self) -> None:
        """End what runs and give memory and threads back; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._call(self._stack.stop())
        self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
        except BaseExceptionGroup as group:
            # One failed prompt ends the call; which of several failed first is of no use to the caller.
            raise group.exceptions[0] from None

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(events: Any) -> Event | None:
    try:
        event: Event = await anext(events)
    except StopAsyncIteration:
        return None
    return event


async def _leave(stream: GenerationStream) -> None:
    stream.__exit__(None, None, None)
