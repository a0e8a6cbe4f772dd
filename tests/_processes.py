"""Processes that this one has started, or that carry its mark: what tests of crashes signal, and look for afterwards."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    pid: int
    birth: str


def descendants(pid: int) -> list[Process]:
    """Give the processes that *pid* has started, and theirs."""
    found: list[Process] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it, or a thread of it, has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [Process(child, birth(child)), *descendants(child)]
    return found


def birth(pid: int) -> str:
    """Give a process's time of birth, which tells it from others with its number; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_program(process: Process, name: str) -> bool:
    """Whether it executes a program with *name* on its command line."""
    try:
        return name in Path(f"/proc/{process.pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def owned(token: str) -> dict[int, str]:
    """Give the processes that have *token* among their owners, by their command lines; this one is not among them."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes()
            command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # it has ended, or is somebody else's
        if any(
            entry.startswith(b"TRIO_SANDBOX_OWNER=") and token.encode() in entry for entry in environment.split(b"\0")
        ):
            found[int(name)] = command.decode(errors="replace")[:120]
    return found
