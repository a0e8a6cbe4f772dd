"""How much of the host's time a guest gets, by clocks that the test has."""

from __future__ import annotations

import attrs
import pytest

from trio_sandbox.wire import WireError, _pace
from trio_sandbox.wire._pace import IDLE_FRAMES, IDLE_RATE, Pace


@attrs.define
class Clocks:
    """What the pace looks at."""

    wall: float = 1000.0
    thread: float = 50.0

    def work(self, seconds: float, *, preempted: float = 0.0) -> None:
        self.wall += seconds + preempted
        self.thread += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(_pace, "perf_counter", lambda: clocks.wall)
    monkeypatch.setattr(_pace, "thread_time", lambda: clocks.thread)
    return clocks


def share(clocks: Clocks, pace: Pace, *, turn: float, away: float, size: int = 0, preempted: float = 0.0) -> float:
    """Return which share of the time a guest gets that has as many turns as it may have, *away* seconds apart."""
    began, worked = clocks.wall, 0.0
    for _ in range(1000):
        pace.begin_turn(size)
        clocks.work(turn, preempted=preempted)
        worked += turn
        clocks.wall += pace.end_turn(0) + away
    return worked / (clocks.wall - began)


@pytest.mark.parametrize("turn", [1e-5, 1e-4, 9e-4, 2e-3, 0.05])
def test_a_guest_that_has_always_something_to_say_gets_half_of_the_time(clocks: Clocks, turn: float) -> None:
    assert share(clocks, Pace(), turn=turn, away=0.0) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("turn", [1e-5, 1e-4, 9e-4])
def test_a_guest_that_leaves_others_as_long_is_not_held_up(clocks: Clocks, turn: float) -> None:
    assert share(clocks, Pace(), turn=turn, away=turn) == pytest.approx(0.5)


def test_what_serves_a_guests_streams_counts_though_it_takes_turns_of_its_own(clocks: Clocks) -> None:
    pace, began, worked = Pace(), clocks.wall, 0.0
    for number in range(1, 1000):
        pace.begin_turn()
        clocks.work(0.00005)
        pause = pace.end_turn(0, number)
        clocks.work(0.00015)  # in a task, before the next read
        worked += 0.0002
        clocks.wall += pause
    assert 0.4 < worked / (clocks.wall - began) <= 0.5


def test_what_is_large_is_worth_its_time(clocks: Clocks) -> None:
    assert share(clocks, Pace(), turn=0.0005, away=0.0, size=131072) == pytest.approx(1.0)
    assert share(clocks, Pace(), turn=0.0005, away=0.0, size=1000) == pytest.approx(0.5, abs=0.01)


def test_what_was_large_is_worth_nothing_later(clocks: Clocks) -> None:
    pace = Pace()
    for _ in range(1000):
        pace.begin_turn(131072)
        assert pace.end_turn(0) == 0
    assert share(clocks, pace, turn=0.0005, away=0.0) == pytest.approx(0.5, abs=0.01)


def test_what_other_processes_take_is_not_the_guests_fault(clocks: Clocks) -> None:
    assert share(clocks, Pace(), turn=1e-4, away=0.0, preempted=0.01) == pytest.approx(1e-4 / 0.0101)


def test_frames_without_effect_have_a_rate(clocks: Clocks) -> None:
    pace, frames = Pace(), 0
    for _ in range(10):
        pace.begin_turn()
        frames += IDLE_FRAMES
        pace.end_turn(frames)
        clocks.wall += IDLE_FRAMES / IDLE_RATE
    with pytest.raises(WireError, match="frames without any effect"):
        pace.end_turn(frames + IDLE_FRAMES + 1)
