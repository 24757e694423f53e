"""The front door behind every transport: text in, text events out.

Turns a GenerationRequest into ids, submits it, and turns what comes back into events. Runs on the
event loop; tokenising and chat templates go to a small thread pool. Knows neither grpc nor tensors.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from photon_grpc.engine.client import AsyncEngine, RequestStream, error_of
from photon_grpc.engine.load import EngineLoad
from photon_grpc.engine.messages import EngineRequest, EngineStats, SequenceOutput, SequenceTimings
from photon_grpc.engine.validation import CheckedRequest, Validator
from photon_grpc.errors import (
    CapacityError,
    DurationError,
    EngineStartingError,
    LifecycleError,
    PhotonError,
)
from photon_grpc.frontend.admission import Admission, Ticket
from photon_grpc.frontend.base import DeltaSink
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.detokenizer import Detokenizer
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
from photon_grpc.frontend.stop_strings import StopMatcher
from photon_grpc.frontend.tenant_terms import TenantTerms
from photon_grpc.frontend.tenants import Lease, Tenants
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import LimitOptions, TenantOptions
from photon_grpc.telemetry.call_record import GenerationRecord, current_call
from photon_grpc.telemetry.metrics import Metrics
from photon_grpc.types import (
    ChatInput,
    ChunkPolicy,
    Finish,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Timings,
    TokenLogprobs,
    Usage,
)

_T = TypeVar("_T")

# Encoding a text this short takes less than the way to another thread and back.
_INLINE_TEXT_CHARS = 1024
_WHOLE = ChunkPolicy(max_tokens=1 << 31)


@dataclass(frozen=True, slots=True)
class TextModel:
    """What is known once the model is loaded: how to turn text into ids and back, and the rules."""

    tokenizer: Tokenizer
    chat: ChatRenderer
    model: ModelInfo
    validator: Validator


class Generator:
    """Implements `frontend.base.FrontDoor` over an AsyncEngine."""

    def __init__(
        self,
        engine: AsyncEngine,
        limits: LimitOptions,
        text_pool: Executor,
        *,
        metrics: Metrics,
        tenants: TenantOptions | None = None,
        field_root: str = "spec.",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._text_pool = text_pool
        self._field_root = field_root
        self._clock = clock
        self._text: TextModel | None = None
        self._admission = Admission(engine, limits, clock=clock)
        self._tenants = Tenants(tenants or TenantOptions(), clock=clock)

    def activate(self, tokenizer: Tokenizer, chat: ChatRenderer) -> None:
        """Begin to answer; called when the engine is ready."""
        model = replace(self._engine.info.model, has_chat_template=chat.is_supported)
        self._text = TextModel(tokenizer, chat, model, Validator(model, self._limits))

    @property
    def model(self) -> ModelInfo:
        """The served model. Raises EngineStartingError before it is known."""
        return self._require_text().model

    def stats(self) -> EngineStats:
        """The engine's latest snapshot."""
        return self._engine.stats

    def load(self) -> EngineLoad:
        """The latest snapshot, and what it comes to."""
        load = self._engine.load(self._clock())
        if self._text is None:
            return load
        return replace(load, estimated_queue_wait_s=self._admission.queue_wait())

    async def flush_cache(self, *, wait_idle: bool) -> int:
        """Forget every cached prefix, with `wait_idle` once no request lives; the number of blocks that
        nobody holds and that kept one. Raises EngineStartingError, EngineDrainingError or EngineDeadError."""
        return await self._engine.flush_cache(wait_idle=wait_idle)

    def abort(self, request_id: str, *, tenant: str = "") -> int:
        """End a live request for an operator. Raises RequestNotFoundError, and InvalidRequestError for
        an id that several tenants use where none is named."""
        return self._engine.abort(request_id, tenant)

    def abort_all(self, *, tenant: str = "") -> int:
        """End every live request, or every one of a tenant, for an operator; the number ended."""
        return self._engine.abort_all(tenant)

    # --- generation -----------------------------------------------------------------------------

    async def open(
        self, request: GenerationRequest, *, deadline: float | None = None, tenant: str = ""
    ) -> TextStream:
        """Check, tokenise and submit a request. Raises errors of `errors.py` only."""
        return await self._submit(request, deadline, tenant, request.chunk_policy)

    async def _submit(
        self,
        request: GenerationRequest,
        deadline: float | None,
        tenant: str,
        policy: ChunkPolicy,
        field_root: str | None = None,
    ) -> TextStream:
        text = self._require_taking()
        with ExitStack() as places:
            lease = places.enter_context(self._tenants.enter(tenant))
            self._admission.check(tenant, lease.terms.weight)
            prepared = await self._prepare(text, request, deadline, tenant, field_root)
            checked = _on_terms(prepared, lease.terms)
            lease.reserve(_most_tokens(checked.engine_request))
            ticket = places.enter_context(self._enter(checked.engine_request))
            request_id = request.request_id or uuid.uuid4().hex
            stream = places.enter_context(self._engine.submit(request_id, checked.engine_request))
            record = _open_record(text, request, checked)
            held = _Places(ticket, lease)
            opened = TextStream(
                stream, held, text.tokenizer, request, checked, policy, record, self._metrics, self._clock
            )
            places.pop_all()
        return opened

    def _enter(self, request: EngineRequest) -> Ticket:
        return self._admission.enter(
            len(request.prompt_token_ids),
            request.sampling.n,
            request.deadlines,
            tenant=request.tenant,
            weight=request.weight,
        )

    async def generate(
        self,
        request: GenerationRequest,
        *,
        deadline: float | None = None,
        tenant: str = "",
        validate_only: bool = False,
        field_root: str | None = None,
    ) -> GenerationResult:
        """Run a request to its end, or only check and count it."""
        if validate_only:
            return await self._validate(request, deadline, tenant, field_root)
        # Without stop strings nobody needs to look before the end.
        policy = ChunkPolicy() if request.stop.strings else _WHOLE
        with await self._submit(request, deadline, tenant, policy, field_root) as stream:
            return await _collect(stream)

    async def _validate(
        self, request: GenerationRequest, deadline: float | None, tenant: str, field_root: str | None
    ) -> GenerationResult:
        prepared = await self._prepare(self._require_taking(), request, deadline, tenant, field_root)
        checked = _on_terms(prepared, self._tenants.terms(tenant))
        num_tokens = len(checked.engine_request.prompt_token_ids)
        return GenerationResult(
            request_id=request.request_id or uuid.uuid4().hex,
            completions=(),
            prompt=_prompt_info(request, checked, ()),
            usage=Usage(prompt_tokens=num_tokens, cached_prompt_tokens=0, output_tokens=0),
            timings=Timings(queue=0, prefill=0, first_token=0, decode=0, total=0, preemptions=0),
            effective=checked.effective,
            admission=self._try_admission(checked.engine_request, tenant),
        )

    def _try_admission(self, request: EngineRequest, tenant: str) -> AdmissionOutlook:
        """What `_submit` would say to a checked request; takes nothing, and no step is made."""
        refusal: PhotonError | None = None
        try:
            self._tenants.check(tenant, _most_tokens(request))
            self._admission.check(tenant, request.weight)
            # Nobody sees the place that is taken: it is given back before anything else runs.
            self._enter(request).close()
            self._engine.check_admission()
        except (CapacityError, DurationError, LifecycleError) as error:
            refusal = error
        return AdmissionOutlook(self._admission.estimated_wait(tenant, request.weight), refusal)

    async def _prepare(
        self,
        text: TextModel,
        request: GenerationRequest,
        deadline: float | None,
        tenant: str,
        field_root: str | None,
    ) -> CheckedRequest:
        arrival = self._clock()
        root = self._field_root if field_root is None else field_root
        text.validator.check(request, root=root)
        self._engine.check_duplicate(tenant, request.request_id)
        match request.prompt:
            case str() as prompt:
                ids = await self._encode(text, prompt, request.add_special_tokens)
            case ChatInput() as chat:
                ids = await self._in_text_pool(lambda: text.chat.encode(chat, field_root=root))
            case token_ids:
                assert token_ids is not None, "the validator refuses a missing prompt"
                ids = token_ids
        return text.validator.resolve(
            request, ids, arrival_time=arrival, deadline=deadline, tenant=tenant, root=root
        )

    # --- text only ------------------------------------------------------------------------------

    async def tokenize(
        self,
        prompt: str | ChatInput,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        return_offsets: bool = False,
    ) -> Tokenized:
        """Token ids of a text or of a rendered conversation."""
        text = self._require_text()
        text.validator.check_model(model)
        text.validator.check_prompt(prompt)
        if isinstance(prompt, ChatInput):
            ids = await self._in_text_pool(lambda: text.chat.encode(prompt, field_root=""))
            return Tokenized(tuple(ids))
        if return_offsets:
            special = True if add_special_tokens is None else add_special_tokens
            return await self._in_text_pool(
                lambda: Tokenized(*text.tokenizer.encode_with_offsets(prompt, add_special_tokens=special))
            )
        return Tokenized(tuple(await self._encode(text, prompt, add_special_tokens)))

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True
    ) -> str:
        """The text of whole token ids."""
        text = self._require_text()
        text.validator.check_model(model)
        text.validator.check_token_ids("token_ids", token_ids)
        return await self._in_text_pool(
            lambda: text.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        )

    async def _encode(self, text: TextModel, prompt: str, add_special_tokens: bool | None) -> Sequence[int]:
        special = True if add_special_tokens is None else add_special_tokens
        if len(prompt) <= _INLINE_TEXT_CHARS:
            return text.tokenizer.encode(prompt, add_special_tokens=special)
        return await self._in_text_pool(lambda: text.tokenizer.encode(prompt, add_special_tokens=special))

    def _require_taking(self) -> TextModel:
        self._engine.check_state()
        return self._require_text()

    def _require_text(self) -> TextModel:
        if self._text is None:
            raise EngineStartingError
        return self._text

    async def _in_text_pool(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, work)


@dataclass(frozen=True, slots=True)
class _Places:
    """What an admitted request holds until its stream is left."""

    ticket: Ticket
    lease: Lease

    def close(self, prompt_tokens: int, output_tokens: int) -> None:
        """Give everything back, and tell what was used. Idempotent."""
        self.ticket.num_output_tokens = output_tokens
        self.lease.used_tokens = prompt_tokens + output_tokens
        self.ticket.close()
        self.lease.close()


@dataclass(slots=True)
class _CompletionState:
    """One completion on its way from ids to text."""

    detokenizer: Detokenizer | None
    matcher: StopMatcher | None
    num_tokens: int = 0
    last_token_time: float | None = None
    finish: Finish | None = None
    timings: SequenceTimings | None = None
    cached_prompt_tokens: int = 0


class TextStream:
    """Implements `frontend.base.GenerationStream`: the events of one request, made as they are asked for."""

    def __init__(
        self,
        stream: RequestStream,
        places: _Places,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        checked: CheckedRequest,
        policy: ChunkPolicy,
        record: GenerationRecord,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.request_id = stream.request_id
        self._stream = stream
        self._places = places
        self._request = request
        self._checked = checked
        self._policy = policy
        self._record = record
        self._metrics = metrics
        self._clock = clock
        stop = checked.effective.stop
        needs_text = request.output.text or bool(stop.strings)
        self._states = [
            _CompletionState(
                detokenizer=Detokenizer(tokenizer, request.output.skip_special_tokens)
                if needs_text
                else None,
                matcher=StopMatcher(stop.strings, stop.include_stop) if stop.strings else None,
            )
            for _ in range(checked.effective.sampling.n)
        ]
        self._num_unfinished = len(self._states)
        self._events: deque[Event] = deque()
        self._held: list[SequenceOutput] = []
        self._started = False
        self._done = False
        self._sink: DeltaSink | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        # It leads back here, as what the stream offers to does.
        self._sink = None
        if not self._done:
            self._note(self._summary())

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._done:
                raise StopAsyncIteration
            self._process(await self._read())
        return self._events.popleft()

    def offer(self, sink: DeltaSink) -> None:
        """Where a delta is nothing but the tokens that have come: for one completion, without stop strings,
        where a delta is for every turn."""
        if len(self._states) == 1 and self._states[0].matcher is None and self._policy == ChunkPolicy():
            self._sink = sink

    def resume(self) -> None:
        self._stream.resume()

    def _take(self, sink: DeltaSink, token_ids: tuple[int, ...]) -> bool:
        """What `_process` does for plain tokens, at once; False while the sink has no room."""
        if not sink.has_room():
            return False
        state = self._states[0]
        text = self._plain_text(state, token_ids, None)
        self._count(state, len(token_ids))
        sink.write_now(self._delta(0, text, token_ids, ()))
        return True

    async def _read(self) -> list[SequenceOutput]:
        policy = self._policy
        if self._started and (policy.max_tokens is not None or policy.max_delay is not None):
            # The delay counts from the first token that waits for it.
            await self._stream.wait(1)
            await self._stream.wait(
                float("inf") if policy.max_tokens is None else policy.max_tokens, policy.max_delay
            )
        return await self._stream.read()

    def _process(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.failure is not None:
                raise error_of(output.failure)
        if not self._started:
            self._places.ticket.start(_prefill_s(outputs[0].timings))
            self._held.extend(outputs)
            if not self._try_start():
                return
            outputs, self._held = self._held, []
        for index, own in _by_index(outputs):
            self._advance(index, self._states[index], own)
        if not self._num_unfinished:
            self._done = True
            self._close()
            summary = self._summary()
            self._note(summary)
            self._metrics.observe_finished(self._record.finish_reasons, summary.usage, summary.timings)
            self._events.append(summary)

    def _note(self, summary: Summary) -> None:
        """Put into the call's record how far the request has come."""
        self._record.usage, self._record.timings = summary.usage, summary.timings
        self._record.finish_reasons = tuple(
            state.finish.reason for state in self._states if state.finish is not None
        )

    def _close(self) -> None:
        request = self._checked.engine_request
        self._places.close(len(request.prompt_token_ids), sum(state.num_tokens for state in self._states))
        self._stream.close()

    def _try_start(self) -> bool:
        """Make the Started event, unless prompt log-probabilities are still on their way with index 0."""
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if self._request.output.prompt_top_logprobs is not None:
            first = next((o for o in self._held if o.index == 0), None)
            if first is None:
                return False
            prompt_logprobs = first.prompt_logprobs
        self._started = True
        self._record.has_first_token = True
        self._events.append(
            Started(
                prompt=_prompt_info(self._request, self._checked, prompt_logprobs),
                effective=self._checked.effective,
            )
        )
        if self._sink is not None:
            self._stream.offer(partial(self._take, self._sink))
        return True

    def _advance(self, index: int, state: _CompletionState, outputs: Sequence[SequenceOutput]) -> None:
        """Take what one read brought for one completion; all of its tokens make one delta."""
        for output in outputs:
            if output.timings is not None:
                state.timings = output.timings
                state.cached_prompt_tokens = output.cached_prompt_tokens
        if state.finish is not None:
            return  # a stop string was found; the engine had not heard of it yet
        token_ids, logprobs, finish = outputs[-1].token_ids, outputs[-1].logprobs, outputs[-1].finish
        if len(outputs) > 1:
            token_ids = tuple([token_id for output in outputs for token_id in output.token_ids])
            logprobs = tuple([entry for output in outputs for entry in output.logprobs])
        if state.matcher is None:
            text = self._plain_text(state, token_ids, finish)
        else:
            text, num_kept, stop_finish = self._matched_text(state, state.matcher, token_ids, finish)
            token_ids = token_ids[:num_kept]
            if stop_finish is not None:
                if finish is None:
                    self._stream.abort_index(index)
                finish = stop_finish
        if token_ids:
            self._count(state, len(token_ids))
        if token_ids or text:
            self._events.append(self._delta(index, text, token_ids, logprobs[: len(token_ids)]))
        if finish is not None:
            state.finish = finish
            self._num_unfinished -= 1
            self._events.append(Finished(index, finish))

    def _count(self, state: _CompletionState, num_tokens: int) -> None:
        now = self._clock()
        if state.last_token_time is not None:
            self._metrics.observe_tokens(num_tokens, now - state.last_token_time)
        state.last_token_time = now
        state.num_tokens += num_tokens

    def _delta(
        self, index: int, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
    ) -> Delta:
        options = self._request.output
        return Delta(
            index=index,
            text=text if options.text else "",
            token_ids=token_ids if options.token_ids else (),
            logprobs=logprobs,
            num_tokens=len(token_ids),
        )

    def _plain_text(self, state: _CompletionState, token_ids: tuple[int, ...], finish: Finish | None) -> str:
        if state.detokenizer is None:
            return ""
        text = state.detokenizer.push(self._visible(token_ids, finish))
        return text if finish is None else text + state.detokenizer.flush()

    def _matched_text(
        self, state: _CompletionState, matcher: StopMatcher, token_ids: tuple[int, ...], finish: Finish | None
    ) -> tuple[str, int, Finish | None]:
        """Text up to a stop string, how many tokens that took, and the finish if one was found."""
        assert state.detokenizer is not None
        min_tokens = self._checked.effective.stop.min_tokens
        parts: list[str] = []
        visible = self._visible(token_ids, finish)
        for position, token_id in enumerate(visible, start=1):
            armed = state.num_tokens + position >= min_tokens
            text, matched = matcher.push(state.detokenizer.push([token_id]), armed)
            parts.append(text)
            if matched is not None:
                return "".join(parts), position, Finish(FinishReason.STOP, stop_string=matched)
        if finish is not None:
            armed = state.num_tokens + len(token_ids) >= min_tokens
            text, matched = matcher.push(state.detokenizer.flush(), armed)
            parts.append(text)
            if matched is not None:
                return "".join(parts), len(token_ids), Finish(FinishReason.STOP, stop_string=matched)
            parts.append(matcher.flush())
        return "".join(parts), len(token_ids), None

    def _visible(self, token_ids: tuple[int, ...], finish: Finish | None) -> tuple[int, ...]:
        """The tokens that show in the text: the one that ended the completion does only when asked for."""
        ended_by_token = finish is not None and (
            finish.eos_token_id is not None or finish.stop_token_id is not None
        )
        if ended_by_token and not self._checked.effective.stop.include_stop:
            return token_ids[:-1]
        return token_ids

    def _summary(self) -> Summary:
        states = self._states
        return Summary(
            usage=Usage(
                prompt_tokens=len(self._checked.engine_request.prompt_token_ids),
                cached_prompt_tokens=states[0].cached_prompt_tokens,
                output_tokens=sum(state.num_tokens for state in states),
            ),
            timings=_timings(
                self._checked.engine_request.arrival_time,
                [state.timings for state in states if state.timings is not None],
                self._clock(),
            ),
        )


def _by_index(outputs: list[SequenceOutput]) -> Iterable[tuple[int, list[SequenceOutput]]]:
    """The outputs of each completion, in order."""
    if len(outputs) == 1:
        return ((outputs[0].index, outputs),)
    grouped: dict[int, list[SequenceOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.index, []).append(output)
    return grouped.items()


def _open_record(text: TextModel, request: GenerationRequest, checked: CheckedRequest) -> GenerationRecord:
    """Put into the call's record, where there is a call, that the engine has taken its request."""
    record = GenerationRecord(
        arrival=checked.engine_request.arrival_time,
        requested_model=request.model,
        model=text.model.name,
        is_chat=isinstance(request.prompt, ChatInput),
        effective=checked.effective,
    )
    call = current_call.get()
    if call is not None:
        call.generation = record
    return record


def _on_terms(checked: CheckedRequest, terms: TenantTerms) -> CheckedRequest:
    """The request as its tenant may have it."""
    request = checked.engine_request
    priority = request.priority
    if terms.max_priority is not None:
        priority = min(priority, terms.max_priority)
    if (priority, terms.weight, terms.kv_share) == (request.priority, request.weight, request.kv_share):
        return checked
    return replace(
        checked,
        engine_request=replace(request, priority=priority, weight=terms.weight, kv_share=terms.kv_share),
    )


def _most_tokens(request: EngineRequest) -> int:
    """All that the request can use: one prompt, and `max_tokens` of each completion."""
    return len(request.prompt_token_ids) + request.sampling.n * request.max_tokens


def _prefill_s(timings: SequenceTimings | None) -> float | None:
    """From the first step to the first token; None without one."""
    if timings is None or timings.started is None or timings.first_token is None:
        return None
    return timings.first_token - timings.started


def _prompt_info(
    request: GenerationRequest, checked: CheckedRequest, logprobs: tuple[TokenLogprobs, ...]
) -> PromptInfo:
    token_ids = checked.engine_request.prompt_token_ids
    return PromptInfo(
        num_tokens=len(token_ids),
        token_ids=token_ids if request.output.echo_prompt else (),
        # The first prompt token follows nothing, so it has no probability.
        logprobs=(None, *logprobs) if request.output.prompt_top_logprobs is not None else (),
    )


def _timings(arrival: float, parts: list[SequenceTimings], now: float) -> Timings:
    """Durations of a request from the moments of its completions: the first to get anywhere counts."""
    started = min((t.started for t in parts if t.started is not None), default=now)
    first_token = min((t.first_token for t in parts if t.first_token is not None), default=now)
    # A completion that a stop string ended has no end of the engine's: it ends now.
    end = max((now if t.end is None else t.end for t in parts), default=now)
    end = max(end, first_token)
    return Timings(
        queue=started - arrival,
        prefill=first_token - started,
        first_token=first_token - arrival,
        decode=end - first_token,
        total=end - arrival,
        preemptions=sum(t.preemptions for t in parts),
    )


async def _collect(stream: TextStream) -> GenerationResult:
    """Everything a stream tells, as one result."""
    started: Started | None = None
    summary: Summary | None = None
    deltas: dict[int, list[Delta]] = {}
    finishes: dict[int, Finish] = {}
    async for event in stream:
        match event:
            case Started():
                started = event
            case Delta():
                deltas.setdefault(event.index, []).append(event)
            case Finished():
                finishes[event.index] = event.finish
            case Summary():
                summary = event
    assert started is not None
    assert summary is not None
    return GenerationResult(
        request_id=stream.request_id,
        completions=tuple(
            Completion(
                index=index,
                text="".join(d.text for d in deltas.get(index, ())),
                token_ids=tuple(t for d in deltas.get(index, ()) for t in d.token_ids),
                logprobs=tuple(entry for d in deltas.get(index, ()) for entry in d.logprobs),
                finish=finish,
            )
            for index, finish in sorted(finishes.items())
        ),
        prompt=started.prompt,
        usage=summary.usage,
        timings=summary.timings,
        effective=started.effective,
    )
