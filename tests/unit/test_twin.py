"""Whether the users' Python is the agent's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from trio_sandbox.guest.spawner import twin

_SIZE = 300_000


@pytest.fixture
def ours(tmp_path: Path) -> int:
    path = tmp_path / "ours"
    path.write_bytes(bytes(range(250)) * (_SIZE // 250))
    return os.open(path, os.O_RDONLY)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_our_own_program_is_the_one_that_runs() -> None:
    descriptor = twin.open_own_program()
    try:
        assert os.path.samestat(os.fstat(descriptor), os.stat(sys.executable))
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_a_file_with_the_same_bytes_is_it_until_it_changes(ours: int, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes((tmp_path / "ours").read_bytes())
    found = twin.find_twin(ours, [str(tmp_path / "missing"), str(theirs)])
    assert found is not None
    try:
        assert found.descriptor == ours
        link = tmp_path / "link"
        link.symlink_to(theirs)
        assert found.is_at(str(theirs))
        assert found.is_at(str(link))
        assert not found.is_at(str(tmp_path / "ours"))
        assert not found.is_at(str(tmp_path / "missing"))
        with theirs.open("r+b") as file:
            file.write(b"x")
        os.utime(theirs, ns=(0, 0))
        assert not found.is_at(str(theirs))
    finally:
        os.close(ours)


@pytest.mark.parametrize("offset", [0, _SIZE // 2, _SIZE - 1])
def test_one_byte_makes_it_another(ours: int, tmp_path: Path, offset: int) -> None:
    content = bytearray((tmp_path / "ours").read_bytes())
    content[offset] ^= 1
    theirs = tmp_path / "theirs"
    theirs.write_bytes(content)
    assert twin.find_twin(ours, [str(theirs)]) is None
    assert not _is_open(ours)


def test_what_is_shorter_is_another(ours: int, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes((tmp_path / "ours").read_bytes()[:-1])
    assert twin.find_twin(ours, [str(theirs)]) is None


def test_the_first_that_is_there_decides(ours: int, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert twin.find_twin(ours, [str(other), str(tmp_path / "ours")]) is None


def test_what_is_no_file_is_none(ours: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert twin.find_twin(ours, [str(tmp_path / "fifo")]) is None


def test_there_need_be_none(ours: int, tmp_path: Path) -> None:
    assert twin.find_twin(ours, [str(tmp_path / "missing")]) is None
    assert not _is_open(ours)
