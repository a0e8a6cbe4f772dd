"""``trio-sandbox ps`` and ``trio-sandbox kill``: the sandboxes that run on this machine for this user."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence

import attrs

from .._errors import SandboxError
from ..machines import RunningSandbox, kill_sandbox, running_sandboxes
from ._json import open_rows, print_json
from ._report import complain, complain_about, one_line

_HEADER = ("ID", "IMAGE", "STATE", "AGE", "MEMORY", "ACCELERATOR", "OWNER", "COMMAND")
#: Seconds in a unit, and up to how many seconds it is used.
_AGES = ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800))
_DAY = 86_400


def ps(options: argparse.Namespace) -> int:
    """List them; 0, or 1 if they can't be known."""
    try:
        sandboxes, problems = running_sandboxes()
    except SandboxError as exc:
        complain_about(exc)
        return 1
    for problem in problems:
        complain(problem)
    if options.json:
        print_json([attrs.asdict(sandbox) for sandbox in sandboxes])
    else:
        print(table(sandboxes, time.time(), shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


def table(sandboxes: Sequence[RunningSandbox], now: float, columns: int | None = None) -> str:
    """Give a line for each, of at most so many columns."""
    if not sandboxes:
        return "no sandbox of this user runs on this machine"
    rows = [
        _HEADER,
        *(
            (
                sandbox.id,
                one_line(sandbox.image),
                sandbox.state,
                age(now - sandbox.opened),
                f"{sandbox.memory_mib} MiB",
                one_line(sandbox.accelerator),
                "-" if sandbox.owner_pid is None else str(sandbox.owner_pid),
                one_line(sandbox.owner_command) or "-",
            )
            for sandbox in sandboxes
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(line[:columns] for line in lines)


def age(seconds: float) -> str:
    """Write how long ago something was; a clock that went back makes it now."""
    for unit, name, below in _AGES:
        if seconds < below:
            return f"{max(seconds, 0) // unit:.0f} {name}"
    return f"{seconds // _DAY:.0f} d"


def kill(options: argparse.Namespace) -> int:
    """End those that are wanted; 0, or 1 if one of them is not ended."""
    status = 0
    with open_rows(options.json) as add:
        try:
            names = options.ids
            if options.all:
                sandboxes, problems = running_sandboxes()
                for problem in problems:
                    complain(problem)
                names = [sandbox.id for sandbox in sandboxes if sandbox.state == "running"]
        except SandboxError as exc:
            complain_about(exc)
            names, status = [], 1
        for name in dict.fromkeys(names):
            try:
                ended = kill_sandbox(name)
            except SandboxError as exc:
                complain_about(exc)
                status = 1
            else:
                add(f"{name}: {'ended' if ended else 'its virtual machine was gone already'}", id=name, ended=ended)
    return status
