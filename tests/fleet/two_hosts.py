"""A fleet whose node is on another host, as far as the kernel can tell: ``python -m tests.fleet.two_hosts SCENARIO``.

Three network namespaces: this process, a router, and the node. The router forwards packets or drops them without a word, as a cut cable
or a switch that is down does. It needs a network namespace of its own to begin with: ``unshare --net``, as root or with ``--user --map-root-user``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import Literal

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import (
    HostConfig,
    Network,
    NetworkRule,
    NodeLostError,
    OutcomeUnknownError,
    RunFailedError,
    Sandbox,
    SandboxClosedError,
)
from trio_sandbox.fleet import FleetConfig, FleetHost
from trio_sandbox.fleet._host import open_fleet
from trio_sandbox.fleet._messages import NodeAddress

from .where import PORT

LEASE = 2.0
FORWARD = "/proc/sys/net/ipv4/ip_forward"


@attrs.define(eq=False)
class Hosts:
    """The router, and the node's process."""

    router: subprocess.Popen[str]
    node: subprocess.Popen[str]
    address: NodeAddress
    ends: contextlib.ExitStack

    def forward(self, on: bool) -> None:
        """Have the router pass packets on, or drop them."""
        inside(self.router.pid, f"echo {int(on)} > {FORWARD}")

    def answer(self, pid: int, text: str) -> None:
        """Have a web server that answers *text* on the loopback of a process's network namespace."""
        command = [*entering(pid), sys.executable, "-m", "tests.fleet.where", text]
        server = self.ends.enter_context(subprocess.Popen(command, stdout=-1, stderr=-3, text=True))
        self.ends.callback(server.kill)
        assert server.stdout is not None
        server.stdout.readline()

    def flap(self, off: str, on: str) -> None:
        """Have the router drop packets for *off* seconds, pass them on for *on* seconds, and so on until the end."""
        script = f"while true; do echo 0 > {FORWARD}; sleep {off}; echo 1 > {FORWARD}; sleep {on}; done"
        self.ends.callback(self.ends.enter_context(subprocess.Popen(shell(self.router.pid, script))).kill)


def entering(pid: int) -> list[str]:
    """Give the beginning of a command that is run in the network namespace of a process."""
    return ["nsenter", f"--target={pid}", "--net"]


def shell(pid: int, script: str) -> list[str]:
    """Give the command for a line of shell in the network namespace of a process."""
    return [*entering(pid), "sh", "-ec", script]


def inside(pid: int, script: str) -> None:
    """Run a line of shell in the network namespace of a process."""
    subprocess.run(shell(pid, script), check=True)


@contextlib.contextmanager
def two_hosts(*, machines: bool = False) -> Generator[Hosts]:
    """Yield a node that is reached through a router; with *machines* its sandboxes are virtual machines."""
    with contextlib.ExitStack() as ends:

        def start(command: str) -> subprocess.Popen[str]:
            """Start a command in a namespace of its own; it begins when a line is written to it."""
            waiting = ["unshare", "--net", "sh", "-c", f"echo; read line; exec {command}"]
            process = ends.enter_context(subprocess.Popen(waiting, stdin=-1, stdout=-1, text=True))
            ends.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            return process

        ours, router = os.getpid(), start("sleep infinity")
        node = start(f"{sys.executable} -m tests.fleet.far_node 10.77.2.1 {LEASE}{' machines' if machines else ''}")
        for pid, script in (
            (ours, "ip link set lo up; ip link add user0 type veth peer name user1"),
            (ours, f"ip link set user1 netns {router.pid}; ip addr add 10.77.1.1/24 dev user0; ip link set user0 up"),
            (ours, "ip route add default via 10.77.1.2"),
            (router.pid, "ip addr add 10.77.1.2/24 dev user1; ip link set user1 up"),
            (router.pid, f"ip link add node1 type veth peer name node0; ip link set node0 netns {node.pid}"),
            (router.pid, f"ip addr add 10.77.2.2/24 dev node1; ip link set node1 up; echo 1 > {FORWARD}"),
            (node.pid, "ip link set lo up; ip addr add 10.77.2.1/24 dev node0; ip link set node0 up"),
            (node.pid, "ip route add default via 10.77.2.2"),
        ):
            inside(pid, script)
        assert node.stdin is not None
        assert node.stdout is not None
        node.stdin.write("go\n")
        node.stdin.flush()
        yield Hosts(router, node, pickle.loads(base64.b64decode(node.stdout.readline())), ends)


async def compute_for_ever(sandbox: Sandbox) -> None:
    await sandbox.run("import time; time.sleep(1000)")


# --- Scenarios ---


async def cut_for_a_second(hosts: Hosts, host: FleetHost) -> None:
    """A run takes longer, and nothing is lost."""
    async with host.open_sandbox() as sandbox:
        await sandbox.run("x = 6")
        hosts.forward(False)
        async with trio.open_nursery() as nursery:
            results: list[str] = []

            async def run() -> None:
                results.append((await sandbox.run("print(x * 7)")).stdout)

            nursery.start_soon(run)
            await trio.sleep(1)
            assert results == []
            hosts.forward(True)
        assert results == ["42\n"]
        print("a run went on after its network had been cut for a second")


async def cut_for_ever(hosts: Hosts, host: FleetHost, *, busy: bool) -> None:
    """Both sides find out by themselves: by questions of their kernels where they say nothing, and by what nobody acknowledges."""
    async with host.open_sandbox() as sandbox:
        await sandbox.run("x = 6")
        began = trio.current_time()
        if busy:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut_when, hosts, lambda: sandbox.statistics().runs == 2)
                with pytest.raises(OutcomeUnknownError, match="node far") as info:
                    await compute_for_ever(sandbox)
            assert isinstance(info.value.__cause__, NodeLostError)
        else:
            hosts.forward(False)
            await wait_until(lambda: host.statistics().nodes[0].lost)
        print(f"the user knew after {trio.current_time() - began:.1f} s; lease: {LEASE:g} s")
        with pytest.raises(SandboxClosedError, match="node far") as closed:
            await sandbox.run("1")
        assert isinstance(closed.value.__cause__, NodeLostError)
        assert closed.value.__cause__.node == "far"
        assert "timed out" in str(closed.value.__cause__)
        print(f"it said: {closed.value.__cause__}")
        await trio.to_thread.run_sync(hosts.node.wait)
        print(f"the node had ended after {trio.current_time() - began:.1f} s")
        assert hosts.node.stdout is not None
        assert hosts.node.stdout.read() == "left 0\n"


async def cut_when(hosts: Hosts, condition: Callable[[], bool]) -> None:
    await wait_until(condition)
    hosts.forward(False)


async def cut_while_sending(hosts: Hosts, host: FleetHost) -> None:
    """What is under way nobody acknowledges; kernels by themselves would send it again for a quarter of an hour."""
    async with host.open_sandbox() as sandbox, trio.open_nursery() as nursery:
        began = trio.current_time()
        nursery.start_soon(cut_when, hosts, lambda: trio.current_time() > began + 0.5)
        with pytest.raises(OutcomeUnknownError, match="node far") as info:
            await sandbox.run_process(["sh", "-c", "while true; do cat > /dev/null; done"], stdin=bytes(10**9))
        assert isinstance(info.value.__cause__, NodeLostError)
        print(f"the user knew {trio.current_time() - began - 0.5:.1f} s after the cut; it said: {info.value.__cause__}")
        await trio.to_thread.run_sync(hosts.node.wait)
        assert hosts.node.stdout is not None
        assert hosts.node.stdout.read() == "left 0\n"


async def cut_while_connecting(hosts: Hosts, host: FleetHost) -> None:
    """A network that was cut while nobody said anything: an opening finds out."""
    hosts.forward(False)
    with pytest.raises((OutcomeUnknownError, SandboxClosedError), match="node far") as info:
        async with host.open_sandbox():
            pass
    assert isinstance(info.value.__cause__, NodeLostError)


async def lossy(hosts: Hosts, host: FleetHost) -> None:
    """A quarter of all packets is lost, those of 50 ms at a time: everything works, slower."""
    hosts.flap("0.05", "0.15")
    async with host.open_sandbox() as sandbox:
        for number in range(5):
            assert (await sandbox.run(f"print({number})")).stdout == f"{number}\n"
        data = os.urandom(500_000)
        done = await sandbox.run_process(["cat"], stdin=data, capture_stdout=True)
        assert done.stdout == data
        with trio.move_on_after(0.3) as scope:
            await compute_for_ever(sandbox)
        assert scope.cancelled_caught
        assert (await sandbox.run("print('on')")).stdout == "on\n"
    assert not host.statistics().nodes[0].lost
    print("runs, a process's 500 kB and a cancellation came through")


async def connections(hosts: Hosts, host: FleetHost, *, made_by: str) -> None:
    """A guest of the node reaches a server on the loopback of whoever makes its connections, and no other."""
    hosts.answer(os.getpid(), "program")
    hosts.answer(hosts.node.pid, "node")
    rule = NetworkRule("where.test", to=("127.0.0.1", PORT))
    code = "from urllib.request import urlopen; print(urlopen('http://where.test/').read().decode())"
    async with host.open_sandbox("python", network=Network.allow(rule)) as sandbox:
        for _ in range(3):
            assert (await sandbox.run(code)).stdout == f"{made_by}\n"
        # The policy, and what is counted, are the program's either way.
        with pytest.raises(RunFailedError):
            await sandbox.run(code.replace("where", "elsewhere"), check=True)
        assert sandbox.network_statistics().connections == 3
        print(f"connections were made by the {made_by}")


#: By what they open a fleet of virtual machines with.
CONNECTIONS: dict[str, Literal["program", "node"]] = {
    "connections_of_the_program": "program",
    "connections_of_the_node": "node",
}
SCENARIOS: dict[str, Callable[[Hosts, FleetHost], Awaitable[None]]] = {
    "cut_for_a_second": cut_for_a_second,
    "cut_for_ever_idle": lambda hosts, host: cut_for_ever(hosts, host, busy=False),
    "cut_for_ever_busy": lambda hosts, host: cut_for_ever(hosts, host, busy=True),
    "cut_while_sending": cut_while_sending,
    "cut_while_connecting": cut_while_connecting,
    "lossy": lossy,
}


async def main(scenario: str) -> None:
    made_by = CONNECTIONS.get(scenario)
    config = FleetConfig(lease=LEASE, connections=made_by or "program")
    with trio.fail_after(300 if made_by else 60), two_hosts(machines=made_by is not None) as hosts:
        async with open_fleet(HostConfig(), config) as (host, members):
            await members.join(hosts.address)
            if made_by is not None:
                await connections(hosts, host, made_by=made_by)
            else:
                await SCENARIOS[scenario](hosts, host)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
