"""Sandboxes of a fleet: nodes in this process, over real TCP and TLS, and agents without virtual machines."""

from __future__ import annotations

import logging
import socket
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from tests._leaks import nothing_left, wait_until
from trio_sandbox import (
    CapacityError,
    DrainingError,
    FleetError,
    HostConfig,
    Image,
    ImageBuildError,
    LinkError,
    NodeLostError,
    OutcomeUnknownError,
    SandboxClosedError,
    SandboxConfig,
    VmDiedError,
    WarmupError,
    WrongNodeError,
)
from trio_sandbox._metadata import version
from trio_sandbox.fleet import FleetConfig, _client, _keeper, _machine
from trio_sandbox.fleet._actor import NodeProcess
from trio_sandbox.fleet._client import MOST_SANDBOXES, NodeClient
from trio_sandbox.fleet._host import open_fleet
from trio_sandbox.fleet._lease import Lease
from trio_sandbox.fleet._links import connect
from trio_sandbox.fleet._messages import Call, Open, decode_all
from trio_sandbox.fleet._node import serve_node
from trio_sandbox.fleet._stock import Stock
from trio_sandbox.sandbox import Sandbox
from trio_sandbox.wire import MAX_STREAMS

from ._fleet import FakeNode, Fleet, LocalHost, open_fake_fleet, start_node

# --- Who ends what ---


async def test_a_run_on_a_node() -> None:
    with nothing_left():
        async with open_fake_fleet("one") as fleet:
            async with fleet.host.open_sandbox("python") as sandbox:
                assert sandbox.node == "one"
                assert (await sandbox.run("x = 6\nprint(x * 7)")).stdout == "42\n"
                assert (await sandbox.run("x")).value == "6"
                assert fleet.nodes["one"].host.open == 1
            assert fleet.nodes["one"].host.open == 0, "leaving the block waits for the end"
            with pytest.raises(SandboxClosedError, match="block has exited"):
                await sandbox.run("x")
            assert (await fleet.host.run("print(1)")).stdout == "1\n"


async def test_leaving_the_fleet_ends_all_of_it() -> None:
    with nothing_left():
        async with open_fake_fleet("one", "two") as fleet:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(hold_sandbox, fleet)
                await wait_until(lambda: fleet.host.statistics().sandboxes_open == 3)
                nursery.cancel_scope.cancel()
        assert [node.host.open for node in fleet.nodes.values()] == [0, 0]
        with pytest.raises(SandboxClosedError, match="block has exited"):
            async with fleet.host.open_sandbox():
                pass


async def hold_sandbox(fleet: Fleet) -> None:
    async with fleet.host.open_sandbox():
        await trio.sleep_forever()


async def test_a_node_and_its_user_that_lose_each_other() -> None:
    """As when either of them is killed: a connection ends, and nothing is said."""
    async with open_fake_fleet("one", "two") as fleet:
        one = fleet.nodes["one"]
        async with (
            fleet.host.open_sandbox() as first,
            fleet.host.open_sandbox() as second,
            trio.open_nursery() as nursery,
        ):
            lost, kept = (first, second) if first.node == "one" else (second, first)
            nursery.start_soon(expect_lost, lost)
            await wait_until(lambda: lost.statistics().runs == 1)
            await one.wire.cut()
            await one.node.left.wait()
            assert one.host.open == 0, "the node has ended what it had"
            with pytest.raises(
                SandboxClosedError, match="was not sent: the sandbox's virtual machine on node one is gone"
            ) as info:
                await lost.run("1")
            assert isinstance(info.value.__cause__, NodeLostError)
            assert info.value.__cause__.node == "one"
            assert info.value.retry_safe
            assert (await kept.run("print('here')")).stdout == "here\n"
            async with fleet.host.open_sandbox() as other:
                assert other.node == "two"
        states = {node.name: node.lost for node in fleet.host.statistics().nodes}
        assert states == {"one": True, "two": False}


async def expect_lost(sandbox: Sandbox) -> None:
    text = f"the virtual machine on node {sandbox.node} ended during a run"
    with pytest.raises(OutcomeUnknownError, match=text) as info:
        await sandbox.run("import time; time.sleep(1000)")
    assert isinstance(info.value.__cause__, NodeLostError)
    assert not info.value.retry_safe


async def test_the_connection_of_one_machine_that_ends_costs_that_machine() -> None:
    async with (
        open_fake_fleet("one") as fleet,
        fleet.host.open_sandbox() as first,
        fleet.host.open_sandbox() as second,
    ):
        one = fleet.nodes["one"]
        await one.wire.cut(1)  # the first is the user's
        with pytest.raises((OutcomeUnknownError, SandboxClosedError), match="node one"):
            await first.run("1")
        await wait_until(lambda: isinstance(one.host.machines[0].failure, VmDiedError))
        assert (await second.run("print(2)")).stdout == "2\n"


async def test_a_machine_that_dies_says_why() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        machine = fleet.nodes["one"].host.machines[0]
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(OutcomeUnknownError, match="the virtual machine ended during a run") as info:
                    await sandbox.run("import time; time.sleep(1000)")
                assert isinstance(info.value.__cause__, VmDiedError)
                assert "of old age" in str(info.value.__cause__)

            nursery.start_soon(run)
            await wait_until(lambda: sandbox.statistics().runs == 1)
            machine.retire("of old age")
        with pytest.raises(SandboxClosedError, match="is gone") as info:
            await sandbox.run("1")
        assert isinstance(info.value.__cause__, VmDiedError)
        assert sandbox.statistics().qemu_pid is None


def end_machine(node: FakeNode) -> None:
    node.host.machines[0].retire("of old age")


def end_node(node: FakeNode) -> None:
    """As if its process were told to end."""
    node.node.left.set()


@pytest.mark.parametrize("end", [end_machine, end_node])
async def test_no_end_of_a_node_is_taken_for_the_guests(
    end: Callable[[FakeNode], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said on a machine's connection of its end; the news of it takes another, and may never come."""
    monkeypatch.setattr(_keeper, "_NEWS_PATIENCE", 0.0)
    monkeypatch.setattr(_machine, "_NEWS_SECONDS", 0.1)
    async with (
        open_fake_fleet("one") as fleet,
        fleet.host.open_sandbox() as sandbox,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(expect_lost, sandbox)
        await wait_until(lambda: sandbox.statistics().runs == 1)
        end(fleet.nodes["one"])


async def test_a_machine_that_is_given_up_here_is_ended_there() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        machine = fleet.nodes["one"].host.machines[0]
        sandbox._slot.machine.retire("its guest is not ours")  # pyright: ignore[reportPrivateUsage]
        await wait_until(lambda: machine.failure is not None)
        with pytest.raises(SandboxClosedError) as info:
            await sandbox.run("1")
        assert "its guest is not ours" in str(info.value.__cause__)


# --- Being opened ---


@pytest.mark.parametrize(
    "error",
    [
        ImageBuildError("no mmdebstrap"),
        WarmupError("it failed"),
        CapacityError("the disk is full"),
        OSError(28, "full"),
    ],
)
async def test_what_opening_raises_there_is_raised_here(error: Exception) -> None:
    host = LocalHost(failure=error)
    async with open_fake_fleet("one", one=host) as fleet:
        with pytest.raises(type(error)) as info:
            async with fleet.host.open_sandbox():
                pass
        assert str(info.value) == str(error)
        assert info.value.__notes__ == ["on node one"]
        assert (await fleet.host.run("print(1)")).stdout == "1\n", "its share was given back"


async def test_a_node_on_which_starts_fail_does_not_attract_all_others() -> None:
    """It has the most memory left, since nothing is opened there."""
    host = LocalHost(memory_mib=20_000)
    async with open_fake_fleet("one", "two", one=host) as fleet:

        async def where() -> str | None:
            async with fleet.host.open_sandbox() as sandbox:
                return sandbox.node

        with pytest.raises(ZeroDivisionError):
            async with fleet.host.open_sandbox():
                _ = 1 / 0
        assert await where() == "one", "what a block raises is no failure of its node"
        host.failure = ImageBuildError("the disk is full")
        with pytest.raises(ImageBuildError):
            await where()
        assert [await where() for _ in range(3)] == ["two"] * 3
        fleet.nodes["two"].node.draining = True
        await wait_until(lambda: any(node.draining for node in fleet.host.statistics().nodes))
        assert await where() == "one", "when no other is left"


async def test_cancelled_while_it_is_opened() -> None:
    host = LocalHost(gate=trio.Event())
    async with open_fake_fleet("one", one=host) as fleet:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold_sandbox, fleet)
                await wait_until(lambda: host.waiting == 1)
                scope.cancel()
        await wait_until(lambda: host.waiting == 0)
        host.gate = None
        assert (await fleet.host.run("print(1)")).stdout == "1\n"


async def test_a_node_that_is_lost_while_it_opens_a_sandbox() -> None:
    host = LocalHost(gate=trio.Event())
    async with open_fake_fleet("one", one=host) as fleet, trio.open_nursery() as nursery:

        async def expect_unknown() -> None:
            with pytest.raises(OutcomeUnknownError, match="node one was lost during opening a sandbox"):
                await hold_sandbox(fleet)

        nursery.start_soon(expect_unknown)
        await wait_until(lambda: host.waiting == 1)
        await fleet.nodes["one"].wire.cut()
    assert host.waiting == 0


async def test_waiting_for_room() -> None:
    host = LocalHost(memory_mib=800)  # for two
    async with open_fake_fleet("one", one=host) as fleet, trio.open_nursery() as nursery:
        opened: list[str] = []

        async def use(name: str) -> None:
            async with fleet.host.open_sandbox():
                opened.append(name)
                await ends[name].wait()

        ends = {name: trio.Event() for name in "abcd"}
        for name in "abcd":
            nursery.start_soon(use, name)
            await wait_until(lambda: len(opened) + fleet.host.statistics().tasks_waiting == "abcd".index(name) + 1)  # noqa: B023
        assert opened == ["a", "b"]
        ends["b"].set()
        await wait_until(lambda: len(opened) == 3)
        assert opened == ["a", "b", "c"]
        for end in ends.values():
            end.set()
    assert opened == ["a", "b", "c", "d"]


async def test_what_never_fits_is_refused_at_once() -> None:
    async with open_fake_fleet("one", "two") as fleet:
        with pytest.raises(CapacityError, match="never fits on a node of this fleet: one has 10000 MiB"):
            async with fleet.host.open_sandbox(memory_mib=20_000):
                pass
        assert [node.host.machines for node in fleet.nodes.values()] == [[], []]


async def test_with_overcommit_a_sandbox_counts_with_its_part_and_has_to_fit_as_a_whole() -> None:
    config = HostConfig(memory_overcommit=4)
    host = LocalHost(memory_mib=360)  # for one, or four that are idle
    async with open_fake_fleet("one", host_config=config, one=host) as fleet, AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(fleet.host.open_sandbox())
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with fleet.host.open_sandbox():
                    pytest.fail("there is no room for a fifth")

            nursery.start_soon(wait)
            await wait_until(lambda: fleet.host.statistics().tasks_waiting == 1)
            nursery.cancel_scope.cancel()
        with pytest.raises(
            CapacityError, match=r"takes 361 MiB, .* never fits on a node of this fleet: one has 360 MiB"
        ):
            async with fleet.host.open_sandbox(memory_mib=257):
                pytest.fail("its half does not help")


async def test_a_node_leaves_the_sandboxes_of_its_user_awake() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox():
        (keeper,) = fleet.nodes["one"].node._keepers.values()
        assert keeper.sandbox._slot.stays_awake()


async def test_a_node_that_joins_later_takes_who_waits() -> None:
    async with open_fake_fleet("one", slots=1) as fleet, trio.open_nursery() as nursery:
        async with fleet.host.open_sandbox():
            nursery.start_soon(hold_sandbox, fleet)
            await wait_until(lambda: fleet.host.statistics().tasks_waiting == 1)
            two = await start_node(nursery, "two", LocalHost())
            await fleet.members.join(two.address)
            await wait_until(lambda: two.host.open == 1)
            nursery.cancel_scope.cancel()


async def test_a_node_that_is_drained() -> None:
    async with open_fake_fleet("one", "two", slots=2) as fleet, fleet.host.open_sandbox() as kept:
        draining = fleet.nodes[str(kept.node)]
        draining.node.draining = True
        await wait_until(lambda: any(node.draining for node in fleet.host.statistics().nodes))
        async with fleet.host.open_sandbox() as first, fleet.host.open_sandbox() as second:
            assert kept.node not in (first.node, second.node)
        assert (await kept.run("print(1)")).stdout == "1\n", "what is there goes on"


async def test_a_node_that_has_begun_to_drain_starts_nothing() -> None:
    async with open_fake_fleet("one") as fleet:
        fleet.nodes["one"].node.draining = True
        with pytest.raises((DrainingError, CapacityError)) as info:
            await hold_sandbox(fleet)
        assert info.value.retry_safe


async def test_a_node_that_is_drained_as_it_joins() -> None:
    async with trio.open_nursery() as nursery, open_fake_fleet() as fleet:
        node = await start_node(nursery, "one", LocalHost())
        node.node.draining = True
        await fleet.members.join(node.address)
        with pytest.raises(CapacityError, match="no node is there"):
            await hold_sandbox(fleet)
        nursery.cancel_scope.cancel()


async def test_a_node_that_is_lost_as_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has said what it has, and nobody has heard of its end before it is among the others."""
    serve = NodeClient.serve

    async def serve_and_lose(client: NodeClient, *, task_status: trio.TaskStatus[None]) -> None:
        monkeypatch.setattr(NodeClient, "serve", serve)
        await serve(client, task_status=Started(client, task_status))

    @attrs.frozen
    class Started:
        client: NodeClient
        task_status: trio.TaskStatus[None]

        def started(self, value: None = None) -> None:
            self.task_status.started(value)
            self.client.lose("the test says so")

    async with trio.open_nursery() as nursery, open_fake_fleet() as fleet:
        lost, other = [await start_node(nursery, name, LocalHost()) for name in ("lost", "other")]
        monkeypatch.setattr(NodeClient, "serve", serve_and_lose)
        await fleet.members.join(lost.address)
        with pytest.raises(CapacityError, match="no node is there"):
            await hold_sandbox(fleet)
        await fleet.members.join(other.address)
        async with fleet.host.open_sandbox() as sandbox:
            assert sandbox.node == "other"
        assert {node.name: node.lost for node in fleet.host.statistics().nodes} == {"lost": True, "other": False}
        nursery.cancel_scope.cancel()


async def test_what_a_node_can_not_have(tmp_path: Path) -> None:
    async with open_fake_fleet("one") as fleet:
        with pytest.raises(ValueError, match="push the image to a registry"):
            async with fleet.host.open_sandbox(Image.oci(f"oci-archive:{tmp_path}/app.tar")):
                pass
        assert fleet.nodes["one"].host.machines == []


async def test_images_are_prepared_everywhere() -> None:
    async with open_fake_fleet("one", "two") as fleet:
        image = Image("python").packages("idna")
        await fleet.host.prepare(image)
        assert [node.host.prepared for node in fleet.nodes.values()] == [[image], [image]]


async def test_what_a_node_says_of_a_sandbox() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox(memory_mib=512) as sandbox:
        assert sandbox.accelerator == "tcg"
        assert sandbox.config.memory_mib == 512
        await wait_until(lambda: sandbox.console() == "no console")
        assert sandbox.statistics().qemu_pid == fleet.nodes["one"].host.machines[0].pid
        (node,) = fleet.host.statistics().nodes
        assert (node.name, node.sandboxes_open, node.lost) == ("one", 1, False)
        await wait_until(lambda: fleet.host.statistics().nodes[0].host.sandboxes_open == 1)  # type: ignore[union-attr]


# --- Who may connect ---


async def test_who_is_not_the_node_is_told_nothing() -> None:
    async with trio.open_nursery() as nursery:
        true, false = [await start_node(nursery, "one", LocalHost()) for _ in range(2)]
        address = attrs.evolve(true.address, port=false.address.port)
        async with open_fleet(HostConfig(), FleetConfig()) as (_, members):
            with pytest.raises(WrongNodeError, match="nothing was said to it"):
                await members.join(address)
            await members.join(true.address)
        assert not false.node.connected.is_set()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secret", [b"x" * 32, b"x", b""])
async def test_a_wrong_secret_opens_nothing(secret: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with open_fake_fleet("one") as fleet:
        address = fleet.nodes["one"].address
        with caplog.at_level(logging.WARNING, "trio_sandbox.fleet"):
            async with await connect(address, secret, lease=Lease(4)) as stream:
                if len(secret) == 32:
                    assert await stream.receive_some() == b"", "the node broke it off, and said nothing"
            await wait_until(lambda: bool(caplog.records))
        assert [record.message for record in caplog.records] == ["a connection with a wrong secret was broken off"]
        assert (await fleet.host.run("print(1)")).stdout == "1\n"


async def test_a_secret_is_good_once() -> None:
    async with open_fake_fleet("one") as fleet:
        address = fleet.nodes["one"].address
        async with open_fleet(HostConfig(), FleetConfig()) as (_, thief):
            with pytest.raises(LinkError):
                await thief.join(address)
        assert (await fleet.host.run("print(1)")).stdout == "1\n"


async def test_nobody_is_there() -> None:
    async with trio.open_nursery() as nursery:
        node = await start_node(nursery, "one", LocalHost())
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        async with open_fleet(HostConfig(), FleetConfig()) as (_, members):
            with pytest.raises(LinkError, match=r"to node one, at 127\.0\.0\.1, port .*: .*Connection refused"):
                await members.join(attrs.evolve(node.address, port=port))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("address", ["localhost", "192.0.2.1", "2001:db8::1", "::1"])
async def test_a_node_listens_whatever_ray_calls_its_address(address: str) -> None:
    """A name, an address that its machine does not have itself, as behind NAT, and one of either kind."""
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    async with trio.open_nursery() as nursery, open_fake_fleet() as fleet:
        host = LocalHost()
        stock = Stock(host.cache, host.images, host.directory, host.check, host.notes)
        serve = partial(serve_node, host, stock, host.notes, "one", address=address, lease=4, patience=30)
        where, _ = await nursery.start(serve)
        assert where.host == address
        reached = {"192.0.2.1": "127.0.0.1", "2001:db8::1": "::1"}.get(address, address)
        await fleet.members.join(attrs.evolve(where, host=reached))
        assert (await fleet.host.run("print(1)")).stdout == "1\n"


def test_a_node_with_another_version_of_the_library_says_so() -> None:
    process = NodeProcess("0.0.1", "one", "127.0.0.1", HostConfig(), FleetConfig())
    (answer,) = decode_all(process.start())
    assert isinstance(answer.error, FleetError)
    assert str(answer.error) == (
        f"node one has version {version()} of trio-sandbox, and this program has 0.0.1: install the same on both"
    )
    assert process.drain(None) == 0
    process.stop()


# --- Bounds ---


async def test_a_slow_reader_stops_its_writer_and_nobody_else() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        flood = ["sh", "-c", "head -c 50000000 /dev/zero; echo done >&2"]
        async with sandbox.open_process(flood, stdin=False) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            machine = fleet.nodes["one"].host.machines[0]
            for _ in range(10):
                await sandbox.run_process(["sleep", "0.02"])  # it goes on meanwhile
            assert machine.guest.statistics().bytes_received < 4_000_000, "both wires and the guest keep little"
            assert process.returncode is None
            size = 0
            async for data in process.stdout:
                size += len(data)
            assert size == 50_000_000
            assert await process.stderr.receive_some() == b"done\n"


async def test_input_that_nobody_reads_waits() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        async with sandbox.open_process(["sleep", "1000"]) as process:
            assert process.stdin is not None
            with trio.move_on_after(1):
                await process.stdin.send_all(bytes(50_000_000))
                pytest.fail("nobody read it")
            machine = fleet.nodes["one"].host.machines[0]
            assert machine.guest.statistics().bytes_sent < 4_000_000


async def test_many_streams_at_once() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        outputs: list[bytes] = []

        async def echo(number: int) -> None:
            done = await sandbox.run_process(["cat"], stdin=b"%d" % number * 1000, capture_stdout=True)
            outputs.append(done.stdout)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(echo, number)
        assert sorted(outputs) == sorted(b"%d" % number * 1000 for number in range(20))


async def test_an_error_of_the_guest_is_the_same() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox("python", SandboxConfig()) as sandbox:
        with pytest.raises(FileNotFoundError):
            await sandbox.run_process(["no-such-program"])
        with pytest.raises(subprocess.CalledProcessError):
            await sandbox.run_process(["false"])
        with pytest.raises(ConnectionRefusedError):
            await sandbox.open_tcp_stream(1)


async def test_as_much_as_a_connection_to_a_node_carries() -> None:
    async with open_fake_fleet("one") as fleet:
        (client,) = fleet.members.clients
        link = client._link  # pyright: ignore[reportPrivateUsage]
        assert link is not None
        streams = [link.open_stream({}) for _ in range(MAX_STREAMS - link.statistics().open_streams)]
        with pytest.raises(
            CapacityError, match="was not sent: too much is under way between this program and node one"
        ):
            await hold_sandbox(fleet)
        for stream in streams:
            stream.close()
        await wait_until(lambda: link.statistics().open_streams == 1)
        assert (await fleet.host.run("print(1)")).stdout == "1\n"


async def test_more_requests_than_there_may_be_wait_for_others() -> None:
    under_way, go_on = 0, trio.Event()

    async def operate() -> None:
        nonlocal under_way
        under_way += 1
        await go_on.wait()

    async with open_fake_fleet("one") as fleet, trio.open_nursery() as nursery:
        fleet.nodes["one"].node._stock._operations["wait"] = operate  # pyright: ignore[reportPrivateUsage]
        (client,) = fleet.members.clients
        most = _client._MOST_REQUESTS  # pyright: ignore[reportPrivateUsage]
        for _ in range(MAX_STREAMS + 10):
            nursery.start_soon(client.request, Call("wait"), "waiting")
        await wait_until(lambda: under_way == most)
        async with (
            fleet.members.placed("python", SandboxConfig()),
            client.hold(Open("python", SandboxConfig(), None), "opening a sandbox"),
        ):
            assert under_way == most, "room for sandboxes is left"
        go_on.set()
    assert under_way == MAX_STREAMS + 10


async def test_a_node_has_no_more_sandboxes_than_its_connection_can_keep() -> None:
    async with open_fake_fleet("one", slots=10**6, one=LocalHost(memory_mib=10**9)) as fleet:
        placement = fleet.members._placement  # pyright: ignore[reportPrivateUsage]
        assert placement._nodes["one"].capacity.slots == MOST_SANDBOXES  # pyright: ignore[reportPrivateUsage]
