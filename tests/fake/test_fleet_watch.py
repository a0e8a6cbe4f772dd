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
from trio_sandbox import HostConfig
from trio_sandbox.fleet import FleetConfig, _ray

from ._fleet import open_fake_fleet


class RayError(Exception):
    """What Ray raises."""


@attrs.define(eq=False)
class FakeRay:
    """Answers after it has failed twice, and then that there is no node any more."""

    exceptions: types.SimpleNamespace = attrs.field(factory=lambda: types.SimpleNamespace(RayError=RayError))
    asked: int = 0
    answers: bool = False

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        if not self.answers:
            raise RayError("no head")
        return []


class DeadActor:
    """Our process on a node, which was killed: the object, its method, and the reference that calling that gives."""

    @property
    def status(self) -> DeadActor:
        return self

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


async def test_ray_that_fails_and_then_says_that_a_node_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ray", "ray.util", "ray.util.metrics"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["ray.util.metrics"], "Gauge", Gauge, raising=False)
    monkeypatch.setattr(_ray, "_LOOK", 0.01)
    ray = FakeRay()
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
        failure = fleet.members.failure("one")
        assert str(failure) == "node one is lost: Ray says that it is gone"
        assert failure is not None
        assert failure.__notes__ == ["Ray says of our process there: it was killed for want of memory"]
        await fleet.nodes["one"].node.left.wait()
        nursery.cancel_scope.cancel()
