"""Hosts that give out more memory than there is, with real machines: whom the guard puts to sleep, and that nothing is lost."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from tests._leaks import child_pids, nothing_left, wait_until
from tests._memory import TOTAL_MIB, MadeUpMemory
from tests.documented import ROOT
from trio_sandbox import CapacityError, Host, HostConfig, Sandbox, SnapshotError, Timeouts, open_host
from trio_sandbox._cgroups import own_groups
from trio_sandbox.machines import MemoryStatistics

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("python_image", "system_disk")]


async def run(sandbox: Sandbox, code: str) -> str:
    result = await sandbox.run(code)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def seen(host: Host) -> MemoryStatistics:
    numbers = host.statistics().admission.memory
    assert numbers is not None
    return numbers


async def test_the_idle_sleep_the_busy_do_not_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MadeUpMemory(tmp_path, monkeypatch)
    config = HostConfig(memory_overcommit=4, vcpu_budget=50, timeouts=Timeouts(admission=2))
    with nothing_left():
        async with open_host(config) as host:
            alone = child_pids()
            async with host.open_sandbox() as idle, host.open_sandbox() as busy, host.open_sandbox() as haunted:
                await run(idle, "x = [1, 2]; open('f', 'w').write('mine')")
                await run(haunted, "import threading\nt = threading.Thread(target=threading.Event().wait); t.start()")
                assert host.statistics().admission.memory_mib_reserved == 3 * 90
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run, busy, "import time; time.sleep(8); y = 1")
                    memory.set(500)
                    await wait_until(lambda: seen(host).put_to_sleep == 1)
                    assert idle.statistics().hibernated
                    assert host.statistics().admission.memory_mib_reserved == 2 * 90
                    assert len(child_pids()) == len(alone) + 2
                    # There is no room for another, nor for one that would wake up; that costs nothing.
                    with pytest.raises(
                        CapacityError, match="memory was tight for 2 s: of 20000 MiB in the machine 500"
                    ):
                        async with host.open_sandbox():
                            pytest.fail("there is no room")
                    with pytest.raises(SnapshotError, match="did not wake up, and still hibernates") as caught:
                        await idle.run("x")
                    assert caught.value.retry_safe
                assert (await run(busy, "print(y)"), busy.statistics().hibernations) == ("1", 0)
                assert haunted.statistics().hibernations == 0
                assert (seen(host).level, seen(host).put_to_sleep) == ("short", 1)
                memory.set(TOTAL_MIB)
                assert await run(idle, "x.append(3); print(x, open('f').read())") == "[1, 2, 3] mine"
                assert not idle.statistics().hibernated
                assert seen(host).level == "easy"
                # Closed asleep, by the guard.
                memory.set(0)
                await wait_until(lambda: seen(host).put_to_sleep == 2)


async def test_spares_go_before_a_sandbox_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MadeUpMemory(tmp_path, monkeypatch)
    config = HostConfig(memory_overcommit=2, warm={"python": 1})
    with nothing_left():
        async with open_host(config) as host, host.open_sandbox() as sandbox:
            await run(sandbox, "x = 1")
            await wait_until(lambda: host.statistics().warm.ready == 1)
            memory.set(0)
            await wait_until(lambda: sandbox.statistics().hibernated)
            assert (host.statistics().warm.ready, host.statistics().warm.evicted) == (0, 1)
            memory.set(TOTAL_MIB)
            assert await run(sandbox, "print(x)") == "1"


# --- The kernel's own numbers ---

_LIMIT = 1024 * 2**20


@pytest.fixture
def small_group() -> Generator[Path]:
    """Give a control group of 1 GiB, of either version, below our own."""
    if os.geteuid() != 0:
        pytest.skip("only root can make control groups")
    for directory, version in own_groups("memory"):
        group = directory / f"trio-sandbox-density-{os.getpid()}"
        limit = group / ("memory.max" if version == 2 else "memory.limit_in_bytes")
        try:
            group.mkdir()
        except OSError as exc:
            pytest.skip(f"no control group can be made in {directory}: {exc.strerror}")
        try:
            if limit.exists():
                limit.write_text(str(_LIMIT))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("memory is not counted for the groups in our own")


def killed_in(group: Path) -> int:
    """Return how many processes the kernel has killed there for want of memory."""
    version_2 = group / "memory.events"
    text = (version_2 if version_2.exists() else group / "memory.oom_control").read_text()
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1])


async def test_the_kernel_kills_nobody(small_group: Path) -> None:
    enter = 'echo 0 > "$1" && shift && exec "$@"'
    done = await trio.run_process(
        [
            "sh",
            "-c",
            enter,
            "sh",
            str(small_group / "cgroup.procs"),
            sys.executable,
            "-m",
            "tests.qemu._density_in_group",
        ],
        cwd=ROOT,
        capture_stdout=True,
    )
    seen = json.loads(done.stdout)
    assert killed_in(small_group) == 0, seen
    whole = str(120 << 20)
    assert 2 <= seen["busy"] < 6, seen
    assert seen["busy answer"] == [f"{whole}\n"] * seen["busy"]
    assert seen["busy slept"] == 0
    assert re.search(
        r"memory was tight for 3 s: of 1024 MiB allowed by \S+ \d+ MiB are left, and 256 MiB", seen["refused"]
    )
    # Those that are idle make room for the others, as often as it takes.
    assert seen["idle slept"] >= 1
    assert seen["idle answer"] == [f"{number} {whole}\n" for number in range(6)]
