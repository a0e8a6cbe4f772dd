"""Byte code of packages, compiled on the host: by a system disk that has a script in place of Python's loader."""

from __future__ import annotations

import importlib.util
import marshal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests._leaks import cancel_at_every_step, nothing_left
from trio_sandbox.image._bytecode import check_magic, compile_tree
from trio_sandbox.image._target import Target
from trio_sandbox.qemu._process import require_program

MAGIC = importlib.util.MAGIC_NUMBER.hex()
TARGET = Target(f"{sys.version_info.major}.{sys.version_info.minor}", "x86_64-manylinux_2_40")
TAG = sys.implementation.cache_tag
#: What the loader is asked: --library-path DIRECTORY PYTHON, and Python's arguments.
LOADER = f'#!/bin/sh\nshift 3\nexec {sys.executable} "$@"\n'
#: The same, but for what compiles.
LOADER_BUT = f'#!/bin/sh\nshift 3\ncase "$*" in *compileall*) {{}};; esac\nexec {sys.executable} "$@"\n'


def make_system_disk(directory: Path, loader: str) -> Path:
    tree = directory / "system-tree"
    files = {f"usr/bin/python{TARGET.python}": "", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": loader}
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        path.chmod(0o755)
    disk = directory / "system.img"
    subprocess.run([require_program("mke2fs"), "-q", "-t", "ext4", "-d", tree, disk, "2048"], check=True)
    return disk


def make_tree(directory: Path) -> Path:
    root = directory / "root"
    for name, content in {
        "one.py": "VALUE = 1\n",
        "package/__init__.py": "raise SystemExit('it was executed')\n",
        "package/tests/test_it.py": "",
        "package/broken.py": "def broken",
        "package/data.txt": "",
        "linked/__init__.py": "",
    }.items():
        path = root / TARGET.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o644)
    (directory / "outside").mkdir()
    (root / TARGET.site / "linked/__pycache__").symlink_to(directory / "outside")
    return root


async def compile_with(tmp_path: Path, loader: str) -> tuple[str, Path]:
    disk, root = make_system_disk(tmp_path, loader), make_tree(tmp_path)
    (tmp_path / "work").mkdir()
    with nothing_left():
        return await compile_tree(disk, root, TARGET, tmp_path / "work", {}), root


def compiled(root: Path) -> set[str]:
    return {path.relative_to(root / TARGET.site).as_posix() for path in root.rglob("*.pyc")}


ALL = {f"__pycache__/one.{TAG}.pyc", f"package/__pycache__/__init__.{TAG}.pyc"}


async def test_modules_are_compiled_and_not_executed(tmp_path: Path) -> None:
    magic, root = await compile_with(tmp_path, LOADER)
    assert magic == MAGIC
    assert compiled(root) == ALL
    source = root / TARGET.site / "one.py"
    (cached,) = (root / TARGET.site / "__pycache__").iterdir()
    data = cached.read_bytes()
    # As it is found in the guest: of this source text, by its place there, for everybody to read.
    assert data[8:12] == int(source.stat().st_mtime).to_bytes(4, "little")
    assert marshal.loads(data[16:]).co_filename == f"/{TARGET.site}/one.py"
    assert (cached.stat().st_mode & 0o777, cached.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("end", ["exit 2", "kill -9 $$", "ulimit -t 0; while :; do :; done"])
async def test_what_did_not_come_to_its_end_is_left_to_the_guest(tmp_path: Path, end: str) -> None:
    magic, root = await compile_with(tmp_path, LOADER_BUT.format(end))
    assert (magic, compiled(root)) == ("", set())


@pytest.mark.parametrize("loader", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho cannot execute\n", "no program"])
async def test_a_system_disk_without_such_a_python_compiles_nothing(tmp_path: Path, loader: str) -> None:
    assert (await compile_with(tmp_path, loader))[0] == ""


async def test_a_system_disk_that_is_none_compiles_nothing(tmp_path: Path) -> None:
    (tmp_path / "system.img").write_text("disk")
    root = make_tree(tmp_path)
    assert await compile_tree(tmp_path / "system.img", root, TARGET, tmp_path / "work", {}) == ""
    assert compiled(root) == set()


async def test_compiling_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    disk, root = make_system_disk(tmp_path, LOADER), make_tree(tmp_path)
    count = 0

    async def compile_it() -> None:
        nonlocal count
        count += 1
        directory = tmp_path / f"work{count}"
        directory.mkdir()
        with nothing_left():
            await compile_tree(disk, root, TARGET, directory, {})

    assert await cancel_at_every_step(compile_it) > 3


@pytest.mark.parametrize(("magic", "done"), [(MAGIC, False), ("00000000", True), ("", True)])
async def test_the_guest_compiles_where_its_python_is_another(tmp_path: Path, magic: str, done: bool) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "magic").write_text(magic)
    script = check_magic(str(tmp_path / "magic"), "echo compiling").replace("python3", str(tmp_path / "python3"))
    result = await trio.run_process(["/bin/sh", "-e", "-c", script], capture_stdout=True)
    assert (result.stdout == b"compiling\n") is done
