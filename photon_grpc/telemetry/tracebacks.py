"""Where an error comes from, without what it says."""

from __future__ import annotations

import traceback

__all__ = ["without_words"]


def without_words(error: BaseException) -> str:
    """The classes and stacks of `error` and of what led to it, the latest first; none of their messages.

    Whoever raises an error that nobody foresaw may quote what it was working on, and in a call that is the
    text of a prompt. Source lines are ours and hold no data.
    """
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        cls = type(current)
        parts.append(
            f"{cls.__module__}.{cls.__qualname__}\n{''.join(traceback.format_tb(current.__traceback__))}"
        )
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "caused by ".join(parts)
