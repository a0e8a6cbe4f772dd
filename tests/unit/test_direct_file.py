"""Large files past the page cache: whatever the file system makes of it, the content is what came."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from trio_sandbox.guest.helpers.direct_file import BLOCK, DirectFile

_SIZE = 2 * BLOCK + 4097


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Path]:
    """Where there may be O_DIRECT, and where there is none."""
    if request.param == "disk":
        yield tmp_path / "file"
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name, "file")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A path where there is O_DIRECT."""
    path = tmp_path / "file"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("temporary files are on a file system without O_DIRECT")
    return path


def write(path: Path, before: bytes, data: bytes, step: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(descriptor, before)
        file = DirectFile(descriptor)
        while data:
            room = file.room[:step]
            count = min(len(room), len(data))
            room[:count] = data[:count]
            file.add(count)
            data = data[count:]
        file.finish()
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("step", [4096, 65536, 99_991, BLOCK])
@pytest.mark.parametrize("before", [0, 5, 4096, 65536])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, _SIZE])
def test_what_comes_is_what_is_there(path: Path, before: int, size: int, step: int) -> None:
    first, data = os.urandom(before), os.urandom(size)
    write(path, first, data, step)
    assert path.read_bytes() == first + data


def test_blocks_go_past_the_cache_and_the_rest_does_not(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(descriptor: int, data: memoryview) -> int:
        writes.append((len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return real(descriptor, data)

    writes: list[tuple[int, bool]] = []
    real = os.write
    monkeypatch.setattr(os, "write", watched)
    write(disk, bytes(4096), os.urandom(_SIZE), 100_000)
    assert writes == [(4096, False), (BLOCK, True), (BLOCK, True), (4097, False)]
    writes.clear()
    write(disk, bytes(5), os.urandom(_SIZE), 100_000)
    assert writes == [(5, False), (BLOCK, False), (BLOCK, False), (4097, False)]


def test_a_file_system_that_stops_at_an_odd_place(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(descriptor: int, data: memoryview) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return real(descriptor, data)
        if len(data) < BLOCK:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_WRONLY)
        try:
            return real(descriptor, data[:999])
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)

    real = os.write
    monkeypatch.setattr(os, "write", odd)
    data = os.urandom(_SIZE)
    write(disk, b"", data, 100_000)
    assert disk.read_bytes() == data


def test_other_errors_are_raised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EIO):

        def fail(descriptor: int, data: memoryview, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with path.open("wb") as raw, monkeypatch.context() as patch:
            file = DirectFile(raw.fileno())
            file.add(BLOCK - 1)
            patch.setattr(os, "write", fail)
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                file.add(1)
            assert caught.value.errno == number
