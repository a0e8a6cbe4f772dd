"""The storage daemon, with the real program. Each sentence of its promises is a test."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_sandbox import MissingProgramError, QemuStorageDaemonError, Timeouts
from trio_sandbox.qemu import QemuStorageDaemon, open_qmp, open_storage_daemon

from .._leaks import cancel_at_every_step, child_pids, nothing_left
from ._images import assert_overlay, make_base, overlays_in, qemu_img_overlay, send_signal, small_disk

pytestmark = pytest.mark.qemu


@pytest.fixture
def sockets() -> Generator[Path]:
    """Give a directory with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        yield Path(directory)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.qcow2")


def alive(pid: int | None) -> bool:
    assert pid is not None
    return os.path.exists(f"/proc/{pid}")


async def assert_nothing_in_daemon(daemon: QemuStorageDaemon) -> None:
    channel = daemon._channel
    assert channel is not None
    assert await channel.execute("query-jobs") == []
    assert await channel.execute("query-named-block-nodes") == []
    assert daemon._jobs == {}


@asynccontextmanager
async def stopped(daemon: QemuStorageDaemon) -> AsyncGenerator[None]:
    """Keep the daemon's process from running for the length of a block: a disk that hangs, say."""
    send_signal(daemon, signal.SIGSTOP)
    try:
        await trio.lowlevel.checkpoint()
        yield
    finally:
        if daemon.pid is not None:
            send_signal(daemon, signal.SIGCONT)


# --- Life cycle ---


async def test_a_directory_of_its_own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")  # short enough for a socket
    with nothing_left():
        async with open_storage_daemon() as daemon:
            directory = daemon.socket_path.parent
            assert daemon.socket_path.is_socket()
            assert directory.parent == Path("/tmp")
            assert directory.stat().st_mode & 0o777 == 0o700
            await daemon.create_overlay(base, tmp_path / "overlay.qcow2")
        assert not directory.exists()
    with pytest.raises(MissingProgramError):
        async with open_storage_daemon(program="no-such-daemon"):
            pytest.fail("started")
    monkeypatch.setenv("TMPDIR", "/" + "long" * 30)
    async with open_storage_daemon() as daemon:
        assert daemon.started


async def test_runs_for_the_block_and_no_longer(sockets: Path, base: Path, tmp_path: Path) -> None:
    with nothing_left(sockets):
        async with open_storage_daemon(directory=sockets) as daemon:
            pid = daemon.pid
            assert daemon.started
            assert child_pids() == [pid]
            assert daemon.socket_path.is_socket()
            assert daemon.socket_path.parent == sockets
            assert f"running with PID {pid}" in repr(daemon)
            assert pid is not None
            assert os.getpgid(pid) == pid  # Ctrl-C is not for it
        assert not daemon.started
        assert daemon.pid is None
        assert not alive(pid)
        assert not daemon.socket_path.exists()
        with pytest.raises(QemuStorageDaemonError, match="not started: it was stopped"):
            await daemon.create_overlay(base, tmp_path / "late")


def environment_of(pid: int | None) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


async def test_environment_is_minimal_plus_what_was_asked(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    async with open_storage_daemon(directory=sockets, environment={"TRIO_SANDBOX_OWNER": "me"}) as daemon:
        environment = environment_of(daemon.pid)
        assert b"TRIO_SANDBOX_OWNER=me" in environment
        assert not any(each.startswith(b"A_SECRET") for each in environment)


async def test_socket_is_for_looking_inside(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        async with open_qmp(daemon.socket_path) as channel:
            with channel.subscribe("JOB_STATUS_CHANGE") as events:
                await daemon.create_overlay(base, tmp_path / "overlay")
                assert (await events.receive()).data["status"] == "created"
            assert await channel.execute("query-named-block-nodes") == []


async def test_stop_before_start_is_no_error(sockets: Path, base: Path, tmp_path: Path) -> None:
    daemon = QemuStorageDaemon(directory=sockets)
    assert not daemon.started
    assert daemon.pid is None
    with trio.testing.assert_checkpoints():
        await daemon.stop()
    with pytest.raises(QemuStorageDaemonError, match="not started") as caught:
        await daemon.create_overlay(base, tmp_path / "overlay")
    assert caught.value.error_class is None
    assert not (tmp_path / "overlay").exists()


async def test_stop_twice_and_by_many_is_no_error(sockets: Path) -> None:
    with nothing_left(sockets):
        async with open_storage_daemon(directory=sockets) as daemon:
            pid = daemon.pid
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(daemon.stop)
            assert not alive(pid)
            assert not daemon.started
            await daemon.stop()
        await daemon.stop()


async def test_stop_after_death_is_no_error(sockets: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        send_signal(daemon, signal.SIGKILL)
        await daemon.stop()
        assert not daemon.socket_path.exists()


async def test_stopping_a_daemon_that_hangs_kills_it(sockets: Path) -> None:
    with nothing_left(sockets):
        async with open_storage_daemon(directory=sockets, timeouts=Timeouts(process_exit=0.05)) as daemon:
            send_signal(daemon, signal.SIGSTOP)
            await daemon.stop()
            assert not daemon.started


async def test_two_in_a_row_and_two_at_once(sockets: Path, base: Path, tmp_path: Path) -> None:
    for index in range(2):
        async with open_storage_daemon(directory=sockets) as daemon:
            await daemon.create_overlay(base, tmp_path / f"row{index}")
    async with open_storage_daemon(directory=sockets) as one, open_storage_daemon(directory=sockets) as two:
        assert one.socket_path != two.socket_path
        await one.create_overlay(base, tmp_path / "one")
        await two.create_overlay(base, tmp_path / "two")
    for name in ("row0", "row1", "one", "two"):
        assert_overlay(tmp_path / name, base)


async def test_five_rapid_cycles_leave_nothing(sockets: Path, base: Path, tmp_path: Path) -> None:
    with nothing_left(sockets, tmp_path):
        for _ in range(5):
            async with open_storage_daemon(directory=sockets) as daemon:
                await daemon.create_overlay(base, tmp_path / "overlay")
            (tmp_path / "overlay").unlink()


async def test_opening_and_closing_cancelled_at_every_await_leaves_nothing(sockets: Path) -> None:
    async def run() -> None:
        async with open_storage_daemon(directory=sockets) as daemon:
            await trio.lowlevel.checkpoint()
            await daemon.stop()

    with nothing_left(sockets):
        runs = await cancel_at_every_step(run, check=lambda: assert_empty(sockets), every_task=True)
        assert runs > 10


def assert_empty(directory: Path) -> None:
    assert child_pids() == []
    assert os.listdir(directory) == []


async def test_exception_of_the_body_comes_out_bare(sockets: Path) -> None:
    with nothing_left(sockets), pytest.raises(KeyError):
        async with open_storage_daemon(directory=sockets):
            raise KeyError("mine")


async def test_body_can_make_overlays_while_it_is_cancelled(sockets: Path, base: Path, tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_storage_daemon(directory=sockets) as daemon:
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(30, shield=True):
                    await daemon.create_overlay(base, tmp_path / "overlay")
    assert_overlay(tmp_path / "overlay", base)


# --- Starts that fail ---


async def test_missing_program_names_its_package(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left(sockets), pytest.raises(MissingProgramError, match="no-such-daemon"):
        async with open_storage_daemon(directory=sockets, program="no-such-daemon"):
            raise AssertionError("not reached")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def test_program_that_ends_at_once_is_quoted(sockets: Path, tmp_path: Path) -> None:
    program = script(tmp_path / "daemon", "echo no luck today >&2; exit 3")
    with nothing_left(sockets), pytest.raises(QemuStorageDaemonError, match="no luck today"):
        async with open_storage_daemon(directory=sockets, program=program):
            raise AssertionError("not reached")


async def test_program_that_says_nothing_times_out(sockets: Path, tmp_path: Path) -> None:
    program = script(tmp_path / "daemon", "exec sleep 60")
    with nothing_left(sockets):
        with pytest.raises(QemuStorageDaemonError, match=r"did not answer within 0\.2 s") as caught:
            async with open_storage_daemon(
                directory=sockets, program=program, timeouts=Timeouts(storage_daemon_start=0.2)
            ):
                raise AssertionError("not reached")
    assert isinstance(caught.value.__cause__, trio.TooSlowError)


async def test_directory_that_can_not_take_a_socket(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for directory, message in (
        (tmp_path / "missing", "No such file"),
        (Path("/proc"), "could not be started"),
        (long, "use a shorter directory"),
    ):
        with nothing_left(), pytest.raises(QemuStorageDaemonError, match=message):
            async with open_storage_daemon(directory=directory):
                raise AssertionError("not reached")


# --- Overlays ---


async def test_overlay_is_what_qemu_img_makes(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        await daemon.create_overlay(base, tmp_path / "overlay")
        await assert_nothing_in_daemon(daemon)
    assert_overlay(tmp_path / "overlay", base)
    assert (tmp_path / "overlay").stat().st_mode & 0o777 == 0o600
    theirs = qemu_img_overlay(base, tmp_path / "theirs")
    assert (tmp_path / "overlay").read_bytes() == theirs.read_bytes()


async def test_overlay_works_as_a_disk(sockets: Path, base: Path, tmp_path: Path) -> None:
    def qemu_io(command: str, path: Path) -> str:
        result = subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, capture_output=True)
        return result.stdout.decode()

    qemu_io("write -P 65 0 64k", base)
    async with open_storage_daemon(directory=sockets) as daemon:
        await daemon.create_overlay(base, tmp_path / "overlay")
        # The daemon has let go of it: qemu-io could not get the lock otherwise.
        qemu_io("write -P 66 64k 64k", tmp_path / "overlay")
    assert "verification failed" not in qemu_io("read -P 65 0 64k", tmp_path / "overlay")
    assert "verification failed" not in qemu_io("read -P 66 64k 64k", tmp_path / "overlay")
    assert "verification failed" not in qemu_io("read -P 0 64k 64k", base)


async def test_several_in_sequence_and_an_overlay_of_an_overlay(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        previous = base
        for index in range(4):
            overlay = tmp_path / f"overlay{index}"
            await daemon.create_overlay(previous, overlay)
            assert_overlay(overlay, previous)
            previous = overlay


@pytest.mark.parametrize("count", [20, 80])
async def test_many_at_once(count: int, sockets: Path, base: Path, tmp_path: Path) -> None:
    """80 is more than the daemon is given at a time."""
    overlays = [tmp_path / f"overlay{index}" for index in range(count)]
    async with open_storage_daemon(directory=sockets) as daemon:
        async with trio.open_nursery() as nursery:
            for overlay in overlays:
                nursery.start_soon(daemon.create_overlay, base, overlay)
        await assert_nothing_in_daemon(daemon)
    assert len({overlay.read_bytes() for overlay in overlays}) == 1
    assert_overlay(overlays[0], base)


@pytest.mark.parametrize(
    "name",
    ["with space", "ünïcödé-日本-🐧", 'quo"te\\s', "comma,=equals", "new\nline", "-dash", "json:{}", "fat:x"],
)
async def test_any_name_works(name: str, sockets: Path, tmp_path: Path) -> None:
    directory = tmp_path / name
    directory.mkdir()
    base = make_base(directory / "base") if "," not in name else copy_of_base(tmp_path, directory / name)
    async with open_storage_daemon(directory=sockets) as daemon:
        await daemon.create_overlay(base, directory / f"overlay {name}")
        await assert_nothing_in_daemon(daemon)
    os.rename(directory / f"overlay {name}", tmp_path / "plain")
    assert_overlay(tmp_path / "plain", base)


def copy_of_base(tmp_path: Path, path: Path) -> Path:
    path.write_bytes(make_base(tmp_path / "copied").read_bytes())
    return path


async def test_symlinks_work(sockets: Path, base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.qcow2"
    link.symlink_to(base)
    real, linked = tmp_path / "real" / "deep", tmp_path / "linked"
    real.mkdir(parents=True)
    linked.symlink_to(real)
    async with open_storage_daemon(directory=sockets) as daemon:
        await daemon.create_overlay(link, linked / "overlay")
        # By the file system "linked/.." is "real", by looking at the text alone it is `tmp_path`.
        await daemon.create_overlay(linked / ".." / ".." / "base.qcow2", linked / ".." / "other")
    assert_overlay(real / "overlay", link)
    assert (tmp_path / "real" / "other").exists()


async def test_relative_paths_count_from_here(
    sockets: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        monkeypatch.chdir(tmp_path)
        await daemon.create_overlay("base.qcow2", "overlay")
        await daemon.create_overlay(os.fspath(base), tmp_path / "other")
    assert_overlay(tmp_path / "overlay", base)


async def test_replaced_base_is_noticed(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        await daemon.create_overlay(base, tmp_path / "before")
        make_base(tmp_path / "new", "128M").replace(base)
        await daemon.create_overlay(base, tmp_path / "after")
    assert_overlay(tmp_path / "after", base, size=128 * 2**20)


# --- Overlays that fail ---


@contextmanager
def refused(message: str) -> Generator[pytest.ExceptionInfo[QemuStorageDaemonError]]:
    with pytest.raises(QemuStorageDaemonError, match=message) as caught:
        yield caught
    assert caught.value.retry_safe


async def test_bad_bases_are_refused_and_leave_nothing(sockets: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(2**20))
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "torn").write_bytes(b"QFI\xfb\0\0\0\3")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    async with open_storage_daemon(directory=sockets) as daemon:
        with nothing_left(tmp_path):
            for name, message in (
                ("missing", "Failed to get image info of the base .*missing: No such file"),
                ("dangling", "Failed to get image info"),
                ("loop", "Failed to get image info"),
                ("directory", "Failed to get image info .*Is a directory"),
                ("fifo", "Failed to get image info .*Neither a regular file"),
                ("/proc/self/mem", "Failed to get image info"),  # root can't read it at 0 either
                ("raw", "raw: not qcow2 format"),
                ("empty", "not qcow2 format"),
                ("/etc/passwd", "not qcow2 format"),
                ("torn", "corrupt qcow2 header"),
            ):
                with refused(message):
                    await daemon.create_overlay(tmp_path / name, tmp_path / "overlay")
        await assert_nothing_in_daemon(daemon)


async def test_target_that_exists_is_left_alone(sockets: Path, base: Path, tmp_path: Path) -> None:
    existing, dangling = tmp_path / "existing", tmp_path / "dangling"
    existing.write_text("precious")
    dangling.symlink_to(tmp_path / "nowhere")
    async with open_storage_daemon(directory=sockets) as daemon:
        with nothing_left(tmp_path):
            for target in (existing, dangling, tmp_path, base):
                with refused("File exists"):
                    await daemon.create_overlay(base, target)
    assert existing.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("target", ["/proc/overlay", "/sys/overlay", "/nowhere/overlay", "/dev/null/overlay"])
async def test_target_that_can_not_be_written(target: str, sockets: Path, base: Path) -> None:
    """Not by root either: its kernel won't have files made there."""
    async with open_storage_daemon(directory=sockets) as daemon:
        with refused(f"can't create the overlay {target}") as caught:
            await daemon.create_overlay(base, target)
        assert isinstance(caught.value.__cause__, OSError)
        await assert_nothing_in_daemon(daemon)


async def test_paths_that_qmp_can_not_express(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets) as daemon:
        for bad in (os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "zero\0byte"):
            with pytest.raises(ValueError, match=r"UTF-8|zero byte"):
                await daemon.create_overlay(base, bad)
            with pytest.raises(ValueError, match=r"UTF-8|zero byte"):
                await daemon.create_overlay(bad, tmp_path / "overlay")
        with pytest.raises(TypeError):
            await daemon.create_overlay(7, tmp_path / "overlay")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert os.listdir(tmp_path) == ["base.qcow2"]


async def test_full_disk_leaves_nothing(sockets: Path, base: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        async with open_storage_daemon(directory=sockets) as daemon:
            with nothing_left(disk), refused("No space left on device") as caught:
                await daemon.create_overlay(base, disk / "overlay")
            assert caught.value.error_class is None  # a job's error has no class
            await assert_nothing_in_daemon(daemon)
            await daemon.create_overlay(base, tmp_path / "elsewhere")


async def test_command_that_qemu_refuses_keeps_its_class(sockets: Path, base: Path, tmp_path: Path) -> None:
    async def create() -> None:
        with refused("No such file or directory") as caught:
            await daemon.create_overlay(base, tmp_path / "overlay")
        assert caught.value.error_class == "GenericError"

    async with open_storage_daemon(directory=sockets) as daemon:
        async with trio.open_nursery() as nursery, stopped(daemon):
            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked()
            os.unlink(tmp_path / "overlay")  # before the daemon gets to open it
        await assert_nothing_in_daemon(daemon)
        await daemon.create_overlay(base, tmp_path / "overlay")
    assert_overlay(tmp_path / "overlay", base)


async def test_base_name_longer_than_qcow2_can_record(sockets: Path, tmp_path: Path) -> None:
    directory = tmp_path / "/".join(["d" * 200] * 6)
    directory.mkdir(parents=True)
    base = make_base(directory / "base")
    async with open_storage_daemon(directory=sockets) as daemon:
        with nothing_left(tmp_path), refused("can't make the overlay"):
            await daemon.create_overlay(base, tmp_path / "overlay")
        await assert_nothing_in_daemon(daemon)


# --- Death, time and cancellation ---


async def test_killed_in_the_middle_of_ten_creations(sockets: Path, base: Path, tmp_path: Path) -> None:
    errors: list[QemuStorageDaemonError] = []

    async def create(index: int) -> None:
        with pytest.raises(QemuStorageDaemonError) as caught:
            await daemon.create_overlay(base, tmp_path / f"overlay{index}")
        errors.append(caught.value)

    with nothing_left(sockets, tmp_path):
        async with open_storage_daemon(directory=sockets) as daemon:
            async with stopped(daemon), trio.open_nursery() as nursery:
                for index in range(10):
                    nursery.start_soon(create, index)
                await trio.testing.wait_all_tasks_blocked()
                assert len(overlays_in(tmp_path)) == 10
                send_signal(daemon, signal.SIGKILL)
            assert len(errors) == 10
            for error in errors:
                assert "was ended by SIGKILL" in str(error)
                assert error.error_class is None
            assert not daemon.started
            assert daemon.pid is None
            with pytest.raises(QemuStorageDaemonError, match="not started: it was ended by SIGKILL"):
                await daemon.create_overlay(base, tmp_path / "later")


@pytest.mark.parametrize("finished", [1, 4, 9])
async def test_killed_after_some_of_ten_creations(finished: int, sockets: Path, base: Path, tmp_path: Path) -> None:
    """What succeeded is sound; what failed is not there."""
    made: list[Path] = []
    failed: list[Path] = []

    async def create(overlay: Path) -> None:
        try:
            await daemon.create_overlay(base, overlay)
        except QemuStorageDaemonError:
            failed.append(overlay)
        else:
            made.append(overlay)
            if len(made) == finished:
                send_signal(daemon, signal.SIGKILL)

    async with open_storage_daemon(directory=sockets) as daemon, trio.open_nursery() as nursery:
        for index in range(10):
            nursery.start_soon(create, tmp_path / f"overlay{index}")
    assert len(made) + len(failed) == 10
    assert len(made) >= finished
    assert overlays_in(tmp_path) == sorted(made)
    for overlay in made:
        assert_overlay(overlay, base)


async def test_stopped_in_the_middle_of_creations(sockets: Path, base: Path, tmp_path: Path) -> None:
    async def create(index: int) -> None:
        with pytest.raises(QemuStorageDaemonError, match="it was stopped"):
            await daemon.create_overlay(base, tmp_path / f"overlay{index}")

    with nothing_left(sockets, tmp_path):
        async with open_storage_daemon(directory=sockets, timeouts=Timeouts(process_exit=0.1)) as daemon:
            async with stopped(daemon), trio.open_nursery() as nursery:
                for index in range(40):  # some of them wait for their turn
                    nursery.start_soon(create, index)
                await trio.testing.wait_all_tasks_blocked()
                await daemon.stop()


def count_in_flight(daemon: QemuStorageDaemon) -> int:
    assert daemon._channel is not None
    return daemon._channel.statistics().commands_in_flight


async def test_too_slow_daemon_that_recovers(sockets: Path, base: Path, tmp_path: Path) -> None:
    caught: list[QemuStorageDaemonError] = []

    async def create() -> None:
        with pytest.raises(QemuStorageDaemonError, match=r"took more than 0\.2 s") as info:
            await daemon.create_overlay(base, tmp_path / "overlay")
        caught.append(info.value)

    with nothing_left(sockets, tmp_path):
        async with open_storage_daemon(directory=sockets, timeouts=Timeouts(overlay=0.2, process_exit=30)) as daemon:
            async with trio.open_nursery() as nursery:
                async with stopped(daemon):
                    nursery.start_soon(create)
                    await trio.testing.wait_all_tasks_blocked()
                    # Past the timeout, until the clearing up waits for the daemon to run again.
                    await trio.testing.wait_all_tasks_blocked(cushion=0.4)
                    assert count_in_flight(daemon) == 2
            assert isinstance(caught[0].__cause__, trio.TooSlowError)
            assert daemon.started
            await assert_nothing_in_daemon(daemon)


async def test_too_slow_daemon_that_does_not_recover_is_killed(sockets: Path, base: Path, tmp_path: Path) -> None:
    with nothing_left(sockets, tmp_path):
        async with open_storage_daemon(directory=sockets, timeouts=Timeouts(overlay=0.1, process_exit=0.1)) as daemon:
            async with stopped(daemon):
                with pytest.raises(QemuStorageDaemonError, match=r"took more than 0\.1 s") as caught:
                    await daemon.create_overlay(base, tmp_path / "overlay")
            assert isinstance(caught.value.__cause__, trio.TooSlowError)
            with pytest.raises(QemuStorageDaemonError, match="SIGKILL"):
                await daemon.create_overlay(base, tmp_path / "overlay")


async def test_waiting_for_a_turn_counts(sockets: Path, base: Path, tmp_path: Path) -> None:
    async with open_storage_daemon(directory=sockets, timeouts=Timeouts(overlay=0.1)) as daemon:
        for other in range(int(daemon._turns.total_tokens)):
            daemon._turns.acquire_on_behalf_of_nowait(other)
        with pytest.raises(QemuStorageDaemonError, match=r"took more than 0\.1 s"):
            await daemon.create_overlay(base, tmp_path / "overlay")
    assert not (tmp_path / "overlay").exists()


@pytest.mark.parametrize("every_task", [False, True])
async def test_caller_cancelled_at_every_await_leaves_nothing(
    every_task: bool, sockets: Path, base: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    made: list[Path] = []

    async def create() -> None:
        try:
            await daemon.create_overlay(base, overlay)
            made.append(overlay)
        finally:
            with trio.CancelScope(shield=True):  # noqa: ASYNC102 # the test's own bound is enough
                await assert_nothing_in_daemon(daemon)

    def check() -> None:
        assert overlay.exists() == bool(made)
        for path in made:
            path.unlink()
        made.clear()

    async with open_storage_daemon(directory=sockets) as daemon:
        assert await cancel_at_every_step(create, check=check, every_task=every_task) > 8
        await daemon.create_overlay(base, overlay)
        assert daemon.started
    assert_overlay(overlay, base)
