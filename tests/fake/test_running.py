"""Sandboxes of other processes: they are found, one of them is ended, and nothing else ever is. Their QEMUs are any processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import attrs
import pytest
import trio

from trio_sandbox import SandboxClosedError, SandboxConfig, SandboxError, VmDiedError
from trio_sandbox._observe import new_id
from trio_sandbox.machines import _held_files, _running
from trio_sandbox.machines._held_files import HeldFile
from trio_sandbox.machines._process_facts import pid_namespace, process_status
from trio_sandbox.machines._roster import (
    MOST,
    PREFIX,
    SIZE,
    NoteMachine,
    SandboxRecord,
    encode,
    open_roster,
)
from trio_sandbox.machines._running import RunningSandbox, kill_sandbox, running_sandboxes
from trio_sandbox.qemu import Vm

from ._host import open_fake_host

SMALL = SandboxConfig(memory_mib=128)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "held"


@pytest.fixture
def processes() -> Generator[list[subprocess.Popen[bytes]]]:
    """Processes of ours that do nothing, which are ended with the test."""
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(process.kill)
            started.append(process)
        yield started


def vm(process: subprocess.Popen[bytes]) -> Vm:
    return cast("Vm", SimpleNamespace(pid=process.pid))


def listed(directory: Path) -> list[RunningSandbox]:
    sandboxes, problems = running_sandboxes(directory)
    assert problems == []
    return sandboxes


@contextmanager
def own_sandbox(directory: Path) -> Generator[NoteMachine]:
    """List a sandbox that hibernates."""
    with open_roster(directory) as roster, roster.enter(new_id(), "mine", SMALL, "tcg") as note:
        note(None)
        yield note


def a_record(**lies: object) -> SandboxRecord:
    """Return a record that is true, but for *lies*."""
    record = SandboxRecord(
        id="0123abcd4567",
        owner=os.getpid(),
        descriptor=0,
        namespace=pid_namespace(),
        image="python",
        opened=1.0,
        memory_mib=128,
        vcpus=1,
        accelerator="tcg",
    )
    return attrs.evolve(record, **lies)  # type: ignore[arg-type]


@contextmanager
def held(directory: Path, *contents: SandboxRecord | bytes) -> Generator[HeldFile]:
    """Hold a file with these records, in which descriptor 0 stands for the file's own."""
    file = HeldFile(directory, PREFIX, lambda path: None)
    file.make()
    for place, content in enumerate(contents):
        if isinstance(content, SandboxRecord):
            content = encode(attrs.evolve(content, descriptor=content.descriptor or file.fd))
        os.pwrite(file.fd, content, place * SIZE)
    try:
        yield file
    finally:
        file.remove()


# --- This process's own ---


async def test_a_host_lists_its_sandboxes_and_notices_the_end_of_one(tmp_path: Path, directory: Path) -> None:
    async with open_fake_host(tmp_path) as host:
        assert listed(directory) == []
        async with host.open_sandbox("python", SMALL) as one, host.open_sandbox("python", SMALL) as two:
            before = time.time()
            first, second = listed(directory)
            assert {(each.id, each.qemu_pid) for each in (first, second)} == {
                (each.id, each.statistics().qemu_pid) for each in (one, two)
            }
            assert (first.image, first.state, first.memory_mib, first.vcpus) == ("python", "running", 128, 1)
            assert (first.accelerator, first.owner_pid) == (one.accelerator, os.getpid())
            assert before - 60 < first.opened <= second.opened <= before
            assert "python" in first.owner_command  # pytest, or a worker of it
            assert await trio.to_thread.run_sync(kill_sandbox, one.id, directory)
            assert {each.id: each.state for each in listed(directory)} == {one.id: "ended", two.id: "running"}
            assert not await trio.to_thread.run_sync(kill_sandbox, one.id, directory), "it is gone already"
            with pytest.raises((VmDiedError, SandboxClosedError)):
                await one.run("1")
        assert listed(directory) == []
    assert not directory.exists()


def test_a_sandbox_that_hibernates_has_no_machine(directory: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    with open_roster(directory) as roster, roster.enter(new_id(), "python", SMALL, "tcg") as note:
        note(vm(processes[0]))
        note(None)
        (sandbox,) = listed(directory)
        assert (sandbox.state, sandbox.qemu_pid) == ("hibernated", None)
        with pytest.raises(SandboxError, match=rf"hibernates, .* its owner is the process {os.getpid()}"):
            kill_sandbox(sandbox.id, directory)
        note(vm(processes[1]))
        assert listed(directory) == [attrs.evolve(sandbox, state="running", qemu_pid=processes[1].pid)]
    assert processes[0].poll() is None


def test_who_gets_another_machine_meanwhile_loses_that_as_well(
    directory: Path, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = _running._kill  # pyright: ignore[reportPrivateUsage]
    with open_roster(directory) as roster, roster.enter(new_id(), "python", SMALL, "tcg") as note:
        note(vm(processes[0]))

        def kill_and_revert(record: SandboxRecord) -> bool:
            ended = kill(record)
            note(vm(processes[1]))
            return ended

        monkeypatch.setattr(_running, "_kill", kill_and_revert)
        (sandbox,) = listed(directory)
        assert kill_sandbox(sandbox.id, directory)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2


def test_names_of_images_are_short_and_can_be_written(directory: Path) -> None:
    names = ["python", "oci:/ä/\udcff", "\0" * 10_000, "\N{GRINNING FACE}" * 10_000]
    with open_roster(directory) as roster, ExitStack() as stack:
        for name in names:
            stack.enter_context(roster.enter(new_id(), name, SMALL, "tcg"))(None)
        assert {each.image for each in listed(directory)} == {
            "python",
            "oci:/ä/\\udcff",
            "\0" * 100,
            "\N{GRINNING FACE}" * 100,
        }


def test_places_are_used_again(directory: Path) -> None:
    with open_roster(directory) as roster, roster.enter(new_id(), "python", SMALL, "tcg") as note:
        note(None)
        for _ in range(5):
            with roster.enter(new_id(), "data", SMALL, "tcg") as note_other:
                note_other(None)
                assert [each.image for each in listed(directory)] == ["python", "data"]
        (path,) = directory.iterdir()
        assert path.stat().st_size == 2 * SIZE


def test_a_file_that_was_removed_is_made_again_with_all(directory: Path) -> None:
    with open_roster(directory) as roster, ExitStack() as stack:
        notes: list[NoteMachine] = [
            stack.enter_context(roster.enter(new_id(), "python", SMALL, "tcg")) for _ in range(3)
        ]
        for note in notes:
            note(None)
        before = listed(directory)
        assert len(before) == 3
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        assert listed(directory) == []
        notes[1](None)
        assert listed(directory) == before


def test_sandboxes_that_can_not_be_listed_are_opened_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "held").write_text("not a directory")
    with open_roster(tmp_path / "held") as roster:
        for _ in range(2):
            with roster.enter(new_id(), "python", SMALL, "tcg") as note:
                note(None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "`trio-sandbox ps` does not list" in record.message
    with pytest.raises(SandboxError, match="can't be known"):
        running_sandboxes(tmp_path / "held")


def test_a_reaper_that_does_not_listen_keeps_nobody_from_opening_sandboxes(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise SandboxError("the reaper does not listen")

    with open_roster(directory, guard=fail) as roster, roster.enter(new_id(), "python", SMALL, "tcg") as note:
        note(None)
    assert "the reaper does not listen" in caplog.text
    assert not directory.exists()


# --- Those of other processes ---

_OTHER = """
import os, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from trio_sandbox import SandboxConfig
from trio_sandbox._observe import new_id
from trio_sandbox.machines._roster import Roster
roster = Roster(Path(sys.argv[1]))
with ExitStack() as stack:
    for image in ("python", "data"):
        qemu = subprocess.Popen(["sleep", "600"])
        stack.enter_context(roster.enter(new_id(), image, SandboxConfig(memory_mib=128), "tcg"))(SimpleNamespace(pid=qemu.pid))
    if len(sys.argv) > 2 and os.fork() == 0:
        os.setpgid(0, 0)
    os.write(1, b"up %d\\n" % os.getpid())
    time.sleep(600)
"""


@contextmanager
def other_process(directory: Path, *options: str) -> Generator[subprocess.Popen[bytes]]:
    """Run a process with two sandboxes."""
    children: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", _OTHER, os.fspath(directory), *options], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            for _ in range(1 + len(options)):
                word, number = process.stdout.readline().split()
                assert word == b"up"
                children.append(int(number))
            yield process
        finally:
            for pid in (process.pid, *children):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def test_one_of_another_process_is_ended_and_no_other(directory: Path) -> None:
    with other_process(directory) as other:
        one, two = listed(directory)
        assert (one.image, two.image) == ("python", "data")
        assert one.owner_pid == two.owner_pid == other.pid
        assert one.owner_command.startswith(f"{sys.executable} -c \nimport os")
        other.send_signal(signal.SIGSTOP)  # it need not help
        assert kill_sandbox(two.id, directory)
        assert [(each.id, each.state) for each in listed(directory)] == [(one.id, "running"), (two.id, "ended")]
        other.send_signal(signal.SIGCONT)
        assert kill_sandbox(two.id, directory) is False
        assert other.poll() is None


@pytest.mark.parametrize("fork", [False, True])
def test_what_a_killed_process_had_is_not_listed(directory: Path, fork: bool) -> None:
    with other_process(directory, *(["fork"] if fork else [])) as other:
        one, two = listed(directory)
        other.kill()
        other.wait()
        assert listed(directory) == []
        assert list(directory.iterdir()) == []
        with pytest.raises(SandboxError, match=rf"no sandbox '{one.id}' of this user runs"):
            kill_sandbox(one.id, directory)
        for sandbox in (one, two):
            assert sandbox.qemu_pid is not None
            assert process_status(sandbox.qemu_pid) is not None, "an orphan is the reaper's"


@pytest.mark.parametrize("name", ["", "0123abcd4567", "../held", "0123ABCD4567", "x" * 10_000, "0123abcd456\n"])
def test_nobody_is_called_that(directory: Path, name: str) -> None:
    with own_sandbox(directory):
        with pytest.raises(SandboxError, match=r"no sandbox .*`trio-sandbox ps` lists those that do"):
            kill_sandbox(name, directory)


# --- Records that lie ---


def started(pid: int) -> int:
    status = process_status(pid)
    assert status is not None
    return status.started


def test_a_number_that_another_process_has_by_now_is_left_alone(
    directory: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    pid = processes[0].pid
    with held(directory, a_record(pid=pid, started=started(pid) - 1)):
        (sandbox,) = listed(directory)
        assert (sandbox.state, sandbox.qemu_pid) == ("ended", None)
        assert kill_sandbox("0123abcd4567", directory) is False
    assert processes[0].poll() is None


def test_a_process_that_its_owner_did_not_start_is_left_alone(directory: Path) -> None:
    with other_process(directory) as other:
        victim = other.pid  # a child of this process, and we call our child the owner
        with held(directory, a_record(id="0" * 12, pid=os.getppid(), started=started(os.getppid()))):
            assert {each.id: each.state for each in listed(directory)}["0" * 12] == "ended"
            assert kill_sandbox("0" * 12, directory) is False
        lie = a_record(id="1" * 12, owner=other.pid, pid=victim, started=started(victim))
        with held(directory, lie) as file:
            sandboxes, problems = running_sandboxes(directory)
            assert "1" * 12 not in {each.id for each in sandboxes}
            (problem,) = problems
            assert problem.startswith(f"{directory / file.name}: 1 of its records can't be used")
            assert f"the process {other.pid}, which it calls its owner, does not have it open" in problem
            with pytest.raises(SandboxError, match="no sandbox"):
                kill_sandbox("1" * 12, directory)
        assert other.poll() is None


def test_processes_of_another_container_are_left_alone(
    directory: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    pid = processes[0].pid
    with held(directory, a_record(namespace=pid_namespace() + 1, pid=pid, started=started(pid))):
        (sandbox,) = listed(directory)
        assert (sandbox.state, sandbox.qemu_pid, sandbox.owner_pid, sandbox.owner_command) == (
            "running",
            None,
            None,
            "",
        )
        with pytest.raises(SandboxError, match="in another container"):
            kill_sandbox("0123abcd4567", directory)
    assert processes[0].poll() is None


def test_of_an_owner_that_may_not_be_looked_at_nothing_is_ended(
    directory: Path, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object) -> bool:
        raise PermissionError

    monkeypatch.setattr(_running, "has_open", deny)
    pid = processes[0].pid
    with held(directory, a_record(pid=pid, started=started(pid))):
        (sandbox,) = listed(directory)
        assert sandbox.state == "running"
        with pytest.raises(SandboxError, match="does not let this user look at its owner"):
            kill_sandbox("0123abcd4567", directory)
    assert processes[0].poll() is None


def test_two_that_say_that_they_are_the_same_are_left_alone(
    directory: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    lies = [a_record(pid=each.pid, started=started(each.pid)) for each in processes]
    with held(directory, lies[0]), held(directory, lies[1]):
        with pytest.raises(SandboxError, match="2 sandboxes say that they are '0123abcd4567'"):
            kill_sandbox("0123abcd4567", directory)
    assert [each.poll() for each in processes] == [None, None]


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"x" * SIZE,
        b"[" * SIZE,
        encode(a_record(descriptor=1))[:-1] + b"x",
        encode(a_record(descriptor=1))[:-1],
        b"\xff" * (5 * SIZE),
    ],
)
def test_what_is_no_record_is_refused_and_the_others_are_listed(directory: Path, content: bytes) -> None:
    with own_sandbox(directory), held(directory, content) as file:
        sandboxes, problems = running_sandboxes(directory)
        assert [each.image for each in sandboxes] == ["mine"]
        (problem,) = problems
        assert str(directory / file.name) in problem
        assert len(problem) < 1000


def test_a_file_without_an_end_is_read_to_a_limit(directory: Path) -> None:
    with held(directory, a_record()) as file:
        os.ftruncate(file.fd, SIZE * 10**9)
        os.pwrite(file.fd, b"x" * SIZE, SIZE * MOST)
        assert [each.state for each in listed(directory)] == ["hibernated"]


def test_files_that_are_no_host_s_are_passed_over(directory: Path) -> None:
    with own_sandbox(directory):
        names = [f"{PREFIX}{number:016x}" for number in range(4)]
        (directory / names[0]).symlink_to("/etc/passwd")
        os.mkfifo(directory / names[1])
        (directory / names[2]).mkdir()
        (directory / names[3]).write_bytes(b"of a host that is dead")
        (directory / f"{PREFIX}mine").write_text("of no concern")
        assert len(listed(directory)) == 1
        assert sorted(each.name for each in directory.iterdir() if each.name in names) == names[:3]
        assert (directory / f"{PREFIX}mine").exists()


def test_who_has_no_descriptors_left_is_told_so_and_not_that_there_is_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def fail(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path).startswith(PREFIX):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, mode, dir_fd=dir_fd)

    with own_sandbox(directory):
        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(SandboxError, match="Too many open files"):
            running_sandboxes(directory)


def test_who_ends_while_it_is_read_is_no_problem(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(directory, a_record()) as file:

        def end(*_: object) -> bool:
            fcntl.flock(file.fd, fcntl.LOCK_UN)
            return False

        monkeypatch.setattr(_running, "has_open", end)
        assert running_sandboxes(directory) == ([], [])


def test_what_is_being_written_is_read_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[bytes] = []
    pread = os.pread

    def torn(fd: int, length: int, offset: int) -> bytes:
        data = pread(fd, length, offset)
        reads.append(data)
        return data if len(reads) == 3 else data[: SIZE // 4] + b"\0" * (SIZE - SIZE // 4)

    with held(directory, a_record()):
        monkeypatch.setattr(os, "pread", torn)
        assert len(listed(directory)) == 1
    assert len(reads) == 3
    assert _held_files.ATTEMPTS > 3
