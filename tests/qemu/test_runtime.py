"""The runtime directory and the reaper, with real processes; no virtual machine."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import trio

from tests._leaks import HANG_LIMIT, cancel_at_every_step, nothing_left, wait_until as wait_in_trio
from trio_sandbox import SandboxError
from trio_sandbox._private import make_private_directory
from trio_sandbox.image import try_lock
from trio_sandbox.qemu import _reaper_main, make_marked, open_runtime, remove_marked, run_owned
from trio_sandbox.qemu._runtime import _choose_directory
from trio_sandbox.qemu._storage_daemon import absolute_path, new_file


def children_with(marker: str) -> list[int]:
    """Find processes with *marker* on their command line, zombies excluded (they have none)."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                command_line = Path(f"/proc/{name}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marker.encode() in command_line.split(b"\0"):
                found.append(int(name))
    return found


def left_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def wait_until(condition: Callable[[], bool]) -> bool:
    """Poll for what another process does when nobody of ours is left to be told."""
    deadline = time.monotonic() + HANG_LIMIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def start_owner(base: Path, body: str) -> subprocess.Popen[bytes]:
    """Run *body* in `open_runtime` in a Python of its own; it prints a line when it may be killed."""
    script = textwrap.dedent(
        """\
        import os, sys, trio
        from trio_sandbox.qemu import minimal_environment, open_runtime, run_owned

        async def main():
            async with open_runtime(BASE) as runtime, trio.open_nursery() as nursery:
                environment = {**minimal_environment(), **runtime.environment}
        BODY

        trio.run(main)
        """
    )
    script = script.replace("BASE", repr(str(base))).replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 8))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.stdout.close()
    assert line == b"ready\n", "the owner failed"
    return process


@pytest.fixture
def base() -> Generator[Path]:
    """Give a directory with a path short enough for sockets, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        yield Path(directory)


@pytest.fixture
def marker() -> str:
    """Give an argument that no other process has."""
    return f"marker-{os.urandom(8).hex()}"


async def test_directory_is_private_and_gone_after(base: Path) -> None:
    async with open_runtime(base) as runtime:
        assert runtime.directory.parent == base
        assert runtime.directory.stat().st_mode & 0o777 == 0o700
        (runtime.directory / "file").write_text("something")
        reaper = runtime.reaper_pid
        assert reaper is not None
        os.kill(reaper, 0)
    assert left_in(base) == []
    with pytest.raises(ProcessLookupError):
        os.kill(reaper, 0)


async def test_base_that_does_not_exist(base: Path) -> None:
    with pytest.raises(SandboxError, match="can't make a runtime directory in"):
        async with open_runtime(base / "nowhere"):
            pytest.fail("was opened")


async def test_base_with_a_path_too_long_for_sockets(base: Path) -> None:
    with pytest.raises(ValueError, match="at most 66 bytes"):
        async with open_runtime(base / ("long" * 20)):
            pytest.fail("was opened")


def directory_of(base: Path | None) -> Path:
    return _choose_directory(base).parent


@pytest.mark.parametrize("tmpdir", ["", "relative", "/no/such/directory", "/etc/passwd", "{base}/" + "long" * 20])
def test_a_tmpdir_that_will_not_do_is_passed_over(tmpdir: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmpdir = tmpdir.format(base=base)
    if tmpdir.startswith(str(base)):
        Path(tmpdir).mkdir()
    monkeypatch.setenv("TMPDIR", tmpdir)
    assert directory_of(None) == Path("/var/tmp")


def test_a_tmpdir_that_will_do_is_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(base))
    assert directory_of(None) == base


async def test_no_place_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bool:
        return False

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(SandboxError, match="Set TMPDIR to one"):
        async with open_runtime():
            pytest.fail("was opened")


@pytest.mark.parametrize("umask", [0, 0o077, 0o277, 0o777])
async def test_no_umask_keeps_us_out_or_lets_others_in(umask: int, base: Path) -> None:
    before = os.umask(umask)
    try:
        make_private_directory(base / "above" / "private")
        for _ in range(2):
            with try_lock(base / "lock") as held:
                assert held
        async with open_runtime(base) as runtime:
            with new_file(f"{runtime.directory}/overlay"):
                paths = (runtime.directory, runtime.directory / "overlay", base / "lock", base / "above" / "private")
                modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]
    finally:
        os.umask(before)
    assert modes == [0o700, 0o600, 0o600, 0o700]


async def test_the_working_directory_may_be_gone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = base / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    async with open_runtime(base) as runtime:
        assert absolute_path(runtime.directory) == str(runtime.directory)
        process = await run_owned(["pwd"], environment=runtime.environment)
    assert (process.returncode, process.output()) == (0, "/\n")


async def test_what_dead_owners_left_is_removed(base: Path) -> None:
    dead, young, alive, link = (f"trio-sandbox-{digit * 12}" for digit in "0123")
    for name in (dead, young, alive):
        make_marked(base / name)
        (base / name / "overlay").write_text("large")
        if name != young:
            os.utime(base / name, (1, 1))
    make_marked(base / "other")
    os.symlink(base / "other", base / link)
    # Names like ours, and directories of ours but for the name or the mark.
    own = ("trio-sandbox-results", "trio-sandbox-4444", f"trio-sandbox-{'F' * 12}", f"trio-sandbox-{'a' * 12}")
    for name in own:
        (base / name).mkdir()
        (base / name / "thesis.txt").write_text("a year of work")
    make_marked(base / f"trio-sandbox-{'0' * 12}-backup")
    (base / f"trio-sandbox-{'b' * 12}").write_text("a file")
    for path in base.iterdir():
        if path.name not in (young, link):
            os.utime(path, (1, 1))
    before = left_in(base)
    fd = os.open(base / alive, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        async with open_runtime(base) as runtime:
            os.utime(runtime.directory, (1, 1))
            async with open_runtime(base):  # It is in use, however old it looks.
                assert runtime.directory.exists()
    finally:
        os.close(fd)
    assert left_in(base) == [name for name in before if name != dead]
    assert all((base / name / "thesis.txt").exists() for name in own)
    assert left_in(base / "other") == [".trio-sandbox"]


async def test_a_removal_that_was_interrupted_can_be_finished(base: Path) -> None:
    directory = base / "directory"
    make_marked(directory)
    (directory / "nested").mkdir()
    (directory / "nested" / "file").touch()
    (directory / "link").symlink_to(base)
    remove_marked(directory)
    assert left_in(base) == []
    # Without the mark only what is empty is removed: the mark goes last.
    directory.mkdir()
    (directory / "thesis.txt").touch()
    with pytest.raises(OSError, match="not empty"):
        remove_marked(directory)
    (base / "link").symlink_to(directory)
    with pytest.raises(OSError, match="Not a directory"):
        remove_marked(base / "link")
    assert left_in(directory) == ["thesis.txt"]


async def test_a_reaper_that_dies_soon_is_an_error(base: Path) -> None:
    async def kill_it() -> None:
        async with open_runtime(base) as runtime:
            assert runtime.reaper_pid is not None
            os.kill(runtime.reaper_pid, signal.SIGKILL)
            await trio.sleep_forever()

    with pytest.raises(SandboxError, match="the reaper was ended by SIGKILL soon after its start"):
        await kill_it()
    assert left_in(base) == []


async def test_a_reaper_that_dies_later_is_replaced(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.qemu._runtime._REAPER_SETTLED", 0.0)
    async with open_runtime(base) as runtime:
        first = runtime.reaper_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await wait_in_trio(lambda: runtime.reaper_pid not in (None, first))


async def test_a_reaper_that_was_stopped_is_not_left(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.qemu._runtime._REAPER_EXIT", 0.2)
    async with open_runtime(base) as runtime:
        reaper = runtime.reaper_pid
        assert reaper is not None
        os.kill(reaper, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):  # nor as a zombie
        os.kill(reaper, 0)
    assert list(base.iterdir()) == []


def test_an_owner_that_died_before_its_reaper_was_ready(base: Path, marker: str) -> None:
    """It happens when the reaper is a replacement: then there are processes to find."""
    directory = base / "directory"
    directory.mkdir()
    orphan = subprocess.Popen(
        [sys.executable, "-Sc", "import time; time.sleep(1000)", marker], env={"TRIO_SANDBOX_OWNER": "outer:token"}
    )
    with subprocess.Popen(["true"]) as owner:
        pidfd = os.pidfd_open(owner.pid)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        argv = [sys.executable, "-IS", _reaper_main.__file__, str(pidfd), str(directory)]
        subprocess.run(argv, input=b"token\n", stdout=writer, pass_fds=[pidfd], check=True)
    finally:
        os.close(writer)
        os.close(pidfd)
    assert orphan.wait() == -signal.SIGKILL
    assert left_in(base) == []


async def test_nobody_else_can_read_an_owners_token(base: Path) -> None:
    async with open_runtime(base) as runtime:
        token = runtime.environment["TRIO_SANDBOX_OWNER"].rpartition(":")[2].encode()
        assert len(token) == 32
        assert token not in Path(f"/proc/{runtime.reaper_pid}/cmdline").read_bytes()
        assert Path(f"/proc/{runtime.reaper_pid}/environ").stat().st_mode & 0o077 == 0


async def test_nested_owners_are_both_in_the_environment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIO_SANDBOX_OWNER", "outer")
    async with open_runtime(base) as runtime:
        assert runtime.environment["TRIO_SANDBOX_OWNER"].startswith("outer:")


def test_killed_owner_leaves_nothing(base: Path, marker: str) -> None:
    """Children, grandchildren, those that cleared their environment, and the directory go."""
    owner = start_owner(
        base,
        f"""
        sleep = f"{{sys.executable}} -S -c 'import time; time.sleep(1000)' {marker} & "
        script = "env -i setsid " + sleep + "env -i " + sleep + sleep + "wait"
        await nursery.start(lambda task_status: run_owned(
            ["bash", "-c", script], environment=environment, task_status=task_status))
        print("ready", flush=True)
        """,
    )
    assert wait_until(lambda: len(children_with(marker)) == 3)
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not left_in(base))
    assert children_with(marker) == []


@pytest.mark.parametrize("attempt", range(4))
def test_owner_killed_while_it_spawns(base: Path, marker: str, attempt: int) -> None:
    """Killed at any point between fork, exec and the parent's learning of it, nothing is left."""
    owner = start_owner(
        base,
        f"""
        async def spawn():
            while True:
                with trio.CancelScope() as scope:
                    await run_owned([sys.executable, "-S", "-c", "import time; time.sleep(1000)", {marker!r}],
                        environment=environment, task_status=Cancel(scope))
        class Cancel:
            def __init__(self, scope): self.scope = scope
            def started(self, value): self.scope.cancel()
        for _ in range(4):
            nursery.start_soon(spawn)
        await trio.sleep(0.1)
        print("ready", flush=True)
        """,
    )
    time.sleep(attempt * 0.0037)  # Not to wait for anything: to hit other moments.
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not left_in(base))
    assert children_with(marker) == []


def test_a_fork_of_the_owner_does_not_hold_the_reaper_up(base: Path, marker: str) -> None:
    """A forked child keeps the reaper's pipe open, as `multiprocessing` would."""
    owner = start_owner(
        base,
        """
        pid = os.fork()
        if pid == 0:
            os.close(1)
            import time
            while os.listdir(runtime.directory.parent):
                time.sleep(0.01)
            os._exit(0)
        print("ready", flush=True)
        await trio.sleep_forever()
        """,
    )
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not left_in(base))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may run things as other users")
def test_processes_of_a_guarded_uid_go_even_without_the_token(base: Path, marker: str) -> None:
    owner = start_owner(
        base,
        f"""
        runtime.guard_uid(1999999999)
        runtime.guard_uid(1999999998)
        runtime.release_uid(1999999998)
        for uid in 1999999999, 1999999998:
            import subprocess
            subprocess.Popen(["/usr/bin/python3", "-S", "-c", "import time; time.sleep(1000)", f"{marker}-{{uid}}"],
                user=uid, group=uid, extra_groups=[], env={{}}, start_new_session=True)
        print("ready", flush=True)
        await trio.sleep_forever()
        """,
    )
    others = children_with(f"{marker}-1999999998")
    assert len(others) == 1
    try:
        assert len(children_with(f"{marker}-1999999999")) == 1
        owner.kill()
        owner.wait()
        assert wait_until(lambda: not left_in(base))
        assert children_with(f"{marker}-1999999999") == []
        assert children_with(f"{marker}-1999999998") == others
    finally:
        for pid in others:
            os.kill(pid, signal.SIGKILL)


async def test_cancelled_at_every_step_of_open_and_close(base: Path) -> None:
    async def attempt() -> None:
        with nothing_left(base):
            async with open_runtime(base):
                await trio.lowlevel.checkpoint()

    await attempt()
    assert await cancel_at_every_step(attempt, every_task=True) > 4
