"""Who is woken in which turn of the event loop."""

from __future__ import annotations

import asyncio

from photon_grpc.turns import WAKES_PER_TURN, Waker


class Sleeper:
    """Writes its number down when it is woken."""

    def __init__(self, number: int, woken: list[int], *, is_urgent: bool = False) -> None:
        self.number = number
        self.is_urgent = is_urgent
        self._woken = woken

    def wake(self) -> None:
        self._woken.append(self.number)


def fill(waker: Waker[Sleeper], numbers: range, woken: list[int], *, is_urgent: bool = False) -> None:
    for number in numbers:
        waker.add(number, Sleeper(number, woken, is_urgent=is_urgent))


async def test_only_so_many_are_woken_in_a_turn_and_in_the_order_in_which_they_came() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(3)
    fill(waker, range(8), woken)
    assert woken == []
    waker.start()
    for expected in (3, 6, 8, 8):
        assert woken == list(range(expected))
        await asyncio.sleep(0)


async def test_by_default_a_turn_has_room_for_calls_that_come() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker()
    fill(waker, range(1000), woken)
    waker.start()
    assert len(woken) == WAKES_PER_TURN < 1000


async def test_who_is_urgent_goes_first_also_when_it_comes_later() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(2)
    fill(waker, range(4), woken)
    waker.start()
    fill(waker, range(10, 13), woken, is_urgent=True)
    for _ in range(4):
        await asyncio.sleep(0)
    assert woken == [0, 1, 10, 11, 12, 2, 3]


async def test_a_start_while_it_is_under_way_wakes_nobody_more() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(2)
    fill(waker, range(6), woken)
    for _ in range(5):
        waker.start()
    assert woken == [0, 1]
    await asyncio.sleep(0)
    assert woken == [0, 1, 2, 3]


async def test_one_that_waits_already_waits_once_and_keeps_its_place() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(10)
    fill(waker, range(3), woken)
    fill(waker, range(1), woken)
    waker.start()
    assert woken == [0, 1, 2]


async def test_one_that_is_forgotten_is_not_woken() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(1)
    fill(waker, range(4), woken)
    fill(waker, range(10, 12), woken, is_urgent=True)
    waker.start()
    for number in (2, 11, 99):
        waker.forget(number)
    for _ in range(6):
        await asyncio.sleep(0)
    assert woken == [10, 0, 1, 3]


async def test_it_begins_again_when_all_had_been_woken() -> None:
    woken: list[int] = []
    waker: Waker[Sleeper] = Waker(2)
    waker.start()
    for start in (0, 10):
        fill(waker, range(start, start + 3), woken)
        waker.start()
        await asyncio.sleep(0)
    assert woken == [0, 1, 2, 10, 11, 12]
