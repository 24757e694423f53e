"""Where an error comes from, without what it says."""

from __future__ import annotations

import traceback

from photon_grpc.errors import PhotonError

__all__ = ["without_words"]


def without_words(error: BaseException) -> str:
    """The classes and stacks of `error` and of what led to it, the latest first; of messages only our own.

    Whoever raises an error that nobody foresaw may quote what it was working on, and in a call that is the
    text of a prompt. The messages of `errors.py` never do, and source lines are ours and hold no data.
    """
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        cls = type(current)
        words = f": {current.message}" if isinstance(current, PhotonError) else ""
        stack = "".join(traceback.format_tb(current.__traceback__))
        parts.append(f"{cls.__module__}.{cls.__qualname__}{words}\n{stack}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "caused by ".join(parts)
