"""Stop strings against a reference that sees the whole text at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.frontend.stop_strings import StopAutomaton, StopMatcher

# Two letters and short strings make overlaps, shared prefixes and self-overlaps common.
_words = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)
_chunks = st.lists(st.text("abc", max_size=5), max_size=12)


def _reference(text: str, armed: list[bool], strings: list[str]) -> tuple[str, str | None]:
    """Text before the match, and the match; `armed` has one entry per character."""
    for end in range(1, len(text) + 1):
        if armed[end - 1]:
            ending = [s for s in strings if text[:end].endswith(s)]
            if ending:
                longest = max(ending, key=len)
                return text[: end - len(longest)], longest
    return text, None


def _run(matcher: StopMatcher, pieces: list[tuple[str, bool]]) -> tuple[str, str | None]:
    out, matched = [], None
    for text, armed in pieces:
        safe, found = matcher.push(text, armed)
        out.append(safe)
        matched = matched or found
    return "".join(out) + matcher.flush(), matched


@given(chunks=_chunks, strings=_words, include_stop=st.booleans())
def test_any_chunking_equals_the_whole_text(
    chunks: list[str], strings: list[str], include_stop: bool
) -> None:
    text = "".join(chunks)
    before, expected = _reference(text, [True] * len(text), strings)
    out, matched = _run(StopMatcher(strings, include_stop), [(chunk, True) for chunk in chunks])
    assert matched == expected
    assert out == before + (expected if include_stop and expected else "")


@given(chunks=st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=12), strings=_words)
def test_matches_that_end_unarmed_are_ignored(chunks: list[tuple[str, bool]], strings: list[str]) -> None:
    text = "".join(piece for piece, _ in chunks)
    armed = [flag for piece, flag in chunks for _ in piece]
    before, expected = _reference(text, armed, strings)
    assert _run(StopMatcher(strings, include_stop=False), chunks) == (before, expected)


@given(chunks=_chunks, strings=_words)
def test_held_text_is_exactly_the_longest_possible_beginning(chunks: list[str], strings: list[str]) -> None:
    matcher = StopMatcher(strings, include_stop=False)
    seen = sent = ""
    for chunk in chunks:
        safe, matched = matcher.push(chunk)
        if matched:
            return
        seen, sent = seen + chunk, sent + safe
        beginnings = {s[:n] for s in strings for n in range(len(s))}
        longest = max(n for n in range(len(seen) + 1) if seen[len(seen) - n :] in beginnings)
        assert sent == seen[: len(seen) - longest]


@pytest.mark.parametrize(
    ("strings", "text", "before", "match"),
    [
        (["</s>"], "hello</s>more", "hello", "</s>"),
        (["b", "ab"], "xab", "x", "ab"),  # both end at the same character: the longest
        (["abcd", "c"], "abcd", "ab", "c"),  # "c" is complete before "abcd" is
        (["aab"], "aaab", "a", "aab"),  # the false start must not hide the true one
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["終わり"], "これで終わりです", "これで", "終わり"),
    ],
)
def test_named_cases_in_single_characters_and_at_once(
    strings: list[str], text: str, before: str, match: str
) -> None:
    for pieces in (list(text), [text]):
        assert _run(StopMatcher(strings, False), [(p, True) for p in pieces]) == (before, match)
        assert _run(StopMatcher(strings, True), [(p, True) for p in pieces]) == (before + match, match)


def test_a_stop_string_split_across_deltas_is_held_until_decided() -> None:
    matcher = StopMatcher(["STOP"], include_stop=False)
    assert matcher.push("go ST") == ("go ", None)
    assert matcher.push("OR") == ("STOR", None)
    assert matcher.push(" ST") == (" ", None)
    assert matcher.push("OP and more") == ("", "STOP")
    assert matcher.matched == "STOP"
    assert matcher.push("anything") == ("", None)
    assert matcher.flush() == ""


def test_flush_returns_an_unfinished_beginning_once() -> None:
    matcher = StopMatcher(["STOP"], include_stop=False)
    assert matcher.push("a STO") == ("a ", None)
    assert matcher.flush() == "STO"
    assert matcher.flush() == ""


def test_min_tokens_lets_an_early_match_through_and_still_sees_a_later_one() -> None:
    matcher = StopMatcher(["ab"], include_stop=False)
    assert matcher.push("ab", armed=False) == ("ab", None)
    assert matcher.push("a", armed=False) == ("", None)
    assert matcher.push("b", armed=True) == ("", "ab")


def test_an_ignored_match_may_be_the_beginning_of_the_next() -> None:
    matcher = StopMatcher(["ab", "bc"], include_stop=False)
    assert matcher.push("ab", armed=False) == ("a", None)
    assert matcher.push("c", armed=True) == ("", "bc")


def test_completions_share_an_automaton_and_no_state() -> None:
    automaton = StopAutomaton(["xyz"])
    first, second = StopMatcher(automaton, False), StopMatcher(automaton, False)
    assert first.push("xy") == ("", None)
    assert second.push("z") == ("z", None)
    assert first.push("z") == ("", "xyz")


@settings(deadline=None)
@given(n=st.integers(1, 64))
def test_work_is_linear_in_the_text(n: int) -> None:
    """Self-overlapping strings are the worst case: count node visits, not time."""
    visits = 0

    class Counting(StopAutomaton):
        __slots__ = ()

        def _follow(self, node: int, char: str) -> int:
            nonlocal visits
            while True:
                visits += 1
                target = self._children[node].get(char)
                if target is not None or node == 0:
                    return target or 0
                node = self._failure[node]

    automaton = Counting(["a" * n + "b"])
    visits = 0
    matcher = StopMatcher(automaton, False)
    text = ("a" * (n - 1) + "c") * 8
    for char in text:
        matcher.push(char)
    assert visits <= 2 * len(text)
