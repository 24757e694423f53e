"""How often readers are woken, in a loop that is simulated; what that does to streams is in `test_client`."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_grpc.engine.messages import PlainTokens
from photon_grpc.engine.pacing import Pace, Rows


class Loop:
    """A simulated event loop, for which a step costs `step_cost_s` and a message `message_s`."""

    def __init__(self, num_streams: int, step_s: float, message_s: float, step_cost_s: float = 0.0) -> None:
        self.cpu = 0.0
        self.now = 0.0
        self.step_s = step_s
        self.pace = Pace(0.85, lambda: self.cpu)
        self._num_streams = num_streams
        self._message_s = message_s
        self._step_cost_s = step_cost_s

    def run(self, num_steps: int) -> list[list[int]]:
        """The streams that were woken after each step."""
        turns = []
        for _ in range(num_steps):
            self.now += self.step_s
            self.pace.step(self.now, self._num_streams)
            turns.append(self.pace.due(range(self._num_streams)))
            self.pace.num_messages += len(turns[-1])
            self.cpu += self._step_cost_s + self._message_s * len(turns[-1])
        return turns


@pytest.mark.parametrize(
    ("num_streams", "step_s", "message_s", "num_steps"),
    [
        (1, 0.0007, 60e-6, 1),
        (16, 0.005, 60e-6, 1),
        (64, 0.020, 60e-6, 1),
        (256, 0.020, 60e-6, 1),
        (64, 0.0013, 25e-6, 1.45),
        (256, 0.0023, 25e-6, 3.27),
        (256, 0.0023, 60e-6, 7.86),
        (256, 0.0023, 10e-6, 1.31),
    ],
)
def test_readers_sleep_only_when_writing_would_fill_the_loop(
    num_streams: int, step_s: float, message_s: float, num_steps: float
) -> None:
    """`num_steps` from one wake of a reader to the next."""
    loop = Loop(num_streams, step_s, message_s)
    turns = loop.run(300)[100:]
    if num_steps > 1:
        assert loop.pace.turn_s == pytest.approx(num_steps * step_s, rel=0.02)
    assert sum(map(len, turns)) == pytest.approx(200 * num_streams / num_steps, rel=0.03)


def test_what_a_step_costs_besides_its_messages_is_counted_too() -> None:
    loop = Loop(256, 0.0023, 25e-6, step_cost_s=0.0005)
    loop.run(1000)
    turn_s = loop.pace.turn_s
    assert 0.0005 + 256 * 0.0023 / turn_s * 25e-6 <= 0.85 * 0.0023
    assert turn_s <= 6 * 0.0023


def test_a_loop_that_never_keeps_up_still_wakes_its_readers() -> None:
    loop = Loop(256, 0.0005, 25e-6, step_cost_s=0.01)
    loop.run(1000)
    turns = [set(due) for due in loop.run(400)]
    # 0.1 s, of which 200 steps come in.
    for start in range(0, 200, 50):
        assert set().union(*turns[start : start + 201]) == set(range(256))


def test_an_idle_engine_teaches_nothing_wrong() -> None:
    """While nothing is generated the loop's time goes to other things, and no message divides it."""
    loop = Loop(16, 0.001, 25e-6)
    loop.run(100)
    loop.cpu += 30.0
    loop.run(200)
    assert all(len(due) == 16 for due in loop.run(20))


def test_a_step_as_long_as_a_turn_wakes_everyone_at_once() -> None:
    """By steps, a reader that sleeps through three slept through three long ones too."""
    loop = Loop(256, 0.0023, 25e-6)
    loop.run(300)
    assert len(loop.run(1)[0]) < 100
    loop.step_s = 0.009
    assert loop.run(1) == [list(range(256))]
    # And the next short ones go on with those whose turn it is.
    loop.step_s = 0.0023
    after = loop.run(3)
    assert all(50 < len(due) < 110 for due in after)
    assert len({key for due in after for key in due}) == sum(map(len, after))


@given(
    step_s=st.lists(st.floats(1e-4, 0.03), min_size=30, max_size=60),
    message_s=st.sampled_from((5e-6, 25e-6, 60e-6)),
    num_streams=st.integers(1, 300),
)
@settings(deadline=None, max_examples=50)
def test_no_reader_sleeps_longer_than_its_turn_and_the_step_it_ends_in(
    step_s: list[float], message_s: float, num_streams: int
) -> None:
    loop = Loop(num_streams, 0.002, message_s)
    loop.run(100)
    woken = dict.fromkeys(range(num_streams), loop.now)
    longest_s = 0.0
    for seconds in step_s:
        loop.step_s = seconds
        (due,) = loop.run(1)
        longest_s = max(longest_s, loop.pace.turn_s)
        for key in due:
            woken[key] = loop.now
        # Before the first of these steps each may have slept for a turn already.
        slack = longest_s + max(step_s)
        assert all(loop.now - at <= slack + 1e-9 for at in woken.values())


@pytest.mark.parametrize("num_steps", [1.0, 1.3, 2.0, 3.4, 17.9])
@pytest.mark.parametrize("first_key", [0, 10**9])
def test_every_reader_has_its_turn_once_and_not_all_at_once(num_steps: float, first_key: int) -> None:
    pace = Pace(0.85, lambda: 0.0)
    pace.turn_s = num_steps
    keys = range(first_key, first_key + 256)
    turns: list[set[int]] = []
    for _ in range(200):
        pace.advance(1.0)
        due = pace.due(keys)
        assert len(due) == len(set(due))
        turns.append(set(due))
    for key in keys:
        steps = [step for step, due in enumerate(turns) if key in due]
        gaps = {after - before for before, after in pairwise(steps)}
        assert gaps <= {math.floor(num_steps), math.ceil(num_steps)}
        assert len(steps) == pytest.approx(200 / num_steps, abs=1)
    # A few more or fewer: the places are spread evenly, not exactly.
    assert all(abs(len(due) - 256 / num_steps) < 8 for due in turns)


def test_turns_go_on_evenly_while_their_length_changes() -> None:
    pace = Pace(0.85, lambda: 0.0)
    draw = random.Random(7)
    last: dict[int, int] = {}
    for step in range(2000):
        pace.turn_s = draw.uniform(3.0, 4.0)
        pace.advance(1.0)
        for key in pace.due(range(64)):
            assert 3 <= step - last.get(key, step - 3) <= 4
            last[key] = step
    assert len(last) == 64


def test_columns_name_the_readers_that_the_pace_does() -> None:
    class Stream:
        is_urgent = False

        def plain_tokens(self, index: int) -> list[int]:
            return []

        def wake(self) -> None:
            raise AssertionError("nobody wakes it here")

    keys = tuple(range(5, 105))
    rows = Rows(PlainTokens(keys, (0,) * 100, (1,) * 100), {key: Stream() for key in keys if key % 7})
    pace = Pace(0.85, lambda: 0.0)
    for turn_s in (1.0, 1.5, 3.0, 5.7):
        pace.turn_s = turn_s
        for _ in range(20):
            pace.advance(1.0)
            assert sorted(key for key, _ in rows.due(pace)) == pace.due(key for key in keys if key % 7)


def test_a_burst_of_calls_says_nothing_of_what_a_message_costs() -> None:
    """Uncounted, a burst made messages seem dear, and its first streams slept to its end."""
    loop = Loop(64, 0.0013, 20e-6)
    loop.run(100)
    turn_s = loop.pace.turn_s
    for _ in range(60):
        loop.pace.num_calls += 4
        loop.cpu += 4 * 160e-6
        loop.run(1)
    assert loop.pace.turn_s <= turn_s + 0.0013
