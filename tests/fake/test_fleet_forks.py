"""Copies of a sandbox on a node: on the same node, each with a connection of its own, and gone with their block."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left, wait_until
from trio_sandbox import (
    CapacityError,
    DrainingError,
    LinkError,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    SnapshotError,
    Timeouts,
    Usage,
)
from trio_sandbox.fleet import FleetHost, _links
from trio_sandbox.sandbox._slot import Slot

from ._fleet import Fleet, LocalHost, open_fake_fleet
from ._sandbox import open_local_sandbox


@attrs.define(eq=False)
class Life:
    """Cares for a machine that can't be saved, and whose copies are new."""

    host: ForkingHost
    slot: Slot
    checkpoints: int = 0
    reverts: int = 0
    hibernations: int = 0
    hibernated: bool = False
    last_pause: float | None = None
    clock_error: float | None = None

    def usage(self) -> Usage:
        raise SandboxError("nobody has counted")

    @asynccontextmanager
    async def fork(self, count: int) -> AsyncGenerator[tuple[Sandbox, ...]]:
        async with AsyncExitStack() as stack:
            children: list[Sandbox] = []
            for _ in range(count):
                if self.host.failure is not None:
                    raise self.host.failure
                children.append(await stack.enter_async_context(self.host.open_one(None)))
            yield tuple(children)


@attrs.define(eq=False)
class ForkingHost(LocalHost):
    """A host whose sandboxes can be forked."""

    @asynccontextmanager
    async def open_sandbox(
        self, image: object, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AsyncGenerator[Sandbox]:
        async with self.open_one(config) as sandbox:
            yield sandbox

    @asynccontextmanager
    async def open_one(self, config: SandboxConfig | None) -> AsyncGenerator[Sandbox]:
        async with open_local_sandbox(config) as (_, machine):
            self.machines.append(machine)
            self.open += 1
            slot = Slot(machine)
            try:
                yield Sandbox(slot, "python", config or SandboxConfig(), Timeouts(), cast("Any", Life(self, slot)))
            finally:
                self.open -= 1


@asynccontextmanager
async def open_parent(**fleet: Any) -> AsyncGenerator[tuple[Fleet, ForkingHost, Sandbox]]:
    host = ForkingHost()
    async with open_fake_fleet("one", "two", one=host, **fleet) as opened:
        opened.nodes["two"].node.draining = True
        await wait_until(lambda: any(node.draining for node in opened.host.statistics().nodes))
        async with opened.host.open_sandbox() as sandbox:
            yield opened, host, sandbox


def room_left(host: FleetHost) -> int:
    return cast("Any", host)._members._placement._nodes["one"].left  # type: ignore[no-any-return]


async def test_copies_are_on_the_node_of_their_original() -> None:
    with nothing_left():
        async with open_parent() as (fleet, host, sandbox):
            before = room_left(fleet.host)
            async with sandbox.fork(2) as children:
                assert [child.node for child in children] == ["one", "one"]
                assert len({sandbox.id, *(child.id for child in children)}) == 3
                for number, child in enumerate(children):
                    assert (await child.run(f"x = {number}; x")).value == str(number)
                async with children[0].fork(1) as (grandchild,):
                    assert (await grandchild.run("print(1)")).stdout == "1\n"
                    assert host.open == 4
                    assert before - room_left(fleet.host) == 3 * (10_000 - before)
            assert host.open == 1
            assert room_left(fleet.host) == before
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            with pytest.raises(SandboxClosedError, match="block has exited"):
                await children[0].run("1")


async def test_copies_count_among_what_a_node_may_have() -> None:
    async with open_parent(slots=3) as (fleet, host, sandbox):
        with pytest.raises(CapacityError, match=r"3 copies never fit on node one .* it may have 3 sandboxes"):
            async with sandbox.fork(3):
                pass
        async with trio.open_nursery() as nursery:

            async def hold() -> None:
                async with fleet.host.open_sandbox():
                    await trio.sleep_forever()

            async with sandbox.fork(2):
                nursery.start_soon(hold)
                await wait_until(lambda: fleet.host.statistics().tasks_waiting == 1)
                assert host.open == 3
            await wait_until(lambda: fleet.host.statistics().sandboxes_open == 2)
            nursery.cancel_scope.cancel()


async def test_a_copy_that_is_lost_costs_itself_only() -> None:
    async with open_parent() as (_, host, sandbox), sandbox.fork(2) as (first, second):
        host.machines[1].retire("of old age")
        with pytest.raises((OutcomeUnknownError, SandboxClosedError)):
            await first.run("1")
        for other in (second, sandbox):
            assert (await other.run("print(1)")).stdout == "1\n"


async def test_a_node_that_is_lost_under_copies() -> None:
    async with open_parent() as (fleet, host, sandbox):
        async with sandbox.fork(2) as children:
            await fleet.nodes["one"].wire.cut()
            for each in (sandbox, *children):
                with pytest.raises((OutcomeUnknownError, SandboxClosedError), match="node one"):
                    await each.run("1")
        with pytest.raises(SandboxClosedError, match="node one"):
            async with sandbox.fork(1):
                pass
        await fleet.nodes["one"].node.left.wait()
        assert host.open == 0


async def test_a_fork_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_parent() as (fleet, host, sandbox):
        before = room_left(fleet.host)
        host.failure = SnapshotError("the disk is full")
        with pytest.raises(SnapshotError, match="the disk is full") as info:
            async with sandbox.fork(2):
                pass
        assert info.value.__notes__ == ["on node one"]
        host.failure = None
        for count, kind in ((0, ValueError), (True, TypeError)):
            with pytest.raises(kind):
                async with sandbox.fork(count):
                    pass
        monkeypatch.setattr(_links, "PATIENCE", 0.5)
        fleet.nodes["one"].wire.deaf = True
        with pytest.raises(LinkError):
            async with sandbox.fork(2):
                pass
        fleet.nodes["one"].wire.deaf = False
        assert host.open == 1
        fleet.nodes["one"].node.draining = True
        with pytest.raises(DrainingError):
            async with sandbox.fork(2):
                pass
        assert room_left(fleet.host) == before
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_a_fork_cancelled_at_every_step() -> None:
    async with open_parent() as (fleet, host, sandbox):
        before = room_left(fleet.host)

        async def use() -> None:
            async with sandbox.fork(1) as (child,):
                await child.run("1")

        async def check() -> None:
            await wait_until(lambda: host.open == 1)
            assert room_left(fleet.host) == before

        assert await cancel_at_every_step(use, check=check) > 10
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_copies_and_their_original_are_drained_together() -> None:
    async with open_parent() as (fleet, _, sandbox), trio.open_nursery() as nursery:
        left: list[int] = []

        async def drain(seconds: float | None) -> None:
            left.append(await fleet.nodes["one"].node.drain(seconds))

        async with sandbox.fork(2):
            await drain(0)
            assert left == [3]
            nursery.start_soon(drain, None)
            await drain(0.01)
            assert left == [3, 3]
        nursery.cancel_scope.cancel()
