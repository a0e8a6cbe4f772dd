"""What a fleet makes of what Ray says of its nodes, and of Ray's silence; Ray itself is played here."""

from __future__ import annotations

import logging
import sys
import types
from concurrent.futures import Future
from typing import Any

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import CapacityError, HostConfig, constants
from trio_sandbox.fleet import FleetConfig, _ray

from ._fleet import open_fake_fleet
from ._ray import Group, Groups


class RayError(Exception):
    """What Ray raises."""


@attrs.define(eq=False)
class FakeRay:
    """Fails until it answers, with the nodes that are there."""

    exceptions: types.SimpleNamespace = attrs.field(factory=lambda: types.SimpleNamespace(RayError=RayError))
    asked: int = 0
    answers: bool = False
    failure: Exception = attrs.field(factory=lambda: RayError("no head"))
    connected: bool = True
    killed: list[object] = attrs.field(factory=list[object])
    there: list[dict[str, Any]] = attrs.field(factory=list[dict[str, Any]])
    util: Groups = attrs.field(factory=Groups)

    def is_initialized(self) -> bool:
        return self.connected

    def kill(self, actor: object) -> None:
        if not self.connected:
            pytest.fail("this would start another Ray")
        self.killed.append(actor)
        raise self.failure

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        if not self.answers:
            raise self.failure
        return self.there


class DeadActor:
    """Our process on a node, which was killed: the object, its method, and the reference that calling that gives."""

    @property
    def status(self) -> DeadActor:
        return self

    stop = status

    def remote(self) -> DeadActor:
        return self

    def future(self) -> Future[object]:
        future: Future[object] = Future()
        future.set_exception(RayError("it was killed for want of memory"))
        return future


@attrs.define(eq=False)
class Gauge:
    """One of Ray's, which nobody reads."""

    name: str
    description: str
    tag_keys: tuple[str, ...]

    def set_default_tags(self, tags: dict[str, str]) -> None:
        pass

    def set(self, value: float) -> None:
        pass


def node_of_ray(name: str, *, alive: bool = True, **resources: int) -> dict[str, Any]:
    """Make a node as Ray tells of it, which a fleet calls NAME-NAME."""
    return {
        "NodeID": name,
        "NodeManagerHostname": name,
        "NodeManagerAddress": "127.0.0.1",
        "Resources": resources,
        "Alive": alive,
    }


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.util", "ray.util.metrics"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["ray.util.metrics"], "Gauge", Gauge, raising=False)
    monkeypatch.setattr(_ray, "_LOOK", 0.01)


@pytest.mark.parametrize("failure", [RayError("no head"), ConnectionError("no head"), RuntimeError("no head")])
async def test_ray_that_fails_and_then_says_that_a_node_is_gone(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(failure=failure)
    supervisor = _ray._Supervisor(ray, HostConfig(), FleetConfig())  # pyright: ignore[reportPrivateUsage]
    supervisor._names["id"], supervisor._actors["id"] = "one", DeadActor()  # pyright: ignore[reportPrivateUsage]
    async with open_fake_fleet("one") as fleet, trio.open_nursery() as nursery:
        with caplog.at_level(logging.WARNING, "trio_sandbox.fleet"):
            nursery.start_soon(supervisor.watch, fleet.members)
            await wait_until(lambda: ray.asked > 3)
            assert (await fleet.host.run("print('here')")).stdout == "here\n"
            assert [record.message for record in caplog.records] == [
                "Ray does not answer, and sandboxes that are open go on: no head"
            ]
            ray.answers = True
            await wait_until(lambda: hasattr(fleet.members.failure("one"), "__notes__"))
        lost = fleet.members.failure("one")
        assert str(lost) == "node one is lost: Ray says that it is gone"
        assert lost is not None
        assert lost.__notes__ == ["Ray says of our process there: it was killed for want of memory"]
        await fleet.nodes["one"].node.left.wait()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("`ca_certificates` is no file of certificates there"),
        ModuleNotFoundError("no cryptography there"),
        FileNotFoundError(2, "No such file"),
        CapacityError("`warm` never fits there"),
        ExceptionGroup("two", [ValueError("one"), TypeError("two")]),
    ],
    ids=lambda failure: type(failure).__name__,
)
async def test_a_node_that_comes_later_and_does_not_start_costs_nobody_anything(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def start(self: object, node: _ray.RayNode, members: object) -> None:
        await trio.lowlevel.checkpoint()
        raise failure

    monkeypatch.setattr(_ray._Supervisor, "_start", start)  # pyright: ignore[reportPrivateUsage]
    ray = FakeRay(answers=True, there=[node_of_ray("n"), node_of_ray("m")])
    supervisor = _ray._Supervisor(ray, HostConfig(), FleetConfig())  # pyright: ignore[reportPrivateUsage]
    supervisor._names["n"] = "n-n"  # pyright: ignore[reportPrivateUsage]
    async with open_fake_fleet("n-n") as fleet, fleet.host.open_sandbox() as sandbox, trio.open_nursery() as nursery:
        with caplog.at_level(logging.WARNING, "trio_sandbox.fleet"):
            nursery.start_soon(supervisor.watch, fleet.members)
            await wait_until(lambda: bool(caplog.records))
            asked = ray.asked
            await wait_until(lambda: ray.asked > asked + 2)
        assert [record.message for record in caplog.records] == [
            f"node m-m has joined Ray, and no sandboxes can be opened there: {failure}"
        ]
        assert (await sandbox.run("print('here')")).stdout == "here\n"
        nursery.cancel_scope.cancel()


async def test_a_ray_that_fails_at_the_end_is_no_error_of_the_block() -> None:
    for failure in (RayError("no head"), ConnectionError("no head"), RuntimeError("no head")):
        ray = FakeRay(failure=failure)
        supervisor = _ray._Supervisor(ray, HostConfig(), FleetConfig())  # pyright: ignore[reportPrivateUsage]
        actors = [DeadActor(), DeadActor()]
        supervisor._actors |= dict(zip("ab", actors, strict=True))  # pyright: ignore[reportPrivateUsage]
        await supervisor.stop()
        assert ray.killed == actors


async def test_when_somebody_has_shut_ray_down_the_end_does_not_start_another() -> None:
    ray = FakeRay(connected=False)
    supervisor = _ray._Supervisor(ray, HostConfig(), FleetConfig())  # pyright: ignore[reportPrivateUsage]
    supervisor._actors["a"] = DeadActor()  # pyright: ignore[reportPrivateUsage]
    await supervisor.stop()
    assert ray.killed == []


# --- Nodes that come when they are needed ---


def test_which_nodes_have_sandboxes() -> None:
    head, worker, gone = node_of_ray("head"), node_of_ray("w", trio_sandbox=3), node_of_ray("g", alive=False)
    for there, with_slots_only, names in (
        ([head, worker, gone], False, ["w-w"]),
        ([head, gone], False, ["head-head"]),
        ([head, gone], True, []),
        ([head, worker], True, ["w-w"]),
    ):
        nodes = _ray.alive_nodes(FakeRay(answers=True, there=there))
        assert [node.name for node in _ray.usable(nodes, with_slots_only=with_slots_only)] == names


async def test_a_node_is_not_lost_because_others_come_that_have_the_resource() -> None:
    ray = FakeRay(answers=True, there=[node_of_ray("n")])
    supervisor = _ray._Supervisor(ray, HostConfig(), FleetConfig())  # pyright: ignore[reportPrivateUsage]
    supervisor._names |= {"n": "n-n", "m": "m-m"}  # pyright: ignore[reportPrivateUsage]
    async with open_fake_fleet("n-n") as fleet, fleet.host.open_sandbox() as sandbox, trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.watch, fleet.members)
        ray.there.append(node_of_ray("m", trio_sandbox=3))
        asked = ray.asked
        await wait_until(lambda: ray.asked > asked + 2)
        assert (await sandbox.run("print('here')")).stdout == "here\n"
        nursery.cancel_scope.cancel()


async def test_ray_is_told_who_waits_until_the_fleet_ends() -> None:
    ray = FakeRay(answers=True, there=[node_of_ray("n", trio_sandbox=1)])
    config = FleetConfig(autoscaling=True)
    supervisor = _ray._Supervisor(ray, HostConfig(), config)  # pyright: ignore[reportPrivateUsage]
    supervisor._names["n"] = "n-n"  # pyright: ignore[reportPrivateUsage]

    async def hold(memory_mib: int) -> None:
        async with fleet.host.open_sandbox(memory_mib=memory_mib):
            await trio.sleep_forever()

    async with open_fake_fleet("n-n", slots=1, fleet=config) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.watch, fleet.members)
        nursery.start_soon(hold, 256)
        await wait_until(lambda: fleet.host.statistics().sandboxes_open == 1)
        asked = ray.asked
        await wait_until(lambda: ray.asked > asked + 2)
        assert ray.util.calls == 0
        for memory_mib in (256, 20_000):  # the second fits on no node that is there
            nursery.start_soon(hold, memory_mib)
        wanted = {Group(memory_mib + constants.VM_OVERHEAD_MIB, "!in(n)") for memory_mib in (256, 20_000)}
        await wait_until(lambda: set(ray.util.there) == wanted)
        nursery.cancel_scope.cancel()
    assert len(ray.util.there) == 2
    await supervisor.stop()
    assert ray.util.there == []
