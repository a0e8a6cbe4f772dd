"""What exchanges of the time prove about another clock, and what is done about that."""

from __future__ import annotations

from hypothesis import example, given, strategies as st

from trio_sandbox.qemu._clock import ClockComparison

_MS = 10**6
#: An exchange: nanoseconds until the other tells its time, then until we have it, then until the next.
_EXCHANGES = st.lists(
    st.tuples(st.integers(0, 3000 * _MS), st.integers(0, 3000 * _MS), st.integers(0, 1000 * _MS)), min_size=1
)
_OFFSETS = st.integers(-(10**18), 10**18)


@given(_OFFSETS, _EXCHANGES)
def test_what_is_proved_is_true_and_each_step_makes_it_better(
    offset: int, exchanges: list[tuple[int, int, int]]
) -> None:
    comparison, now, errors = ClockComparison(), 10**18, list[int]()
    assert comparison.error is None
    assert comparison.step == 0
    for there, back, pause in exchanges:
        step = comparison.step
        offset += step
        comparison.stepped(step)
        comparison.exchanged(now, now + there + offset, now + there + back)
        now += there + back + pause
        assert comparison.error is not None
        assert abs(offset) <= comparison.error
        errors.append(comparison.error)
    assert errors == sorted(errors, reverse=True), "nothing true makes the bound worse"


@given(_OFFSETS, st.integers(0, 15 * _MS), st.integers(0, 15 * _MS))
@example(5 * _MS + 1, 15 * _MS, 5 * _MS + 2)
@example(10 * _MS, 15 * _MS, 15 * _MS)
@example(-10 * _MS, 15 * _MS, 15 * _MS)
def test_one_short_round_trip_is_enough(offset: int, there: int, back: int) -> None:
    comparison = ClockComparison()
    comparison.exchanged(0, there + offset, there + back)
    step = comparison.step
    comparison.stepped(step)
    assert comparison.error is not None
    assert abs(offset + step) <= comparison.error <= 20 * _MS
    assert comparison.step == 0, "what is good enough is left alone"


def test_a_long_round_trip_moves_nothing_that_may_be_right() -> None:
    comparison = ClockComparison()
    comparison.exchanged(0, 900 * _MS, 1000 * _MS)
    assert comparison.error == 900 * _MS
    assert comparison.step == 0
    comparison.exchanged(2000 * _MS, 2010 * _MS + 50 * _MS, 2020 * _MS)
    assert comparison.error == 60 * _MS
    assert comparison.step == -50 * _MS


def test_a_clock_that_was_set_meanwhile() -> None:
    comparison = ClockComparison()
    comparison.exchanged(0, 5, 10)
    comparison.exchanged(100, 10_000, 110)
    assert comparison.error == 9900, "the last word counts"
    comparison.exchanged(200, 0, 199)
    assert comparison.error == 9900, "ours was set back: there is nothing to learn"
