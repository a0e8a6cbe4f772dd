"""Puts packages where they belong, and compiles them if nobody has for this Python: it needs no shell and no other program of the image.

Its text is run by the Python of an image, as root, in a virtual machine of that image, so it stands alone: the standard library of Python 3.8 or
later. Arguments: the directory with what is to be put into /, the directory of the modules, a file with the magic number of the Python that has compiled them, and
what of them is not compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from compileall import compile_file
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import MAGIC_NUMBER


def _copy(source: str, target: str) -> None:
    """Copy what is in a directory into another; what is there besides stays, and so do directories as they are."""
    for name in os.listdir(source):
        path, there = os.path.join(source, name), os.path.join(target, name)
        if os.path.isdir(path) and not os.path.islink(path):
            os.makedirs(there, 0o755, exist_ok=True)
            _copy(path, there)
            continue
        if os.path.lexists(there):
            os.unlink(there)
        shutil.copy2(path, there, follow_symlinks=False)


def _modules(source: str, target: str) -> list[str]:
    found: list[str] = []
    for directory, _, names in os.walk(source):
        there = os.path.join(target, os.path.relpath(directory, source))
        found += [os.path.normpath(os.path.join(there, name)) for name in names if name.endswith(".py")]
    return found


def _compile(paths: list[str], left_out: str) -> None:
    one = partial(compile_file, quiet=2, rx=re.compile(left_out))
    try:
        with ProcessPoolExecutor() as pool:
            for _ in pool.map(one, paths, chunksize=50):
                pass
    except (ImportError, NotImplementedError, OSError):  # what several processes need is not there
        for path in paths:
            one(path)


def _place(content: str, modules: str, magic: str, left_out: str) -> None:
    os.umask(0o022)
    _copy(content, "/")
    with open(magic, encoding="ascii") as file:
        compiled = file.read() == MAGIC_NUMBER.hex()
    if not compiled:
        _compile(_modules(content + modules, modules), left_out)


if __name__ == "__main__":
    _place(*sys.argv[1:])
