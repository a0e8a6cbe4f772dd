"""Whether the memory that is left is enough: every level, and what may be given out."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trio_sandbox.machines._memory import Level, MemoryWatch, Room, Stalls

MIB = 2**20
EASY, TIGHT, SHORT = Level


def machine(left_mib: int, some: float = 0.0, full: float = 0.0, *, total_mib: int = 10_000) -> Room:
    """Give the room of a machine that keeps 1000 MiB free."""
    return Room("in the machine", left_mib * MIB, total_mib * MIB, Stalls(some, full))


@pytest.mark.parametrize(
    ("total_mib", "reserve_mib"),
    [(512, 128), (1024, 256), (2048, 256), (10_000, 1000), (24_000, 2400), (40_960, 4096), (1_000_000, 4096)],
)
def test_what_is_kept_free(total_mib: int, reserve_mib: int) -> None:
    assert machine(0, total_mib=total_mib).reserve == reserve_mib * MIB


@pytest.mark.parametrize(
    ("room", "level"),
    [
        (machine(1000), EASY),
        (machine(999), TIGHT),
        (machine(500), TIGHT),
        (machine(499), SHORT),
        (machine(0), SHORT),
        # Stalls, where little is left.
        (machine(2499, some=0.09), EASY),
        (machine(2499, some=0.1), TIGHT),
        (machine(2499, some=0.5, full=0.09), TIGHT),
        (machine(2499, some=0.5, full=0.1), SHORT),
        # Elsewhere somebody has reached a limit of its own.
        (machine(2500, some=1, full=1), EASY),
        # A kernel that does not tell.
        (Room("in the machine", 2000 * MIB, 10_000 * MIB), EASY),
        (Room("in the machine", 400 * MIB, 10_000 * MIB), SHORT),
    ],
)
def test_levels(room: Room, level: Level) -> None:
    assert room.level() is level


def look(watch: MemoryWatch, *rooms: Room, now: float = 0.0) -> Level:
    watch.look(rooms, now)
    return watch.level


def test_it_gets_worse_at_once_and_better_with_a_margin() -> None:
    watch = MemoryWatch()
    for room, level in [
        (machine(1000), EASY),
        (machine(999), TIGHT),
        (machine(1249), TIGHT),
        (machine(1250), EASY),
        (machine(1001), EASY),
        (machine(499), SHORT),
        (machine(624), SHORT),
        (machine(625), TIGHT),
        (machine(499), SHORT),
        (machine(5000), EASY),
        (machine(2000, some=0.1), TIGHT),
        (machine(2000, some=0.081), TIGHT),
        (machine(2000, some=0.079), EASY),
        (machine(2000, full=0.1), SHORT),
        (machine(2000, some=0.2, full=0.079), TIGHT),
    ]:
        assert look(watch, room) is level, room


rooms = st.builds(machine, st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))


@given(st.lists(st.lists(rooms, min_size=1, max_size=3), min_size=1, max_size=6))
def test_it_is_never_better_than_what_was_measured_nor_worse_than_it_ever_was(looks: Sequence[Sequence[Room]]) -> None:
    watch = MemoryWatch()
    worst = EASY
    for measured in looks:
        before = watch.level
        told = watch.look(measured, 0.0)
        assert told == (watch.level != before)
        now = max(room.level() for room in measured)
        worst = max(worst, now)
        assert now <= watch.level <= max(before, now) <= worst
        if all(room.left > 3200 * MIB for room in measured):
            assert watch.level is EASY, "with a margin over everything nothing of before counts"
        assert not (watch.level is not EASY and watch.admits(0))


def test_the_narrowest_room_decides() -> None:
    watch = MemoryWatch()
    group = Room("allowed by /group", 200 * MIB, 1024 * MIB, Stalls(0, 0))
    assert look(watch, machine(9000), group) is TIGHT
    assert watch.worst == group
    assert "of 1024 MiB allowed by /group 200 MiB are left, and 256 MiB are kept free" in watch.describe()
    assert look(watch, machine(400), group) is SHORT
    assert watch.worst == machine(400)


def test_before_the_first_look_nothing_is_known() -> None:
    watch = MemoryWatch()
    assert (watch.level, watch.worst, watch.tells_stalls) == (EASY, None, False)


def test_what_is_given_out_counts_until_it_shows() -> None:
    watch = MemoryWatch()
    look(watch, machine(2000), now=0)
    given = 0
    while watch.admits(90):
        watch.grant(given, 90, 0)
        given += 1
    assert given == 11, "a hundred that ask in the same moment find what the first ones have left"
    assert "990 MiB are for machines that start just now" in watch.describe()
    for _ in range(2):
        watch.forget(5)
    assert watch.admits(90), "what was given back counts no more, once"
    assert not watch.admits(110)
    watch.grant("another", 90, 1)
    look(watch, machine(1900), now=9.9)
    assert not watch.admits(90)
    watch.look([machine(1900)], 10)
    assert watch.admits(810)
    assert not watch.admits(811)
    watch.look([machine(1900)], 11)
    assert watch.admits(900)
    assert not watch.admits(901)
    assert "start just now" not in watch.describe()


def test_a_kernel_that_does_not_tell_stalls_is_said() -> None:
    watch = MemoryWatch()
    look(watch, Room("in the machine", 400 * MIB, 10_000 * MIB))
    assert not watch.statistics().stalls_known
    assert "the kernel does not tell how long programs wait for memory" in watch.statistics().measured
    look(watch, machine(2000, some=0.125, full=0.5))
    numbers = watch.statistics()
    assert (numbers.level, numbers.stalls_known, numbers.put_to_sleep) == ("short", True, 0)
    assert "some program waited for memory in 12%, and all in 50%" in numbers.measured
