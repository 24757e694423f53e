"""Every limit of a generation, with requests on both sides of it.

A request is a StreamGenerateRequest whichever way it goes: it can say all that a generation can be asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.duration_pb2 import Duration

from photon_grpc.options import LimitOptions
from photon_grpc.v1 import inference_pb2 as pb

__all__ = ["NOT_OF_A_REQUEST", "Bound", "bounds", "plain", "with_value"]

# Limits of what a server holds, or of how long, and not of what one request may say; of calls that carry
# many; and the size of a message, which grpc judges before there is a request.
NOT_OF_A_REQUEST = {
    "default_deadline_s",
    "max_batch_concurrency",
    "max_batch_items",
    "max_batch_tokens",
    "max_message_bytes",
    "max_queued_requests",
    "max_queued_tokens",
    "slow_consumer_timeout_s",
}

_EPSILON = 1e-6
_MOST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Bound:
    """`limit` is its name in LimitOptions, or another name for what the model or the contract fixes.

    `good` must be accepted; `bad` refused with a violation of `field` (or of an element of it).
    """

    limit: str
    field: str
    good: tuple[pb.StreamGenerateRequest, ...]
    bad: tuple[pb.StreamGenerateRequest, ...]


def plain() -> pb.StreamGenerateRequest:
    """Two tokens of a prompt of three."""
    request = pb.StreamGenerateRequest()
    request.spec.token_ids.ids.extend((5, 6, 7))
    request.spec.stop.max_tokens = 2
    return request


def with_value(path: str, value: Any) -> pb.StreamGenerateRequest:
    """The plain request with `value` at a dotted path; a list or mapping fills a repeated field, a number
    of seconds a Duration."""
    request = plain()
    *parents, name = path.split(".")
    message: Any = request
    for parent in parents:
        message = getattr(message, parent)
    if isinstance(value, list):
        getattr(message, name).extend(value)
    elif isinstance(value, Mapping):
        getattr(message, name).update(value)
    elif message.DESCRIPTOR.fields_by_name[name].message_type is Duration.DESCRIPTOR:
        getattr(message, name).FromNanoseconds(round(value * 1e9))
    else:
        setattr(message, name, value)
    return request


def bounds(limits: LimitOptions, max_model_len: int, vocab_size: int, template_variable: str) -> list[Bound]:
    """All of them, for a model of this context and vocabulary whose chat template writes this variable.

    Texts of `max_text_bytes` must fit the context as one token per byte, with what a template adds.
    """

    def at(limit: str, path: str, good: list[Any], bad: list[Any], field: str = "") -> Bound:
        return Bound(
            limit,
            field or path,
            tuple(with_value(path, value) for value in good),
            tuple(with_value(path, value) for value in bad),
        )

    def count(limit: str, path: str, element: Any) -> Bound:
        """Of as many elements as may be, and one more. `element` makes one of a number."""
        most = getattr(limits, limit)
        few = [[element(i) for i in range(number)] for number in (1, most - 1, most)]
        return at(limit, path, few, [[element(i) for i in range(most + 1)]])

    def number(
        path: str, low: float, high: float, *, open_low: bool = False, limit: str = "contract"
    ) -> Bound:
        good = [high, (low + high) / 2, low + _EPSILON if open_low else low]
        bad = [high + _EPSILON * 2, low if open_low else low - _EPSILON, math.nan, math.inf, -math.inf]
        return at("contract", path, good, bad)

    def duration(path: str, most_s: float, limit: str) -> Bound:
        return at(limit, path, [most_s, most_s - 1e-3], [0.0, -1.0, most_s + 1e-3])

    def whole(path: str, low: int, high: int, limit: str) -> Bound:
        below = [low - 1] if low else []
        return at(limit, path, sorted({low, high - 1, high}), [high + 1, *below])

    def chat(**values: Any) -> pb.ChatInput:
        message = pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="hello")
        return pb.ChatInput(**{"messages": [message], **values})

    def asking(chat_input: pb.ChatInput) -> pb.StreamGenerateRequest:
        request = plain()
        request.spec.chat.CopyFrom(chat_input)
        return request

    def arguments(value: dict[str, Any]) -> pb.StreamGenerateRequest:
        chat_input = chat()
        chat_input.template_args.update(value)
        return asking(chat_input)

    def nested(depth: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for _ in range(depth - 1):
            value = {template_variable: value}
        return value

    def messages(number: int, content: str = "a") -> pb.StreamGenerateRequest:
        one = pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content=content)
        return asking(pb.ChatInput(messages=[one] * number))

    text, depth, size = limits.max_text_bytes, limits.max_template_args_depth, limits.max_template_args_bytes
    # As compact JSON: {"note":"xxx"}
    inside = size - len(template_variable) - len('{"":""}')
    names = "aZ9._:-"

    def name(limit: str, path: str) -> Bound:
        most = getattr(limits, limit)
        longest = (names * most)[:most]
        return at(limit, path, ["", longest[1:], longest], [longest + "a", "a b", "a\n", "é", "a/b"])

    stop_bytes, priority = limits.max_stop_string_bytes, limits.max_priority
    return [
        whole("spec.sampling.n", 1, limits.max_n, "max_n"),
        at("max_n", "spec.sampling.n", [], [_MOST]),
        number("spec.sampling.temperature", 0, 2),
        number("spec.sampling.top_p", 0, 1, open_low=True),
        number("spec.sampling.min_p", 0, 1),
        number("spec.sampling.presence_penalty", -2, 2),
        number("spec.sampling.frequency_penalty", -2, 2),
        number("spec.sampling.repetition_penalty", 0, 2, open_low=True),
        whole("spec.sampling.top_k", 0, vocab_size, "vocab_size"),
        at(
            "max_logit_bias",
            "spec.sampling.logit_bias",
            [dict.fromkeys(range(limits.max_logit_bias), 1.0)],
            [dict.fromkeys(range(limits.max_logit_bias + 1), 1.0)],
        ),
        at(
            "contract",
            "spec.sampling.logit_bias",
            [{5: 100.0}, {5: -100.0}],
            [{5: 100.001}, {5: -100.001}, {5: math.nan}, {5: math.inf}],
        ),
        at("vocab_size", "spec.sampling.logit_bias", [{vocab_size - 1: 1.0}], [{vocab_size: 1.0}]),
        count("max_allowed_token_ids", "spec.sampling.allowed_token_ids", lambda i: i % vocab_size),
        at("vocab_size", "spec.sampling.allowed_token_ids", [[vocab_size - 1]], [[vocab_size], [_MOST]]),
        count("max_stop_strings", "spec.stop.strings", lambda i: f"~{i}"),
        at(
            "max_stop_string_bytes",
            "spec.stop.strings",
            [["~"], ["~" * stop_bytes], ["é" * (stop_bytes // 2)]],
            [[""], ["~" * (stop_bytes + 1)], ["é" * (stop_bytes // 2) + "~"]],
        ),
        count("max_stop_token_ids", "spec.stop.token_ids", lambda i: i % vocab_size),
        at("vocab_size", "spec.stop.token_ids", [[vocab_size - 1]], [[vocab_size], [_MOST]]),
        at("max_model_len", "spec.stop.max_tokens", [1, max_model_len - 3], [0, max_model_len - 2, _MOST]),
        at("max_tokens", "spec.stop.min_tokens", [0, 1, 2], [3, _MOST]),
        duration("spec.stop.time_limit", limits.max_deadline_s, "max_deadline_s"),
        whole("spec.output.top_logprobs", 0, limits.max_top_logprobs, "max_top_logprobs"),
        whole(
            "spec.output.prompt_top_logprobs", 0, limits.max_prompt_top_logprobs, "max_prompt_top_logprobs"
        ),
        at("max_priority", "spec.scheduling.priority", [0, priority], [priority + 1, -1]),
        duration("spec.scheduling.queue_timeout", limits.max_deadline_s, "max_deadline_s"),
        duration("spec.scheduling.first_token_budget", limits.max_deadline_s, "max_deadline_s"),
        name("max_request_id_chars", "request_id"),
        name("max_cache_salt_chars", "spec.cache.cache_salt"),
        whole("chunk_policy.max_tokens", 1, limits.max_chunk_tokens, "max_chunk_tokens"),
        duration("chunk_policy.max_delay", limits.max_chunk_delay_s, "max_chunk_delay_s"),
        whole("spec.truncate_input_tokens", 1, max_model_len - 1, "max_model_len"),
        at(
            "max_text_bytes",
            "spec.text",
            ["a" * text, "é" * (text // 2)],
            ["a" * (text + 1), "é" * (text // 2 + 1), ""],
        ),
        Bound(
            "max_text_bytes",
            "spec.chat.messages",
            (messages(2, "a" * (text // 2)),),
            (messages(2, "a" * (text // 2 + 1)), messages(0)),
        ),
        Bound(
            "max_chat_messages",
            "spec.chat.messages",
            (messages(1), messages(limits.max_chat_messages)),
            (messages(limits.max_chat_messages + 1),),
        ),
        Bound(
            "max_template_args_bytes",
            "spec.chat.template_args",
            (
                arguments({template_variable: "x" * inside}),
                arguments({template_variable: "é" * (inside // 2)}),
            ),
            (arguments({template_variable: "x" * (inside + 1)}),),
        ),
        Bound(
            "max_template_args_depth",
            "spec.chat.template_args",
            (arguments(nested(depth - 1)), arguments(nested(depth))),
            (arguments(nested(depth + 1)),),
        ),
        at("vocab_size", "spec.token_ids.ids", [[vocab_size - 1]], [[vocab_size], [_MOST]]),
        Bound(
            "max_model_len",
            "spec.token_ids.ids",
            (_prompt(max_model_len - 1),),
            (_prompt(max_model_len),),
        ),
    ]


def _prompt(num_tokens: int) -> pb.StreamGenerateRequest:
    request = with_value("spec.token_ids.ids", [5] * (num_tokens - 3))
    request.spec.stop.ClearField("max_tokens")
    return request
