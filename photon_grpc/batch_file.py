"""Requests and answers as lines of JSON, for the command line's `batch`. Pure functions.

A line is an object with `text` or `messages` (objects of `role` and `content`), optionally `id`, a string
that its answer repeats, and whatever else `client.Request` has. An answer has `item`, the number of its
line from 0, and either `text`, `finish_reason` and counts, or `error`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from photon_grpc.client import Answer, CallError, Request
from photon_grpc.errors import FieldViolation, InvalidRequestError

__all__ = ["Entry", "chunks", "read_entries", "render"]

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: `item` is its number from 0, `num_bytes` its length."""

    item: int
    name: str | None
    request: Request
    num_bytes: int


def _text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False  # JSON can escape half of a character
    return True


def _below(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(_text(item) for item in value)


def _messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in _ROLES
        and _text(message["content"])
        for message in value
    )


# What is said of a value is for the server; here is what a request can hold at all.
_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_text, "a string"),
    "text": (_text, "a string"),
    "messages": (_messages, f"a list of objects with role ({', '.join(_ROLES)}) and content"),
    "max_tokens": (_below(1 << 32), "a whole number of 32 bits"),
    "temperature": (_number, "a number"),
    "top_p": (_number, "a number"),
    "top_k": (_below(1 << 32), "a whole number of 32 bits"),
    "seed": (_below(1 << 64), "a whole number of 64 bits"),
    "stop": (_strings, "a list of strings"),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
}


def read_entries(lines: Iterable[str], default: Request) -> list[Entry]:
    """One entry per line that is not empty; `default` has what a line does not state.

    Raises InvalidRequestError with every line that is no request.
    """
    wrong: list[FieldViolation] = []
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values, problems = _parse(line)
        wrong += [
            FieldViolation(f"line {number}{'.' if key else ''}{key}", problem) for key, problem in problems
        ]
        if not problems:
            name = values.pop("id", None)
            if "messages" in values:
                values["messages"] = tuple((m["role"], m["content"]) for m in values["messages"])
            if "stop" in values:
                values["stop"] = tuple(values["stop"])
            entries.append(Entry(len(entries), name, replace(default, **values), len(line.encode())))
    if wrong:
        raise InvalidRequestError(wrong)
    return entries


def _parse(line: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The values of a line, and the (key, problem) of everything that is wrong with it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}, [("", "is no JSON")]
    if not isinstance(values, dict):
        return {}, [("", "is no object")]
    problems = []
    for key, value in values.items():
        if key not in _KEYS:
            problems.append((key, f"no such key; known are {', '.join(_KEYS)}"))
        elif not _KEYS[key][0](value):
            problems.append((key, f"must be {_KEYS[key][1]}"))
    if ("text" in values) == ("messages" in values):
        problems.append(("", "must have one of text and messages"))
    return values, problems


def chunks(entries: Sequence[Entry], max_items: int, max_bytes: int) -> Iterator[list[Entry]]:
    """`entries` in order, in calls of at most `max_items` and, where there are several, `max_bytes`."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        if chunk and (len(chunk) == max_items or size + entry.num_bytes > max_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += entry.num_bytes
    if chunk:
        yield chunk


def render(entry: Entry, answer: Answer) -> str:
    """The line of an answer, without its end."""
    line: dict[str, Any] = {"item": entry.item}
    if entry.name is not None:
        line["id"] = entry.name
    if answer.error is not None:
        line["error"] = _error(answer.error)
    if answer.ending is not None:
        line |= {
            "text": answer.text,
            "finish_reason": answer.ending.finish_reason,
            "prompt_tokens": answer.ending.prompt_tokens,
            "output_tokens": answer.ending.output_tokens,
        }
    return json.dumps(line, ensure_ascii=False)


def _error(error: CallError) -> dict[str, Any]:
    told: dict[str, Any] = {"status": error.status, "reason": error.reason, "message": error.message}
    if error.violations:
        told["fields"] = [field for field, _ in error.violations]
    if error.retry_after_s is not None:
        told["retry_after_s"] = error.retry_after_s
    return told
