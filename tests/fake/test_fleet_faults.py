"""What a network between a node and its user can do to them: it stalls, slows down, cuts and changes what they say."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left, wait_until
from trio_sandbox import (
    LinkError,
    NodeLostError,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
)
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.fleet import _client, _links, _machine

from ._fleet import Fleet, LocalHost, open_fake_fleet

#: Of a wire's ends.
TO_USER, TO_NODE = 0, 1
#: Numbers of connections: of the user, and of the first sandbox's machine.
USERS, MACHINES = 0, 1
#: Memory of a sandbox of which two, with what QEMU takes, are all that a node of these tests may have.
HALF = LocalHost().memory_mib // 2 - VM_OVERHEAD_MIB


@contextmanager
def expect_lost(node: str, text: str) -> Generator[None]:
    """Expect what requests raise when a node is lost under them: it names the node, and why is in its cause."""
    with pytest.raises((OutcomeUnknownError, SandboxClosedError), match=f"node {node}") as info:
        yield
    cause = info.value.__cause__
    assert isinstance(cause, NodeLostError)
    assert cause.node == node
    assert text in str(cause)


async def compute_for_ever(sandbox: Sandbox) -> None:
    await sandbox.run("import time; time.sleep(1000)")


async def assert_rest_goes_on(fleet: Fleet, lost: str) -> None:
    """Another node serves, and is the only one that does."""
    async with fleet.host.open_sandbox() as sandbox:
        assert sandbox.node != lost
        assert (await sandbox.run("print('here')")).stdout == "here\n"
    assert {node.name for node in fleet.host.statistics().nodes if node.lost} == {lost}


# --- It is slow ---


async def test_a_network_that_is_silent_for_a_while_costs_that_while() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        wire = fleet.nodes["one"].wire
        await sandbox.run("x = 6")
        wire.stall()
        results: list[str] = []

        async def run() -> None:
            results.append((await sandbox.run("print(x * 7)")).stdout)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(1)
            assert results == []
            wire.go_on()
        assert results == ["42\n"]
        assert not fleet.host.statistics().nodes[0].lost


async def test_a_slow_network(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    async with open_fake_fleet("one") as fleet:
        fleet.nodes["one"].wire.delay = 0.02
        async with fleet.host.open_sandbox() as sandbox:
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            done = await sandbox.run_process(["cat"], stdin=data, capture_stdout=True)
            assert done.stdout == data
            with trio.move_on_after(0.1) as scope:
                await compute_for_ever(sandbox)
            assert scope.cancelled_caught
            assert (await sandbox.run("print('the same interpreter')")).stdout == "the same interpreter\n"


async def test_cancelled_while_the_network_is_silent() -> None:
    """The guest stops when it hears of it, and what is said after that is heard."""
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        wire = fleet.nodes["one"].wire
        await sandbox.run("x = 6")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(compute_for_ever, sandbox)
            await wait_until(lambda: sandbox.statistics().runs == 2)
            wire.stall()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.2)
                wire.go_on()
        assert (await sandbox.run("print(x * 7)")).stdout == "42\n"


# --- It is gone ---


async def test_a_network_that_is_silent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a node whose process hangs, and whose kernel answers: our own pings find out."""
    for module in (_client, _machine):
        monkeypatch.setattr(module, "SILENCE", 0.5)
    async with open_fake_fleet("one", "two") as fleet, fleet.host.open_sandbox() as sandbox:
        assert sandbox.node is not None
        wire = fleet.nodes[sandbox.node].wire
        with expect_lost(sandbox.node, "left a ping unanswered"):
            wire.stall()
            await compute_for_ever(sandbox)
        with expect_lost(sandbox.node, "left a ping unanswered"):
            await sandbox.run("1")
        await assert_rest_goes_on(fleet, sandbox.node)
        # Its user has closed what it had there; when the wire lets that through, the node ends all that it has.
        wire.go_on()
        await fleet.nodes[sandbox.node].node.left.wait()
        assert fleet.nodes[sandbox.node].host.open == 0


@pytest.mark.parametrize("when", ["idle", "opening", "a run", "an upload", "a download", "a process"])
async def test_a_network_that_is_cut(when: str, tmp_path: Path) -> None:
    here, there = (
        tmp_path / "here",
        tmp_path / "there",
    )  # whose files are in one directory with ours: it is no virtual machine
    for directory in (here, there):
        directory.mkdir()
    (here / "large").write_bytes(bytes(2 * 10**6))
    with nothing_left(here):
        async with open_fake_fleet("one", "two") as fleet:
            async with fleet.host.open_sandbox() as sandbox:
                assert sandbox.node is not None
                node = fleet.nodes[sandbox.node]
                await sandbox.upload(here / "large", str(there / "large"))
                node.wire.delay = 0.01  # so that it is in the middle of it
                async with trio.open_nursery() as nursery:
                    before = node.wire.pieces
                    match when:
                        case "opening":
                            node.host.gate = trio.Event()
                            nursery.start_soon(expect_opening_to_fail, fleet, sandbox.node)
                            await wait_until(lambda: node.host.waiting == 1)
                        case "a run":
                            nursery.start_soon(expect_failure, sandbox, compute_for_ever)
                            await wait_until(lambda: sandbox.statistics().runs == 1)
                        case "an upload":
                            nursery.start_soon(expect_failure, sandbox, upload, here / "large", there / "again")
                            await wait_until(lambda: node.wire.pieces > before + 2)
                        case "a download":
                            nursery.start_soon(expect_failure, sandbox, download, there / "large", here / "new")
                            await wait_until(lambda: node.wire.pieces > before + 2)
                        case "a process":
                            nursery.start_soon(expect_failure, sandbox, run_process)
                            await wait_until(lambda: node.wire.pieces > before + 2)
                        case _:
                            pass
                    await node.wire.cut()
                    await node.node.left.wait()
                assert node.host.open == node.host.waiting == 0, "the node has ended what it had"
                with expect_lost(sandbox.node, "the connection"):
                    await sandbox.run("1")
                await assert_rest_goes_on(fleet, sandbox.node)


async def expect_opening_to_fail(fleet: Fleet, node: str) -> None:
    """Both nodes have as much left, and that one comes next: fill the other first."""
    async with fleet.host.open_sandbox() as other:
        assert other.node != node
        with expect_lost(node, "the connection"):
            async with fleet.host.open_sandbox():
                pass


async def expect_failure(sandbox: Sandbox, use: object, *arguments: object) -> None:
    with expect_lost(str(sandbox.node), "the connection"):
        await use(sandbox, *arguments)  # type: ignore[operator]


async def upload(sandbox: Sandbox, here: Path, there: Path) -> None:
    await sandbox.upload(here, str(there))


async def download(sandbox: Sandbox, there: Path, here: Path) -> None:
    await sandbox.download(str(there), here)


async def run_process(sandbox: Sandbox) -> None:
    await sandbox.run_process(["cat"], stdin=bytes(10**7), capture_stdout=True)


async def test_a_network_that_lets_no_new_connection_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node opens a sandbox, and its machine can't be connected to."""
    monkeypatch.setattr(_links, "PATIENCE", 0.5)
    async with open_fake_fleet("one") as fleet:
        node = fleet.nodes["one"]
        node.wire.deaf = True
        with pytest.raises(LinkError, match=r"to node one, .* did not come about: no answer within 0\.5 s") as info:
            async with fleet.host.open_sandbox():
                pass
        assert info.value.retry_safe
        assert node.wire.ignored == 1
        assert node.host.open == 0, "what was opened is ended"
        node.wire.deaf = False
        assert (await fleet.host.run("print(1)")).stdout == "1\n", "its share was given back"


async def test_cancelled_at_every_step() -> None:
    async with open_fake_fleet("one") as fleet:
        host = fleet.nodes["one"].host

        async def use() -> None:
            async with fleet.host.open_sandbox() as sandbox:
                await sandbox.run("1")

        async def check() -> None:
            # Opening that is given up ends there when the node hears of it.
            await wait_until(lambda: host.open == 0)
            numbers = fleet.host.statistics()
            assert numbers.sandboxes_open == numbers.tasks_waiting == numbers.nodes[0].sandboxes_open == 0

        assert await cancel_at_every_step(use, check=check) > 10
        async with fleet.host.open_sandbox(memory_mib=HALF), fleet.host.open_sandbox(memory_mib=HALF):
            pass  # all shares were given back


# --- It changes what is said ---


@pytest.mark.parametrize("to", [TO_USER, TO_NODE])
async def test_a_bit_that_changes_costs_the_connection(to: int) -> None:
    """TLS finds out; whose side that is says so, and the other sees an end."""
    text = "what came is not what the other side sent" if to == TO_USER else "the peer closed the connection"
    async with open_fake_fleet("one", "two") as fleet, fleet.host.open_sandbox() as sandbox:
        assert sandbox.node is not None
        node = fleet.nodes[sandbox.node]
        node.wire.spoiled.add((USERS, to))
        await fleet.host.prepare("python")  # says something there; a node that is lost is no error of it
        with expect_lost(sandbox.node, text):
            await sandbox.run("1")
        await node.node.left.wait()
        assert node.host.open == 0
        await assert_rest_goes_on(fleet, sandbox.node)


@pytest.mark.parametrize("to", [TO_USER, TO_NODE])
async def test_a_bit_that_changes_on_the_way_to_a_machine_costs_that_machine(to: int) -> None:
    text = "what came is not what the other side sent" if to == TO_USER else "the peer closed the connection"
    async with (
        open_fake_fleet("one") as fleet,
        fleet.host.open_sandbox() as first,
        fleet.host.open_sandbox() as second,
    ):
        node = fleet.nodes["one"]
        node.wire.spoiled.add((MACHINES, to))
        with expect_lost("one", text):
            await first.run("print(1)")
        await wait_until(lambda: node.host.machines[0].failure is not None)
        assert (await second.run("print(2)")).stdout == "2\n"
        assert not fleet.host.statistics().nodes[0].lost
