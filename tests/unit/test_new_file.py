"""Files that have their names only when they are complete, on file systems of any kind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trio_sandbox.image._new_file import NewFile


@pytest.fixture(params=["nameless", "named", "without second names"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a file system be able to do that, or not."""
    kind: str = request.param
    real_open, real_link = os.open, os.link

    def fake_open(path: Any, flags: int, *more: Any, **fields: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real_open(path, flags, *more, **fields)

    def fake_link(*arguments: Any, **fields: Any) -> None:
        if kind == "without second names":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        real_link(*arguments, **fields)

    if kind != "nameless":
        monkeypatch.setattr(os, "open", fake_open)
        monkeypatch.setattr(os, "link", fake_link)
    return kind


def test_it_has_its_name_when_it_is_complete(tmp_path: Path, system: str) -> None:
    target = tmp_path / "file"
    with NewFile(target) as new:
        new.file.write(b"content")
        assert not target.exists()
        assert bool(os.listdir(tmp_path)) is (system != "nameless")
        new.publish()
    assert target.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]
    assert target.stat().st_mode & 0o666 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_what_fails_leaves_nothing(tmp_path: Path, system: str) -> None:
    with pytest.raises(RuntimeError), NewFile(tmp_path / "file"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_nothing_is_replaced(tmp_path: Path, system: str) -> None:
    target = tmp_path / "file"
    with NewFile(target) as new:
        target.symlink_to("nowhere")
        with pytest.raises(FileExistsError):
            new.publish()
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileExistsError):
        NewFile(target)
    with pytest.raises(FileNotFoundError):
        NewFile(tmp_path / "none" / "file")
    with pytest.raises(NotADirectoryError):
        NewFile(Path(__file__) / "file")


_WRITE = """
import sys
from pathlib import Path
from trio_sandbox.image._new_file import NewFile
with NewFile(Path(sys.argv[1])) as new:
    new.file.write(b"x" * 1000)
    new.file.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    with NewFile(tmp_path / "probe") as probe:
        if os.listdir(tmp_path):
            pytest.skip("this file system has no files without names")
        del probe
    command = [sys.executable, "-c", _WRITE, os.fspath(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == []
