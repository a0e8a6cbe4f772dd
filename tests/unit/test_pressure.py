"""What is killed when users' programs do little but wait for memory; a process of the test's own stands for each of theirs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from trio_sandbox.guest.spawner.pressure import Pressure

MIB = 2**20


@pytest.fixture
def processes() -> Generator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


class Guest:
    """Stands for the files of a control group and of /proc."""

    def __init__(self, path: Path, limit: str = f"{160 * MIB}") -> None:
        self.path = path
        (path / "users").mkdir()
        (path / "proc").mkdir()
        (path / "users/memory.max").write_text(f"{limit}\n")
        (path / "users/memory.pressure").write_text("")
        self.score(1, 10_000)  # never: that is us
        self.count(3)
        self.descriptors = [os.open(path / name, os.O_PATH | os.O_DIRECTORY) for name in ("users", "proc")]
        self.pressure = Pressure(*self.descriptors)

    def score(self, pid: int, score: int) -> None:
        (self.path / f"proc/{pid}").mkdir(exist_ok=True)
        (self.path / f"proc/{pid}/oom_score").write_text(f"{score}\n")

    def fill(self, files: int, current: int = 159 * MIB) -> None:
        (self.path / "users/memory.current").write_text(f"{current}\n")
        text = f"anon {159 * MIB}\nactive_file {files // 2}\ninactive_file {files - files // 2}\nfile 0\n"
        (self.path / "users/memory.stat").write_text(text)

    def count(self, threads: int) -> None:
        (self.path / "users/pids.current").write_text(f"{threads}\n")

    def close(self) -> None:
        for descriptor in [*self.descriptors, self.pressure.descriptor]:
            os.close(descriptor)


@pytest.fixture
def guest(tmp_path: Path) -> Generator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


def test_the_kernel_is_told_what_to_watch_for(guest: Guest) -> None:
    kind, stall, window = (guest.path / "users/memory.pressure").read_bytes().rstrip(b"\0").split()
    assert kind == b"some"
    assert 0 < int(stall) < int(window)
    # What the kernel takes: psi_trigger_create() in kernel/sched/psi.c.
    assert 500_000 <= int(window) <= 10_000_000


def test_the_one_that_the_kernel_would_kill_is_killed(guest: Guest, processes: list[subprocess.Popen[bytes]]) -> None:
    for process, score in zip(processes, (3, 950, 20), strict=True):
        guest.score(process.pid, score)
    (guest.path / "proc/meminfo").write_text("not a process")
    (guest.path / "proc/4194305").mkdir()  # it has ended meanwhile
    guest.fill(MIB)
    assert guest.pressure.relieve() == processes[1].pid
    assert processes[1].wait() == -signal.SIGKILL
    assert [processes[0].poll(), processes[2].poll()] == [None, None]


def test_who_waits_for_files_while_there_is_memory_is_left_alone(
    guest: Guest, processes: list[subprocess.Popen[bytes]]
) -> None:
    guest.score(processes[0].pid, 950)
    guest.fill(20 * MIB)
    assert guest.pressure.relieve() == 0
    assert processes[0].poll() is None


def test_a_balloon_that_took_the_memory_costs_nobody_his_process(
    guest: Guest, processes: list[subprocess.Popen[bytes]]
) -> None:
    guest.score(processes[0].pid, 950)
    guest.fill(MIB, current=80 * MIB)
    assert guest.pressure.relieve() == 0
    assert processes[0].poll() is None


def test_none_of_very_many_is_looked_for(guest: Guest, processes: list[subprocess.Popen[bytes]]) -> None:
    guest.score(processes[0].pid, 950)
    guest.fill(MIB)
    guest.count(129)
    assert guest.pressure.relieve() == 0
    assert processes[0].poll() is None
    guest.count(128)
    assert guest.pressure.relieve() == processes[0].pid


def test_there_may_be_nobody_to_kill(guest: Guest) -> None:
    guest.fill(MIB)
    assert guest.pressure.relieve() == 0
    guest.score(4194305, 950)  # gone by the time it is killed: no process has that number
    assert guest.pressure.relieve() == 4194305


def test_without_a_limit_nobody_is_killed(tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    guest = Guest(tmp_path, limit="max")
    guest.score(processes[0].pid, 950)
    guest.fill(MIB)
    assert guest.pressure.relieve() == 0
    guest.close()


def test_a_group_without_memory_of_its_own_is_not_watched(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    with pytest.raises(FileNotFoundError):
        Pressure(directory, directory)
    os.close(directory)
