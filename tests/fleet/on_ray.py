"""A fleet on a Ray cluster of three nodes, all on this machine: ``nox -s fleet``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import (
    CapacityError,
    FleetError,
    HostConfig,
    NodeLostError,
    OutcomeUnknownError,
    Sandbox,
    SandboxClosedError,
    constants,
)
from trio_sandbox.fleet import FleetHost, _client, _machine, drain_node, open_ray_host, read_reports
from trio_sandbox.fleet._connection import NAMESPACE
from trio_sandbox.fleet._ray import import_ray

from ._cluster import CONFIG, FLEET, cluster_of, demands, hold_sandbox


@pytest.fixture(scope="module")
def cluster() -> Generator[Any]:
    with cluster_of(2) as cluster:
        yield cluster


@pytest.fixture
async def host(cluster: Any) -> AsyncGenerator[FleetHost]:
    async with open_ray_host(cluster.address, CONFIG, FLEET) as host:
        yield host


def qemu_of(sandbox: Sandbox) -> int:
    pid = sandbox.statistics().qemu_pid
    assert pid is not None
    return pid


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def process_of(sandbox: Sandbox) -> int:
    """Return the process id of our process on a sandbox's node."""
    pid = qemu_of(sandbox)
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
        # "pid (name) state parent ...", and a name may have spaces.
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


async def test_sandboxes_on_two_nodes(host: FleetHost, tmp_path: Path) -> None:
    assert [node.lost for node in host.statistics().nodes] == [False, False]
    async with host.open_sandbox() as first, host.open_sandbox() as second:
        assert first.node != second.node
        for sandbox in (first, second):
            assert (await sandbox.run("print(6 * 7)")).stdout == "42\n"
            await sandbox.path("greeting").write_text("hello")
            await sandbox.download("greeting", tmp_path / str(sandbox.node))
            assert (tmp_path / str(sandbox.node)).read_text() == "hello"
            done = await sandbox.run_process(["cat"], stdin=b"through", capture_stdout=True)
            assert done.stdout == b"through"
        pids = [qemu_of(sandbox) for sandbox in (first, second)]
        assert all(map(is_there, pids))
    assert not any(map(is_there, pids)), "leaving the blocks waits for their ends"


async def test_the_life_of_a_sandbox(host: FleetHost) -> None:
    async with host.open_sandbox() as sandbox:
        await sandbox.run("x = 1")
        checkpoint = await sandbox.checkpoint()
        await sandbox.run("x = 2")
        await sandbox.revert(checkpoint)
        assert (await sandbox.run("x")).value == "1"
        async with sandbox.fork(1) as (child,):
            assert child.node == sandbox.node
            await child.run("x = 3")
            assert [(await each.run("x")).value for each in (sandbox, child)] == ["1", "3"]
        await sandbox.hibernate()
        await sandbox.resume()
        assert (await sandbox.run("x")).value == "1"


OWN_RAY = """
    import trio
    from trio_sandbox import HostConfig
    from trio_sandbox.fleet import FleetConfig, open_ray_host

    trio._core._thread_cache.IDLE_TIMEOUT = 0.1

    async def main():
        config = HostConfig(memory_budget_mib=1500, vcpu_budget=4)
        async with open_ray_host(None, config, FleetConfig(start_timeout=120)) as host, host.open_sandbox() as sandbox:
            for _ in range(5):
                await trio.sleep(1)
                print((await sandbox.run("print('here')")).stdout, end="")

    trio.run(main)
"""


def test_a_ray_of_its_own_outlives_the_threads_of_trio() -> None:
    """What Ray starts dies with the thread that has started it, and Trio ends threads that have nothing to do.

    In a process of its own: Ray changes the environment of one that starts it.
    """
    command = [sys.executable, "-c", textwrap.dedent(OWN_RAY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "here\n" * 5, done.stderr


async def test_what_never_fits(host: FleetHost) -> None:
    with pytest.raises(CapacityError, match="never fits on a node"):
        async with host.open_sandbox(memory_mib=2000):
            pass


async def expect_lost(sandbox: Sandbox) -> None:
    with pytest.raises(OutcomeUnknownError, match=f"on node {sandbox.node} ended during") as info:
        await sandbox.run("import time; time.sleep(1000)")
    assert isinstance(info.value.__cause__, NodeLostError)


def kill_by_ray(sandbox: Sandbox) -> None:
    """Kill our process on a sandbox's node as Ray does."""
    ray = import_ray()
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    (name,) = [name for name in names if name.startswith(str(sandbox.node).rpartition("-")[2])]
    ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def kill_by_signal(sandbox: Sandbox) -> None:
    """Kill our process on a sandbox's node as the kernel does that is out of memory."""
    os.kill(process_of(sandbox), signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_by_ray, kill_by_signal])
async def test_our_process_on_a_node_is_killed(host: FleetHost, kill: Callable[[Sandbox], None]) -> None:
    async with (
        host.open_sandbox() as first,
        host.open_sandbox() as second,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(expect_lost, first)
        await wait_until(lambda: first.statistics().runs == 1)
        pid = qemu_of(first)
        kill(first)
        await wait_until(lambda: not is_there(pid))
        assert (await second.run("print('here')")).stdout == "here\n"
        assert first.node is not None
        with pytest.raises(SandboxClosedError, match=first.node) as info:
            await first.run("1")
        lost = info.value.__cause__
        assert isinstance(lost, NodeLostError)
        assert lost.node == first.node
        await wait_until(lambda: hasattr(lost, "__notes__"))
        assert "Ray says of our process there: The actor" in lost.__notes__[0]


async def test_our_process_on_a_node_hangs(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel answers for it, so that our own pings have to find out."""
    for module in (_client, _machine):
        monkeypatch.setattr(module, "SILENCE", 2.0)
    async with (
        open_ray_host(cluster.address, CONFIG, FLEET) as host,
        host.open_sandbox() as first,
        host.open_sandbox() as second,
    ):
        process, pid = process_of(first), qemu_of(first)
        os.kill(process, signal.SIGSTOP)
        try:
            await expect_lost(first)
            assert (await second.run("print('here')")).stdout == "here\n"
            assert is_there(pid), "who hangs can end nothing"
        finally:
            os.kill(process, signal.SIGCONT)
        await wait_until(lambda: not is_there(pid))


async def test_ray_kills_our_process_for_want_of_memory() -> None:
    """Its memory monitor does so when little memory of the machine is left, whoever has taken it."""
    used = 1 - available_bytes() / total_bytes()
    limit = used + 2 * 2**30 / total_bytes()
    with cluster_of(1, memory_usage_threshold=limit, memory_monitor_refresh_ms=100) as cluster:
        async with open_ray_host(cluster.address, CONFIG, FLEET) as host, host.open_sandbox() as sandbox:
            pid = qemu_of(sandbox)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_lost, sandbox)
                await wait_until(lambda: sandbox.statistics().runs == 1)
                with taken_memory(2**31 + 2**30):
                    await wait_until(lambda: not is_there(pid))
            with pytest.raises(SandboxClosedError) as info:
                await sandbox.run("1")
            lost = info.value.__cause__
            assert isinstance(lost, NodeLostError)
            await wait_until(lambda: hasattr(lost, "__notes__"))
            assert "memory" in lost.__notes__[0]


def total_bytes() -> int:
    return memory_of_machine("MemTotal")


def available_bytes() -> int:
    return memory_of_machine("MemAvailable")


def memory_of_machine(name: str) -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


@contextmanager
def taken_memory(size: int) -> Generator[None]:
    """Have another process take so many bytes of memory for a block."""
    command = [
        sys.executable,
        "-c",
        "import sys; taken = b'x' * int(sys.argv[1]); print('taken', flush=True); input()",
        str(size),
    ]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


# --- Room ---


@pytest.mark.parametrize(("slots", "memory_mib"), [(1, 1500), (3, 400)])
async def test_who_waits_is_shown_to_rays_autoscaler(slots: int, memory_mib: int) -> None:
    """Whatever it is that the nodes have no more of: sandboxes, or memory."""
    config = HostConfig(memory_budget_mib=memory_mib, vcpu_budget=4)
    with cluster_of(2, slots=slots) as cluster:
        async with open_ray_host(cluster.address, config, FLEET) as host, host.open_sandbox(), host.open_sandbox():
            assert demands(cluster) == []
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(hold_sandbox, host)
                one = {"trio_sandbox": 1.0, "memory": (256 + constants.VM_OVERHEAD_MIB) * 2.0**20}
                await wait_until(lambda: demands(cluster) == [one, one])
                nursery.cancel_scope.cancel()
            await wait_until(lambda: demands(cluster) == [])


# --- Nodes that come and go ---


async def test_a_node_of_rays_is_killed() -> None:
    with cluster_of(2) as cluster:
        async with open_ray_host(cluster.address, CONFIG, FLEET) as host:
            async with (
                host.open_sandbox() as first,
                host.open_sandbox() as second,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(expect_lost, first)
                await wait_until(lambda: first.statistics().runs == 1)
                pid = qemu_of(first)
                assert first.node is not None
                beginning = first.node.rpartition("-")[2]
                (node,) = [node for node in cluster.worker_nodes if node.node_id.startswith(beginning)]
                await trio.to_thread.run_sync(lambda: cluster.remove_node(node, allow_graceful=False))
                await wait_until(lambda: not is_there(pid))
                assert (await second.run("print('here')")).stdout == "here\n"
            # A node that joins later has sandboxes as well.
            cluster.add_node(num_cpus=1, resources={"trio_sandbox": 3})
            await wait_until(lambda: sum(not node.lost for node in host.statistics().nodes) == 2)
            async with host.open_sandbox() as third, host.open_sandbox() as fourth:
                assert third.node != fourth.node


async def test_a_node_is_drained(host: FleetHost) -> None:
    async with host.open_sandbox() as kept, trio.open_nursery() as nursery:
        assert kept.node is not None
        reports = await trio.to_thread.run_sync(read_reports)
        assert [report.host.sandboxes_open for report in reports if report.host and report.name == kept.node] == [1]
        left: list[int] = []

        async def drain() -> None:
            left.append(await trio.to_thread.run_sync(lambda: drain_node(str(kept.node), timeout=2)))

        nursery.start_soon(drain)
        await wait_until(lambda: any(node.draining for node in host.statistics().nodes))
        async with host.open_sandbox() as other:
            assert other.node != kept.node
            await wait_until(lambda: left == [1])
            assert (await other.run("print('here')")).stdout == "here\n"
        with pytest.raises(SandboxClosedError, match=kept.node):
            await kept.run("1")
        with pytest.raises(FleetError, match="no fleet has a node 'nowhere'; there are: "):
            await trio.to_thread.run_sync(lambda: drain_node("nowhere"))


DRIVER = """
    import sys, trio
    from trio_sandbox import HostConfig
    from trio_sandbox.fleet import FleetConfig, open_ray_host

    async def main():
        config = HostConfig(memory_budget_mib=1500, vcpu_budget=4)
        async with open_ray_host(sys.argv[1], config, FleetConfig(start_timeout=120)) as host:
            async with host.open_sandbox() as first, host.open_sandbox() as second:
                print(first.statistics().qemu_pid, second.statistics().qemu_pid, flush=True)
                await trio.sleep_forever()

    trio.run(main)
"""


def start_driver(address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
async def test_a_program_that_ends_takes_its_sandboxes_along(cluster: Any, end: signal.Signals) -> None:
    with start_driver(cluster.address) as driver:
        try:
            assert driver.stdout is not None
            pids = list(map(int, (await trio.to_thread.run_sync(driver.stdout.readline)).split()))
            assert len(pids) == 2
            assert all(map(is_there, pids))
            began = trio.current_time()
            os.kill(driver.pid, end)
            await wait_until(lambda: not any(map(is_there, pids)))
            print(f"after {end.name} its sandboxes were gone within {trio.current_time() - began:.1f} s")
        finally:
            driver.kill()
