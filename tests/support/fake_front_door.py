"""A front door without a house: scripted events, and a record of what the server did with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from photon_grpc.engine.load import EngineLoad
from photon_grpc.engine.messages import EngineStats
from photon_grpc.errors import EngineStartingError, RequestNotFoundError
from photon_grpc.frontend.base import DeltaSink
from photon_grpc.frontend.events import (
    AdmissionOutlook,
    Completion,
    Delta,
    Event,
    Finished,
    GenerationResult,
    PromptInfo,
    Started,
    Summary,
    Tokenized,
)
from photon_grpc.types import (
    ChatInput,
    EffectiveParams,
    EffectiveSampling,
    EffectiveStop,
    Finish,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Timings,
    Usage,
)

MODEL = ModelInfo(
    name="fake",
    fingerprint="f" * 8,
    vocab_size=1000,
    max_model_len=256,
    eos_token_ids=(2,),
    has_chat_template=True,
)
EFFECTIVE = EffectiveParams(
    EffectiveSampling(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=7,
        n=1,
        logit_bias=((5, -1.5),),
    ),
    EffectiveStop(
        max_tokens=3,
        min_tokens=0,
        strings=("stop",),
        token_ids=(9,),
        ignore_eos=False,
        include_stop=False,
        time_limit=None,
    ),
    "f" * 8,
)
TIMINGS = Timings(queue=0.001, prefill=0.25, first_token=0.5, decode=1.0, total=1.5, preemptions=2)
PROMPT = PromptInfo(num_tokens=4, token_ids=(1, 2, 3, 4))


@dataclass
class Script:
    """What a stream does: `num_deltas` (None: without end) of `text`, `interval_s` apart.

    `error` is raised in place of the event number `error_at` (0: in `open`, before any event);
    `hang` never brings a first event; with `resume` nothing follows the first delta before it is set.
    """

    num_deltas: int | None = 3
    text: str = " tok"
    interval_s: float = 0.0
    error: Exception | None = None
    error_at: int = 0
    hang: bool = False
    resume: asyncio.Event | None = None
    finish: Finish = field(default_factory=lambda: Finish(FinishReason.STOP, stop_string="stop"))


class FakeStream:
    """Follows a script; remembers how often it was left and how far it got."""

    def __init__(self, request: GenerationRequest, script: Script) -> None:
        self.request_id = request.request_id
        self.exits = 0
        self.num_events = 0
        self.left = asyncio.Event()
        self._script = script

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.exits += 1
        self.left.set()

    def offer(self, sink: DeltaSink) -> None:
        """All events are the reader's."""

    def resume(self) -> None:
        """Nothing was offered."""

    async def __aiter__(self) -> AsyncIterator[Event]:
        script = self._script
        if script.hang:
            await asyncio.Event().wait()
        for event in self._events():
            self.num_events += 1
            if script.error is not None and self.num_events == script.error_at:
                raise script.error
            if script.resume is not None and self.num_events > 2:
                await script.resume.wait()
            await asyncio.sleep(script.interval_s)
            yield event

    def _events(self) -> Iterator[Event]:
        script = self._script
        yield Started(PROMPT, EFFECTIVE)
        index = 0
        while script.num_deltas is None or index < script.num_deltas:
            yield Delta(index=0, text=script.text, token_ids=(index,), logprobs=(), num_tokens=1)
            index += 1
        yield Finished(0, script.finish)
        yield Summary(Usage(4, 1, index), TIMINGS)


class FakeFrontDoor:
    """Implements `FrontDoor`; every test sets `script` and looks at `streams`, `requests`, `deadlines`."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.starting = False
        self.model_info = MODEL
        self.streams: list[FakeStream] = []
        self.requests: list[GenerationRequest] = []
        self.deadlines: list[float | None] = []
        self.tenants: list[str] = []
        self.calls: list[tuple[str, object]] = []
        self.live_ids: set[tuple[str, str]] = set()  # (tenant, request_id)
        self.outlook = AdmissionOutlook(0.5, None)
        self.output_tokens_per_second: float | None = None
        self.estimated_queue_wait_s: float | None = None
        self.engine_stats = EngineStats(
            running=2,
            waiting=3,
            waiting_tokens=40,
            kv_blocks_used=25,
            kv_blocks_total=100,
            block_size=16,
            prefix_queries=8,
            prefix_hits=2,
        )

    @property
    def model(self) -> ModelInfo:
        if self.starting:
            raise EngineStartingError
        return self.model_info

    def _record(self, request: GenerationRequest, deadline: float | None, tenant: str) -> None:
        if self.starting:
            raise EngineStartingError
        self.requests.append(request)
        self.deadlines.append(deadline)
        self.tenants.append(tenant)
        if self.script.error is not None and self.script.error_at == 0:
            raise self.script.error

    async def open(
        self, request: GenerationRequest, *, deadline: float | None = None, tenant: str = ""
    ) -> FakeStream:
        self._record(request, deadline, tenant)
        stream = FakeStream(request, self.script)
        self.streams.append(stream)
        return stream

    async def generate(
        self,
        request: GenerationRequest,
        *,
        deadline: float | None = None,
        tenant: str = "",
        validate_only: bool = False,
        field_root: str | None = None,
    ) -> GenerationResult:
        self._record(request, deadline, tenant)
        self.calls.append(("generate", validate_only))
        if self.script.hang:
            await asyncio.Event().wait()
        num_deltas = self.script.num_deltas or 0
        completion = Completion(
            index=0,
            text=self.script.text * num_deltas,
            token_ids=tuple(range(num_deltas)),
            logprobs=(),
            finish=self.script.finish,
        )
        return GenerationResult(
            request_id=request.request_id,
            completions=() if validate_only else (completion,),
            prompt=PROMPT,
            usage=Usage(4, 1, 0 if validate_only else num_deltas),
            timings=TIMINGS,
            effective=EFFECTIVE,
            admission=self.outlook if validate_only else None,
        )

    async def tokenize(
        self,
        prompt: str | ChatInput,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        return_offsets: bool = False,
    ) -> Tokenized:
        self.calls.append(("tokenize", (prompt, model, add_special_tokens, return_offsets)))
        return Tokenized((1, 2), ((0, 3), (3, 5)) if return_offsets else ())

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        self.calls.append(("detokenize", (tuple(token_ids), model, skip_special_tokens)))
        return "héllo"

    def stats(self) -> EngineStats:
        return self.engine_stats

    def load(self) -> EngineLoad:
        return EngineLoad(self.engine_stats, self.output_tokens_per_second, self.estimated_queue_wait_s)

    async def flush_cache(self, *, wait_idle: bool) -> int:
        self.calls.append(("flush_cache", wait_idle))
        return 7

    def abort(self, request_id: str, *, tenant: str = "") -> int:
        meant = {name for name in self.live_ids if name[1] == request_id and tenant in ("", name[0])}
        if not meant:
            raise RequestNotFoundError(request_id)
        self.live_ids -= meant
        return len(meant)

    def abort_all(self, *, tenant: str = "") -> int:
        meant = {name for name in self.live_ids if tenant in ("", name[0])}
        self.live_ids -= meant
        return len(meant)
