"""What the benchmarks' runner does with figures."""

from __future__ import annotations

import pytest

from tests.benchmarks.__main__ import (
    END_MARK,
    START_MARK,
    known_benchmarks,
    limit_text,
    main,
    replace_between_marks,
    table,
)
from tests.benchmarks._figures import Figure


def test_a_figure_is_the_median_of_its_samples() -> None:
    figure = Figure.of("a thing", [9.0, 1.0, 2.0, 100.0, 3.0], "ms")
    assert (figure.value, figure.samples, figure.p95) == (3.0, 5, 100.0)


def test_no_samples_make_no_figure() -> None:
    with pytest.raises(ValueError, match="a thing: no samples"):
        Figure.of("a thing", [], "ms")


@pytest.mark.parametrize(
    ("at_most", "at_least", "within"),
    [
        (None, None, None),
        (4, None, True),
        (3, None, True),
        (2, None, False),
        (None, 3, True),
        (None, 4, False),
        (4, 4, False),
    ],
)
def test_limits(at_most: float | None, at_least: float | None, within: bool | None) -> None:
    figure = Figure(name="x", value=3, unit="ms", samples=1, at_most=at_most, at_least=at_least)
    assert figure.within_limits is within


def test_the_table_shows_limits_and_what_is_over() -> None:
    good = Figure(name="fast", value=3.14159, unit="ms", samples=10, p95=4, at_most=4)
    bad = Figure(name="slow", value=12.6, unit="MB/s", samples=10, at_least=20)
    lines = table([good, bad]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["fast", "3.14", "4", "ms", "<= 4", "ok", "10"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["slow", "12.6", "", "MB/s", ">= 20", "OVER", "10"]
    assert limit_text(Figure(name="x", value=1, unit="x", samples=1)) == ""


def test_figures_go_between_the_marks() -> None:
    text = f"before\n{START_MARK}\nold\n{END_MARK}\nafter\n"
    assert replace_between_marks(text, "new") == f"before\n{START_MARK}\nnew\n{END_MARK}\nafter\n"
    with pytest.raises(ValueError, match="exactly one"):
        replace_between_marks("no marks", "new")


def test_an_unknown_benchmark_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["astrology"])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "no benchmark 'astrology'" in error
    assert all(name in error for name in known_benchmarks())
