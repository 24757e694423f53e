"""Every bug in tests/README.md's catalogue names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
_ROW = re.compile(r"^\| (?P<bug>[^|]+) \| (?P<tests>(?:`[^`]+` ?)+) \|$", re.M)
_ROWS = [
    (m["bug"], re.findall(r"`([^`]+)`", m["tests"])) for m in _ROW.finditer((TESTS / "README.md").read_text())
]


def test_the_catalogue_is_read() -> None:
    assert len(_ROWS) == 36


@pytest.mark.parametrize(("bug", "tests"), _ROWS)
def test_its_tests_exist(bug: str, tests: list[str]) -> None:
    for test in tests:
        path, _, name = test.partition("::")
        file = TESTS.parent / path if path.startswith("tests/") else TESTS / "photon_grpc" / path
        functions = {
            node.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, f"{bug}: {test}"
