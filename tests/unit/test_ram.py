"""The RAM of another process, copied: what the kernel says about it, what is data, and a process that really has some."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, strategies as st

from tests._leaks import nothing_left
from trio_sandbox.qemu._ram import Mapping, PrivateRam, copy_data, find_own_pages, parse_maps

PAGE = os.sysconf("SC_PAGE_SIZE")
INODE = 77


def line(start: int, end: int, offset: int, *, permissions: str = "rw-p", inode: int = INODE) -> str:
    return f"{start:x}-{end:x} {permissions} {offset:08x} 00:2f {inode:<10} /memfd:ram (deleted)\n"


OTHERS = (
    line(0x1000, 0x3000, 0, inode=INODE + 1)
    + "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n"
    + "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]\n"
)


def test_a_file_that_is_mapped_as_a_whole() -> None:
    assert parse_maps(OTHERS + line(0x10000, 0x14000, 0), INODE, 0x4000) == [Mapping(0x10000, 0x4000, 0)]


def test_a_mapping_that_the_kernel_has_split_is_found_in_the_file_s_order() -> None:
    text = line(0x90000, 0x91000, 0x3000, permissions="r--p") + OTHERS + line(0xA0000, 0xA3000, 0)
    assert parse_maps(text, INODE, 0x4000) == [Mapping(0xA0000, 0x3000, 0), Mapping(0x90000, 0x1000, 0x3000)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param(OTHERS, id="others"),
        pytest.param(line(0x10000, 0x14000, 0, permissions="rw-s"), id="shared"),
        pytest.param(line(0x10000, 0x11000, 0) + line(0x12000, 0x14000, 0x2000), id="gap"),
        pytest.param(line(0x11000, 0x14000, 0x1000), id="no beginning"),
        pytest.param(line(0x10000, 0x13000, 0), id="no end"),
        pytest.param(line(0x10000, 0x15000, 0), id="too much"),
        pytest.param(line(0x10000, 0x13000, 0) + line(0x20000, 0x22000, 0x2000), id="overlap"),
        pytest.param(line(0x10000, 0x14000, 0) * 2, id="twice"),
        pytest.param("10000-14000 rw-p\n", id="words are missing"),
        pytest.param("10000 rw-p 0 00:2f 77 x\n", id="no end of an address"),
        pytest.param("10000-14000 rw-p zz 00:2f 77 x\n", id="no number"),
        pytest.param("10000-14000 rw-p 0 00:2f \ufffd x\n", id="no inode"),
        pytest.param("\0\n", id="a zero byte"),
    ],
)
def test_what_is_not_the_whole_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - hostile text fails in other words
        parse_maps(text, INODE, 0x4000)


def test_a_name_can_t_pretend_to_be_a_mapping() -> None:
    # The kernel writes a line feed in a name as \012, so that what follows it stays in the name.
    hostile = line(0x1000, 0x2000, 0, inode=5).rstrip("\n") + r"\012" + line(0x10000, 0x14000, 0)
    with pytest.raises(ValueError, match="not mapped as a whole"):
        parse_maps(hostile, INODE, 0x4000)


def entry(*, present: bool = False, swapped: bool = False, file: bool = False, low: int = 0) -> bytes:
    """Make one entry of a pagemap, as the kernel's documentation has it; *low* is what we must not look at."""
    bits = (present << 63) | (swapped << 62) | (file << 61) | (low & (2**61 - 1))
    return bits.to_bytes(8, sys.byteorder)


def test_own_pages_are_those_in_memory_or_swapped_out_that_are_not_the_file_s() -> None:
    own, away = entry(present=True, low=2**61 - 1), entry(swapped=True)
    files, nothing = entry(present=True, file=True, low=2**60), entry()
    entries = own + away + files + nothing + entry(swapped=True, file=True) + own
    assert list(find_own_pages(entries)) == [(0, 2), (5, 1)]
    assert list(find_own_pages(b"")) == []


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**61 - 1)), max_size=50))
def test_runs_of_own_pages_are_what_a_loop_finds(pages: list[tuple[bool, bool, bool, int]]) -> None:
    entries = b"".join(entry(present=p, swapped=s, file=f, low=low) for p, s, f, low in pages)
    expected = {number for number, (p, s, f, _) in enumerate(pages) if (p or s) and not f}
    runs = list(find_own_pages(entries))
    assert [page for first, count in runs for page in range(first, first + count)] == sorted(expected)
    # As few runs as can be: none begins where another ends.
    assert all(first + count not in dict(runs) for first, count in runs)


@contextmanager
def opened(*paths: Path) -> Generator[list[int]]:
    fds = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def run_copy(source: int, target: int) -> None:
    async def main() -> None:
        await trio.to_thread.run_sync(copy_data, source, target)

    trio.run(main)


def test_holes_stay_holes(tmp_path: Path) -> None:
    with opened(tmp_path / "old", tmp_path / "new") as (old, new):
        size = 64 * 2**20
        for fd in (old, new):
            os.ftruncate(fd, size)
        for offset in (0, 5 * 2**20 + 7, size - 3):
            os.pwrite(old, b"abc", offset)
        run_copy(old, new)
        assert os.fstat(new).st_blocks <= os.fstat(old).st_blocks < 2**20 // 512
    assert (tmp_path / "new").read_bytes() == (tmp_path / "old").read_bytes()


@pytest.mark.parametrize("size", [0, 1, PAGE, 10 * PAGE + 1])
def test_files_of_any_size(tmp_path: Path, size: int) -> None:
    data = secrets.token_bytes(size)
    (tmp_path / "old").write_bytes(data)
    with opened(tmp_path / "old", tmp_path / "new") as (old, new):
        run_copy(old, new)
    assert (tmp_path / "new").read_bytes() == data


def test_between_file_systems(tmp_path: Path) -> None:
    # From memory to a disk, which copy_file_range(2) refuses: as with a RAM that is no template's.
    old = os.memfd_create("old", os.MFD_CLOEXEC)
    try:
        os.ftruncate(old, 8 * PAGE)
        os.pwrite(old, b"x" * PAGE, 2 * PAGE)
        os.pwrite(old, b"y" * 2 * PAGE, 5 * PAGE)
        with opened(tmp_path / "new") as (new,):
            os.ftruncate(new, 8 * PAGE)
            run_copy(old, new)
    finally:
        os.close(old)
    expected = bytes(2 * PAGE) + b"x" * PAGE + bytes(2 * PAGE) + b"y" * 2 * PAGE + bytes(PAGE)
    assert (tmp_path / "new").read_bytes() == expected


def test_a_target_that_takes_no_more(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"data")
    with opened(tmp_path / "old") as (old,):
        sealed = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            with pytest.raises(PermissionError):
                run_copy(old, sealed)
        finally:
            os.close(sealed)


def test_a_cancelled_copy_stops(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"data")

    async def main() -> bool:
        with trio.CancelScope() as scope, opened(tmp_path / "old", tmp_path / "new") as (old, new):
            # The thread starts whatever happens; it is in there that the cancellation is noticed.
            with trio.CancelScope(shield=True) as shield:

                def copy() -> None:
                    trio.from_thread.run_sync(scope.cancel)
                    trio.from_thread.run_sync(setattr, shield, "shield", False)
                    copy_data(old, new)

                await trio.to_thread.run_sync(copy)
        return scope.cancelled_caught

    assert trio.run(main)
    assert (tmp_path / "new").read_bytes() == b""


#: Maps the file, writes to some pages, and says what it sees when it is asked.
_CHILD = """
import mmap, os, sys
path, pages, *wanted = sys.argv[1:]
with open(path, "r+b") as file:
    ram = mmap.mmap(file.fileno(), int(pages) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
for page in map(int, wanted):
    ram[page * mmap.PAGESIZE + 5] = page % 256 ^ 0xFF
print(len(ram[::mmap.PAGESIZE]), flush=True)  # every page is touched: there are the file's own, too
for _ in sys.stdin:
    sys.stdout.buffer.write(ram)
    sys.stdout.buffer.flush()
    break
"""


@contextmanager
def child_with_ram(path: Path, pages: int, *written: int) -> Generator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-IS", "-c", _CHILD, str(path), str(pages), *map(str, written)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"%d\n" % pages
        yield child


@pytest.mark.parametrize("written", [[], [0], [3, 4, 5, 9], [0, 1023], list(range(1024))])
def test_the_copy_is_what_the_process_sees(tmp_path: Path, written: list[int]) -> None:
    pages = 1024
    data = secrets.token_bytes(pages * PAGE)
    (tmp_path / "ram").write_bytes(data)
    with (
        nothing_left(),
        child_with_ram(tmp_path / "ram", pages, *written) as child,
        opened(tmp_path / "ram", tmp_path / "copy") as (ram, copy),
        PrivateRam(child.pid, ram) as private,
    ):
        run_copy(ram, copy)
        assert private.copy(copy) == len(written) * PAGE
        seen, _ = child.communicate(b"\n")
    assert (tmp_path / "copy").read_bytes() == seen
    assert (tmp_path / "ram").read_bytes() == data, "the file itself never changes"


def test_a_process_that_has_not_mapped_the_file(tmp_path: Path) -> None:
    for name in ("ram", "other"):
        (tmp_path / name).write_bytes(bytes(PAGE))
    with nothing_left(), child_with_ram(tmp_path / "ram", 1) as child, opened(tmp_path / "other") as (other,):
        with pytest.raises(ValueError, match="not mapped as a whole"):
            PrivateRam(child.pid, other)


def test_a_process_that_ends_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(4 * PAGE))
    with (
        nothing_left(),
        child_with_ram(tmp_path / "ram", 4, 1) as child,
        opened(tmp_path / "ram", tmp_path / "copy") as (ram, copy),
        PrivateRam(child.pid, ram) as private,
    ):
        child.kill()
        child.wait()
        with pytest.raises(OSError, match="the process is gone"):
            private.copy(copy)
        with pytest.raises(FileNotFoundError):
            PrivateRam(child.pid, ram)


def test_no_room_for_the_pages(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(2 * PAGE))
    full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with child_with_ram(tmp_path / "ram", 2, 1) as child, opened(tmp_path / "ram") as (ram,):
            with PrivateRam(child.pid, ram) as private, pytest.raises(OSError, match="No space left"):
                private.copy(full)
    finally:
        os.close(full)
