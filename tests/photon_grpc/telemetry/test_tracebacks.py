"""Errors whose messages quote what nobody may read."""

from __future__ import annotations

import pytest

from photon_grpc.errors import InternalError
from photon_grpc.telemetry.tracebacks import without_words

SECRET = "-".join(["canary", "2b7e"])  # not spelt here: a traceback shows source lines


def look_up(text: str) -> None:
    try:
        {}[text]
    except KeyError as error:
        raise ValueError(f"not known: {text}") from error


def test_classes_and_places_are_told_and_no_message() -> None:
    with pytest.raises(ValueError, match=SECRET) as caught:
        look_up(SECRET)
    told = without_words(caught.value)
    assert SECRET not in told
    assert told.index("builtins.ValueError") < told.index("caused by builtins.KeyError")
    assert told.count("in look_up") == 2
    assert __file__ in told


def test_our_own_errors_keep_their_message() -> None:
    error = InternalError("the stream ended without a summary")
    error.__cause__ = KeyError(SECRET)
    told = without_words(error)
    assert told.startswith("photon_grpc.errors.InternalError: the stream ended without a summary\n")
    assert SECRET not in told


def hide(text: str, *, suppressed: bool) -> None:
    try:
        raise KeyError(text)
    except KeyError:
        if suppressed:
            raise ValueError from None
        raise ValueError  # noqa: B904 - that is what is being tested


@pytest.mark.parametrize("suppressed", [False, True])
def test_what_was_being_handled_is_told_unless_it_was_suppressed(suppressed: bool) -> None:
    with pytest.raises(ValueError) as caught:
        hide(SECRET, suppressed=suppressed)
    told = without_words(caught.value)
    assert ("KeyError" in told) is not suppressed
    assert SECRET not in told


def test_an_error_that_is_its_own_cause_comes_to_an_end() -> None:
    error = ValueError(SECRET)
    error.__cause__ = KeyError(SECRET)
    error.__cause__.__cause__ = error
    assert without_words(error).count("ValueError") == 1
