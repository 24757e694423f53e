"""What is to hold whoever takes the public listener's connections: the event loop itself, or acceptors.

A test asks for both by `pytest.mark.usefixtures("each_listener")`; every server that it makes by
`tests.support.grpc_harness` is then of the one kind, and of the other when it runs again. Acceptors take some
tenths of a second to start: of a test with many parameters they run the first and the last.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.grpc_harness import acceptors_by_default

_FIXTURE = "each_listener"
_BY_ITSELF = 0


@pytest.fixture(params=[_BY_ITSELF, 2], ids=["loop", "acceptors"])
def each_listener(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of acceptors that servers of the test have."""
    number: int = request.param
    with acceptors_by_default(number):
        yield number


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_function: dict[object, list[pytest.Item]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and _number(item) != _BY_ITSELF:
            by_function.setdefault((item.path, item.cls, item.originalname), []).append(item)
    left_out = {item for variants in by_function.values() for item in variants[1:-1]}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _number(item: pytest.Function) -> int:
    """Of the acceptors that the test asks for."""
    asked: int = item.callspec.params.get(_FIXTURE, _BY_ITSELF) if hasattr(item, "callspec") else _BY_ITSELF
    return asked
