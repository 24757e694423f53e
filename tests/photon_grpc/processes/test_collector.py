"""When the garbage collector looks, and when it does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from photon_grpc.processes.collector import keep_imports, paused_collector, quiet_collector


@pytest.fixture(autouse=True)
def restore_collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.enable()


class Cycle:
    """Freed by the collector alone."""

    def __init__(self) -> None:
        self.itself = self


def num_cycles() -> int:
    return sum(type(item) is Cycle for item in gc.get_objects())


def test_paused_until_it_is_quieted_and_on_in_any_case() -> None:
    with paused_collector():
        assert not gc.isenabled()
        quiet_collector()
        assert gc.isenabled()
    with pytest.raises(KeyError), paused_collector():
        raise KeyError
    assert gc.isenabled()


def test_a_quiet_one_looks_less_often_and_not_at_what_was_there() -> None:
    kept = [Cycle()]
    Cycle()
    assert num_cycles() == 2
    quiet_collector()
    # What is frozen is not listed; what was garbage has gone.
    assert num_cycles() == 0
    assert gc.get_freeze_count() > len(kept)
    assert gc.get_threshold()[0] > 2000
    gc.unfreeze()
    assert num_cycles() == 1


def test_what_is_kept_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    kept = [Cycle()]
    keep_imports()
    assert gc.get_freeze_count() > before + len(kept)
    assert num_cycles() == 0
