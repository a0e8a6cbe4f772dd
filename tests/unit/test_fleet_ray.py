"""What Ray is told of a fleet: who waits, and numbers; Ray itself is played here."""

from __future__ import annotations

import sys
import types
from collections import Counter
from typing import Any

import attrs
import pytest

from tests.fake._fleet import LocalHost
from tests.fake._ray import Group, Groups
from trio_sandbox import SandboxConfig
from trio_sandbox.fleet import FleetStatistics, NodeStatistics
from trio_sandbox.fleet._demand import MOST_WAITING, Demands
from trio_sandbox.fleet._metrics import OF_A_FLEET, OF_A_NODE, Gauges
from trio_sandbox.fleet._placement import Claim, Demand, Placement, demand_of


def waiting(*memory_mib: int) -> tuple[Demand, ...]:
    return tuple(Demand(memory, 1) for memory in memory_mib)


def test_ray_is_told_of_nothing_while_nobody_waits() -> None:
    ray = Groups()
    Demands(ray).tell(["a", "b"], ())
    assert ray.calls == 0


def test_ray_is_told_who_waits_and_where_there_is_no_room() -> None:
    ray = Groups()
    demands = Demands(ray)
    demands.tell((), waiting(360))
    assert ray.there == [Group(360)], "any node will do"
    demands.tell(["b", "a"], waiting(360, 600, 360))
    assert Counter(ray.there) == {Group(360, "!in(a,b)"): 2, Group(600, "!in(a,b)"): 1}
    calls = ray.calls
    demands.tell(["a", "b"], waiting(360, 360, 600))
    assert ray.calls == calls, "what has not changed is not told again"
    demands.tell(["a", "b", "c"], waiting(600))
    assert ray.there == [Group(600, "!in(a,b,c)")], "what Ray has given on c is given back, as c has no room either"
    demands.tell(["a"], waiting(*[360] * 1000))
    assert ray.there == [Group(360, "!in(a)")] * MOST_WAITING
    demands.tell(["a"], ())
    assert ray.there == []


def test_what_ray_did_not_do_is_tried_again() -> None:
    ray = Groups()
    demands = Demands(ray)
    demands.tell(["a"], waiting(360, 360))
    ray.fails = True
    with pytest.raises(OSError, match="no head"):
        demands.tell(["a"], ())
    ray.fails = False
    demands.tell(["a"], ())
    assert ray.there == []


def test_who_waits_for_a_saved_sandbox_is_helped_by_any_node() -> None:
    placement = Placement("spread")
    placement.add("one", Demand(1000, 4, 1))
    demand = demand_of(SandboxConfig(memory_mib=256))
    for nodes in ((), (), ("one",), ()):
        placement.submit(Claim(demand, prefer=frozenset(nodes)))
        placement.settle()
    assert placement.wants() == (demand, demand, demand)


# --- Metrics ---


@attrs.define(eq=False)
class Gauge:
    """One of Ray's."""

    name: str
    description: str
    tag_keys: tuple[str, ...]
    tags: dict[str, str] = attrs.field(factory=dict[str, str])
    told: list[float] = attrs.field(factory=list[float])

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.tags = tags

    def set(self, value: float) -> None:
        self.told.append(value)


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gauge]:
    made: dict[str, Gauge] = {}

    def make(name: str, **options: Any) -> Gauge:
        assert name not in made
        made[name] = Gauge(name, **options)
        return made[name]

    for name in ("ray", "ray.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("ray.util.metrics")
    module.Gauge = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.util.metrics", module)
    return made


def test_a_node_tells_what_has_changed(gauges: dict[str, Gauge]) -> None:
    host = LocalHost(memory_mib=2000, open=3)
    told = Gauges(OF_A_NODE, node="one")
    told.tell(host.statistics())
    told.tell(host.statistics())
    host.open = 2
    told.tell(host.statistics())
    assert gauges["trio_sandbox_node_sandboxes_open"].told == [3, 2]
    assert gauges["trio_sandbox_node_memory_budget_mib"].told == [2000]
    assert {gauge.tags["node"] for gauge in gauges.values()} == {"one"}
    assert all(gauge.told and gauge.description for gauge in gauges.values())


def test_a_program_tells_of_its_fleet(gauges: dict[str, Gauge]) -> None:
    nodes = tuple(NodeStatistics(name, 1, draining=False, lost=name == "two", host=None) for name in ("one", "two"))
    Gauges(OF_A_FLEET, user="me").tell(FleetStatistics(2, 5, 4, nodes))
    values = {name.removeprefix("trio_sandbox_fleet_"): gauge.told for name, gauge in gauges.items()}
    assert values == {
        "sandboxes_open": [2],
        "sandboxes_opened": [5],
        "tasks_waiting": [4],
        "nodes": [1],
        "nodes_lost": [1],
    }
