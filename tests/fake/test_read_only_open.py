"""The library that makes an old QEMU open its RAM's file for reading only, loaded into a Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trio_sandbox.qemu import InheritedFds, minimal_environment
from trio_sandbox.qemu._read_only_open import lend_library, prove_library

#: Opens the file argv[1] by each of the C library's functions with each of the flags that come on standard input; prints
#: what came of it: how it is open, or minus the number of the error.
_OPEN = """
import ctypes, fcntl, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
found = []
for name, flags in json.load(sys.stdin):
    fd = getattr(libc, name)(os.fsencode(sys.argv[1]), flags, 0o640)
    found.append(-ctypes.get_errno() if fd < 0 else fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
stack = next(line.split()[1] for line in open("/proc/self/maps") if "[stack]" in line)
print(json.dumps({"found": found, "stack": stack}))
"""


def try_to_open(path: Path, calls: list[tuple[str, int]]) -> list[int]:
    with InheritedFds() as inherited:
        lent = lend_library(inherited)
        completed = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _OPEN, path],
            input=json.dumps(calls),
            env={**minimal_environment(), **lent},
            pass_fds=inherited.numbers,
            capture_output=True,
            text=True,
            check=True,
        )
    assert completed.stderr == "", "the linker takes it without a word"
    answer = json.loads(completed.stdout)
    assert answer["stack"] == "rw-p", "it makes nothing executable but itself"
    numbers: list[int] = answer["found"]
    return numbers


NAMES = ("open", "open64", "__open_2", "__open64_2")


@pytest.mark.parametrize("name", NAMES)
def test_both_reading_and_writing_is_reading_and_all_else_is_what_it_was(tmp_path: Path, name: str) -> None:
    (path := tmp_path / "file").write_bytes(b"x")
    assert try_to_open(path, [(name, os.O_RDWR)]) == [os.O_RDONLY]
    others = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CLOEXEC, os.O_RDWR | os.O_NONBLOCK, os.O_WRONLY | os.O_CLOEXEC]
    assert try_to_open(path, [(name, flags) for flags in others]) == [flags & os.O_ACCMODE for flags in others]
    assert path.read_bytes() == b"x"


def test_the_mode_of_a_new_file_and_errors_are_the_c_librarys(tmp_path: Path) -> None:
    path = tmp_path / "new"
    assert try_to_open(path, [("open64", os.O_RDWR)]) == [-2]
    old = os.umask(0)
    try:
        assert try_to_open(path, [("open64", os.O_RDWR | os.O_CREAT)]) == [os.O_RDWR]
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


async def test_whether_a_program_has_it_is_found_out_by_the_linker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await prove_library([], sys.executable, environment={})
    (program := tmp_path / "program").symlink_to("/bin/true")
    with monkeypatch.context() as patch:
        patch.setattr("trio_sandbox.qemu._read_only_open.make_library", lambda: b"not a library")
        assert not await prove_library([], os.fspath(program), environment={})
    assert not await prove_library([], os.fspath(program), environment={}), "it is found out once"
