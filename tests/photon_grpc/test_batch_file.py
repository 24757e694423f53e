"""Lines of JSON to requests, and answers to lines."""

from __future__ import annotations

import json

import pytest

from photon_grpc.batch_file import Entry, chunks, read_entries, render
from photon_grpc.client import Answer, CallError, Ending, Request
from photon_grpc.errors import InvalidRequestError

DEFAULT = Request(max_tokens=64, stop=("x",))


def test_a_line_states_what_it_likes_and_the_default_has_the_rest() -> None:
    lines = [
        '{"text": "a"}',
        "",
        '{"id": "n-1", "messages": [{"role": "user", "content": "ü"}], "max_tokens": 3,'
        ' "seed": 18446744073709551615, "temperature": 0, "top_p": 0.5, "top_k": 2,'
        ' "stop": ["y", "z"], "ignore_eos": true}\r',
    ]
    first, second = read_entries(lines, DEFAULT)
    assert first == Entry(0, None, Request(text="a", max_tokens=64, stop=("x",)), len(lines[0]))
    assert (second.item, second.name, second.num_bytes) == (1, "n-1", len(lines[2].encode()))
    assert second.request == Request(
        messages=(("user", "ü"),),
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        top_k=2,
        seed=(1 << 64) - 1,
        stop=("y", "z"),
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line 1"),
        ("[" * 100_000, "line 1"),
        ("3", "line 1"),
        ("{}", "line 1"),
        ('{"text": "a", "messages": []}', "line 1"),
        ('{"text": "a", "max_token": 3}', "line 1.max_token"),
        ('{"text": 3}', "line 1.text"),
        ('{"text": "\\ud800"}', "line 1.text"),
        ('{"text": "a", "id": 3}', "line 1.id"),
        ('{"text": "a", "max_tokens": true}', "line 1.max_tokens"),
        ('{"text": "a", "max_tokens": -1}', "line 1.max_tokens"),
        ('{"text": "a", "top_k": 4294967296}', "line 1.top_k"),
        ('{"text": "a", "seed": 18446744073709551616}', "line 1.seed"),
        ('{"text": "a", "temperature": "0"}', "line 1.temperature"),
        ('{"text": "a", "stop": "x"}', "line 1.stop"),
        ('{"text": "a", "stop": [1]}', "line 1.stop"),
        ('{"text": "a", "ignore_eos": 1}', "line 1.ignore_eos"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 1.messages"),
        ('{"messages": [{"role": "user"}]}', "line 1.messages"),
        ('{"messages": ["x"]}', "line 1.messages"),
    ],
)
def test_what_is_no_request_is_told_by_its_line(line: str, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_entries([line], DEFAULT)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_wrong_lines_are_told_together() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_entries(["{", '{"text": "a"}', '{"text": 1, "seed": "x"}'], DEFAULT)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["line 1", "line 3.text", "line 3.seed"]


@pytest.mark.parametrize(
    ("max_items", "max_bytes", "sizes"),
    [(2, 1000, [2, 2, 1]), (5, 1000, [5]), (9, 25, [2, 2, 1]), (9, 5, [1] * 5), (1, 1000, [1] * 5)],
)
def test_chunks_keep_the_order_and_both_bounds(max_items: int, max_bytes: int, sizes: list[int]) -> None:
    entries = [Entry(item, None, DEFAULT, 10) for item in range(5)]
    made = list(chunks(entries, max_items, max_bytes))
    assert [len(chunk) for chunk in made] == sizes
    assert [entry for chunk in made for entry in chunk] == entries
    assert list(chunks([], 3, 10)) == []


def test_an_answer_is_one_line() -> None:
    ending = Ending("EOS", 4, 1, 3, 0.5, 1.0, 1.5)
    line = render(Entry(7, "n-7", DEFAULT, 1), Answer(0, text="ü\n\u2028", ending=ending))
    assert "\n" not in line
    assert json.loads(line) == {
        "item": 7,
        "id": "n-7",
        "text": "ü\n\u2028",
        "finish_reason": "EOS",
        "prompt_tokens": 4,
        "output_tokens": 3,
    }
    error = CallError("INVALID_ARGUMENT", "no", reason="INVALID_FIELD", violations=[("specs[0].text", "no")])
    assert json.loads(render(Entry(8, None, DEFAULT, 1), Answer(1, error=error))) == {
        "item": 8,
        "error": {
            "status": "INVALID_ARGUMENT",
            "reason": "INVALID_FIELD",
            "message": "no",
            "fields": ["specs[0].text"],
        },
    }
