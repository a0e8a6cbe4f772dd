"""What the benchmark of fleets measures with many sandboxes, and when it says that a limit is not kept."""

from __future__ import annotations

import pytest

from tests.benchmarks import _crowd
from tests.benchmarks._crowd import against_local

from ._fleet import LocalHost, open_fleet_of


@pytest.mark.parametrize(
    ("fleet", "limits", "kept"),
    [
        ([9.6, 20.0, 19.2], {"at_least": 0.95}, True),
        ([9.0, 20.0, 18.0], {"at_least": 0.95}, False),
        ([10.8, 20.0, 21.6], {"at_most": 1.1}, True),
        ([11.2, 20.0, 22.4], {"at_most": 1.1}, False),
    ],
)
def test_limits_are_for_the_median_of_the_pairs_ratios(
    fleet: list[float], limits: dict[str, float], kept: bool
) -> None:
    # In the middle round the machine was busy with something else while the fleet's was taken, or the local one.
    _, _, ratio = against_local("something", "fleet", [[10.0, 10.0, 20.0], fleet], "s", **limits)
    assert ratio.within_limits is kept


async def test_a_crowd_is_open_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crowd, "CROWD", 3)
    nodes = {"one": LocalHost(), "two": LocalHost()}
    async with open_fleet_of(nodes) as fleet:
        assert await _crowd._seconds_to_open(fleet.host) > 0  # pyright: ignore[reportPrivateUsage]
        assert sorted(len(node.machines) for node in nodes.values()) == [1, 2]
        assert fleet.host.statistics().sandboxes_open == 0


async def test_each_run_has_a_sandbox_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crowd, "_RUNS", 3)
    node = LocalHost()
    async with open_fleet_of({"one": node}) as fleet:
        assert await _crowd._runs_per_second(fleet.host) > 0  # pyright: ignore[reportPrivateUsage]
        assert len(node.machines) == 3
