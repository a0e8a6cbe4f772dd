"""The source text of the runs of a Python interpreter: for tracebacks, for `inspect`, and for processes that start from nothing.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

A process of `multiprocessing` that is not forked imports the program's file to have its functions. Code of runs has none, so
it is given one: a memory file of ours with a program (`python_spawned.py`) that makes what past runs have defined.
"""

from __future__ import annotations

import io
import linecache
import os
import re
import sys
from collections import deque
from fcntl import F_DUPFD_CLOEXEC, fcntl
from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Bytes of past runs' source that is kept, about.
_LIMIT = 8 << 20
#: What keeping any costs besides its characters.
_OVERHEAD = 500
#: From Python 3.13 on `traceback` places its marks by the line's end.
_NEEDS_LINE_END = sys.version_info < (3, 13)
#: Out of the way of code that counts on low numbers, or closes them.
_LOWEST_DESCRIPTOR = 100


class Sources:
    """What the last runs were, by the names that tracebacks have for them.

    Args:
      program: Text of the program for processes that start from nothing; see `python_spawned`.

    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._sources: deque[tuple[str, str]] = deque()
        self._size = 0
        self._file = -1
        self._file_identity = (0, 0)
        # From Python 3.13 on the text that the interpreter was started with is there, for whatever code calls "<string>".
        linecache.cache.clear()
        getattr(linecache, "_interactive_cache", {}).clear()

    def add(self, name: str, code: str) -> None:
        """Keep *code*, and let go of the oldest if it is too much."""
        self._sources.append((name, code))
        self._size += _OVERHEAD + 2 * len(code)
        while self._size > _LIMIT and len(self._sources) > 1:
            oldest, old_code = self._sources.popleft()
            self._size -= _OVERHEAD + 2 * len(old_code)
            linecache.cache.pop(oldest, None)
        # Lines as Python's tokenizer counts them, which knows three line ends; `splitlines` knows ten.
        lines = io.StringIO(code, None).readlines() if "\n" in code or "\r" in code else [code]
        if _NEEDS_LINE_END and lines:
            lines[-1] = lines[-1].rstrip("\n") + "\n"
        # No time of modification means that there is no file to check against.
        linecache.cache[name] = (len(code), None, lines, name)

    def complete(self, error: SyntaxError) -> None:
        """Give *error* the line that it is about, if that is of a run: the compiler looks for it in a file."""
        entry = linecache.cache.get(str(error.filename))
        if error.text is None and error.lineno is not None and entry is not None and len(entry) == 4:
            lines = entry[2]
            if error.filename in dict(self._sources) and 0 < error.lineno <= len(lines):
                error.text = lines[error.lineno - 1]

    def find_class(self, definition: type) -> str | None:
        """Return the name of the run that a class is of: as its functions say, or else the newest that has a class of its name."""
        names = dict(self._sources)
        statement = re.compile(rf"^\s*class\s+{re.escape(definition.__name__)}\b", re.MULTILINE)
        methods = [
            value.__code__.co_filename
            for value in vars(definition).values()
            if isinstance(value, FunctionType) and value.__qualname__ == f"{definition.__qualname__}.{value.__name__}"
        ]
        return next((name for name in [*methods, *reversed(names)] if statement.search(names.get(name, ""))), None)

    def patch_multiprocessing(self) -> None:
        """Have processes that are not forked find what runs have defined."""
        from multiprocessing import spawn

        module: Any = spawn
        prepare = module.get_preparation_data
        if prepare.__module__ == __name__:
            return  # it was done before

        def get_preparation_data(name: str) -> dict[str, Any]:
            data: dict[str, Any] = prepare(name)
            if "init_main_from_name" not in data and "init_main_from_path" not in data:
                data["init_main_from_path"] = self._write_program()
            return data

        module.get_preparation_data = get_preparation_data

    def _write_program(self) -> str:
        """Return the name of a file with the program, for other processes to open while this one lives."""
        try:
            is_ours = _identity(self._file) == self._file_identity
        except OSError:
            is_ours = False
        if not is_ours:
            file = os.memfd_create("runs", os.MFD_CLOEXEC)
            self._file = fcntl(file, F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
            self._file_identity = _identity(self._file)
            os.close(file)
        text = f"{self._program}\n_learn({list(self._sources)!a})\n"
        with open(self._file, "wb", closefd=False) as output:
            os.ftruncate(self._file, 0)
            output.seek(0)
            output.write(text.encode())
        return f"/proc/{os.getpid()}/fd/{self._file}"


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
