"""Hosts of one user, in one process and in several, which share what the machine has."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest
import trio
import trio.testing

from trio_sandbox import CapacityError, HostConfig, SandboxConfig, Timeouts
from trio_sandbox.constants import VM_OVERHEAD_MIB
from trio_sandbox.machines import _admission, _ledger
from trio_sandbox.machines._admission import Admission
from trio_sandbox.machines._budget import Limit
from trio_sandbox.machines._ledger import SIZE, Ledger, LedgerEntry, encode, open_ledger

SMALL = SandboxConfig(memory_mib=128)
EACH = 128 + VM_OVERHEAD_MIB
QUICK = Timeouts(admission=5)


@pytest.fixture
def ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are; the machine has room for four small sandboxes."""
    monkeypatch.setattr(_admission, "memory_limit", lambda: Limit(4 * EACH, "says the test"))
    return tmp_path / "ledgers"


@contextmanager
def host(directory: Path, config: HostConfig | None = None, disk: Path | None = None) -> Generator[Admission]:
    with open_ledger(directory) as ledger:
        yield Admission(HostConfig(vcpu_budget=100, timeouts=QUICK) if config is None else config, disk, ledger)


def reserved(admission: Admission) -> tuple[int, int]:
    numbers = admission.statistics()
    return numbers.memory_mib_reserved // EACH, numbers.memory_mib_elsewhere // EACH


async def test_two_hosts_together_take_no_more_than_there_is(
    ledgers: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    with host(ledgers) as one, host(ledgers) as two:
        assert one.statistics().memory_mib_budget == two.statistics().memory_mib_budget == 4 * EACH
        async with one.admit_together(SMALL, 3, beside=0), two.admit(SMALL):
            assert (reserved(one), reserved(two)) == ((3, 1), (1, 3))
            for admission in (one, two):
                with pytest.raises(CapacityError) as caught:
                    async with admission.admit(SMALL):
                        pytest.fail("there is no room for a fifth")
                assert caught.value.retry_safe
            words = str(caught.value)
            assert f"takes {EACH} MiB" in words
            assert f"process {os.getpid()} has {3 * EACH} MiB" in words
            assert f"may have {4 * EACH} MiB" in words
            assert "Nothing was started, and it is safe to try again" in words
            assert (reserved(one), reserved(two)) == ((3, 1), (1, 3)), "what was not granted is not taken"
        assert (reserved(one), reserved(two)) == ((0, 0), (0, 0))
    assert "a sandbox waits for other processes" in caplog.text
    assert not ledgers.exists()


async def test_who_waits_for_another_host_goes_on_when_that_gives_back(
    ledgers: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with host(ledgers) as one, host(ledgers) as two:
        order: list[str] = []

        async def take(name: str, config: SandboxConfig) -> None:
            async with two.admit(config):
                order.append(name)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            with ExitStack() as shares:
                assert shares.enter_context(one.reserve(SandboxConfig(memory_mib=128 + EACH)))
                nursery.start_soon(take, "large", SandboxConfig(memory_mib=128 + 2 * EACH))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(take, "small", SMALL)
                await trio.sleep(2)
                assert order == [], "nobody overtakes within a host"
                assert two.statistics().tasks_waiting == 2
            await trio.sleep(1)
            assert order == ["large", "small"]


async def test_who_waited_for_its_own_host_first_waits_for_others_then(
    ledgers: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with host(ledgers) as one, host(ledgers) as two, ExitStack() as first, ExitStack() as other:
        assert first.enter_context(one.reserve(SandboxConfig(memory_mib=128 + 2 * EACH)))
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                async with one.admit(SandboxConfig(memory_mib=128 + 3 * EACH)):
                    assert reserved(one) == (4, 0)

            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            assert other.enter_context(two.reserve(SMALL))
            await trio.sleep(100)  # it waits for its own host, and does not mind how long
            first.close()
            await trio.sleep(1)
            assert reserved(one) == (0, 1)
            assert one.statistics().tasks_waiting == 1
            other.close()


async def test_a_waiter_that_gives_up_leaves_nothing_taken(
    ledgers: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with host(ledgers) as one, host(ledgers) as two:
        async with one.admit_together(SMALL, 4, beside=0):
            with trio.move_on_after(1) as scope:
                async with two.admit(SMALL):
                    pytest.fail("there is no room")
            assert scope.cancelled_caught
            assert two.statistics().tasks_waiting == 0
            with two.reserve(SMALL) as fits:
                assert not fits
            assert reserved(one) == (4, 0)


async def test_a_budget_set_by_hand_is_a_host_s_own(ledgers: Path, autojump_clock: trio.testing.MockClock) -> None:
    """It is not used up by others; but more than the machine has they don't take together, unless a budget says so."""
    with host(ledgers) as one:
        with host(ledgers, HostConfig(memory_budget_mib=EACH, vcpu_budget=9, timeouts=QUICK)) as two:
            async with one.admit_together(SMALL, 3, beside=0), two.admit(SMALL):
                assert two.statistics().memory_mib_budget == EACH
                with pytest.raises(CapacityError):
                    async with one.admit(SMALL):
                        pytest.fail("the other has the rest")
        with host(ledgers, HostConfig(memory_budget_mib=6 * EACH, vcpu_budget=9, timeouts=QUICK)) as two:
            async with one.admit_together(SMALL, 3, beside=0), two.admit_together(SMALL, 3, beside=0):
                with pytest.raises(CapacityError):
                    async with two.admit(SMALL):
                        pytest.fail("six are together more than there are")


async def test_disks_are_shared_where_they_are_counted(
    ledgers: Path, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_admission, "disk_room", mock.Mock(return_value=150))
    monkeypatch.setattr(_admission, "disk_shortage", mock.Mock(return_value=None))
    counted = HostConfig(memory_budget_mib=10**6, vcpu_budget=9, disk_budget_mib=100, timeouts=QUICK)
    each = SandboxConfig(disk_mib=80)
    with host(ledgers, counted, tmp_path) as one, host(ledgers, counted, tmp_path) as two:
        async with one.admit(each):
            assert two.statistics().disk_mib_elsewhere == 80
            with pytest.raises(CapacityError, match=f"process {os.getpid()} has .* and 80 MiB of the disk"):
                async with two.admit(each):
                    pytest.fail("160 MiB are more than 150")
            async with two.admit(SandboxConfig(disk_mib=70)):
                pass
            with host(ledgers, attrs_without_disk(counted), tmp_path) as three:
                async with three.admit(each):
                    assert three.statistics().disk_mib_elsewhere == 0
        with one.keep_disk(each):  # it hibernates
            assert two.statistics().disk_mib_elsewhere == 80
            with two.reserve(each) as fits:
                assert not fits
    monkeypatch.setattr(
        Ledger,
        "others",
        mock.Mock(return_value=[LedgerEntry(pid=1, memory_total=1, disk=1, disk_total=9, disk_reserved=10**6)]),
    )
    with host(ledgers, counted, tmp_path) as one:
        async with one.admit(each):
            assert one.statistics().disk_mib_elsewhere == 0, "it is another disk"


def attrs_without_disk(config: HostConfig) -> HostConfig:
    return HostConfig(
        memory_budget_mib=config.memory_budget_mib, vcpu_budget=config.vcpu_budget, timeouts=config.timeouts
    )


# --- Other processes ---

_OTHER = """
import sys, time
from pathlib import Path
from trio_sandbox.machines import _ledger
ledger = _ledger.Ledger(Path(sys.argv[1]))
import os
ledger.publish(_ledger.LedgerEntry(pid=os.getpid(), memory_total=int(sys.argv[2]), memory_reserved=int(sys.argv[3])))
assert not ledger.problem, ledger.problem
FORK
print("up", flush=True)
time.sleep(600)
"""


@contextmanager
def other_process(directory: Path, memory_mib: int, *, fork: bool = False) -> Generator[subprocess.Popen[bytes]]:
    code = _OTHER.replace("FORK", "if os.fork() == 0: time.sleep(600)" if fork else "")
    with subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(directory), str(4 * EACH), str(memory_mib)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("fork", [False, True])
async def test_what_a_killed_process_had_comes_free(ledgers: Path, fork: bool) -> None:
    with host(ledgers) as one, other_process(ledgers, 4 * EACH, fork=fork) as other:
        assert reserved(one) == (0, 4)
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                async with one.admit(SMALL):
                    assert reserved(one) == (1, 0)

            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            assert one.statistics().tasks_waiting == 1
            other.kill()
            other.wait()
    assert not ledgers.exists()


async def test_a_process_that_is_stopped_stops_nobody(ledgers: Path) -> None:
    with other_process(ledgers, 2 * EACH) as other:
        other.send_signal(signal.SIGSTOP)
        with host(ledgers) as one:
            async with one.admit_together(SMALL, 2, beside=0):
                assert reserved(one) == (2, 2)
                with trio.move_on_after(0.3):
                    async with one.admit(SMALL):
                        pytest.fail("the stopped one has its share still")


# --- Strange files ---


def test_files_that_are_no_host_s_are_passed_over(ledgers: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_ledger(ledgers) as ledger, ExitStack() as stack:
        ledger.publish(LedgerEntry(pid=1, memory_total=1))
        locked: list[Path] = []
        for number, content in enumerate(
            (b"", b"\0" * SIZE, b"x" * 10**6, encode(LedgerEntry(pid=1, memory_total=1))[:-1])
        ):
            path = ledgers / f"{number:016x}"
            path.write_bytes(content)
            file = stack.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            locked.append(path)
        (ledgers / "f000000000000000").symlink_to("/etc/passwd")
        os.mkfifo(ledgers / "f000000000000001")
        (ledgers / "f000000000000002").mkdir()
        (ledgers / "a user's own file").write_text("of no concern")
        dead = ledgers / "f000000000000003"
        dead.write_bytes(encode(LedgerEntry(pid=1, memory_total=1, memory_reserved=5)))
        assert ledger.others() == ledger.others() == []
        assert caplog.text.count("is not counted") == len(locked) - 1, (
            "each is told of once, but for one that says nothing yet"
        )
        assert not dead.exists(), "its host is dead"
        assert all(path.exists() for path in locked)
        assert (ledgers / "a user's own file").exists()


def test_an_entry_of_another_version_is_said_not_to_be_counted(
    ledgers: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_ledger(ledgers) as ledger, open_ledger(ledgers) as newer:
        ledger.publish(LedgerEntry(pid=1, memory_total=1, memory_reserved=7))
        with monkeypatch.context() as patch:
            patch.setattr(_ledger, "FORMAT", 2)
            newer.publish(LedgerEntry(pid=2, memory_total=1, memory_reserved=9))
            assert newer.others() == []
        assert ledger.others() == []
        assert "its format is 2, and this version of trio-sandbox reads 1 only" in caplog.text
        assert "its format is 1, and this version of trio-sandbox reads 2 only" in caplog.text
        assert len(list(ledgers.iterdir())) == 2, "neither removed the other's"


def test_a_file_that_was_removed_is_made_again(ledgers: Path) -> None:
    with open_ledger(ledgers) as ledger, open_ledger(ledgers) as other:
        entry = LedgerEntry(pid=1, memory_total=1, memory_reserved=7)
        ledger.publish(entry)
        for path in ledgers.iterdir():
            path.unlink()
        ledgers.rmdir()
        assert other.others() == []
        ledger.publish(entry)
        assert other.others() == [entry]


@pytest.mark.parametrize("spoil", ["file", "link", "writable", "foreign", "unwritable"])
def test_without_a_directory_of_its_own_a_host_is_for_itself(
    ledgers: Path, spoil: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ledgers
    if spoil == "file":
        ledgers.write_text("")
    elif spoil == "link":
        (ledgers.parent / "elsewhere").mkdir(mode=0o700)
        ledgers.symlink_to("elsewhere")
    elif spoil == "writable":
        ledgers.mkdir()
        ledgers.chmod(0o770)
    elif spoil == "foreign":
        ledgers.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        directory = Path("/proc/self/ledgers")
    with host(directory) as one, host(directory) as two:
        assert one.total.memory_mib == 4 * EACH
        with one.reserve(SandboxConfig(memory_mib=128 + 3 * EACH)) as fits:
            assert fits
            with two.reserve(SMALL) as also:
                assert also
            assert two.statistics().memory_mib_elsewhere == 0
    assert "other processes' sandboxes are not counted" in caplog.text
    assert str(directory) in caplog.text


def test_a_full_memory_disk_makes_a_host_be_for_itself(
    ledgers: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with host(ledgers) as one:
        monkeypatch.setattr(os, "pwrite", fail)
        with one.reserve(SMALL) as fits:
            assert fits
        assert caplog.records[-1].levelno == logging.WARNING
        assert "No space left on device" in caplog.text
    assert not ledgers.exists(), "nobody counts what it had given out"


def test_the_umask_keeps_nobody_out(ledgers: Path) -> None:
    before = os.umask(0o777)
    try:
        with open_ledger(ledgers) as ledger, open_ledger(ledgers) as other:
            ledger.publish(LedgerEntry(pid=1, memory_total=1))
            assert ledgers.stat().st_mode & 0o777 == 0o700
            assert [path.stat().st_mode & 0o777 for path in ledgers.iterdir()] == [0o600]
            assert len(other.others()) == 1
    finally:
        os.umask(before)


def test_all_processes_of_a_user_look_at_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    place = _ledger.default_directory()
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.setenv(name, "/nonexistent")
    assert _ledger.default_directory() == place
    assert place.name == f"trio-sandbox-{os.geteuid()}"
