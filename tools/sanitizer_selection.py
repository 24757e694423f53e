"""A pytest plugin: what of the tests runs under an instrumenting tool, so that it ends.

`--kernel NAME` keeps the small launches of one kernel. `--most-per-test N` keeps at most N parametrisations
of each test function, chosen by the function's name and so the same each time; `--leave-out WORD` drops tests
with the word in their name. With `--line-info` kernels are compiled with the lines of their source, which
changes no instruction, so that what is found has a place.
"""

from __future__ import annotations

import random

import pytest

__all__ = ["select"]

_LINE_INFO = "--generate-line-info"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--kernel", default="", metavar="NAME", help="of the small launches")
    group.addoption("--most-per-test", type=int, default=0, metavar="N", help="0: all")
    group.addoption("--leave-out", action="append", default=[], metavar="WORD")
    group.addoption("--line-info", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    from photon_grpc.kernels import compiler

    if config.getoption("--line-info") and _LINE_INFO not in compiler._OPTIONS:
        compiler._OPTIONS = (*compiler._OPTIONS, _LINE_INFO)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most, words = config.getoption("--most-per-test"), config.getoption("--leave-out")
    kernel = config.getoption("--kernel")
    kept = set(select([item.nodeid for item in items], most, words))
    if kernel:
        kept &= {item.nodeid for item in items if _kernel_of(item) == kernel}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def _kernel_of(item: pytest.Item) -> object:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("kernel") if callspec is not None else None


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
