"""What a running QEMU can do, against what the page on security says: red when it can do more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import cast

import attrs
import pytest
import trio

from trio_sandbox import (
    Checkpoint,
    ConfinementRequiredError,
    HostConfig,
    Sandbox,
    SandboxConfig,
    SnapshotError,
    open_host,
)
from trio_sandbox.host import Host
from trio_sandbox.qemu import Confinement, Vm
from trio_sandbox.qemu._confinement import prove_landlock
from trio_sandbox.sandbox import Lifecycle

pytestmark = pytest.mark.qemu


@pytest.fixture
async def host() -> AsyncGenerator[Host]:
    async with open_host() as host:
        yield host


def pid_of(sandbox: Sandbox) -> int:
    pid = sandbox.statistics().qemu_pid
    assert pid is not None
    return pid


def soft_and_hard(pid: int) -> dict[str, tuple[str, str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): (line[26:47].strip(), line[47:68].strip()) for line in lines}


async def test_limits_of_resources_hold_for_every_thread(host: Host) -> None:
    if not host.accelerator.confinement.limits:
        pytest.skip("this host has no prlimit")
    async with host.open_sandbox(config=SandboxConfig(vcpus=2)) as sandbox:
        await sandbox.run("1")
        pid = pid_of(sandbox)
        limits = soft_and_hard(pid)
        assert limits["Max core file size"] == ("0", "0")
        assert limits["Max open files"] == ("1024", "1024")
        soft, hard = limits["Max file size"]
        assert soft == hard
        assert 8 * 2**30 < int(hard) < 10 * 2**30
        if host.accelerator.confinement.uid_per_vm:
            assert limits["Max processes"] == ("162", "162")
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        threads = {os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
        assert threads == {min(ours + 5, 19)}


def writable_files(pid: int) -> set[str]:
    """Give the names of the files on a disk that a process has open for writing."""
    found = set[str]()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            path, info = os.readlink(f"/proc/{pid}/fd/{fd}"), Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed meanwhile
        flags = next(int(line.split()[1], 8) for line in info.splitlines() if line.startswith("flags:"))
        if path.startswith("/") and not path.startswith(("/dev/", "/memfd:")) and flags & os.O_ACCMODE != os.O_RDONLY:
            found.add(path)
    return found


async def test_what_others_stand_on_is_written_to_by_nobody(host: Host) -> None:
    """A QEMU that its guest took over can't reach back into a checkpoint, a saved sandbox, or the siblings of a fork."""
    async with host.open_sandbox() as sandbox:
        for revert in (False, True):
            checkpoints = list[Checkpoint]()
            for number in range(3):
                await sandbox.run(f"open('file-{number}', 'w').write('x' * 10**6)")
                checkpoints.append(await sandbox.checkpoint())
                vm = cast("Vm", sandbox._slot.machine)  # pyright: ignore[reportPrivateUsage]
                disks = {path for path in writable_files(pid_of(sandbox)) if path.endswith(".qcow2")}
                assert disks == {os.fspath(vm.config.overlay)}, "and of no layer"
                assert vm.config.overlay.stat().st_nlink == 1, "nobody else stands on what it writes to"
            # What it writes is there, in spite of all that was opened and closed.
            assert (await sandbox.run("import os; os.sync(); len(open('file-0').read())")).value == "1000000"
            if not revert:
                await sandbox.revert(checkpoints[0])
        async with sandbox.fork(2) as children:
            for each in (sandbox, *children):
                vm = cast("Vm", each._slot.machine)  # pyright: ignore[reportPrivateUsage]
                disks = {path for path in writable_files(pid_of(each)) if path.endswith(".qcow2")}
                assert disks == {os.fspath(vm.config.overlay)}


#: What whoever took QEMU over could try with its descriptor $1, which is open for reading: open it anew for writing, and make that possible first.
#: Prints what worked, and writes nothing.
ATTACK = """
chmod 666 /proc/self/fd/$1 && echo chmod
(: <> /proc/self/fd/$1) && echo opened
(: >> /proc/self/fd/$1) && echo appended
"""


def attack(pid: int) -> dict[str, list[str]]:
    """Try to write, as QEMU's user, to the files that it has open for reading; give what worked, by the files' names."""
    uid = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")
    ).split()[1]
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    found = dict[str, list[str]]()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        path = os.readlink(entry)
        if path.startswith("/memfd:") or not entry.is_file() or path in writable_files(pid):
            continue
        fd = os.open(entry, os.O_RDONLY)  # the same file in the same mount
        try:
            completed = subprocess.run(
                [*(become if os.geteuid() == 0 else []), "/bin/sh", "-c", ATTACK, "sh", str(fd)],
                pass_fds=[fd],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=False,
            )
        finally:
            os.close(fd)
        found[path] = completed.stdout.split()
    return found


async def test_what_it_has_open_for_reading_it_can_not_write_to(host: Host) -> None:
    """Whatever others go on from: the memory of a template, a checkpoint and a fork, layers and images."""
    async with host.open_sandbox() as sandbox:
        await sandbox.run("x = 1")
        checkpoint = await sandbox.checkpoint()
        clone = await trio.to_thread.run_sync(attack, pid_of(sandbox))
        await sandbox.revert(checkpoint)
        reverted = await trio.to_thread.run_sync(attack, pid_of(sandbox))
        async with sandbox.fork(1) as (child,):
            forked = await trio.to_thread.run_sync(attack, pid_of(child))
            assert (await child.run("x")).value == "1"
        await sandbox.revert(checkpoint)
        for found in (clone, reverted, forked):
            assert any("memory" in path for path in found)
            assert any("image" in path for path in found)
            assert not any(found.values()), found
        assert any("layer" in path for path in forked)


async def test_nothing_goes_on_from_memory_that_was_written_to(host: Host) -> None:
    async with host.open_sandbox() as sandbox:
        await sandbox.run("x = 1")
        checkpoint = await sandbox.checkpoint()
        life = cast("Lifecycle[Sandbox]", sandbox._lifecycle)  # pyright: ignore[reportPrivateUsage]
        memory = life._checkpoints.find(checkpoint).config.memory_file  # pyright: ignore[reportPrivateUsage]
        assert memory is not None
        os.chmod(memory, 0o600)
        with memory.open("r+b") as file:
            file.write(b"PWNED")
        with pytest.raises(SnapshotError, match="has been written to since"):
            await sandbox.revert(checkpoint)
        assert (await sandbox.run("x")).value == "1", "it is as it was"


#: What is in QEMU's root directory, and below those that are not shown as a whole.
ROOT = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "usr"}
BELOW = {"dev": {"null", "kvm"}, "etc": {"ld.so.cache"}}
#: Where something could be written, as far as its user may: two devices, and what the kernel tells of processes.
WRITABLE_MOUNTS = {"/dev/null", "/dev/kvm", "/proc"}


def namespace(pid: int | str, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


@pytest.fixture
async def jailed(host: Host) -> AsyncGenerator[Sandbox]:
    async with host.open_sandbox() as sandbox:
        await sandbox.run("1")
        confinement = cast("Vm", sandbox._slot.machine).accelerator.confinement  # pyright: ignore[reportPrivateUsage]
        if not confinement.jail:
            pytest.skip("this host allows no jail")
        assert "a root directory with nothing but programs" in sandbox.confinement
        yield sandbox


async def test_namespaces_of_its_own(jailed: Sandbox) -> None:
    names = {"mnt", "ipc", "uts", "net"} | (set[str]() if os.geteuid() == 0 else {"user", "pid"})
    for name in names:
        assert namespace(pid_of(jailed), name) != namespace("self", name)
    async with jailed.fork(1) as (child,):
        for name in names - {"mnt"}:
            assert namespace(pid_of(child), name) != namespace(pid_of(jailed), name), "nor another machine's"


async def test_its_root_directory_has_nothing_but_programs(jailed: Sandbox) -> None:
    root = Path(f"/proc/{pid_of(jailed)}/root/")
    assert {path.name for path in root.iterdir()} <= ROOT
    for directory, names in BELOW.items():
        assert set(os.listdir(root / directory)) <= names
    mounts = [line.split() for line in Path(f"/proc/{pid_of(jailed)}/mountinfo").read_text().splitlines()]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",")}
    assert {path for path in writable if not path.startswith("/proc/")} <= WRITABLE_MOUNTS
    shown = {fields[4] for fields in mounts if not fields[4].startswith("/proc/")}
    assert {path.split("/")[1] for path in shown} <= ROOT | {""}


async def test_it_has_no_rights(jailed: Sandbox) -> None:
    lines = Path(f"/proc/{pid_of(jailed)}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    assert "0" not in status["Uid"]
    assert len(set(status["Uid"])) == 1
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind][0], 16) == 0
    if os.geteuid() == 0:
        assert int(status["CapBnd"][0], 16) == 0
        assert status["Uid"] != [str(os.geteuid())] * 4
        assert status["Groups"] == []
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]


async def test_what_it_has_open_for_writing(jailed: Sandbox) -> None:
    vm = cast("Vm", jailed._slot.machine)  # pyright: ignore[reportPrivateUsage]
    assert writable_files(pid_of(jailed)) == {os.fspath(vm.config.overlay)}, "and of no RAM's file"


async def test_an_ordinary_user_without_namespaces_has_landlock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ordinary = Confinement(False, False, False, no_new_privileges=True, limits=True)
    if not await prove_landlock(ordinary, {}):
        pytest.skip("this kernel has no Landlock, or it is switched off")
    proved = attrs.evolve(ordinary, landlock=True)
    monkeypatch.setattr("trio_sandbox.qemu._confinement._proved", {os.geteuid(): proved})
    for templates in (True, False):
        async with open_host(HostConfig(templates=templates)) as host, host.open_sandbox() as sandbox:
            assert "no files but programs and its own (Landlock)" in sandbox.confinement
            assert Path(f"/proc/{pid_of(sandbox)}/status").read_text().count("NoNewPrivs:\t1") == 1
            # All that opens files goes on working.
            checkpoint = await sandbox.checkpoint()
            await sandbox.run("open('file', 'w').write('x' * 10**6); import os; os.sync()")
            async with sandbox.fork(1) as (child,):
                assert (await child.run("import os; os.path.getsize('file')")).value == "1000000"
            await sandbox.hibernate()
            await sandbox.resume()
            await sandbox.revert(checkpoint)
            assert (await sandbox.run("import os; os.path.exists('file')")).value == "False"
    assert "QEMU sees this machine's files" not in caplog.text


async def test_less_than_all_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_host(HostConfig(confinement="require")) as host, host.open_sandbox() as sandbox:
        assert (await sandbox.run("print(1)")).stdout == "1\n"
    monkeypatch.setattr("trio_sandbox.qemu._jail._MAKE", "echo there is no room; exit 1")
    async with open_host() as host, host.open_sandbox() as sandbox:
        assert "a root directory" not in sandbox.confinement
        assert (await sandbox.run("print(1)")).stdout == "1\n"
    with pytest.raises(
        ConfinementRequiredError, match=r"QEMU sees (the names of )?this machine's files.*to change that"
    ):
        async with open_host(HostConfig(confinement="require")):
            pytest.fail("was opened")
