"""Notes on which container image a name stood for when it was fetched: a name is looked up once, and then means the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Final, final

import attrs

from ..._errors import OciError
from ..._oci_reference import OciReference, parse_oci
from ..._private import check_trusted, make_private_directory, write_new_file
from ..._stored_json import Fields, read_json

#: What the file of a note is called.
NOTE_NAME: Final = re.compile("container-[0-9a-f]{32}")
_FORMAT: Final = 1
_INDEX: Final = "index.json"
_LONGEST_INDEX: Final = 4 * 2**20


@final
@attrs.frozen
class Note:
    """What a name stood for."""

    reference: str
    state: str
    """What tells whether it can stand for something else by now; of a registry's, nothing."""
    manifest: str
    """The digest of the image's manifest; "" where nothing is known."""


def note_path(directory: Path, reference: OciReference) -> Path:
    """Return where the note on *reference* is, or would be."""
    return directory / f"container-{hashlib.sha256(str(reference).encode()).hexdigest()[:32]}"


def read_note(path: Path) -> Note:
    """Read a note; one that says nothing if there is none, or it is damaged."""
    try:
        check_trusted(path)
        fields = Fields(read_json(path))
        fields.check_format(_FORMAT)
        return Note(fields.text("reference"), fields.text("state"), fields.text("manifest"))
    except (OSError, ValueError):
        return Note("", "", "")


def manifest_of(directory: Path, name: str) -> str:
    """Return the digest of the manifest that a name of an image stands for, by the notes in *directory*; "" where none is known."""
    try:
        reference = parse_oci(name)
    except ValueError:
        return ""
    return read_note(note_path(directory, reference)).manifest


def write_note(path: Path, note: Note) -> None:
    """Write a note, in place of an earlier one.

    Raises:
      OSError: if it can't be written.

    """
    make_private_directory(path.parent, 0o755)
    temporary = path.with_name(f"new-{path.name}.{secrets.token_hex(8)}")
    write_new_file(temporary, json.dumps({"format": _FORMAT, **attrs.asdict(note)}), 0o644)
    temporary.replace(path)


def state_of(reference: OciReference) -> str:
    """Return what tells whether the files that *reference* names are as they were. Blocks: call it in a thread.

    Raises:
      OciError: if they are not there.

    """
    path = reference.path
    if path is None:
        return ""
    try:
        if path.is_dir():
            with open(path / _INDEX, "rb") as file:
                return hashlib.sha256(file.read(_LONGEST_INDEX)).hexdigest()
        status = path.stat()
    except OSError as exc:
        what = os.fspath(exc.filename or path)
        raise OciError(f"the container image {reference} can't be read: {what}: {exc.strerror}") from exc
    return f"{status.st_dev}.{status.st_ino}.{status.st_size}.{status.st_mtime_ns}.{status.st_ctime_ns}"
