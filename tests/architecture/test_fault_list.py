"""Every fault in tests/README.md has a test that carries its number, and no test a number of its own."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# Faults without a test. A number that has got one must leave this set.
NOT_TESTED_YET = {47}

_ROW = re.compile(r"^\| (?P<number>\d+) \| (?P<fault>[^|]+) \|$", re.M)
_NAME = re.compile(r"test_fault_(?P<number>\d{2})_[a-z0-9]")
_FAULTS = {int(m["number"]): m["fault"] for m in _ROW.finditer((TESTS / "README.md").read_text())}


def names_by_file() -> dict[Path, list[str]]:
    """Functions and methods that begin like the test of a fault, in files that pytest collects."""
    found: dict[Path, list[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text()
        if "def test_fault_" in text:
            found[path] = [
                node.name
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name.startswith("test_fault_")
            ]
    return found


@cache
def by_number() -> dict[int, list[str]]:
    """`file::name` of the tests of each fault. Raises AssertionError for a name that is not of the form."""
    tests: dict[int, list[str]] = defaultdict(list)
    for path, names in names_by_file().items():
        for name in names:
            match = _NAME.match(name)
            assert match, f"{path.relative_to(TESTS)}::{name} is not test_fault_NN_what_happens"
            tests[int(match["number"])].append(f"{path.relative_to(TESTS)}::{name}")
    return tests


def test_the_list_is_read() -> None:
    assert list(_FAULTS) == list(range(1, 49))


@pytest.mark.parametrize("number", _FAULTS)
def test_it_has_a_test_or_stands_among_those_to_come(number: int) -> None:
    tests = by_number().get(number, [])
    if number in NOT_TESTED_YET:
        assert not tests, f"{number} has {tests[0]}: take it out of NOT_TESTED_YET"
    else:
        assert tests, f"no test_fault_{number:02}_...: {_FAULTS[number]}"


def test_no_test_has_a_number_without_a_fault() -> None:
    unknown = {number: tests for number, tests in by_number().items() if number not in _FAULTS}
    assert not unknown


def test_what_is_to_come_is_of_the_list() -> None:
    assert set(_FAULTS) >= NOT_TESTED_YET
