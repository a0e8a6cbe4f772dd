"""Files of a guest that answers what it likes: the host's calls are bounded, end in the errors promised, and hold nobody up."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio

from trio_sandbox import GuestFile, GuestProtocolError, Sandbox
from trio_sandbox.constants import MAXIMUM_LINE_BYTES
from trio_sandbox.guest.trees import LISTING_NAMES
from trio_sandbox.wire import RecordStream

from ._guest import Service, open_fake_sandbox

Records = Iterable[tuple[bytes, bytes]]

OK = (b"R", b"")


def answering(*records: tuple[bytes, bytes]) -> Service:
    """A guest that answers every request with *records*, and ends the session with the host."""

    async def serve(session: RecordStream) -> None:
        while await session.receive() is not None:
            await session.send_many(records)
        await session.send_eof()

    return serve


def status(**changed: int | str) -> tuple[bytes, bytes]:
    fields: dict[str, object] = {
        "mode": stat.S_IFREG | 0o644,
        "ino": 1,
        "dev": 1,
        "nlink": 1,
        "uid": 0,
        "gid": 0,
        "size": 1,
        "rdev": 0,
        "blksize": 4096,
        "blocks": 8,
        "atime": 1,
        "mtime": 1,
        "ctime": 1,
        **changed,
    }
    return b"R", b"\0".join(str(value).encode() for value in fields.values())


def names(*entries: bytes) -> tuple[bytes, bytes]:
    return b"D", b"\0".join(entries)


Call = Callable[[Sandbox], Awaitable[object]]


def iterdir(sandbox: Sandbox) -> Awaitable[object]:
    return sandbox.path("x").iterdir()


def is_file(sandbox: Sandbox) -> Awaitable[object]:
    return sandbox.path("x").is_file()


async def read_some(sandbox: Sandbox) -> object:
    async with await sandbox.path("x").open("rb") as file:
        return await file.read(1)


async def watch(sandbox: Sandbox) -> object:
    async with sandbox.watch("x") as changes:
        return await changes.receive()


async def push(sandbox: Sandbox) -> object:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "a").touch()
        return await sandbox.push(directory, "x")


VIOLATIONS: dict[str, tuple[Call, list[tuple[bytes, bytes]]]] = {
    "a mode that is too large": (is_file, [status(mode=2**16)]),
    "a mode of 20 digits": (is_file, [status(mode="9" * 20)]),
    "a negative mode": (is_file, [status(mode=-1)]),
    "a negative size": (is_file, [status(size=-1)]),
    "a size past 63 bits": (is_file, [status(size=2**63)]),
    "negative blocks": (is_file, [status(blocks=-8)]),
    "a user past 32 bits": (is_file, [status(uid=2**32)]),
    "an inode past 64 bits": (is_file, [status(ino=2**64)]),
    "a time past 64 bits": (is_file, [status(mtime=2**63 * 10**9 + 1)]),
    "a time before 64 bits": (is_file, [status(atime=-(2**63) * 10**9 - 1)]),
    "a time of many digits": (is_file, [status(ctime="1" * 5000)]),
    "digits of another script": (is_file, [status(mode="²")]),
    "too few fields": (is_file, [(b"R", b"1")]),
    "too many fields": (is_file, [(b"R", b"\0".join([b"1"] * 14))]),
    "a name twice": (iterdir, [names(b"fa", b"fb", b"fa"), OK]),
    "a name again later": (iterdir, [names(b"fa"), names(b"fb"), names(b"da"), OK]),
    "too many names at once": (iterdir, [names(*(b"f%d" % n for n in range(LISTING_NAMES + 1))), OK]),
    "too much at once": (iterdir, [names(*(b"f" + b"%0255d" % n for n in range(200))), OK]),
    "a name that is too long": (iterdir, [names(b"f" * 257), OK]),
    "no name": (iterdir, [names(b"f"), OK]),
    "a path": (iterdir, [names(b"fa/b"), OK]),
    "the parent": (iterdir, [names(b"d.."), OK]),
    "more than was asked for": (read_some, [(b"R", b"xx")]),
    "a change with a path": (watch, [OK, (b"W", b"256\0a/b")]),
    "a change with a name that is too long": (watch, [OK, (b"W", b"256\0" + b"a" * 256)]),
    "a state of no file that was sent": (push, [(b"K", b"b\x001.2.3.4"), OK]),
    "a state that is too long": (push, [(b"K", b"a\0" + b"1" * 200), OK]),
    "a path without a state": (push, [(b"K", b"a"), OK]),
    "a change with no number": (watch, [OK, (b"W", b"-1\0a")]),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_an_answer_that_no_guest_of_ours_gives_ends_the_machine(name: str) -> None:
    call, records = VIOLATIONS[name]
    async with open_fake_sandbox({"file": answering(*records)}) as (sandbox, machine):
        with pytest.raises(GuestProtocolError):
            await call(sandbox)
        assert machine.failure is not None


async def test_what_a_status_can_be_is_believed() -> None:
    extremes = status(mode=0o177777, ino=2**64 - 1, size=2**63 - 1, mtime=-1, ctime=2**63 * 10**9)
    async with open_fake_sandbox({"file": answering(extremes)}) as (sandbox, _):
        result = await sandbox.path("x").stat()
    assert (result.st_mode, result.st_ino, result.st_size, result.st_blocks) == (0o177777, 2**64 - 1, 2**63 - 1, 8)
    assert (result.st_mtime, result.st_mtime_ns, result[stat.ST_MTIME]) == (-1e-9, -1, -1)
    assert result.st_ctime_ns == 2**63 * 10**9


# --- What has no end ---


async def list_for_ever(session: RecordStream) -> None:
    """Each name another one, as many at a time as may be."""
    await session.receive()
    number = 0
    while True:
        await session.send(b"D", b"\0".join(b"f%x" % n for n in range(number, number + LISTING_NAMES)))
        number += LISTING_NAMES


async def directories_for_ever(session: RecordStream) -> None:
    """Each directory holds a file and a directory that does."""
    while await session.receive() is not None:
        await session.send_many([names(*(b"f%d" % n for n in range(100)), b"dx"), OK])
    await session.send_eof()


async def content_for_ever(session: RecordStream) -> None:
    await session.receive()
    await session.send(*OK)
    while (record := await session.receive()) is not None:
        await session.send(b"R", b"x" * int(record[1].split(b"\0")[1]))


async def turn(turns: list[int]) -> None:
    while True:
        await trio.lowlevel.checkpoint()
        turns[0] += 1


async def list_iterdir(sandbox: Sandbox) -> object:
    return await sandbox.path("x").iterdir()


async def list_glob(sandbox: Sandbox) -> object:
    return await sandbox.path("x").glob("f*")


async def list_rglob(sandbox: Sandbox) -> object:
    return await sandbox.path("x").rglob("*")


@pytest.mark.parametrize(
    ("call", "service", "error"),
    [
        (list_iterdir, list_for_ever, errno.EOVERFLOW),
        (list_glob, list_for_ever, errno.EOVERFLOW),
        (list_rglob, directories_for_ever, errno.ENAMETOOLONG),
        (list_rglob, list_for_ever, errno.EOVERFLOW),
    ],
    ids=["iterdir", "glob", "rglob deep", "rglob wide"],
)
async def test_names_without_end(call: Call, service: Service, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.sandbox._walk.LISTING_LIMIT", 200 * LISTING_NAMES * 512)
    turns = [0]
    async with open_fake_sandbox({"file": service}) as (sandbox, machine), trio.open_nursery() as nursery:
        nursery.start_soon(turn, turns)
        with pytest.raises(OSError, match="x") as caught:
            await call(sandbox)
        assert caught.value.errno == error
        assert machine.failure is None
        # Others had their turn after every few names.
        assert turns[0] > 100
        nursery.cancel_scope.cancel(reason="the test is over")


async def test_a_listing_makes_paths_when_they_are_taken() -> None:
    entries = [b"f%d" % number for number in range(10)]
    async with open_fake_sandbox({"file": answering(names(*entries), OK)}) as (sandbox, _):
        found = await sandbox.path("/d").iterdir()
        assert next(found) == sandbox.path("/d/0")
        assert [path.name for path in found] == [str(number) for number in range(1, 10)]
        assert [str(path) for path in await sandbox.path("/").glob("[23]")] == ["/2", "/3"]
        assert [str(path) for path in await sandbox.path().glob("[23]")] == ["2", "3"]


async def open_file(sandbox: Sandbox, mode: Any, **more: int) -> Any:
    """Open a file either way; what it gives is bytes or text, as the test has it."""
    return await sandbox.path("x").open(mode, **more)


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_a_line_without_end(mode: Any) -> None:
    async with open_fake_sandbox({"file": content_for_ever}) as (sandbox, machine):
        async with await open_file(sandbox, mode) as file:
            with pytest.raises(OSError, match="higher `limit`") as caught:
                async for _ in file:
                    pass
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, "x")
            with pytest.raises(OSError, match=f"more than {MAXIMUM_LINE_BYTES + 1} "):
                await file.readline(limit=MAXIMUM_LINE_BYTES + 1)
            # Nothing was lost, and no more was read than it takes to know.
            assert len(await file.read(MAXIMUM_LINE_BYTES)) == MAXIMUM_LINE_BYTES
        async with await open_file(sandbox, mode, limit=10) as file:
            with pytest.raises(OSError, match="more than 10 "):
                await file.readline()
        assert machine.failure is None


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_a_file_without_end(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.sandbox._file.MAXIMUM_READ_BYTES", 1_000_000)
    monkeypatch.setattr("trio_sandbox.sandbox._text.MAXIMUM_READ_BYTES", 1_000_000)
    async with open_fake_sandbox({"file": content_for_ever}) as (sandbox, machine):
        async with await open_file(sandbox, mode) as file:
            with pytest.raises(OSError, match="1000000") as caught:
                await file.read()
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, "x")
            assert len(await file.read(100)) == 100
        assert machine.failure is None


async def test_changes_without_end_hold_nobody_up() -> None:
    async def serve(session: RecordStream) -> None:
        await session.receive()
        await session.send(*OK)
        while True:  # what is no change
            await session.send_many([(b"W", b"0\0")] * 5000)

    turns = [0]
    async with open_fake_sandbox({"file": serve}) as (sandbox, _), trio.open_nursery() as nursery:
        nursery.start_soon(turn, turns)
        async with sandbox.watch("x") as changes:
            with trio.move_on_after(0.3):
                await changes.receive()
            received, turns[0] = turns[0], 0
        assert received > 1000
        nursery.cancel_scope.cancel(reason="the test is over")


# --- Lines and text ---

LINES = [b"one\n", b"x" * 200_000 + b"\n", b"\n", b"three\r\n", b"y" * 70_000]


def serving(content: bytes) -> Service:
    """A guest with one file, which is read in order."""

    async def serve(session: RecordStream) -> None:
        position = 0
        await session.receive()
        await session.send(*OK)
        while (record := await session.receive()) is not None:
            size = int(record[1].split(b"\0")[1])
            await session.send(b"R", content[position : position + size])
            position += size

    return serve


async def test_lines_of_any_length_are_whole() -> None:
    async with open_fake_sandbox({"file": serving(b"".join(LINES))}) as (sandbox, _):
        async with await sandbox.path("x").open("rb") as file:
            assert [line async for line in file] == LINES
        async with await sandbox.path("x").open(limit=200_001) as text:
            assert [line async for line in text] == [line.decode().replace("\r\n", "\n") for line in LINES]


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_what_is_read_ahead_comes_in_order(mode: Any) -> None:
    content = os.urandom(100_000).hex()
    async with open_fake_sandbox({"file": serving(content.encode())}) as (sandbox, _):
        async with await open_file(sandbox, mode, limit=1000) as file:
            with pytest.raises(OSError, match="more than 1000 "):
                await file.readline()
            parts = [await file.read(size) for size in (0, 1, 70_000, 0, 100_000, 1000, 200_000)]
            assert await file.read() == await file.readline() == parts[0]
            whole = parts[0].join(parts)
            assert (whole.decode() if isinstance(whole, bytes) else whole) == content


def test_a_limit_is_checked() -> None:
    async def main() -> None:
        async with open_fake_sandbox({"file": answering(OK)}) as (sandbox, _):
            with pytest.raises(ValueError, match="`limit` must be at least 1, not 0"):
                await sandbox.path("x").open("rb", limit=0)
            async with await sandbox.path("x").open("rb") as file:
                assert isinstance(file, GuestFile)
                with pytest.raises(ValueError, match="`limit` must be at least 1, not -1"):
                    await file.readline(limit=-1)

    trio.run(main)


TEXTS = {
    "plain": "a line\r\nand another\rone\n" * 40_000,
    "wide at the end": "x" * 600_000 + "\N{GRINNING FACE}",
    "wide throughout": "é\N{GRINNING FACE}\r\n" * 100_000,
    "a carriage return where pieces meet": "x" * (2**18 - 1) + "\r\n" + "y" * 2**18,
    "short": "é\r\n",
}


@pytest.mark.parametrize("name", TEXTS)
async def test_large_text_is_decoded_in_pieces(name: str) -> None:
    text = TEXTS[name]
    turns = [0]
    content = text.encode()
    records = [(b"D", content[start : start + 65536]) for start in range(0, len(content), 65536)]
    async with open_fake_sandbox({"file": answering(*records, OK)}) as (sandbox, _), trio.open_nursery() as nursery:
        nursery.start_soon(turn, turns)
        assert await sandbox.path("x").read_text() == text.replace("\r\n", "\n").replace("\r", "\n")
        nursery.cancel_scope.cancel(reason="the test is over")


@pytest.mark.parametrize("size", [10, 300_000])
async def test_text_that_is_none(size: int) -> None:
    content = b"x" * size + b"\xff" + b"y" * size
    async with open_fake_sandbox({"file": answering((b"D", content), OK)}) as (sandbox, _):
        with pytest.raises(UnicodeDecodeError, match=f"position {size}"):
            await sandbox.path("x").read_text()
        assert await sandbox.path("x").read_text(errors="replace") == content.decode(errors="replace")


async def test_text_that_takes_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_sandbox.sandbox._text.MAXIMUM_READ_BYTES", 1_000_000)
    content = ("x" * 400_000 + "\N{GRINNING FACE}").encode()
    async with open_fake_sandbox({"file": answering((b"D", content), OK)}) as (sandbox, _):
        with pytest.raises(OSError, match="as text it takes more than 1000000 bytes") as caught:
            await sandbox.path("x").read_text()
        assert caught.value.errno == errno.EFBIG
