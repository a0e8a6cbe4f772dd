"""The soak's own logic: what it does is drawn from the seed, and what it says is what was found."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.documented import END_MARK, START_MARK
from tests.soak import __main__ as program, _report
from tests.soak._parts import PARTS
from tests.soak._report import FAILURE_LIMIT, Budget, Gauge, Latencies, Report, Series, to_markdown
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


def test_the_time_is_shared_out_fairly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(_report, "time", types.SimpleNamespace(monotonic=lambda: now))
    shares = Budget(1, None, 30.0, 0.5, started=now).shares([None, 7, None])
    first = next(shares)
    assert (first.minutes, first.count, first.scale) == (10, None, 0.5)
    now += 4 * 60  # it needed less, and leaves the rest to the others
    second = next(shares)
    assert (second.minutes, second.count) == (13, 7)
    now += 40 * 60
    assert next(shares).minutes == 0, "one took all that there was"
    assert [share.count for share in Budget(1, None, None).shares([3, 4])] == [3, 4]


def test_a_series_climbs_by_the_slope_of_its_second_half() -> None:
    filling = [float(min(number, 20)) for number in range(60)]
    assert Series(0.5, values=filling).is_flat, "a cache that has filled up"
    leaking = [float(number) for number in range(60)]
    assert Series(28, values=leaking).climbs == 29
    assert not Series(28, values=leaking).is_flat
    noisy = [*filling[:40], *(20.0 + 90 * (number % 7 == 0) for number in range(20))]
    assert Series(0.5, values=noisy).is_flat, "a few values that are far off"
    assert Series(0.5, values=[1.0]).climbs == Series(0.5).climbs == 0


def test_latencies_are_compared_by_the_tenths_at_both_ends() -> None:
    assert Latencies().is_flat
    assert Latencies([3.0]).is_flat
    steady = Latencies([10.0, 11.0] * 50 + [500.0])
    assert (steady.first, steady.last, steady.is_flat) == (10.5, 11, True)
    assert not Latencies([10.0 + number for number in range(100)]).is_flat
    assert Latencies([10.0] * 50 + [10.0, 40.0, 50.0] * 20).is_flat, "another program was busy"
    slower = [10.0] * 50 + [40.0] * 50
    assert not Latencies(slower).is_flat
    assert not Latencies(slower, beside=[50.0] * 10 + [12.0] * 10).is_flat
    assert Latencies(slower, beside=[10.0] * 10 + [30.0] * 10).is_flat, "the machine is slower now"
    with (took := Latencies()).measured():
        pass
    with pytest.raises(ValueError, match="wrong"), took.measured():
        raise ValueError("wrong")
    assert len(took.samples) == 1, "what failed has no latency"


def test_a_report_s_tables() -> None:
    report = Report("load", 1, seconds=9.6, slowest=2)
    report.operations["runs"] += 40
    report.series["runs: memory"] = Series(1, "MiB", [5.0] * 20)
    report.series["forks: descriptors"] = Series(0.5, values=[1.0, 2.0, 2.0, 3.0])
    report.series["forks: memory"] = Series(1)
    report.latencies["runs"] = Latencies([10.0] * 10, beside=[11.0, 12.0])
    report.gauges["tasks"] = Gauge(1, 9, 0)
    lines = to_markdown([report]).splitlines()
    assert "| load | 40 | 10 | 2 | 0 | FAILS |" in lines
    assert "| load | tasks | 1 | 9 |  | GREW, by more than 0 |" in lines
    assert lines[-6:] == [
        "| --- | --- | --- |",
        "| operations | 40 | 0 |",
        "| latency, ms | 10 → 10 |  |",
        "| of a new one, ms | 11 → 12 |  |",
        "| memory | 5 → 5 MiB |  |",
        "| descriptors |  | 1 → 3  CLIMBS, by 1; it may by 0.5 |",
    ]
    written = report.to_json()
    assert written["series"]["runs: memory"]["is_flat"]
    assert written["latencies"]["runs"] == {"samples": 10, "first": 10, "last": 10, "is_flat": True}


def test_a_part_that_did_nothing_does_not_hold() -> None:
    assert not Report("runs", 7).holds
    assert "it did nothing in its time" in str(Report("runs", 7))


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

    async def break_off(budget: Budget, report: Report) -> None:
        raise RuntimeError("its own doing")

    monkeypatch.setitem(PARTS, "broken", break_off)
    assert program.main(["--count", "3", "--json", str(file), "broken", "good"]) == 1
    broken, good = json.loads(file.read_text())
    assert (broken["holds"], good["holds"]) == (False, True), "each part has its turn"
    assert "its own doing" in broken["failures"][0]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START_MARK}\nstale\n{END_MARK}\nafter\n")
    assert program.main(["--count", "3", "--write", str(page), "good"]) == 0
    assert "| good | 3 |" in page.read_text()
    assert "stale" not in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="exactly one"):
        program.main(["--write", str(page), "good"])


@pytest.mark.parametrize("wrong", [["astrology"], ["--count", "0"], ["--minutes", "-1"], ["--minutes", "soon"]])
def test_wrong_use_is_told_before_anything_starts(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        program.main(wrong)
    assert raised.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
