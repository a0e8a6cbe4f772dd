"""Asking for nodes, and draining one, from outside: nodes that answer, hang, fail and end meanwhile. Ray is played here."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from tests.fake._fleet import LocalHost
from trio_sandbox import FleetError
from trio_sandbox.fleet import NodeReport, _admin, drain_node, read_reports


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class GetTimeoutError(RayError, TimeoutError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a long traceback\n{cause}")
        self.cause = cause


Answer = Callable[[], object]


def raises(error: Exception) -> Answer:
    def answer() -> object:
        raise error

    return answer


def hangs() -> object:
    raise AssertionError("`FakeRay.get` does not call it")


@attrs.define(eq=False)
class Actor:
    """A process of ours on a node: what its methods do when they are waited for."""

    status: Any
    drain: Any = 0
    asked: list[object] = attrs.field(factory=list[object])

    def __attrs_post_init__(self) -> None:
        self.status, self.drain = [self._method(each) for each in (self.status, self.drain)]

    def _method(self, result: object) -> Any:
        def remote(*arguments: object) -> Answer:
            self.asked.append(arguments)
            return result if callable(result) else lambda: result

        return types.SimpleNamespace(remote=remote)


@attrs.define(eq=False)
class FakeRay:
    """Waits for what hangs as long as it is told to, by its own clock."""

    actors: dict[str, Actor]
    now: float = 0.0
    ended: bool = False
    exceptions: types.SimpleNamespace = attrs.field(
        factory=lambda: types.SimpleNamespace(
            RayError=RayError, ActorDiedError=ActorDiedError, GetTimeoutError=GetTimeoutError
        )
    )

    @property
    def util(self) -> FakeRay:
        return self

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        pass

    def shutdown(self) -> None:
        self.ended = True

    def monotonic(self) -> float:
        return self.now

    def list_named_actors(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        ours = [{"name": name, "namespace": "trio-sandbox"} for name in (*self.actors, "gone:u")]
        return [*ours, {"name": "somebody's", "namespace": "else"}]

    def get_actor(self, name: str, *, namespace: str) -> Actor:
        if name not in self.actors:
            raise ValueError(f"there is no actor {name}")
        return self.actors[name]

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name.partition(":")[0],
                "NodeManagerHostname": "host",
                "NodeManagerAddress": "::1",
                "Resources": {},
            }
            | {"Alive": True}
            for name in self.actors
        ]

    def get(self, reference: Answer, timeout: float | None) -> object:
        if reference is hangs:
            assert timeout is not None
            self.now += timeout
            raise GetTimeoutError("it takes too long")
        return reference()


def report(name: str) -> NodeReport:
    return NodeReport(name, LocalHost().statistics(), draining=False)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay({"a:u": Actor(report("host-a"), drain=2), "b:u": Actor(report("host-b"))})
    monkeypatch.setattr(_admin, "import_ray", lambda: ray)
    monkeypatch.setattr(_admin, "time", ray)
    return ray


def test_nodes_that_hang_are_told_of_and_cost_their_patience_once(ray: FakeRay) -> None:
    ray.actors |= {f"{name}:u": Actor(hangs) for name in "xyz"}
    reports = {each.name: each for each in read_reports()}
    assert set(reports) == {"host-a", "host-b", "host-x", "host-y", "host-z"}
    assert reports["host-x"].problem == "does not answer within 30 s"
    assert reports["host-a"].problem == ""
    assert ray.now == 30
    assert ray.ended


def test_nodes_that_fail_are_told_of_and_those_that_end_meanwhile_are_not(ray: FakeRay) -> None:
    ray.actors["f:u"] = Actor(raises(RayTaskError(OSError(13, "Permission denied", "/cache"))))
    ray.actors["d:u"] = Actor(raises(ActorDiedError("its program has ended")))
    reports = {each.name: each.problem for each in read_reports()}
    assert reports == {"host-a": "", "host-b": "", "host-f": "can't say: [Errno 13] Permission denied: '/cache'"}


@pytest.mark.parametrize("timeout", [None, 0, 1.5, math.inf])
def test_a_node_is_drained_for_all_programs(ray: FakeRay, timeout: float | None) -> None:
    ray.actors["a:v"] = Actor(report("host-a"), drain=3)
    assert drain_node("host-a", timeout=timeout) == 5
    told = None if timeout == math.inf else timeout
    assert [actor.asked for actor in ray.actors.values()] == [[(), (told,)], [()], [(), (told,)]]


@pytest.mark.parametrize(
    ("name", "timeout", "kind"),
    [
        ("host-a", -1, ValueError),
        ("host-a", math.nan, ValueError),
        ("host-a", "5", TypeError),
        ("host-a", True, TypeError),
        (7, None, TypeError),
    ],
)
def test_what_can_not_be_drained_is_refused_before_anybody_is_told(
    ray: FakeRay, name: Any, timeout: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="must be"):
        drain_node(name, timeout=timeout)
    assert [actor.asked for actor in ray.actors.values()] == [[], []]


def test_a_node_that_nobody_has(ray: FakeRay) -> None:
    with pytest.raises(FleetError, match=r"no fleet has a node 'host\\x1b'; there are: host-a, host-b"):
        drain_node("host\x1b")


def test_a_node_that_hangs_is_drained_as_soon_as_it_can_be(ray: FakeRay) -> None:
    ray.actors["x:u"] = Actor(hangs, drain=hangs)
    with pytest.raises(FleetError, match="node 'host-x' was told to end, and has not 60 s after the timeout") as info:
        drain_node("host-x", timeout=5)
    assert info.value.retry_safe
    assert ray.now == 30 + 65
    assert ray.actors["x:u"].asked == [(), (5,)]


def test_a_node_that_ends_while_it_is_drained_has_nothing_left(ray: FakeRay) -> None:
    ray.actors["a:v"] = Actor(report("host-a"), drain=raises(ActorDiedError("its program has ended")))
    assert drain_node("host-a", timeout=0) == 2


def test_a_node_that_can_not_be_reached_while_it_is_drained(ray: FakeRay) -> None:
    ray.actors["a:u"] = Actor(report("host-a"), drain=raises(RayError("unavailable")))
    with pytest.raises(FleetError, match="it is not known whether node 'host-a' is drained: unavailable"):
        drain_node("host-a")
