"""Uploads and downloads: against a real agent, and from a guest that wants out."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings, strategies as st

from tests._leaks import cancel_at_every_step, nothing_left, wait_until
from tests.unit.test_trees import describe, make_sparse, payloads, tags
from trio_sandbox import GuestProtocolError, OutcomeUnknownError, Sandbox, TransferStatistics
from trio_sandbox.guest.helpers.direct_file import BLOCK
from trio_sandbox.guest.trees import CHUNK, record
from trio_sandbox.sandbox._files import encode_request, open_session
from trio_sandbox.wire import RecordStream

from ._guest import open_fake_sandbox
from ._sandbox import open_local_sandbox


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with open_local_sandbox() as (sandbox, _):
        yield sandbox


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with everything in it that is kept."""
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "large").write_bytes(os.urandom(400_000))
    (tree / "program").write_text("#!/bin/sh\n")
    (tree / "program").chmod(0o755)
    (tree / "b\udcff\n").write_text("a name of bytes")
    (tree / "link").symlink_to("/etc/passwd")
    (tree / "dangling").symlink_to("../../..")
    (tree / "sub" / "empty").chmod(0o500)
    (tree / "sub").chmod(0o555)
    return tree


@contextmanager
def nothing_new(directory: Path, *names: str) -> Generator[None]:
    """Assert that the block makes nothing but *names*; for where the guest's descriptors are this process's too."""
    before = os.listdir(directory)
    yield
    assert sorted(os.listdir(directory)) == sorted([*before, *names])


# --- Both ways ---


async def test_a_tree_goes_over_and_comes_back(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    with nothing_new(tmp_path, "there", "back"):
        steps: list[TransferStatistics] = []
        sent = await sandbox.upload(tree, sandbox.path(str(tmp_path), "there"), progress=steps.append)
        assert sent == steps[-1] == TransferStatistics(files=5, size=400_025, total_size=400_025)
        assert len(steps) > 2
        assert describe(tmp_path / "there") == describe(tree)
        steps.clear()
        received = await sandbox.download(str(tmp_path / "there"), tmp_path / "back", progress=steps.append)
        assert received == steps[-1] == TransferStatistics(files=5, size=400_025, total_size=None)
        assert describe(tmp_path / "back") == describe(tree)
    assert sorted(os.listdir(tmp_path)) == ["back", "there", "tree"]


async def test_one_file(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    assert (await sandbox.upload(str(tmp_path / "link"), str(tmp_path / "there"))).size == len(data)
    assert describe(tmp_path / "there") == (0o640, data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "back").write_text("is replaced")
    assert await sandbox.download(str(tmp_path / "there"), "back") == TransferStatistics(1, len(data), None)
    assert describe(tmp_path / "back") == (0o640, data)


async def test_large_files_of_any_size_among_others(sandbox: Sandbox, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for size in (CHUNK, CHUNK + 1, CHUNK + BLOCK - 1, CHUNK + BLOCK, CHUNK + BLOCK + 1, 3 * BLOCK + 4097, 5):
        (tree / f"first {size}").write_bytes(os.urandom(size))
        (tree / f"second {size}").write_bytes(os.urandom(size))
    with nothing_new(tmp_path, "there"):
        statistics = await sandbox.upload(tree, str(tmp_path / "there"))
    assert describe(tmp_path / "there") == describe(tree)
    assert statistics.size == sum(path.stat().st_size for path in tree.iterdir())
    # To a file system that keeps its files in memory, and has nothing to write past that.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        await sandbox.upload(tree, f"{memory}/there")
        assert describe(Path(memory, "there")) == describe(tree)


async def test_a_large_upload_that_stops_early_leaves_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    content = record(b"c", bytes(BLOCK))
    with nothing_new(tmp_path):
        for sent in (content, content[: BLOCK // 2], content + content[:3], content + record(b"x", b"")):
            async with open_session(sandbox._slot, None, "the test") as session:
                await session.send(encode_request("upload", str(tmp_path / "new")))
                await session.send(record(b"f", b"644\0\0" + bytes(CHUNK)) + sent, end=True)
                assert await session.receive_raw() == b""
        async with open_session(sandbox._slot, None, "the test") as session:
            await session.send(encode_request("upload", str(tmp_path / "new")) + content, end=True)
            assert await session.receive_raw() == b""


async def test_an_empty_directory_is_replaced_and_others_are_not(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    await sandbox.upload(tree, str(tmp_path / "there"))
    await sandbox.download(str(tree), tmp_path / "here")
    assert describe(tmp_path / "there") == describe(tmp_path / "here") == describe(tree)
    (tmp_path / "file").write_text("")
    for source in (tree, tmp_path / "file"):
        with pytest.raises(OSError, match="not empty") as caught:
            await sandbox.upload(source, str(tmp_path / "there"))
        assert caught.value.filename == str(tmp_path / "there")
        with pytest.raises(OSError, match="not empty") as caught:
            await sandbox.download(str(source), tmp_path / "here")
        assert caught.value.filename == str(tmp_path / "here")
    # A tree in the place of a file, and a file in that of an empty directory.
    (tmp_path / "empty").mkdir()
    for source, target, error in [(tree, "file", NotADirectoryError), (tmp_path / "file", "empty", IsADirectoryError)]:
        with pytest.raises(error):
            await sandbox.upload(source, str(tmp_path / target))
        with pytest.raises(error):
            await sandbox.download(str(source), tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "here", "there", "tree"]


@pytest.mark.parametrize(
    ("source", "target", "error", "filename"),
    [
        ("nothing", "new", FileNotFoundError, "nothing"),
        ("file", "nothing/new", FileNotFoundError, "nothing/new"),
        ("file", "file/new", NotADirectoryError, "file/new"),
        ("pipe", "new", OSError, "pipe"),
        ("with pipe", "new", OSError, "with pipe/pipe"),
    ],
)
@pytest.mark.parametrize("way", ["upload", "download"])
async def test_transfers_that_can_not_be(
    sandbox: Sandbox, tmp_path: Path, way: str, source: str, target: str, error: type[OSError], filename: str
) -> None:
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    (tmp_path / "with pipe").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "with pipe" / "pipe")
    before = sorted(os.listdir(tmp_path))
    with nothing_new(tmp_path), pytest.raises(error) as caught:
        await getattr(sandbox, way)(str(tmp_path / source), str(tmp_path / target))
    assert caught.value.filename in (str(tmp_path / filename), str((tmp_path / filename).parent))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("path", ["", "/", ".", "a/..", ".."])
async def test_what_is_to_be_made_needs_a_name(sandbox: Sandbox, tree: Path, path: str) -> None:
    with pytest.raises(IsADirectoryError):
        await sandbox.download(str(tree), path)
    with pytest.raises(IsADirectoryError):
        await sandbox.upload(tree, path)


async def test_downloads_are_bounded(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    with nothing_new(tmp_path), pytest.raises(OSError, match="more than the 200000 bytes") as caught:
        await sandbox.download(str(tree), tmp_path / "new", max_bytes=200_000)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "new"))
    with pytest.raises(ValueError, match="`max_bytes` must not be negative"):
        await sandbox.download(str(tree), tmp_path / "new", max_bytes=-1)
    for max_bytes in (math.nan, 1.5, True, None):
        with pytest.raises(TypeError, match="`max_bytes` must be a whole number"):
            await sandbox.download(str(tree), tmp_path / "new", max_bytes=max_bytes)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def test_a_full_disk_leaves_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting takes privileges")
    small = tmp_path / "small"
    small.mkdir()
    await trio.run_process(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(small)])
    try:
        (tmp_path / "large").write_bytes(bytes(3_000_000))
        with nothing_new(small):
            with pytest.raises(OSError, match="No space") as caught:
                await sandbox.upload(tmp_path / "large", str(small / "new"))
            assert caught.value.filename == str(small / "new")
            with pytest.raises(OSError, match="No space") as caught:
                await sandbox.download(str(tmp_path / "large"), small / "new")
            assert caught.value.filename == str(small / "new")
            with pytest.raises(OSError, match="No space"):
                await sandbox.path(str(small), "new").write_bytes(bytes(3_000_000))
    finally:
        with trio.move_on_after(10, shield=True):
            await trio.run_process(["umount", str(small)])


async def test_what_a_progress_callback_raises_stops_the_transfer(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(statistics: TransferStatistics) -> None:
        raise StopError

    for way in (sandbox.upload, sandbox.download):
        with nothing_new(tmp_path), pytest.raises(StopError):
            await way(str(tree), str(tmp_path / "new"), progress=stop)
    assert await sandbox.path(str(tree)).is_dir()


@pytest.mark.parametrize("way", ["upload", "download"])
async def test_a_cancelled_transfer_leaves_all_or_nothing(
    sandbox: Sandbox, tree: Path, tmp_path: Path, way: str
) -> None:
    new = tmp_path / "new"
    complete = 0

    def check() -> None:
        nonlocal complete
        # The guest removes what is incomplete before an upload returns.
        assert set(os.listdir(tmp_path)) <= {"tree", "new"}
        if new.exists():
            complete += 1
            assert describe(new) == describe(tree)
            for directory in (new / "sub" / "empty", new / "sub"):
                directory.chmod(0o700)
            for path in sorted(new.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            new.rmdir()

    steps = await cancel_at_every_step(lambda: getattr(sandbox, way)(str(tree), str(new)), check=check)
    assert steps > 5
    assert complete > 0


async def test_a_stalled_transfer_holds_up_nobody(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(5_000_000))
    stalled, go_on = trio.Event(), trio.Event()

    async def download() -> None:
        async with await sandbox.path(str(tmp_path), "large").open("rb") as file:
            await file.read(1)
            stalled.set()
            await go_on.wait()
            assert len(await file.read()) == 4_999_999

    async with trio.open_nursery() as nursery:
        nursery.start_soon(download)
        await stalled.wait()
        await sandbox.upload(tmp_path / "large", str(tmp_path / "there"))
        await sandbox.run_process(["true"])
        go_on.set()


# --- From a guest that wants out ---


async def answer(records: RecordStream, sent: list[tuple[bytes, bytes]], *, end: bool = True) -> None:
    """Take a request and say what the test wants said."""
    await records.receive()
    await records.stream.send_all(b"".join(record(*item) for item in sent) or b"\0", end=end)


TREE = [(b"d", b"755\0"), (b"f", b"644\0a\0data"), (b"u", b""), (b".", b""), (b"R", b"1\x004")]


async def test_the_script_of_a_guest_is_believed_where_it_is_good(tmp_path: Path) -> None:
    async def guest(records: RecordStream) -> None:
        await answer(records, TREE)

    async with open_fake_sandbox({"file": guest}) as (sandbox, _):
        assert await sandbox.download("tree", tmp_path / "new") == TransferStatistics(1, 4, None)
    assert describe(tmp_path / "new") == (0o755, {"a": (0o644, b"data")})


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (TREE[:-1], "less than a whole tree"),
        (TREE[:2], "less than a whole tree"),
        ([*TREE[:2], TREE[-1]], "no tree"),
        ([*TREE, TREE[0]], "more after the end"),
        ([*TREE, TREE[-1]], "more after the end"),
        ([(b"d", b"755\0"), (b"f", b"644\0../canary/file\0x")], "not a name"),
        ([(b"d", b"755\0"), (b"f", b"644\0/etc/x\0x")], "not a name"),
        ([(b"d", b"755\0"), (b"l", b"a\0../canary"), (b"d", b"755\0a"), (b"f", b"644\0file\0x")], "one name"),
        ([(b"d", b"755\0"), (b"l", b"a\0../canary/file"), (b"f", b"644\0a\0x")], "one name"),
        ([(b"Z", b"")], "no tree"),
        ([(b"X", b"0\0\0")], "not an error"),
        ([(b"X", b"99999\0\0")], "not an error"),
        ([(b"X", b"-1\0\0")], "not an error"),
        ([(b"X", b"\xb2\0\0")], "not an error"),
        ([(b"c", bytes(2 << 20))], "record of 2097152 bytes"),
    ],
)
async def test_nothing_outside_is_written(tmp_path: Path, sent: list[tuple[bytes, bytes]], message: str) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("as it was")

    async def guest(records: RecordStream) -> None:
        await answer(records, sent)

    async with open_fake_sandbox({"file": guest}) as (sandbox, machine):
        with nothing_left(tmp_path), pytest.raises(GuestProtocolError, match=message):
            await sandbox.download("tree", tmp_path / "new")
        assert machine.failure is not None
    assert describe(canary) == (0o755, {"file": (0o644, b"as it was")})


@settings(max_examples=60)
@given(
    sent=st.lists(st.tuples(tags | st.sampled_from([b"R", b"X", b"D"]), payloads), max_size=12),
    tail=st.binary(max_size=9),
)
def test_nothing_outside_is_written_whatever_comes(sent: list[tuple[bytes, bytes]], tail: bytes) -> None:
    async def guest(records: RecordStream) -> None:
        await records.receive()
        await records.stream.send_all(b"".join(record(*item) for item in sent) + tail, end=True)

    async def main(directory: trio.Path) -> None:
        canary = directory / "canary"
        await canary.mkdir()
        await (canary / "file").write_text("as it was")
        before = describe(Path(canary))
        async with open_fake_sandbox({"file": guest}) as (sandbox, _):
            try:
                await sandbox.download("tree", directory / "new")
            except (GuestProtocolError, OSError, OutcomeUnknownError):
                assert os.listdir(directory) == ["canary"]
        assert describe(Path(canary)) == before
        assert set(os.listdir(directory)) <= {"canary", "new"}

    import tempfile

    with tempfile.TemporaryDirectory() as name:
        trio.run(main, trio.Path(name))


@pytest.mark.parametrize(
    ("call", "sent", "message"),
    [
        ("stat", [(b"R", b"1\0" * 9)], "not a status"),
        ("stat", [(b"R", b"x\0" * 9 + b"1")], "not a status"),
        ("stat", [(b"R", b"9" * 5000)], "not a status"),
        ("stat", [(b"D", b"")], "a record b'D' where a result"),
        ("stat", [], "ended within a record"),
        ("iterdir", [(b"D", b"f../../etc/passwd")], "an entry that is none"),
        ("iterdir", [(b"D", b"d..")], "an entry that is none"),
        ("iterdir", [(b"D", b"")], "an entry that is none"),
        ("iterdir", [(b"D", b"qname")], "an entry that is none"),
        ("iterdir", [(b"f", b"fname")], "where names were expected"),
        ("read_bytes", [(b"f", b"x")], "where content was expected"),
        ("read_bytes", [(b"D", b"x")], "did not finish its answer"),
    ],
)
async def test_answers_that_are_none(call: str, sent: list[tuple[bytes, bytes]], message: str) -> None:
    async def guest(records: RecordStream) -> None:
        await answer(records, sent)

    async with open_fake_sandbox({"file": guest}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError, match=message):
            await getattr(sandbox.path("file"), call)()
        assert machine.failure is not None


async def test_numbers_and_changes_that_are_none() -> None:
    async def guest(records: RecordStream) -> None:
        await records.receive()
        await records.send(b"R", b"")
        if await records.receive() is not None:  # of an open file, there is a second request
            await records.send(b"R", b"12x")

    async with open_fake_sandbox({"file": guest}) as (sandbox, machine):
        async with await sandbox.path("file").open("rb") as file:
            with pytest.raises(GuestProtocolError, match="a number that is none"):
                await file.tell()
            assert file.closed
        assert machine.failure is not None
    for payload in (b"1\0../x", b"x\0y", b"1\0.", b"1\0a\0b", b"9" * 20):

        async def watched(records: RecordStream, payload: bytes = payload) -> None:
            await records.receive()
            await records.send_many([(b"R", b""), (b"W", payload)])
            await records.receive()

        async with open_fake_sandbox({"file": watched}) as (sandbox, machine):
            with pytest.raises(GuestProtocolError, match="a change that is none"):
                async with sandbox.watch("x") as changes:
                    await changes.receive()


async def test_an_upload_that_the_guest_refuses_early_stops_early(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(10_000_000))

    async def guest(records: RecordStream) -> None:
        await records.receive()
        await records.send(b"X", b"28\0there\0", end=True)

    async with open_fake_sandbox({"file": guest}) as (sandbox, _):
        with pytest.raises(OSError, match="No space") as caught:
            await sandbox.upload(tmp_path / "large", "there")
        assert caught.value.filename == "there"
        assert sandbox._slot.machine.guest.statistics().bytes_sent < 5_000_000
        await wait_until(lambda: sandbox._slot.machine.guest.statistics().open_streams == 0)


@pytest.mark.parametrize("over", [False, True], ids=["new", "over a file of two names"])
async def test_holes_stay_holes_both_ways(sandbox: Sandbox, tmp_path: Path, over: bool) -> None:
    make_sparse(tmp_path / "sparse", 2**30, {2**29: b"x" * 300_000})
    if over:
        (tmp_path / "there").write_text("old")
        (tmp_path / "other").hardlink_to(tmp_path / "there")
    steps: list[TransferStatistics] = []
    sent = await sandbox.upload(tmp_path / "sparse", str(tmp_path / "there"), progress=steps.append)
    received = await sandbox.download(str(tmp_path / "there"), tmp_path / "back", max_bytes=2**20)
    assert sent == steps[-1]
    assert 300_000 <= sent.size == sent.total_size == received.size < 310_000
    for name in ("there", "back", *(("other",) if over else ())):
        status = (tmp_path / name).stat()
        assert (status.st_size, status.st_blocks * 512 < 2**20) == (2**30, True)
        async with await trio.open_file(tmp_path / name, "rb") as file:
            await file.seek(2**29 - 1)
            assert await file.read(300_002) == b"\0" + b"x" * 300_000 + b"\0"


MODES = [(None, 0o077, 0o700, 0o600), (None, 0o002, 0o755, 0o644), (0, 0o077, 0o777, 0o666), (0o027, 0, 0o750, 0o640)]


@pytest.mark.parametrize(("umask", "process", "directory", "file"), MODES)
async def test_a_download_has_the_modes_that_were_asked_for(
    tmp_path: Path, umask: int | None, process: int, directory: int, file: int
) -> None:
    async def guest(records: RecordStream) -> None:
        await records.receive()
        tree = [(b"d", b"777\0x"), (b"f", b"666\0file\0x"), (b"u", b""), (b".", b""), (b"R", b"1\0001")]
        await records.send_many(tree, end=True)

    before = os.umask(process)
    try:
        async with open_fake_sandbox({"file": guest}) as (sandbox, _):
            await sandbox.download("x", tmp_path / "new", umask=umask)
            assert os.umask(process) == process
    finally:
        os.umask(before)
    assert oct((tmp_path / "new").stat().st_mode & 0o7777) == oct(directory)
    assert oct((tmp_path / "new" / "file").stat().st_mode & 0o7777) == oct(file)


@pytest.mark.parametrize("umask", [-1, 0o1000])
async def test_a_umask_is_checked(sandbox: Sandbox, tmp_path: Path, umask: int) -> None:
    with pytest.raises(ValueError, match="`umask` must be from 0 to 0o777"):
        await sandbox.download("x", tmp_path / "new", umask=umask)
