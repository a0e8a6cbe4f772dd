"""The spawner in namespaces, a root directory and control groups of its own, as in a virtual machine. Needs root."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from ._agent import Host, open_agent
from ._cgroup import own_cgroup


def find_busybox() -> str | None:
    """Give a busybox that needs no libraries: one that names no program to load them."""
    path = shutil.which("busybox")
    if path is None or b"/ld-linux" in Path(path).read_bytes()[:4096]:
        return None
    return path


BUSYBOX = find_busybox()

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make PID and mount namespaces and control groups"),
    pytest.mark.skipif(BUSYBOX is None, reason="needs a static busybox (Debian: apt-get install busybox-static)"),
]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A file system with a shell in it."""
    assert BUSYBOX is not None
    root = tmp_path / "root"
    for directory in ("bin", "etc", "home/user", "proc", "sys", "tmp"):
        (root / directory).mkdir(parents=True)
    root.chmod(0o755)
    (root / "tmp").chmod(0o1777)
    os.chown(root / "home/user", 1000, 1000)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:User:/home/user:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\nplugdev:x:46:other,user\n")
    return str(root)


@pytest.fixture
def cgroup() -> Generator[str]:
    """A control group of our own."""
    with own_cgroup() as path:
        yield path


async def shell(host: Host, script: str, **request: object) -> list[str]:
    """Run a script, which may fail, and return its lines."""
    _, output = await host.run_process(["sh", "-c", script], **request)
    return output.decode().splitlines()


async def test_who_and_where_a_process_is(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        assert await shell(host, "busybox id; pwd; busybox ls /; busybox cat /proc/self/oom_score_adj") == [
            "uid=1000(user) gid=1000(user) groups=46(plugdev),1000(user)",
            "/home/user",
            *["bin", "dev", "etc", "home", "proc", "run", "sys", "tmp"],
            "0",
        ]
        _, output = await host.run_process(["busybox", "env"])
        assert sorted(output.decode().splitlines()) == [
            "HOME=/home/user",
            "LANG=C.UTF-8",
            "LOGNAME=user",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "SHELL=/bin/sh",
            "USER=user",
        ]
        assert any(re.fullmatch(r"0::/.*/p\d+", line) for line in await shell(host, "busybox cat /proc/self/cgroup"))


async def test_nobody_else_is_in_sight_and_the_spawner_is_out_of_reach(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        # A user sees its own processes, and root everybody's, but nobody's from outside.
        look = "busybox sleep 1000 & cd /proc; echo [0-9]*; kill $!"
        (pids,) = await shell(host, look)
        assert len(pids.split()) == 2
        assert "1" not in pids.split()
        (pids,) = await shell(host, look, user=0)
        assert len(pids.split()) == 3
        assert "1" in pids.split()
        assert await shell(host, "kill -9 1 2>/dev/null || echo refused; busybox ls /proc/1/root 2>/dev/null") == [
            "refused"
        ]
        # Not even root there can kill it, or see where it came from.
        assert await shell(host, "kill -9 1; busybox ls /proc/1/root", user=0) == [
            "bin",
            "dev",
            "etc",
            "home",
            "proc",
            "run",
            "sys",
            "tmp",
        ]
        assert await shell(host, "echo on") == ["on"]


async def test_a_user_never_gets_rights_and_root_keeps_its_own(root: str, cgroup: str) -> None:
    look = "busybox grep -E '^(Cap|NoNewPrivs)' /proc/self/status"
    none = "0" * 16
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        for user in (None, "user", 1001):
            assert dict(line.split() for line in await shell(host, look, user=user)) == {
                **dict.fromkeys(("CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"), none),
                "NoNewPrivs:": "1",
            }
        ours = [
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(("Cap", "NoNewPrivs"))
        ]
        assert await shell(host, look, user=0) == ours


async def test_devices_are_those_that_programs_expect(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        assert await shell(host, "busybox ls /dev") == sorted(
            [
                "fd",
                "full",
                "null",
                "ptmx",
                "pts",
                "random",
                "shm",
                "stderr",
                "stdin",
                "stdout",
                "tty",
                "urandom",
                "zero",
            ]
        )
        script = "echo x >/dev/null && busybox head -c 3 /dev/zero | busybox wc -c; echo x >/dev/shm/x && echo shm"
        assert await shell(host, script) == ["3", "shm"]
        for refused in ("mknod /tmp/x b 8 0", "mount -t tmpfs x /tmp", "touch /sys/x"):
            assert await shell(host, f"busybox {refused} 2>/dev/null || echo refused") == ["refused"]


async def test_users(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        script = "busybox id -u; busybox id -G; echo $HOME; pwd"
        assert await shell(host, script, user="root") == ["0", "0", "/root", "/"]
        assert await shell(host, script, user=0) == ["0", "0", "/root", "/"]
        assert await shell(host, script, user="user") == ["1000", "1000 46", "/home/user", "/home/user"]
        assert await shell(host, script, user=4321) == ["4321", "4321", "/", "/"]
        async with host.open_process(["sh"], user="nobody") as process:
            failed = (await process.message())["failed"]
        assert (failed["errno"], failed["strerror"], failed["filename"]) == (errno.ENOENT, "no such user", "nobody")


async def test_orphans_are_reaped(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        # The pipe ends when all of them have.
        await shell(host, "for i in 1 2 3; do (busybox setsid sh -c 'exit 1' &) ; done")
        assert await shell(host, "busybox grep -l 'State:.Z' /proc/[0-9]*/status; echo none") == ["none"]


@pytest.mark.parametrize("how", ["kill", "end"])
async def test_daemons_do_not_escape(root: str, cgroup: str, how: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        script = "busybox setsid sh -c 'trap \"\" TERM HUP INT; echo up; busybox sleep 1000' & wait"
        async with host.open_process(["sh", "-c", script], stdout=True) as process:
            await process.started()
            assert process.stdout is not None
            assert await process.stdout.receive_some() == b"up\n"
            if how == "kill":
                await process.records.send_json({"kill": True})
                assert await process.exited() == -signal.SIGKILL
                assert groups(cgroup) == []
        while groups(cgroup):
            await shell(host, "true")
        (pids,) = await shell(host, "cd /proc; echo [0-9]*", user=0)
        assert len(pids.split()) == 2


async def test_background_processes_live_as_long_as_the_stream(root: str, cgroup: str) -> None:
    async with open_agent(root=root, cgroup=cgroup, user=1000) as host:
        async with host.open_process(["sh", "-c", "busybox sleep 1000 & echo up"], stdout=True) as process:
            await process.started()
            assert await process.exited() == 0
            assert len(groups(cgroup)) == 1
            assert process.stdout is not None
            assert await process.stdout.receive_some() == b"up\n"
        while groups(cgroup):
            await shell(host, "true")


async def test_everything_goes_with_the_agent(root: str, cgroup: str) -> None:
    fifo = os.path.join(root, "tmp/fifo")
    os.mkfifo(fifo)
    os.chmod(fifo, 0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with (
            open_agent(root=root, cgroup=cgroup, user=1000) as host,
            host.open_process(
                ["sh", "-c", "exec 9>/tmp/fifo; busybox setsid busybox sleep 1000 & echo up; wait"], stdout=True
            ) as process,
        ):
            await process.started()
            assert process.stdout is not None
            assert await process.stdout.receive_some() == b"up\n"
            with pytest.raises(BlockingIOError):
                os.read(reader, 1)
        await trio.lowlevel.wait_readable(reader)
        assert os.read(reader, 1) == b""
    finally:
        trio.lowlevel.notify_closing(reader)
        os.close(reader)


async def test_an_image_without_our_directories_and_without_users(tmp_path: Path, cgroup: str) -> None:
    assert BUSYBOX is not None
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(BUSYBOX, root / "busybox")
    async with open_agent(root=str(root), cgroup=cgroup, user=1000) as host:
        status, output = await host.run_process(["/busybox", "sh", "-c", "/busybox id; echo $HOME; pwd"])
    assert (status, output) == (0, b"uid=1000 gid=1000 groups=1000\n/\n/\n")


def groups(cgroup: str) -> list[str]:
    """Give the control groups with a process in them; some more are kept for later ones."""
    return [
        events.parent.name for events in Path(cgroup).glob("*/cgroup.events") if "populated 1" in events.read_text()
    ]
