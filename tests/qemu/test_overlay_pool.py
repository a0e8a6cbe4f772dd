"""The overlay pool, with the real storage daemon."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_sandbox import QemuStorageDaemonError
from trio_sandbox.qemu import OverlayPool, QemuStorageDaemon, open_overlay_pool, open_storage_daemon

from .._leaks import cancel_at_every_step, nothing_left
from ._images import assert_overlay, make_base, overlays_in, qemu_img_overlay, send_signal, small_disk

pytestmark = pytest.mark.qemu


@pytest.fixture
async def daemon() -> AsyncGenerator[QemuStorageDaemon]:
    with tempfile.TemporaryDirectory(prefix="ts-") as directory:
        async with open_storage_daemon(directory=directory) as daemon:
            yield daemon


@pytest.fixture
async def pool(daemon: QemuStorageDaemon) -> AsyncGenerator[OverlayPool]:
    async with open_overlay_pool(daemon) as pool:
        yield pool


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.qcow2")


async def test_first_comes_from_the_daemon_and_the_rest_from_the_pool(
    pool: OverlayPool, base: Path, tmp_path: Path
) -> None:
    assert [await pool.acquire(base, tmp_path / f"overlay{index}") for index in range(4)] == [False, True, True, True]
    expected = qemu_img_overlay(base, tmp_path / "theirs").read_bytes()
    for index in range(4):
        overlay = tmp_path / f"overlay{index}"
        assert_overlay(overlay, base)
        assert overlay.read_bytes() == expected
        assert overlay.stat().st_mode & 0o777 == 0o600
    statistics = pool.statistics()
    assert (statistics.prototypes, statistics.hits, statistics.misses) == (1, 3, 1)


async def test_copies_are_sparse_and_independent(pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    await pool.acquire(base, one)
    await pool.acquire(base, two)
    assert two.stat().st_blocks * 512 < two.stat().st_size / 4
    before = two.read_bytes()
    await trio.run_process(["qemu-io", "-f", "qcow2", "-c", "write -P 65 0 64k", str(one)], capture_stdout=True)
    assert two.read_bytes() == before
    await pool.acquire(base, tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == before


async def test_a_disk_so_large_that_its_table_is_not_empty_space(pool: OverlayPool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "large", "16T")
    for name, hit in (("one", False), ("two", True)):
        assert await pool.acquire(base, tmp_path / name) is hit
        assert_overlay(tmp_path / name, base, size=16 * 2**40)
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


async def test_different_bases_have_their_own_prototypes(pool: OverlayPool, tmp_path: Path) -> None:
    bases = [make_base(tmp_path / f"base ü{index}", f"{index + 1}G") for index in range(3)]
    for round_ in range(2):
        for index, base in enumerate(bases):
            overlay = tmp_path / f"overlay{round_}-{index}"
            assert await pool.acquire(base, overlay) is (round_ == 1)
            assert_overlay(overlay, base, size=(index + 1) * 2**30)


async def test_symlinked_base_is_recorded_as_given_and_followed(pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    await pool.acquire(base, tmp_path / "one")
    assert not await pool.acquire(link, tmp_path / "two")
    assert_overlay(tmp_path / "two", link)
    link.unlink()
    link.symlink_to(make_base(tmp_path / "other", "1G"))
    assert not await pool.acquire(link, tmp_path / "three")
    assert_overlay(tmp_path / "three", link, size=2**30)


async def test_replaced_base_is_noticed(pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    await pool.acquire(base, tmp_path / "before")
    make_base(tmp_path / "new", "128M").replace(base)
    assert not await pool.acquire(base, tmp_path / "after")
    assert_overlay(tmp_path / "after", base, size=128 * 2**20)
    assert await pool.acquire(base, tmp_path / "later")
    assert pool.statistics().prototypes == 1


async def test_base_that_vanished_or_became_another_thing(pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    await pool.acquire(base, tmp_path / "before")
    os.unlink(base)
    with nothing_left(tmp_path), pytest.raises(QemuStorageDaemonError, match="Failed to get image info"):
        await pool.acquire(base, tmp_path / "after")
    os.truncate(make_base(base), 0)
    with nothing_left(tmp_path), pytest.raises(QemuStorageDaemonError, match="not qcow2 format"):
        await pool.acquire(base, tmp_path / "after")


async def test_at_once_one_prototype_serves_all(
    daemon: QemuStorageDaemon, pool: OverlayPool, base: Path, tmp_path: Path
) -> None:
    hits: list[bool] = []

    async def acquire(index: int) -> None:
        hits.append(await pool.acquire(base, tmp_path / f"overlay{index}"))

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(acquire, index)
    assert hits == [False] * 20
    assert next(daemon._numbers) == 1  # the daemon has made one overlay
    assert len({(tmp_path / f"overlay{index}").read_bytes() for index in range(20)}) == 1


async def test_target_that_exists_is_left_alone(pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    existing, dangling = tmp_path / "existing", tmp_path / "dangling"
    existing.write_text("precious")
    dangling.symlink_to(tmp_path / "nowhere")
    with nothing_left(tmp_path):
        for _ in range(2):  # first without a prototype, then with
            for target in (existing, dangling, base, tmp_path):
                with pytest.raises(QemuStorageDaemonError, match="File exists"):
                    await pool.acquire(base, target)
    assert existing.read_text() == "precious"


@pytest.mark.parametrize("target", ["/proc/overlay", "/sys/overlay", "/nowhere/overlay"])
async def test_target_that_can_not_be_written(target: str, pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    with pytest.raises(QemuStorageDaemonError, match=f"can't create the overlay {target}") as caught:
        await pool.acquire(base, target)
    assert isinstance(caught.value.__cause__, OSError)
    # Somebody's bad target is not the prototype's fault.
    assert await pool.acquire(base, tmp_path / "overlay")


async def test_pool_directory_that_vanishes_is_made_again(
    daemon: QemuStorageDaemon, base: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "some" / "pool"
    other = make_base(tmp_path / "other", "1G")
    async with open_overlay_pool(daemon, directory=directory) as pool:
        assert pool.directory == directory
        await pool.acquire(base, tmp_path / "one")
        assert os.listdir(directory) == []
        directory.rmdir()
        assert await pool.acquire(base, tmp_path / "two")  # needs no directory
        await pool.acquire(other, tmp_path / "three")
    assert_overlay(tmp_path / "three", other, size=2**30)
    assert os.listdir(directory) == []  # it is the caller's, so it stays


async def test_own_directory_goes_with_the_pool(daemon: QemuStorageDaemon, base: Path, tmp_path: Path) -> None:
    with nothing_left(daemon.directory):
        async with open_overlay_pool(daemon) as pool:
            await pool.acquire(base, tmp_path / "overlay")
    assert_overlay(tmp_path / "overlay", base)


@pytest.mark.parametrize("directory", ["/proc/pool", "/dev/null/pool"])
async def test_pool_directory_that_can_not_be_made(
    directory: str, daemon: QemuStorageDaemon, base: Path, tmp_path: Path
) -> None:
    async with open_overlay_pool(daemon, directory=directory) as pool:
        with nothing_left(tmp_path), pytest.raises(QemuStorageDaemonError, match="can't make a prototype in"):
            await pool.acquire(base, tmp_path / "overlay")


async def test_closed_pool_says_so(daemon: QemuStorageDaemon, base: Path, tmp_path: Path) -> None:
    async with open_overlay_pool(daemon) as pool:
        await pool.acquire(base, tmp_path / "one")
    with pytest.raises(trio.ClosedResourceError):
        await pool.acquire(base, tmp_path / "two")
    assert "closed" in repr(pool)
    assert not (tmp_path / "two").exists()


async def test_dead_daemon_matters_to_new_bases_only(
    daemon: QemuStorageDaemon, pool: OverlayPool, base: Path, tmp_path: Path
) -> None:
    await pool.acquire(base, tmp_path / "one")
    send_signal(daemon, signal.SIGKILL)
    await daemon.stop()
    assert await pool.acquire(base, tmp_path / "two")
    assert_overlay(tmp_path / "two", base)
    other = make_base(tmp_path / "other")
    with nothing_left(tmp_path), pytest.raises(QemuStorageDaemonError, match="not started"):
        await pool.acquire(other, tmp_path / "three")


@contextmanager
def file_size_limit(limit: int) -> Generator[None]:
    """Make this process's writes past so many bytes fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 70_000, 150_000])
async def test_write_that_fails_leaves_nothing(limit: int, pool: OverlayPool, base: Path, tmp_path: Path) -> None:
    await pool.acquire(base, tmp_path / "one")
    with nothing_left(tmp_path):
        with file_size_limit(limit), pytest.raises(QemuStorageDaemonError, match="can't write the overlay") as caught:
            await pool.acquire(base, tmp_path / "two")
    assert isinstance(caught.value.__cause__, OSError)
    assert await pool.acquire(base, tmp_path / "three")


async def test_full_disk_leaves_nothing(daemon: QemuStorageDaemon, base: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        async with open_overlay_pool(daemon, directory=disk) as pool:
            with nothing_left(disk), pytest.raises(QemuStorageDaemonError, match="No space left"):
                await pool.acquire(base, tmp_path / "one")
        (disk / "filler").write_bytes(bytes(60 * 2**10))
        async with open_overlay_pool(daemon) as pool:
            await pool.acquire(base, tmp_path / "two")
            with nothing_left(disk), pytest.raises(QemuStorageDaemonError, match="No space left"):
                await pool.acquire(base, disk / "three")


@pytest.mark.parametrize("known", [False, True])
async def test_cancelled_at_every_await_leaves_nothing(
    known: bool, daemon: QemuStorageDaemon, base: Path, tmp_path: Path
) -> None:
    target = tmp_path / "overlay"
    results: list[bool] = []
    with nothing_left(daemon.directory):

        async def acquire() -> None:
            async with open_overlay_pool(daemon) as pool:
                if known:
                    with trio.CancelScope(shield=True):
                        await pool.acquire(base, target)
                    target.unlink()
                results.append(await pool.acquire(base, target))

        def check() -> None:
            assert target.exists() == bool(results)
            target.unlink(missing_ok=True)
            results.clear()

        assert await cancel_at_every_step(acquire, check=check) > (2 if known else 6)


async def test_cancelled_maker_hands_over_to_the_next(
    daemon: QemuStorageDaemon, pool: OverlayPool, base: Path, tmp_path: Path
) -> None:
    scopes = [trio.CancelScope() for _ in range(3)]

    async def acquire(index: int) -> None:
        with scopes[index]:
            await pool.acquire(base, tmp_path / f"overlay{index}")

    async with trio.open_nursery() as nursery:
        send_signal(daemon, signal.SIGSTOP)
        for index in range(3):
            nursery.start_soon(acquire, index)
            await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        send_signal(daemon, signal.SIGCONT)
    assert scopes[0].cancelled_caught
    assert overlays_in(tmp_path) == [tmp_path / "overlay1", tmp_path / "overlay2"]
    assert pool.statistics().prototypes == 1
    assert os.listdir(pool.directory) == []
