"""Between the messages of `photon.v1` and the domain types; pure functions, any thread.

Decoding refuses only what the domain types cannot hold: too many elements (counted before one is
touched), durations that are none, unknown enum values, fields that this release does not support.
Whether a value is sensible is for `engine/validation.py`. Absent and zero stay apart all the way. All
violations found are reported together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value

from photon_grpc.engine.load import EngineLoad
from photon_grpc.errors import FieldViolation, InvalidRequestError, UnsupportedFeatureError
from photon_grpc.frontend import events
from photon_grpc.options import LimitOptions
from photon_grpc.server.status import to_message
from photon_grpc.types import (
    CacheOptions,
    ChatInput,
    ChatMessage,
    ChunkPolicy,
    EffectiveParams,
    Finish,
    GenerationRequest,
    ModelInfo,
    OutputOptions,
    Prompt,
    Role,
    SamplingParams,
    SchedulingOptions,
    StopParams,
    Timings,
    TokenLogprobs,
    Usage,
)
from photon_grpc.v1 import control_pb2, inference_pb2, model_pb2

_ROLES = {
    inference_pb2.ChatMessage.ROLE_SYSTEM: Role.SYSTEM,
    inference_pb2.ChatMessage.ROLE_USER: Role.USER,
    inference_pb2.ChatMessage.ROLE_ASSISTANT: Role.ASSISTANT,
    inference_pb2.ChatMessage.ROLE_TOOL: Role.TOOL,
}

# The bounds that google/protobuf/duration.proto sets: about ten thousand years.
_MAX_DURATION_SECONDS = 315_576_000_000
_MAX_NANOS = 999_999_999
# Closer together than this, snapshots tell nothing new and cost the loop that serves.
MIN_LOAD_INTERVAL_S = 0.1
# A message that is filled anew keeps the memory of the texts that it had before, until it goes.
_DELTAS_PER_MESSAGE = 256


class _Decoder:
    """Collects violations while one request is decoded."""

    def __init__(self, limits: LimitOptions) -> None:
        self._limits = limits
        self._violations: list[FieldViolation] = []

    def refuse(self, field: str, description: str) -> None:
        self._violations.append(FieldViolation(field, description))

    def finish(self) -> None:
        """Raises InvalidRequestError when anything was refused."""
        if self._violations:
            raise InvalidRequestError(self._violations)

    def fits(self, field: str, elements: Any, limit: int) -> bool:
        """Whether the repeated field holds at most `limit` elements; looks at none of them."""
        if len(elements) <= limit:
            return True
        self.refuse(field, f"has {len(elements)} elements, at most {limit} are allowed")
        return False

    def duration(self, message: Any, name: str, path: str) -> float | None:
        """Seconds of the Duration `name` in `message`, None when absent."""
        if not message.HasField(name):
            return None
        value: Duration = getattr(message, name)
        field = f"{path}.{name}" if path else name
        if abs(value.seconds) > _MAX_DURATION_SECONDS or abs(value.nanos) > _MAX_NANOS:
            self.refuse(field, "is no valid Duration")
        elif value.seconds * value.nanos < 0:
            self.refuse(field, "is no valid Duration: seconds and nanos differ in sign")
        elif value.seconds < 0 or value.nanos < 0:
            self.refuse(field, "must not be negative")
        else:
            return value.seconds + value.nanos / 1e9
        return None

    def chat(self, message: inference_pb2.ChatInput, path: str) -> ChatInput:
        messages = []
        if self.fits(f"{path}.messages", message.messages, self._limits.max_chat_messages):
            for index, item in enumerate(message.messages):
                role = _ROLES.get(item.role)
                if role is None:
                    self.refuse(f"{path}.messages[{index}].role", "is unspecified or unknown")
                    continue
                messages.append(ChatMessage(role, item.content))
        template_args: dict[str, Any] = {}
        if message.HasField("template_args"):
            walk = _StructWalk(self._limits.max_template_args_depth, self._limits.max_template_args_bytes)
            try:
                template_args = walk.struct(message.template_args, 1)
            except _StructError as error:
                self.refuse(f"{path}.template_args", str(error))
        return ChatInput(tuple(messages), template_args, message.continue_final_message)

    def sampling(self, message: inference_pb2.SamplingParams, path: str) -> SamplingParams:
        logit_bias: dict[int, float] = {}
        if self.fits(f"{path}.logit_bias", message.logit_bias, self._limits.max_logit_bias):
            logit_bias = dict(message.logit_bias)
        allowed: tuple[int, ...] = ()
        limit = self._limits.max_allowed_token_ids
        if self.fits(f"{path}.allowed_token_ids", message.allowed_token_ids, limit):
            allowed = tuple(message.allowed_token_ids)
        return SamplingParams(
            temperature=_optional(message, "temperature"),
            top_p=_optional(message, "top_p"),
            top_k=_optional(message, "top_k"),
            min_p=_optional(message, "min_p"),
            presence_penalty=_optional(message, "presence_penalty"),
            frequency_penalty=_optional(message, "frequency_penalty"),
            repetition_penalty=_optional(message, "repetition_penalty"),
            seed=_optional(message, "seed"),
            n=_optional(message, "n"),
            logit_bias=logit_bias,
            allowed_token_ids=allowed,
        )

    def stop(self, message: inference_pb2.StopParams, path: str) -> StopParams:
        strings: tuple[str, ...] = ()
        if self.fits(f"{path}.strings", message.strings, self._limits.max_stop_strings):
            strings = tuple(message.strings)
        token_ids: tuple[int, ...] = ()
        if self.fits(f"{path}.token_ids", message.token_ids, self._limits.max_stop_token_ids):
            token_ids = tuple(message.token_ids)
        return StopParams(
            max_tokens=_optional(message, "max_tokens"),
            min_tokens=_optional(message, "min_tokens"),
            strings=strings,
            token_ids=token_ids,
            ignore_eos=_optional(message, "ignore_eos"),
            include_stop=_optional(message, "include_stop"),
            time_limit=self.duration(message, "time_limit", path),
        )

    def scheduling(self, message: inference_pb2.SchedulingOptions, path: str) -> SchedulingOptions:
        return SchedulingOptions(
            priority=_optional(message, "priority"),
            queue_timeout=self.duration(message, "queue_timeout", path),
            first_token_budget=self.duration(message, "first_token_budget", path),
        )

    def chunk_policy(self, message: inference_pb2.ChunkPolicy, path: str) -> ChunkPolicy:
        return ChunkPolicy(
            max_tokens=_optional(message, "max_tokens"),
            max_delay=self.duration(message, "max_delay", path),
        )

    def prompt(self, spec: inference_pb2.GenerationSpec, path: str) -> Prompt | None:
        kind = spec.WhichOneof("input")
        if kind == "text":
            return str(spec.text)
        if kind == "token_ids":
            return tuple(spec.token_ids.ids)
        if kind == "chat":
            return self.chat(spec.chat, f"{path}.chat")
        return None

    def generation(
        self,
        spec: inference_pb2.GenerationSpec,
        request_id: str,
        chunk_policy: inference_pb2.ChunkPolicy | None,
        root: str = "spec",
    ) -> GenerationRequest:
        _refuse_unsupported(spec, root)
        if spec.experimental.fields:
            self.refuse(f"{root}.experimental", "holds keys that this server does not know")
        request = GenerationRequest(
            prompt=self.prompt(spec, root),
            request_id=request_id,
            model=spec.model,
            sampling=self.sampling(spec.sampling, f"{root}.sampling"),
            stop=self.stop(spec.stop, f"{root}.stop"),
            output=_output(spec.output),
            scheduling=self.scheduling(spec.scheduling, f"{root}.scheduling"),
            cache=CacheOptions(spec.cache.bypass_prefix_cache, spec.cache.cache_salt),
            chunk_policy=(
                ChunkPolicy() if chunk_policy is None else self.chunk_policy(chunk_policy, "chunk_policy")
            ),
            add_special_tokens=_optional(spec, "add_special_tokens"),
            truncate_input_tokens=_optional(spec, "truncate_input_tokens"),
        )
        self.finish()
        return request


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _refuse_unsupported(spec: inference_pb2.GenerationSpec, root: str) -> None:
    if spec.HasField("constraint"):
        raise UnsupportedFeatureError(f"{root}.constraint", "constraints are not supported")
    if spec.adapter:
        raise UnsupportedFeatureError(f"{root}.adapter", "adapters are not supported")


def _output(message: inference_pb2.OutputOptions) -> OutputOptions:
    return OutputOptions(
        text=message.text if message.HasField("text") else True,
        token_ids=message.token_ids,
        top_logprobs=_optional(message, "top_logprobs"),
        prompt_top_logprobs=_optional(message, "prompt_top_logprobs"),
        echo_prompt=message.echo_prompt,
        skip_special_tokens=(
            message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        ),
    )


class _StructError(Exception):
    """A Struct is too deep, too large, or holds what JSON cannot."""


class _StructWalk:
    """Struct to plain values within bounds; sizes count as compact JSON does that needs no escapes.

    Whole numbers become integers, as a template would write them otherwise.
    """

    def __init__(self, max_depth: int, max_bytes: int) -> None:
        self._max_depth = max_depth
        self._max_bytes = max_bytes
        self._bytes = 0

    def struct(self, message: Struct, depth: int) -> dict[str, Any]:
        self._enter(len(message.fields), depth)
        result = {}
        for key, value in message.fields.items():
            self._spend(len(key.encode()) + 3)
            result[key] = self.value(value, depth + 1)
        return result

    def value(self, message: Value, depth: int) -> Any:
        kind = message.WhichOneof("kind")
        if kind == "struct_value":
            return self.struct(message.struct_value, depth)
        if kind == "list_value":
            values = message.list_value.values
            self._enter(len(values), depth)
            return [self.value(item, depth + 1) for item in values]
        if kind == "string_value":
            self._spend(len(message.string_value.encode()) + 2)
            return message.string_value
        if kind == "number_value":
            number = message.number_value
            if not math.isfinite(number):
                raise _StructError("holds a number that is not finite")
            plain = int(number) if number.is_integer() else number
            self._spend(len(repr(plain)))
            return plain
        if kind == "bool_value":
            self._spend(4 if message.bool_value else 5)
            return message.bool_value
        if kind == "null_value":
            self._spend(4)
            return None
        raise _StructError("holds a value without a kind")

    def _enter(self, num_elements: int, depth: int) -> None:
        if depth > self._max_depth:
            raise _StructError(f"is nested deeper than {self._max_depth}")
        self._spend(2 + max(0, num_elements - 1))

    def _spend(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if self._bytes > self._max_bytes:
            raise _StructError(f"is larger than {self._max_bytes} bytes")


def decode_generate(
    message: inference_pb2.GenerateRequest, request_id: str, limits: LimitOptions
) -> GenerationRequest:
    """The domain request, under `request_id`. Raises InvalidRequestError, UnsupportedFeatureError."""
    return _Decoder(limits).generation(message.spec, request_id, None)


def decode_stream_generate(
    message: inference_pb2.StreamGenerateRequest, request_id: str, limits: LimitOptions
) -> GenerationRequest:
    """The domain request, under `request_id`. Raises InvalidRequestError, UnsupportedFeatureError."""
    if message.resumable:
        raise UnsupportedFeatureError("resumable", "resuming a stream is not supported")
    return _Decoder(limits).generation(message.spec, request_id, message.chunk_policy)


def decode_item(
    spec: inference_pb2.GenerationSpec, request_id: str, root: str, limits: LimitOptions
) -> GenerationRequest:
    """The domain request of one spec of a batch, whose fields are named below `root` in errors.

    Raises InvalidRequestError, UnsupportedFeatureError.
    """
    return _Decoder(limits).generation(spec, request_id, None, root)


def decode_tokenize(message: inference_pb2.TokenizeRequest, limits: LimitOptions) -> str | ChatInput:
    """The input of a Tokenize call. Raises InvalidRequestError."""
    kind = message.WhichOneof("input")
    if kind == "text":
        return str(message.text)
    if kind != "chat":
        raise InvalidRequestError.of("input", "one of text and chat is required")
    decoder = _Decoder(limits)
    chat = decoder.chat(message.chat, "chat")
    decoder.finish()
    return chat


def decode_token_ids(message: inference_pb2.DetokenizeRequest, max_token_ids: int) -> tuple[int, ...]:
    """The ids of a Detokenize call. Raises InvalidRequestError for more than `max_token_ids`."""
    if len(message.token_ids) > max_token_ids:
        raise InvalidRequestError.of(
            "token_ids", f"has {len(message.token_ids)} elements, at most {max_token_ids} are allowed"
        )
    return tuple(message.token_ids)


class EventEncoder:
    """The messages of one stream, numbered."""

    __slots__ = ("_delta", "_message", "_request_id", "_seq")

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._seq = 0
        self._renew()

    def encode(self, event: events.Event) -> inference_pb2.StreamGenerateResponse:
        """The next message."""
        self._seq += 1
        return encode_event(event, self._request_id, self._seq)

    def encode_delta(self, event: events.Delta) -> inference_pb2.StreamGenerateResponse:
        """The next message, of a delta without log-probabilities. It is the same object each time, in half
        the time that a new one takes: serialize it before the next."""
        assert not event.logprobs
        self._seq += 1
        if self._seq % _DELTAS_PER_MESSAGE == 0:
            self._renew()
        self._message.seq = self._seq
        delta = self._delta
        delta.num_tokens = event.num_tokens
        delta.token_ids[:] = event.token_ids
        if event.index or delta.index:
            delta.index = event.index
        if event.text or delta.text:
            delta.text = event.text
        return self._message

    def _renew(self) -> None:
        self._message = inference_pb2.StreamGenerateResponse(request_id=self._request_id)
        self._delta = self._message.delta


def encode_event(event: events.Event, request_id: str, seq: int) -> inference_pb2.StreamGenerateResponse:
    """One message of a stream."""
    response = inference_pb2.StreamGenerateResponse(request_id=request_id, seq=seq)
    if type(event) is events.Delta:
        # Filled in place, and with what it has alone.
        delta = response.delta
        delta.num_tokens = event.num_tokens
        if event.index:
            delta.index = event.index
        if event.text:
            delta.text = event.text
        if event.token_ids:
            delta.token_ids.extend(event.token_ids)
        if event.logprobs:
            _fill_logprobs(delta.logprobs, event.logprobs)
    elif isinstance(event, events.Started):
        _fill_prompt(response.started.prompt, event.prompt)
        response.started.effective.CopyFrom(encode_effective(event.effective))
    elif isinstance(event, events.Finished):
        response.finished.index = event.index
        response.finished.finish.CopyFrom(encode_finish(event.finish))
    elif isinstance(event, events.Summary):
        response.summary.usage.CopyFrom(encode_usage(event.usage))
        response.summary.timings.CopyFrom(encode_timings(event.timings))
    return response


def encode_result(result: events.GenerationResult) -> inference_pb2.GenerateResponse:
    """The response of a unary call."""
    response = inference_pb2.GenerateResponse(
        request_id=result.request_id,
        usage=encode_usage(result.usage),
        timings=encode_timings(result.timings),
        effective=encode_effective(result.effective),
    )
    _fill_prompt(response.prompt, result.prompt)
    for completion in result.completions:
        message = response.completions.add(
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            finish=encode_finish(completion.finish),
        )
        if completion.logprobs:
            _fill_logprobs(message.logprobs, completion.logprobs)
    admission = result.admission
    if admission is not None:
        response.admission.SetInParent()
        if admission.estimated_wait_s is not None:
            response.admission.estimated_wait.CopyFrom(encode_duration(admission.estimated_wait_s))
        if admission.refusal is not None:
            response.admission.refusal.CopyFrom(to_message(admission.refusal, result.request_id))
    return response


def encode_tokenized(tokenized: events.Tokenized, max_context_tokens: int) -> inference_pb2.TokenizeResponse:
    return inference_pb2.TokenizeResponse(
        token_ids=tokenized.token_ids,
        offsets=[position for pair in tokenized.offsets for position in pair],
        num_tokens=len(tokenized.token_ids),
        max_context_tokens=max_context_tokens,
    )


def _fill_prompt(message: inference_pb2.PromptInfo, prompt: events.PromptInfo) -> None:
    # Scalars first: assigning one also marks the message as present.
    message.num_tokens = prompt.num_tokens
    message.token_ids.extend(prompt.token_ids)
    if prompt.logprobs:
        _fill_logprobs(message.logprobs, prompt.logprobs)


def _fill_logprobs(message: inference_pb2.Logprobs, entries: Sequence[TokenLogprobs | None]) -> None:
    """Parallel arrays; a position without a value (the first of a prompt) is NaN."""
    message.values.extend([math.nan if entry is None else entry.logprob for entry in entries])
    if any(entry is not None and entry.top for entry in entries):
        for entry in entries:
            top = () if entry is None else entry.top
            message.top.add(token_ids=[token_id for token_id, _ in top], logprobs=[value for _, value in top])


def encode_finish(finish: Finish) -> inference_pb2.Finish:
    """At most one of the matched fields is set, as in the domain type."""
    return inference_pb2.Finish(
        reason=cast(inference_pb2.FinishReason, int(finish.reason)),  # the numbers are the same
        stop_string=finish.stop_string,
        stop_token_id=finish.stop_token_id,
        eos_token_id=finish.eos_token_id,
    )


def encode_usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        output_tokens=usage.output_tokens,
    )


def encode_duration(seconds: float) -> Duration:
    """Non-negative seconds to the nearest nanosecond."""
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def encode_timings(timings: Timings) -> inference_pb2.Timings:
    return inference_pb2.Timings(
        queue=encode_duration(timings.queue),
        prefill=encode_duration(timings.prefill),
        first_token=encode_duration(timings.first_token),
        decode=encode_duration(timings.decode),
        total=encode_duration(timings.total),
        preemptions=timings.preemptions,
    )


def encode_effective(effective: EffectiveParams) -> inference_pb2.EffectiveParams:
    """Every optional field is set: these are the values that were used."""
    sampling, stop = effective.sampling, effective.stop
    return inference_pb2.EffectiveParams(
        sampling=inference_pb2.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            n=sampling.n,
            logit_bias=dict(sampling.logit_bias),
            allowed_token_ids=sampling.allowed_token_ids,
        ),
        stop=inference_pb2.StopParams(
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens,
            strings=stop.strings,
            token_ids=stop.token_ids,
            ignore_eos=stop.ignore_eos,
            include_stop=stop.include_stop,
            time_limit=None if stop.time_limit is None else encode_duration(stop.time_limit),
        ),
        model_fingerprint=effective.model_fingerprint,
    )


def encode_model_info(model: ModelInfo, limits: LimitOptions) -> model_pb2.GetModelInfoResponse:
    """What is served; `Capabilities` says what `decode_*` and the engine accept, no more."""
    return model_pb2.GetModelInfoResponse(
        model=model.name,
        fingerprint=model.fingerprint,
        max_context_tokens=model.max_model_len,
        max_output_tokens=model.max_model_len - 1,
        capabilities=model_pb2.Capabilities(
            text_input=True,
            token_ids_input=True,
            chat_input=model.has_chat_template,
            constraint_kinds=(),
            max_top_logprobs=limits.max_top_logprobs,
            max_prompt_top_logprobs=limits.max_prompt_top_logprobs,
            max_n=limits.max_n,
            max_stop_strings=limits.max_stop_strings,
            priority=True,
            cache_salt=True,
            resume=False,
            seeded_determinism=True,
            max_batch_items=limits.max_batch_items,
        ),
    )


def decode_drain(message: control_pb2.DrainRequest, limits: LimitOptions) -> tuple[float | None, bool]:
    """`(seconds of grace, undo)`. Raises InvalidRequestError."""
    decoder = _Decoder(limits)
    grace_s = decoder.duration(message, "grace", "")
    if grace_s is not None and grace_s > limits.max_deadline_s:
        decoder.refuse("grace", f"is more than {limits.max_deadline_s:g} s")
    if message.undo and message.HasField("grace"):
        decoder.refuse("grace", "has no meaning with undo")
    decoder.finish()
    return grace_s, message.undo


def decode_watch_state(message: control_pb2.WatchStateRequest, limits: LimitOptions) -> float | None:
    """Seconds between snapshots that no change brings; None for no such. Raises InvalidRequestError."""
    decoder = _Decoder(limits)
    interval_s = decoder.duration(message, "load_interval", "")
    if interval_s is not None and not MIN_LOAD_INTERVAL_S <= interval_s <= limits.max_deadline_s:
        bounds = f"{MIN_LOAD_INTERVAL_S:g} to {limits.max_deadline_s:g} s"
        decoder.refuse("load_interval", f"is not in {bounds}")
    decoder.finish()
    return interval_s


def encode_load(load: EngineLoad) -> control_pb2.GetLoadResponse:
    """What the engine counts; a rate or an estimate that is not known stays absent."""
    stats = load.stats
    response = control_pb2.GetLoadResponse(
        running=stats.running,
        queued=stats.waiting,
        queued_uncached_tokens=stats.waiting_tokens,
        used_kv_blocks=stats.kv_blocks_used,
        total_kv_blocks=stats.kv_blocks_total,
    )
    if stats.kv_blocks_total > 0:
        response.kv_utilization = stats.kv_blocks_used / stats.kv_blocks_total
    if stats.prefix_queries > 0:
        response.prefix_hit_rate = stats.prefix_hits / stats.prefix_queries
    if load.output_tokens_per_second is not None:
        response.output_tokens_per_second = load.output_tokens_per_second
    if load.estimated_queue_wait_s is not None:
        response.estimated_queue_wait.CopyFrom(encode_duration(load.estimated_queue_wait_s))
    return response


def encode_finish_reasons(finishes: Iterable[Finish]) -> str:
    """The reasons for a trailer, one per completion, in order of their index."""
    return ",".join(finish.reason.name for finish in finishes)
