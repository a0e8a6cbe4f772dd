"""Unpacked packages, put where the guest's Python and its programs look for them.

uv unpacks into one directory what belongs to several: modules, scripts and data. Its scripts name the host's Python, and
each package's RECORD says where its files are and what is in them. All of that is put right here; nothing is run.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from .._errors import ImageBuildError
from ._target import Target

#: What does not belong beside modules, unless it is a package itself.
_DATA: Final = ("bin", "etc", "include", "share")
#: A script's first line, and what takes its place where the path of Python is too long for one.
_FIRST_LINE: Final = re.compile(rb"#![^\n]*\bpython[\d.]*w?\n")
_TRAMPOLINE: Final = re.compile(rb"#!/bin/sh\n'''exec' [^\n]*\n' '''\n")
#: What says where a package came from; that is nobody's business in the guest.
_ORIGIN: Final = "direct_url.json"
_MOST_RECORD_BYTES: Final = 32 * 2**20
#: Directories within each other. Python 3.11 can't look into many more, and later ones and a guest's programs need not.
_DEEPEST: Final = 256


def arrange(unpacked: Path, root: Path, target: Target) -> None:
    """Move the packages in *unpacked* to their places below the new directory *root*. Blocks: call it in a thread.

    Raises:
      ImageBuildError: if one has too many directories within each other.
      OSError: if a file can't be moved or written.

    """
    site = root / target.site
    site.parent.mkdir(parents=True)
    (unpacked / ".lock").unlink(missing_ok=True)
    unpacked.rename(site)
    moved: dict[str, Path] = {}
    for name in _DATA:
        if _is_directory(site / name) and not (site / name / "__init__.py").exists():
            moved[name] = root / target.scripts if name == "bin" else root / target.prefix / name
            moved[name].parent.mkdir(parents=True, exist_ok=True)
            (site / name).rename(moved[name])
    if "bin" in moved:
        for script in moved["bin"].iterdir():
            _correct_script(script, target.first_line)
    for information in sorted(site.glob("*.dist-info")):
        _correct_record(information, moved)
    _open_to_all(root)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _correct_script(script: Path, first_line: bytes) -> None:
    if script.is_symlink() or not script.is_file():
        return
    content = script.read_bytes()
    for pattern in (_TRAMPOLINE, _FIRST_LINE):
        if match := pattern.match(content):
            script.write_bytes(first_line + content[match.end() :])
            return


def _correct_record(information: Path, moved: Mapping[str, Path]) -> None:
    """Have a RECORD say where files are by now: *moved* has where directories went that were beside the modules."""
    # The ways from the modules' directory.
    ways = {name: os.path.relpath(place, information.parent) for name, place in moved.items()}
    origin, record = information / _ORIGIN, information / "RECORD"
    origin.unlink(missing_ok=True)
    if record.is_symlink() or not record.is_file() or record.stat().st_size > _MOST_RECORD_BYTES:
        return
    rows: list[list[str]] = []
    for row in csv.reader(io.StringIO(record.read_text("utf-8", "surrogateescape"), newline="")):
        if not row or row[0] == f"{information.name}/{_ORIGIN}":
            continue
        first, _, rest = row[0].partition("/")
        if first in moved and rest:
            if first == "bin" and os.path.basename(rest) == rest and (moved[first] / rest).is_file():
                row = _row(row[0], (moved[first] / rest).read_bytes())
            row[0] = f"{ways[first]}/{rest}"
        rows.append(row)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    record.write_text(text.getvalue(), "utf-8", "surrogateescape")


def _row(name: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(content))]


def _open_to_all(root: Path) -> None:
    """Let everybody in the guest read it all, whatever our umask."""
    root.chmod(0o755)
    deepest = str(root).count(os.sep) + _DEEPEST
    for directory, names, files in os.walk(root):
        if directory.count(os.sep) > deepest:
            raise ImageBuildError(
                f"a package has too many directories within each other, more than {_DEEPEST}: {directory[len(str(root)) :]:.100}...; leave it out"
            )
        for name in (*names, *files):
            path = os.path.join(directory, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode):
                os.chmod(path, 0o755)
            elif stat.S_ISREG(mode):
                os.chmod(path, 0o755 if mode & 0o100 else 0o644)
