"""Stages of a start: every moment belongs to one of them."""

from __future__ import annotations

import time

import psutil
import pytest

from photon_grpc import stages
from photon_grpc.stages import Stages, process_begun


def test_every_moment_from_the_beginning_on_belongs_to_a_stage() -> None:
    moments = iter((13.0, 13.25, 17.0005, 18.0))
    start = Stages(begun=10.0, clock=lambda: next(moments))
    for name in ("imports", "device", "weights", "device"):
        start.ended(name)
    assert start.seconds() == {"imports": 3.0, "device": 1.25, "weights": 3.75}
    assert list(start.seconds()) == ["imports", "device", "weights"]
    assert start.total_s == 8.0


def test_it_begins_when_it_is_made_unless_told_otherwise() -> None:
    moments = iter((5.0, 7.0))
    start = Stages(clock=lambda: next(moments))
    start.ended("all")
    assert (start.seconds(), start.total_s) == ({"all": 2.0}, 2.0)


def test_a_process_began_when_the_system_says() -> None:
    age = time.time() - psutil.Process().create_time()
    assert time.monotonic() - process_begun() == pytest.approx(age, abs=2.0)


def test_where_the_system_does_not_say_it_begins_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "Path", lambda _: _Unreadable())
    before = time.monotonic()
    assert process_begun() >= before


class _Unreadable:
    def read_text(self) -> str:
        raise FileNotFoundError
