"""Every limit on what a request may ask for. No front end can go round it: engine requests are made here.

Paths in the violations are those of the proto message below `root` ("spec." for the generation RPCs,
empty for the Python API). All violations of a request are reported together. Nothing here reads text
for its meaning; it counts bytes and compares numbers.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from photon_grpc.engine.messages import Deadlines, EngineRequest
from photon_grpc.errors import (
    ContextLengthError,
    FieldViolation,
    InvalidRequestError,
    ModelNotFoundError,
)
from photon_grpc.options import LimitOptions
from photon_grpc.types import (
    ChatInput,
    EffectiveParams,
    EffectiveSampling,
    EffectiveStop,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    Prompt,
)

_NAME = re.compile(r"[A-Za-z0-9._:\-]*")
_T = TypeVar("_T")
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that the engine can take, and what became of its parameters."""

    engine_request: EngineRequest
    effective: EffectiveParams


class _Violations:
    """Collects what is wrong, with full field paths."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str, *, rooted: bool = True) -> None:
        self.found.append(FieldViolation(self._root + field if rooted else field, description))

    def range(
        self, field: str, value: float | None, low: float, high: float, *, open_low: bool = False
    ) -> None:
        """Check `low <= value <= high` (`low < value` with `open_low`); None is "not stated"."""
        if value is None:
            return
        # Bounds are finite and comparisons with NaN false, so this is a check for finiteness too.
        inside = (value > low if open_low else value >= low) and value <= high
        if not inside:
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
            self.add(field, f"must be a finite number in {bounds}")

    def raise_if_any(self) -> None:
        if self.found:
            raise InvalidRequestError(self.found)


class Validator:
    """Checks requests against the served model and the server's limits. Stateless; from any thread."""

    def __init__(self, model: ModelInfo, limits: LimitOptions) -> None:
        self._model = model
        self._limits = limits

    def check_model(self, name: str) -> None:
        """Raise ModelNotFoundError unless `name` is empty or the served model's."""
        if name and name != self._model.name:
            raise ModelNotFoundError(name)

    def check(self, request: GenerationRequest, *, root: str = "spec.") -> None:
        """Everything that can be judged before the prompt is tokenised.

        Raises ModelNotFoundError, ContextLengthError for too many token_ids, or InvalidRequestError with
        all violations.
        """
        self.check_model(request.model)
        if isinstance(request.prompt, tuple) and request.truncate_input_tokens is None:
            # Before any element is looked at: a message holds up to a million ids.
            self._check_room(root + "token_ids.ids", len(request.prompt))
        wrong = _Violations(root)
        self._check_name(
            wrong, "request_id", request.request_id, self._limits.max_request_id_chars, rooted=False
        )
        self._check_prompt(wrong, request.prompt)
        self._check_sampling(wrong, request)
        self._check_stop(wrong, request)
        self._check_output(wrong, request)
        self._check_scheduling(wrong, request)
        wrong.raise_if_any()

    def check_prompt(self, prompt: Prompt | None, *, root: str = "") -> None:
        """The prompt's own rules, for calls that only tokenise. Raises InvalidRequestError."""
        wrong = _Violations(root)
        self._check_prompt(wrong, prompt)
        wrong.raise_if_any()

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """At most a context of ids of the vocabulary. Raises InvalidRequestError."""
        wrong = _Violations("")
        if len(token_ids) > self._model.max_model_len:
            wrong.add(field, f"at most {self._model.max_model_len} ids")
        else:
            self._check_ids(wrong, field, token_ids)
        wrong.raise_if_any()

    def resolve(
        self,
        request: GenerationRequest,
        prompt_token_ids: Sequence[int],
        *,
        arrival_time: float,
        deadline: float | None,
        tenant: str = "",
        root: str = "spec.",
    ) -> CheckedRequest:
        """Apply defaults to a request that passed `check` and fit it to its prompt.

        Raises ContextLengthError for a prompt that leaves no room for a token, InvalidRequestError for
        an empty one and for token counts at odds with it.
        """
        limits, model, stop = self._limits, self._model, request.stop
        if request.truncate_input_tokens is not None:
            prompt_token_ids = prompt_token_ids[-request.truncate_input_tokens :]
        wrong = _Violations(root)
        prompt_field = _prompt_field(request.prompt)
        if not prompt_token_ids:
            wrong.add(prompt_field, "must yield at least one token")
            wrong.raise_if_any()
        room = self._check_room(root + prompt_field, len(prompt_token_ids))
        wrong.range("stop.max_tokens", stop.max_tokens, 1, room)
        max_tokens = room if stop.max_tokens is None else stop.max_tokens
        min_tokens = stop.min_tokens or 0
        if not wrong.found and min_tokens > max_tokens:
            wrong.add("stop.min_tokens", f"must not exceed max_tokens, which is {max_tokens} here")
        wrong.raise_if_any()

        effective = EffectiveParams(
            sampling=self._effective_sampling(request),
            stop=EffectiveStop(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                strings=stop.strings,
                token_ids=stop.token_ids,
                ignore_eos=bool(stop.ignore_eos),
                include_stop=bool(stop.include_stop),
                time_limit=stop.time_limit,
            ),
            model_fingerprint=model.fingerprint,
        )
        latest = arrival_time + limits.max_deadline_s
        end_by = arrival_time + limits.default_deadline_s if deadline is None else deadline
        engine_request = EngineRequest(
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=effective.sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop.token_ids,
            eos_token_ids=() if stop.ignore_eos else model.eos_token_ids,
            arrival_time=arrival_time,
            length_finish=FinishReason.CONTEXT_LIMIT if stop.max_tokens is None else FinishReason.MAX_TOKENS,
            priority=request.scheduling.priority or 0,
            deadlines=Deadlines(
                start_by=_after(arrival_time, request.scheduling.queue_timeout),
                first_token_by=_after(arrival_time, request.scheduling.first_token_budget),
                end_by=min(end_by, latest),
                finish_by=_after(arrival_time, stop.time_limit),
            ),
            top_logprobs=request.output.top_logprobs,
            prompt_top_logprobs=request.output.prompt_top_logprobs,
            cache_salt=request.cache.cache_salt,
            bypass_prefix_cache=request.cache.bypass_prefix_cache,
            tenant=tenant,
        )
        return CheckedRequest(engine_request, effective)

    def _check_room(self, field: str, num_tokens: int) -> int:
        room = self._model.max_model_len - num_tokens
        if room < 1:
            raise ContextLengthError(field, num_tokens, self._model.max_model_len - 1)
        return room

    def _effective_sampling(self, request: GenerationRequest) -> EffectiveSampling:
        asked, model = request.sampling, self._model
        return EffectiveSampling(
            temperature=_default(asked.temperature, model.default_temperature),
            top_p=_default(asked.top_p, model.default_top_p),
            top_k=_default(asked.top_k, model.default_top_k),
            min_p=_default(asked.min_p, model.default_min_p),
            presence_penalty=_default(asked.presence_penalty, 0.0),
            frequency_penalty=_default(asked.frequency_penalty, 0.0),
            repetition_penalty=_default(asked.repetition_penalty, model.default_repetition_penalty),
            seed=secrets.randbits(64) if asked.seed is None else asked.seed,
            n=_default(asked.n, 1),
            logit_bias=tuple(asked.logit_bias.items()),
            allowed_token_ids=asked.allowed_token_ids,
        )

    # --- the sections of a request ----------------------------------------------------------------

    def _check_prompt(self, wrong: _Violations, prompt: Prompt | None) -> None:
        match prompt:
            case None:
                wrong.add("input", "one of text, token_ids and chat is required")
            case str():
                if not prompt:
                    wrong.add("text", "must not be empty")
                self._check_text(wrong, "text", prompt)
            case ChatInput():
                self._check_chat(wrong, prompt)
            case tuple():
                if not prompt:
                    wrong.add("token_ids.ids", "must not be empty")
                self._check_ids(wrong, "token_ids.ids", prompt)

    def _check_text(self, wrong: _Violations, field: str, text: str) -> int:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            wrong.add(field, "must be valid Unicode without lone surrogates")
            return 0
        if size > self._limits.max_text_bytes:
            wrong.add(field, f"must not exceed {self._limits.max_text_bytes} bytes of UTF-8")
        return size

    def _check_chat(self, wrong: _Violations, chat: ChatInput) -> None:
        if not chat.messages:
            wrong.add("chat.messages", "must not be empty")
        if len(chat.messages) > self._limits.max_chat_messages:
            wrong.add("chat.messages", f"at most {self._limits.max_chat_messages} messages")
            return
        total = 0
        for index, message in enumerate(chat.messages):
            total += self._check_text(wrong, f"chat.messages[{index}].content", message.content)
        if total > self._limits.max_text_bytes:
            wrong.add("chat.messages", f"must not exceed {self._limits.max_text_bytes} bytes in all")
        if _depth(chat.template_args, self._limits.max_template_args_depth) is False:
            wrong.add("chat.template_args", f"nested deeper than {self._limits.max_template_args_depth}")
        elif chat.template_args and not _fits_json(chat.template_args, self._limits.max_template_args_bytes):
            wrong.add(
                "chat.template_args", f"must be JSON of at most {self._limits.max_template_args_bytes} bytes"
            )

    def _check_ids(self, wrong: _Violations, field: str, ids: Sequence[int]) -> None:
        vocab_size = self._model.vocab_size
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            return
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size:
                wrong.add(f"{field}[{index}]", f"must be a token id below {vocab_size}")
                return

    def _check_count(self, wrong: _Violations, field: str, count: int, limit: int) -> bool:
        if count > limit:
            wrong.add(field, f"at most {limit} entries")
            return False
        return True

    def _check_name(
        self, wrong: _Violations, field: str, value: str, max_chars: int, *, rooted: bool = True
    ) -> None:
        if len(value) > max_chars or _NAME.fullmatch(value) is None:
            wrong.add(field, f"at most {max_chars} characters of A-Z a-z 0-9 . _ : -", rooted=rooted)

    def _check_sampling(self, wrong: _Violations, request: GenerationRequest) -> None:
        asked, limits = request.sampling, self._limits
        wrong.range("sampling.temperature", asked.temperature, 0, 2)
        wrong.range("sampling.top_p", asked.top_p, 0, 1, open_low=True)
        wrong.range("sampling.top_k", asked.top_k, 0, self._model.vocab_size)
        wrong.range("sampling.min_p", asked.min_p, 0, 1)
        wrong.range("sampling.presence_penalty", asked.presence_penalty, -2, 2)
        wrong.range("sampling.frequency_penalty", asked.frequency_penalty, -2, 2)
        wrong.range("sampling.repetition_penalty", asked.repetition_penalty, 0, 2, open_low=True)
        wrong.range("sampling.n", asked.n, 1, limits.max_n)
        if asked.seed is not None and not 0 <= asked.seed <= _MAX_SEED:
            wrong.add("sampling.seed", "must be an unsigned 64-bit number")
        if self._check_count(wrong, "sampling.logit_bias", len(asked.logit_bias), limits.max_logit_bias):
            for token_id, bias in asked.logit_bias.items():
                if not 0 <= token_id < self._model.vocab_size:
                    wrong.add(f"sampling.logit_bias[{token_id}]", "no such token id")
                wrong.range(f"sampling.logit_bias[{token_id}]", bias, -100, 100)
        ids = asked.allowed_token_ids
        if self._check_count(wrong, "sampling.allowed_token_ids", len(ids), limits.max_allowed_token_ids):
            self._check_ids(wrong, "sampling.allowed_token_ids", ids)

    def _check_stop(self, wrong: _Violations, request: GenerationRequest) -> None:
        stop, limits = request.stop, self._limits
        if stop.min_tokens is not None and stop.min_tokens < 0:
            wrong.add("stop.min_tokens", "must not be negative")
        if stop.max_tokens is not None and stop.max_tokens < 1:
            wrong.add("stop.max_tokens", "must be at least 1")
        elif stop.max_tokens is not None and (stop.min_tokens or 0) > stop.max_tokens:
            wrong.add("stop.min_tokens", "must not exceed max_tokens")
        if self._check_count(wrong, "stop.strings", len(stop.strings), limits.max_stop_strings):
            for index, string in enumerate(stop.strings):
                field = f"stop.strings[{index}]"
                if not 1 <= self._check_text(wrong, field, string) <= limits.max_stop_string_bytes:
                    wrong.add(field, f"must have 1 to {limits.max_stop_string_bytes} bytes of UTF-8")
        if self._check_count(wrong, "stop.token_ids", len(stop.token_ids), limits.max_stop_token_ids):
            self._check_ids(wrong, "stop.token_ids", stop.token_ids)
        self._check_duration(wrong, "stop.time_limit", stop.time_limit)

    def _check_output(self, wrong: _Violations, request: GenerationRequest) -> None:
        output, limits = request.output, self._limits
        wrong.range("output.top_logprobs", output.top_logprobs, 0, limits.max_top_logprobs)
        wrong.range(
            "output.prompt_top_logprobs", output.prompt_top_logprobs, 0, limits.max_prompt_top_logprobs
        )
        policy = request.chunk_policy
        if policy.max_tokens is not None and not 1 <= policy.max_tokens <= limits.max_chunk_tokens:
            wrong.add("chunk_policy.max_tokens", f"must be 1 to {limits.max_chunk_tokens}", rooted=False)
        if policy.max_delay is not None and not 0 < policy.max_delay <= limits.max_chunk_delay_s:
            wrong.add(
                "chunk_policy.max_delay",
                f"must be above 0 and at most {limits.max_chunk_delay_s:g} s",
                rooted=False,
            )

    def _check_scheduling(self, wrong: _Violations, request: GenerationRequest) -> None:
        asked, limits = request.scheduling, self._limits
        wrong.range("scheduling.priority", asked.priority, 0, limits.max_priority)
        self._check_duration(wrong, "scheduling.queue_timeout", asked.queue_timeout)
        self._check_duration(wrong, "scheduling.first_token_budget", asked.first_token_budget)
        self._check_name(wrong, "cache.cache_salt", request.cache.cache_salt, limits.max_cache_salt_chars)
        wrong.range("truncate_input_tokens", request.truncate_input_tokens, 1, self._model.max_model_len - 1)

    def _check_duration(self, wrong: _Violations, field: str, value: float | None) -> None:
        if value is not None and not 0 < value <= self._limits.max_deadline_s:
            wrong.add(field, f"must be above 0 and at most {self._limits.max_deadline_s:g} s")


def _prompt_field(prompt: Prompt | None) -> str:
    match prompt:
        case str():
            return "text"
        case tuple():
            return "token_ids.ids"
        case _:
            return "chat.messages"


def _default(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _after(start: float, seconds: float | None) -> float | None:
    return None if seconds is None else start + seconds


def _depth(value: Any, limit: int) -> bool:
    """True if `value` is at most `limit` containers deep; iterative, so that depth cannot hurt us."""
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, Mapping) else container)
            if isinstance(item, Mapping | list | tuple)
        ]
        if not level:
            return True
    return False


def _fits_json(value: Mapping[str, Any], limit: int) -> bool:
    try:
        return len(json.dumps(dict(value), ensure_ascii=False, separators=(",", ":")).encode()) <= limit
    except (TypeError, ValueError):
        return False
