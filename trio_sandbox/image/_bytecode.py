"""Byte code of packages, compiled on the host by the Python of the system disk, which is of the same Debian package as the image's.

Compiling reads source text and executes none of it. A guest under software emulation takes fifty times as long. Whether the byte code is of use to
the image's Python is for the guest to see: it knows its own magic number.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import trio

from .._nurseries import hide_nursery
from ..qemu import minimal_environment, run_owned
from ._target import Target

#: Tests of packages are not compiled: there is as much of them as of all else, and nobody imports them.
TESTS: Final = "/tests?/"
#: Where libraries are on the system disk, and what starts a program with these and no others.
_LIBRARIES, _LOADER = "usr/lib/x86_64-linux-gnu", "ld-linux-x86-64.so.2"
#: Source text can be made to take any time and memory to compile: seconds of the processor, KiB, and blocks of 512 bytes of one file.
_LIMITED: Final = 'ulimit -c 0; ulimit -t 300; ulimit -v 4194304; ulimit -f 262144; umask 022; exec "$@"'
_MOST_PROCESSES: Final = 4
#: What compileall exits with if something could not be compiled, which is nothing unusual.
_USUAL: Final = (0, 1)
_MAGIC: Final = "import importlib.util as u; print(u.MAGIC_NUMBER.hex(), end='')"


def check_magic(file: str, script: str) -> str:
    """Return a shell script that does *script* where byte code of the magic number in *file* is of no use to the guest's Python."""
    return f'[ "$(python3 -I -S -c "{_MAGIC}")" = "$(cat {file})" ] || {{ {script}; }}'


async def compile_tree(
    system: Path, root: Path, target: Target, directory: Path, environment: Mapping[str, str]
) -> str:
    """Put byte code beside the modules of *root*, which is to be / in the guest.

    Cancelled, it leaves no process; what it has written by then is whole and of use.

    Args:
      system: The system disk.
      root: The tree.
      target: What it is for.
      directory: One for Python and lists of files; somebody else removes it.
      environment: `Runtime.environment`.

    Returns:
      The magic number of the Python that compiled all that can be compiled, in hexadecimal digits; "" if not all was, since the
      system disk has no such Python, or source text took too long or too much.

    Raises:
      MissingProgramError: if e2fsprogs are not installed.

    """
    python = await _take_python(system, target, directory / "system", environment)
    process = await run_owned([*python, "-c", _MAGIC], environment={**minimal_environment(), **environment})
    magic = process.output()
    if process.returncode != 0 or not re.fullmatch("[0-9a-f]{8}", magic):
        return ""
    count = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    lists = await trio.to_thread.run_sync(_list, root / target.site, directory, count)
    statuses: list[int | None] = []

    async def compile_list(names: Path) -> None:
        options = ["-m", "compileall", "-qq", "-s", os.fspath(root), "-p", "/", "-i", os.fspath(names)]
        done = await run_owned([*python, *options], environment={**minimal_environment(), **environment})
        statuses.append(done.returncode)

    with hide_nursery("compile_tree()"):
        async with trio.open_nursery() as nursery:
            for each in lists:
                nursery.start_soon(partial(compile_list, each))
    return magic if all(status in _USUAL for status in statuses) else ""


async def _take_python(system: Path, target: Target, directory: Path, environment: Mapping[str, str]) -> list[str]:
    """Copy Python from the system disk; return how to start it."""
    name = f"python{target.python}"
    (directory / "usr/bin").mkdir(parents=True)
    (directory / "usr/lib").mkdir()
    commands = directory / "commands"
    # debugfs has no way to quote: the paths are relative.
    commands.write_text(
        f"rdump /usr/lib/{name} usr/lib\nrdump /{_LIBRARIES} usr/lib\ndump -p /usr/bin/{name} usr/bin/{name}\n", "utf-8"
    )
    await run_owned(
        ["debugfs", "-f", os.fspath(commands), os.fspath(system)],
        environment={**minimal_environment(), **environment},
        cwd=directory,
    )
    libraries = os.fspath(directory / _LIBRARIES)
    return [
        *("/bin/sh", "-c", _LIMITED, "sh", f"{libraries}/{_LOADER}", "--library-path", libraries),
        *(os.fspath(directory / "usr/bin" / name), "-I", "-S"),
    ]


def _list(site: Path, directory: Path, count: int) -> list[Path]:
    """Write down which modules there are, in up to *count* lists of the same size."""
    found: list[tuple[int, str]] = []
    for parent, names, files in os.walk(site):
        names[:] = [name for name in names if name not in ("test", "tests")]
        if os.path.islink(os.path.join(parent, "__pycache__")):
            continue  # byte code would be written wherever it leads to
        for name in files:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            # A list has a path in each line, without the blanks around it.
            if name.endswith(".py") and stat.S_ISREG(status.st_mode) and path.isprintable() and path == path.strip():
                found.append((status.st_size, path))
    found.sort(reverse=True)
    lists: list[Path] = []
    for number in range(min(count, len(found))):
        lists.append(directory / f"modules{number}")
        lists[-1].write_text("".join(f"{path}\n" for _, path in found[number::count]), "utf-8")
    return lists
