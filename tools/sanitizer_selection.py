"""A pytest plugin: of every test a few of its parameters, so that a run under an instrumenting tool ends.

`--most-per-test N` keeps at most N parametrisations of each test function, chosen by the function's name
and so the same each time; `--leave-out WORD` drops tests with the word in their name.
"""

from __future__ import annotations

import random

import pytest

__all__ = ["select"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--most-per-test", type=int, default=0, metavar="N", help="0: all")
    group.addoption("--leave-out", action="append", default=[], metavar="WORD")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most, words = config.getoption("--most-per-test"), config.getoption("--leave-out")
    kept = set(select([item.nodeid for item in items], most, words))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def select(names: list[str], most: int, words: list[str]) -> list[str]:
    """The node ids that are kept, in their order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        function = name.partition("[")[0]
        if not any(word in function for word in words):
            groups.setdefault(function, []).append(name)
    kept: set[str] = set()
    for function, group in groups.items():
        kept.update(group if not most or len(group) <= most else random.Random(function).sample(group, most))
    return [name for name in names if name in kept]
