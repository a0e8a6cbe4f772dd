"""The soak's own logic: what it does is drawn from the seed, and what it says is what was found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.soak import __main__ as program
from tests.soak._parts import PARTS
from tests.soak._report import FAILURE_LIMIT, Budget, Gauge, Report
from tests.soak._steps import LIMITS, MAX_OUTPUT, Step, steps


def first_steps(seed: int, count: int = 3000) -> list[Step]:
    return list(itertools.islice(steps(seed), count))


def test_a_seed_stands_for_its_steps() -> None:
    assert first_steps(1) == first_steps(1)
    assert first_steps(1) != first_steps(2)


def test_there_are_steps_of_every_kind_in_every_language_on_both_sides_of_each_limit() -> None:
    drawn = first_steps(1)
    assert len({(step.kind, step.language) for step in drawn if step.kind not in ("ends", "is forked")}) == 6 * 3
    assert {step.kind for step in drawn} >= {"ends", "is forked"}
    sizes = {step.stdout for step in drawn if step.kind == "prints"}
    assert all(
        {limit - 1, limit, limit + 1} & sizes and any(0 < size - limit < 2000 for size in sizes) for limit in LIMITS
    )
    assert {step.streamed for step in drawn if step.stdout > MAX_OUTPUT} == {False, True}
    assert {step.has_deadline for step in drawn} == {False, True}


def test_a_budget_ends_by_count_or_by_time() -> None:
    assert Budget(1, 10, None).is_left(9)
    assert not Budget(1, 10, None).is_left(10)
    assert Budget(1, None, 1000).is_left(10**9)
    assert not Budget(1, None, 0.0).is_left(0)


def test_a_report_says_what_grew_and_what_failed() -> None:
    report = Report("runs", 7)
    report.operations["prints (python)"] += 3
    report.gauges["tasks"] = Gauge(5, 5, 0)
    assert report.holds
    assert "holds; seed 7, 3 operations" in str(report)
    report.gauges["memory"] = Gauge(5, 50, 10, "MiB")
    assert not report.holds
    assert "GREW, by more than 10" in str(report)
    report.gauges.clear()
    for number in range(FAILURE_LIMIT):
        assert not report.is_hopeless
        report.fail(f"step {number} hung")
    assert report.is_hopeless
    assert not report.holds
    assert "FAILURE: step 0 hung" in str(report)


def test_the_report_is_written_as_json_and_tells_by_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(*, fails: bool) -> Callable[[Budget, Report], Awaitable[None]]:
        async def soak(budget: Budget, report: Report) -> None:
            report.operations["nothing"] += budget.count or 0
            if fails:
                report.fail("it hung")

        return soak

    monkeypatch.setitem(PARTS, "good", part(fails=False))
    monkeypatch.setitem(PARTS, "bad", part(fails=True))
    file = tmp_path / "report.json"
    assert program.main(["--count", "3", "--seed", "9", "--json", str(file), "good"]) == 0
    assert program.main(["--count", "3", "--seed", "9", "--json", str(file), "good", "bad"]) == 1
    good, bad = json.loads(file.read_text())
    assert (good["part"], good["seed"], good["operations"], good["holds"]) == ("good", 9, {"nothing": 3}, True)
    assert (bad["holds"], bad["failures"]) == (False, ["it hung"])
    assert "bad: FAILS" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["astrology"], ["--count", "0"], ["--minutes", "-1"], ["--minutes", "soon"]])
def test_wrong_use_is_told_before_anything_starts(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        program.main(wrong)
    assert raised.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
