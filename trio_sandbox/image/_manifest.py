"""What the store knows about one thing it holds: the manifest, and whether the files still match it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import attrs

from .._errors import ImageCorruptError
from .._private import check_trusted, write_new_file
from .._stored_json import Fields, read_json
from ._recipe import BUILDER_VERSION

MANIFEST_NAME = "manifest.json"
_VERDICT_NAME = "verified.json"
#: Bytes of a manifest, which no more of are read.
LONGEST_MANIFEST = 2**20
#: A file beside the manifest, which no other part of a path is.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@attrs.frozen(kw_only=True)
class StoredFile:
    """One file of a stored entry, as it was built."""

    size: int
    """Bytes, holes included."""
    sha256: str


@attrs.frozen(kw_only=True)
class Manifest:
    """What was built: written last, so that an entry without one is no entry."""

    name: str
    digest: str
    """Digest of the recipe: of everything that decides what is built."""
    created: float
    """When it was built, in Unix seconds."""
    files: Mapping[str, StoredFile]
    details: Mapping[str, object]
    """What the builder has to say about it; only for showing and for opening it."""

    def to_json(self) -> str:
        """Return the manifest's text."""
        value = {
            "format": BUILDER_VERSION,
            "name": self.name,
            "digest": self.digest,
            "created": self.created,
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()},
            "details": dict(self.details),
        }
        return json.dumps(value, indent=2) + "\n"

    @classmethod
    def from_value(cls, value: object) -> Manifest:
        """Read what `to_json` wrote, once it is parsed.

        Raises:
          ValueError: if it is not one of ours.
        """
        fields = Fields(value)
        fields.check_format(BUILDER_VERSION)
        files = fields.fields("files")
        return cls(
            name=fields.text("name"),
            digest=fields.text("digest"),
            created=fields.time("created"),
            files={_file_name(name): _stored_file(files.fields(name)) for name in files.names()},
            details=fields.fields("details").values(),
        )


def _file_name(name: str) -> str:
    if _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"it is damaged: {name!r:.80} is no file of it")
    return name


def _stored_file(fields: Fields) -> StoredFile:
    return StoredFile(size=fields.number("size"), sha256=fields.text("sha256"))


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a stored directory.

    Raises:
      ImageCorruptError: if there is none, or it can't be read.
    """
    try:
        check_trusted(directory, directory / MANIFEST_NAME)
        return Manifest.from_value(read_json(directory / MANIFEST_NAME, longest=LONGEST_MANIFEST))
    except (OSError, ValueError) as exc:
        name = directory.name.rpartition("-")[0]
        raise corrupt(directory, name, f"{MANIFEST_NAME}: {exc}") from exc


def describe_files(directory: Path, names: Iterable[str]) -> dict[str, StoredFile]:
    """Read the files *names* of *directory*, and return what they are. Blocks: call it in a thread."""
    return {
        name: StoredFile(size=(directory / name).stat().st_size, sha256=_sha256(directory / name)) for name in names
    }


def check_files(directory: Path, manifest: Manifest) -> None:
    """Make sure that the files of *directory* are what was built.

    Reading them takes a second or so; the verdict is kept, and stands for as long as the kernel
    says that nobody wrote to them. Blocks: call it in a thread.

    Raises:
      ImageCorruptError: if a file is missing or differs.
    """
    state = _state(directory, manifest)
    verdict = directory / _VERDICT_NAME
    try:
        check_trusted(*(directory / name for name in manifest.files))
    except OSError as exc:
        raise corrupt(directory, manifest.name, str(exc)) from exc
    try:
        check_trusted(verdict)
        if read_json(verdict) == state:
            return
    except (OSError, ValueError):
        pass
    found = describe_files(directory, manifest.files)
    for name, file in manifest.files.items():
        if found[name] != file:
            raise corrupt(directory, manifest.name, f"{name} is not what was built")
    record_verdict(directory, manifest, state)


def record_verdict(directory: Path, manifest: Manifest, state: object = None) -> None:
    """Remember that the files are what was built, as of *state* (None: as they are now)."""
    verdict = directory / _VERDICT_NAME
    temporary = verdict.with_name(f"{_VERDICT_NAME}.{secrets.token_hex(8)}")
    try:
        write_new_file(temporary, json.dumps(_state(directory, manifest) if state is None else state), 0o644)
    except OSError:
        return  # A store that may only be read: the next process reads the files again.
    temporary.replace(verdict)


def _state(directory: Path, manifest: Manifest) -> dict[str, list[int]]:
    state: dict[str, list[int]] = {}
    for name in manifest.files:
        try:
            status = (directory / name).stat()
        except OSError as exc:
            raise corrupt(directory, manifest.name, f"{name}: {exc.strerror}") from exc
        state[name] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return state


def corrupt(directory: Path, name: str, what: str) -> ImageCorruptError:
    """Return the error of an entry that is damaged."""
    return ImageCorruptError(
        f"the stored files of {name} in {directory} are not what was built: {what}."
        f" `trio-sandbox image rm {name}` removes them, and the next use builds them again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
