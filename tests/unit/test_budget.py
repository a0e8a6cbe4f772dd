"""What a machine and its control groups leave, read from files as the kernel writes them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trio_sandbox import constants
from trio_sandbox.machines._budget import Limit, charge_mib, cpu_limit, memory_limit, memory_rooms
from trio_sandbox.machines._memory import Room, Stalls

GIB = 2**30
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "34 31 0:31 {shown} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {shown} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
UNLIMITED_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give the root of a machine with 16 GiB, 10 of them available, and no control groups."""
    meminfo = f"MemTotal: {16 * 2**20} kB\nMemFree: {2**20} kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0"
    write(
        tmp_path,
        {
            "proc/meminfo": meminfo,
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/vda rw",
        },
    )
    return tmp_path


def share(mib: int) -> int:
    return int(mib * constants.MEMORY_BUDGET_SHARE)


def test_without_control_groups_it_is_what_the_machine_has_left(root: Path) -> None:
    limit = memory_limit(root)
    assert limit.amount == share(10 * 1024)
    assert "of 16384 MiB in the machine 10240 MiB were left" in limit.reason


def test_version_2_any_group_above_ours_may_be_the_narrowest(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/system.slice/our.service",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/system.slice/memory.max": 2 * GIB,
            "sys/fs/cgroup/system.slice/memory.current": GIB,
            "sys/fs/cgroup/system.slice/memory.stat": f"anon {GIB}\ninactive_file {GIB // 4}\nactive_file {GIB // 4}",
            "sys/fs/cgroup/system.slice/our.service/memory.max": "max",
            "sys/fs/cgroup/system.slice/our.service/memory.high": "max",
            "sys/fs/cgroup/system.slice/our.service/memory.current": GIB,
        },
    )
    limit = memory_limit(root)
    assert limit.amount == share(1024 + 512), "page cache counts as free"
    assert "of 2048 MiB allowed by /sys/fs/cgroup/system.slice 1536 MiB were left" in limit.reason
    write(root, {"sys/fs/cgroup/system.slice/our.service/memory.high": GIB + GIB // 2})
    assert memory_limit(root).amount == share(512)


def test_version_1(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/jobs/1\n3:cpu,cpuacct:/jobs/1\n1:name=systemd:/\n0::/",
            "proc/self/mountinfo": V1_MOUNTS.format(shown="/") + V2_MOUNT,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/memory/jobs/1/memory.usage_in_bytes": 3 * GIB,
            "sys/fs/cgroup/memory/jobs/1/memory.stat": f"cache {GIB}\ninactive_file 1\ntotal_inactive_file {GIB}",
        },
    )
    assert memory_limit(root).amount == share(2048)


def test_in_a_container_our_own_group_is_what_is_mounted(root: Path) -> None:
    # The path is the host's; the mount shows our part of it only, at its top.
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/docker/abc/inner",
            "proc/self/mountinfo": V1_MOUNTS.format(shown="/docker/abc"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 0,
            "sys/fs/cgroup/memory/inner/memory.limit_in_bytes": GIB,
            "sys/fs/cgroup/memory/inner/memory.usage_in_bytes": 0,
        },
    )
    assert memory_limit(root).amount == share(1024)
    # Nor need there be such a path at all, and with a name space of its own it may lead outside.
    for path in ("/elsewhere", "/../outside"):
        write(root, {"proc/self/cgroup": f"4:memory:{path}"})
        assert memory_limit(root).amount == share(2048)


PRESSURE = "some avg10={some:.2f} avg60=0.00 avg300=0.00 total=1\nfull avg10={full:.2f} avg60=0.00 avg300=0.00 total=1"


def test_stalls_are_those_of_the_machine_and_of_each_group(root: Path) -> None:
    assert memory_rooms(root) == [Room("in the machine", 10 * GIB, 16 * GIB)], "this kernel does not tell"
    write(
        root,
        {
            "proc/pressure/memory": PRESSURE.format(some=2, full=1.5),
            "proc/self/cgroup": "0::/outer/middle/ours",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/outer/memory.max": 4 * GIB,
            "sys/fs/cgroup/outer/memory.current": GIB,
            "sys/fs/cgroup/outer/memory.pressure": PRESSURE.format(some=3, full=0),
            # Without a limit of its own, what it waits for is that of the group above.
            "sys/fs/cgroup/outer/middle/memory.max": "max",
            "sys/fs/cgroup/outer/middle/memory.pressure": PRESSURE.format(some=40, full=10),
            "sys/fs/cgroup/outer/middle/ours/memory.max": GIB,
            "sys/fs/cgroup/outer/middle/ours/memory.current": GIB // 2,
            "sys/fs/cgroup/outer/middle/ours/memory.pressure": PRESSURE.format(some=0, full=0),
        },
    )
    assert memory_rooms(root) == [
        Room("in the machine", 10 * GIB, 16 * GIB, Stalls(0.4, 0.1)),
        Room("allowed by /sys/fs/cgroup/outer/middle/ours", GIB // 2, GIB, Stalls(0, 0)),
        Room("allowed by /sys/fs/cgroup/outer", 3 * GIB, 4 * GIB, Stalls(0.4, 0.1)),
    ]


def test_a_kernel_that_was_told_not_to_count_stalls(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"proc/pressure/memory": PRESSURE.format(some=50, full=50)})
    read = Path.read_text

    def refuse(path: Path, *arguments: str) -> str:
        if path.name == "memory" and path.parent.name == "pressure":
            raise OSError(
                errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)
            )  # psi=0: the file is there, and can't be read
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert [room.stalls for room in memory_rooms(root)] == [None]


@pytest.mark.parametrize(
    ("memory_mib", "overcommit", "charge"),
    [(256, 1, 360), (256, 1.0, 360), (256, 4, 90), (256, 7, 52), (128, 32, 8), (152, 1.5, 171)],
)
def test_a_sandbox_counts_with_a_part_of_what_it_may_have(memory_mib: int, overcommit: float, charge: int) -> None:
    assert constants.VM_OVERHEAD_MIB == 104
    assert charge_mib(memory_mib, overcommit) == charge


def test_more_used_than_allowed_leaves_nothing(root: Path) -> None:
    write(
        root,
        {
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": GIB,
            "sys/fs/cgroup/memory.current": 2 * GIB,
        },
    )
    assert memory_limit(root).amount == 0


def processors() -> int:
    return len(os.sched_getaffinity(0))


def test_processors_without_a_quota(root: Path) -> None:
    assert cpu_limit(root) == Limit(
        processors() * constants.VCPUS_PER_CORE,
        f"{constants.VCPUS_PER_CORE} for each of the {processors()} processors that this process may use",
    )


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"a/cpu.max": "50000 100000"}, 0.5),
        ({"a/b/cpu.max": "25000 100000", "a/cpu.max": "50000 100000"}, 0.25),
        ({"a/cpu.max": "100 100000"}, 0.001),
        ({"a/cpu.max": "max 100000"}, None),
        ({"a/cpu.max": "99900000 100000"}, None),
    ],
)
def test_processors_with_a_quota_of_version_2(root: Path, files: dict[str, object], cores: float | None) -> None:
    write(root, {"proc/self/cgroup": "0::/a/b", "proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/a/b/cgroup.procs": ""})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    expected = max(1, int((processors() if cores is None else cores) * constants.VCPUS_PER_CORE))
    assert cpu_limit(root).amount == expected


def test_processors_with_a_quota_of_version_1(root: Path) -> None:
    directory = "sys/fs/cgroup/cpu,cpuacct"
    write(
        root,
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/a",
            "proc/self/mountinfo": V1_MOUNTS.format(shown="/"),
            f"{directory}/cpu.cfs_quota_us": -1,
            f"{directory}/a/cpu.cfs_quota_us": 50000,
            f"{directory}/a/cpu.cfs_period_us": 100000,
        },
    )
    assert cpu_limit(root).amount == constants.VCPUS_PER_CORE // 2


def test_this_machine_has_limits() -> None:
    assert memory_limit().amount > 0
    assert cpu_limit().amount >= constants.VCPUS_PER_CORE // 2
