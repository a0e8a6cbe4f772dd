"""The store of templates: saved states of machines that have booted and warmed up, to restore others from.

A template is a directory of the cache with the RAM, the devices' state and the frozen disk overlay of one
machine, and a manifest that is written last. Its name is the digest of everything that could make it wrong.
It is made in a staging directory and renamed, so that what a killed process leaves is never mistaken for
one. Nothing here starts a machine.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs

from .._errors import UnknownTemplateError
from .._observe import part_logger
from .._private import check_trusted, make_private_directory, write_new_file
from .._stored_json import Fields, read_json
from ..constants import MAXIMUM_REQUEST_BYTES
from ..image import try_lock
from ..qemu import (
    Qcow2FormatError,
    is_marked,
    is_own_directory,
    make_marked,
    mark,
    read_qcow2_info,
    remove_marked,
)

_log = part_logger("templates")

#: Changes with whatever a template's files mean, so that no other version's are used.
_FORMAT: Final = 1
_MANIFEST: Final = "template.json"
_MEMORY, _DEVICES, _OVERLAY = "memory", "devices", "overlay.qcow2"
#: Bytes of a manifest: the warm-up is in it, whose characters may take six each, and little else.
_LONGEST_MANIFEST: Final = 6 * MAXIMUM_REQUEST_BYTES + 2**16
_FILES: Final = (_MEMORY, _DEVICES, _OVERLAY)
#: How much of a key names a directory, and the least that says which template is meant.
_KEY_CHARACTERS, _SHORTEST_KEY = 24, 6
_STAGING, _REMOVED = ".staging-", ".removed-"
#: What a directory of ours in the store is called: a template, one that is being made, one that is being removed.
_ENTRY_NAME: Final = re.compile(rf"[0-9a-f]{{{_KEY_CHARACTERS}}}")
_STAGING_NAME: Final = re.compile(re.escape(_STAGING) + rf"([0-9a-f]{{{_KEY_CHARACTERS}}})-[0-9a-f]{{8}}")
_REMOVED_NAME: Final = re.compile(re.escape(_REMOVED) + "[0-9a-f]{16}")


@final
@attrs.frozen(kw_only=True)
class Template:
    """A template of the store, or one that is being made."""

    key: str
    directory: Path
    image: str
    """The name of the image."""
    memory_mib: int
    vcpus: int
    warmup: str
    """The code that ran before the state was saved."""
    marker: bytes = attrs.field(repr=False)
    """What wakes up the agent of a machine restored from here."""
    created: float
    """When it was made, in Unix seconds."""
    used: float = 0.0
    """When it was last used, in Unix seconds."""
    size_bytes: int = 0
    """What it takes on the host's disk."""

    @property
    def memory(self) -> Path:
        """The RAM's file."""
        return self.directory / _MEMORY

    @property
    def devices(self) -> Path:
        """The devices' state."""
        return self.directory / _DEVICES

    @property
    def overlay(self) -> Path:
        """What the machine had written to its disk; it never changes any more."""
        return self.directory / _OVERLAY

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it consists of."""
        return (self.memory, self.devices, self.overlay)


def template_key(*parts: object) -> str:
    """Return the key of a template that depends on *parts*, which must have a `repr` that says all."""
    return hashlib.sha256(repr((_FORMAT, _cpu(), *parts)).encode()).hexdigest()[:_KEY_CHARACTERS]


@functools.cache
def _cpu() -> str:
    """Tell the host's processor: the guest has seen its features, where it is not emulated, and how fast its clock ticks."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first, _, _ = file.read().partition("\n\n")
        return "\n".join(line for line in first.splitlines() if line.partition("\t")[0].strip() in wanted)
    return ""


@final
class TemplateStore:
    """A directory of templates, which any number of processes may share. Making the object touches nothing.

    Args:
      cache_dir: Where it is, or will be: in ``templates`` there.
      budget_mib: What all of them together may take on the disk, in MiB.
      shared: Another cache, whose templates are used, too, and never touched.

    """

    def __init__(self, cache_dir: Path, *, budget_mib: int, shared: Path | None = None) -> None:
        self._directory = cache_dir.absolute() / "templates"
        self._budget = budget_mib * 2**20
        self._shared = None if shared is None else shared.absolute() / "templates"
        self._refused: set[str] = set()  # of those that are shared

    def __repr__(self) -> str:
        return f"<trio_sandbox TemplateStore in {str(self._directory)!r}>"

    @property
    def budget_bytes(self) -> int:
        """What all of them together may take on the disk."""
        return self._budget

    def find(self, key: str) -> Template | None:
        """Return the intact template of that key, marked as used now, or None.

        One that is damaged is removed, and a warning says so. One that can't be read is not there.
        """
        found = self._find_own(key)
        if found is None and self._shared is not None and key not in self._refused:
            with suppress(OSError, ValueError):
                found = _read(self._shared / key)
        return found

    def _find_own(self, key: str) -> Template | None:
        directory = self._directory / key
        try:
            template = _read(directory)
        except FileNotFoundError:
            if directory.exists():
                self.discard(key, "a file of it is missing")
            return None
        except (OSError, ValueError) as exc:
            if not isinstance(exc, PermissionError):
                self.discard(key, str(exc))
            return None
        with suppress(OSError):  # where only reading is allowed it can still be used
            os.utime(directory / _MANIFEST)
        return template

    @contextmanager
    def lock(self, key: str) -> Generator[bool]:
        """Be the only one that makes the template of *key*, if nobody else is; yields whether it is so.

        Raises:
          OSError: if the directory can't be written.

        """
        locks = self._directory / "locks"
        # The RAM's file can be written to by whoever gets at it, QEMU's user being another.
        make_private_directory(self._directory)
        make_private_directory(locks)
        check_trusted(self._directory, locks)
        with try_lock(locks / key) as held:
            if held:
                self._remove_leftovers(key)
            yield held

    @contextmanager
    def make(self, template: Template) -> Generator[Template]:
        """Yield *template* in a directory of its own for the block to fill; after the block it is in the store.

        Call it with the lock held. An error or a cancellation in the block leaves nothing.

        Raises:
          OSError: if there is no room for it, or the directory can't be written.

        """
        staging = self._directory / f"{_STAGING}{template.key}-{secrets.token_hex(4)}"
        make_marked(staging)
        try:
            self._require_room(template.memory_mib)
            staged = attrs.evolve(template, directory=staging)
            with open(staged.memory, "xb") as memory:
                memory.truncate(template.memory_mib * 2**20)
                # QEMU, which runs as another user, opens it anew. Nobody else gets at it, by its directory.
                os.fchmod(memory.fileno(), 0o666)
            yield staged
            _write_manifest(staged)
            os.rename(staging, self._directory / template.key)
        except BaseException:
            _try_to_remove(staging)
            raise

    def _require_room(self, memory_mib: int) -> None:
        # Where the disk fills up under a running machine's RAM, that machine dies of SIGBUS.
        status = os.statvfs(self._directory)
        if status.f_bavail * status.f_frsize < memory_mib * 2**20:
            raise OSError(errno.ENOSPC, f"no room for {memory_mib} MiB of RAM", str(self._directory))

    def discard(self, key: str, reason: str) -> None:
        """Remove a template that proved to be of no use, or use it no more if it is shared, and say so in the log."""
        if not (self._directory / key).exists():
            self._refused.add(key)
            _log.warning("the template %s of %s is not used any more: %s", key, self._shared, reason)
            return
        _log.warning("the template %s is removed: %s", key, reason)
        try:
            self._remove(self._directory / key)
        except OSError as exc:
            _log.warning("it can't be: %s", exc)

    def remove(self, key: str) -> int:
        """Remove the templates whose key begins with *key*; return the bytes that came free.

        Machines restored from them are not disturbed.

        Raises:
          UnknownTemplateError: if there is none, or *key* is shorter than 6 characters.
          OSError: if one can't be removed.

        """
        found = [entry for entry in self._entries() if len(key) >= _SHORTEST_KEY and entry.name.startswith(key)]
        if not found:
            known = ", ".join(entry.name for entry in self._entries()) or "none"
            raise UnknownTemplateError(f"there is no template {key!r}; there are: {known}")
        return sum(self._remove(entry) for entry in found)

    def prune(self) -> int:
        """Remove what is damaged, was left by killed processes, or is of an image that is gone; return the bytes that came free.

        Raises:
          OSError: if something can't be removed.

        """
        usable = {template.directory for template in self.list() if _has_image(template)}
        freed = sum(self._remove(entry) for entry in self._entries() if entry not in usable)
        return freed + self.remove_leftovers() + self.evict()

    def remove_leftovers(self) -> int:
        """Remove what killed processes left half-made or half-removed; return the bytes that came free.

        Raises:
          OSError: if the directory can't be written.

        """
        freed = 0
        for leftover, name in self._marked(_STAGING_NAME):
            before = disk_usage(leftover)
            with self.lock(name[1]) as held:  # which removes it, if nobody is making it
                freed += before if held else 0
        for removed, _ in self._marked(_REMOVED_NAME):
            freed += disk_usage(removed)
            _try_to_remove(removed)
        return freed

    def evict(self, *, keep: str = "") -> int:
        """Remove the templates that were used longest ago, until the rest is within the budget.

        Args:
          keep: The key of one that stays in any case.

        Returns:
          The bytes that came free.

        Raises:
          OSError: if something can't be removed.

        """
        # Those of other versions of the library count, too: they share the budget, and say in the same way when they were used.
        entries = sorted((_last_used(entry), disk_usage(entry), entry) for entry in self._entries())
        left, freed = sum(size for _, size, _ in entries), 0
        for _, size, entry in entries:
            if left > self._budget and entry.name != keep:
                freed += self._remove(entry)
                left -= size
        return freed

    def disks_below(self) -> dict[str, Path]:
        """Return the file that the disk of each template stands on, by its key; damaged ones and those of other versions included."""
        found = {entry.name: _disk_below(entry / _OVERLAY) for entry in self._entries()}
        return {key: disk for key, disk in found.items() if disk is not None}

    def _remove(self, directory: Path) -> int:
        if not os.path.lexists(directory):
            return 0  # somebody else was faster
        if not _is_template(directory):
            raise FileExistsError(errno.EEXIST, "not a directory of ours, and left alone", str(directory))
        size = disk_usage(directory)
        removed = self._directory / f"{_REMOVED}{secrets.token_hex(8)}"
        try:
            # Gone at once, and as a whole, for everybody else.
            os.rename(directory, removed)
        except FileNotFoundError:
            return 0  # somebody else was faster
        mark(removed)
        _try_to_remove(removed)
        return size

    def _remove_leftovers(self, key: str) -> None:
        for leftover, name in self._marked(_STAGING_NAME):
            if name[1] == key:
                _try_to_remove(leftover)

    def _entries(self) -> Sequence[Path]:
        return [path for path, _ in self._matching(_ENTRY_NAME) if _is_template(path)]

    def _marked(self, name: re.Pattern[str]) -> Sequence[tuple[Path, re.Match[str]]]:
        return [(path, match) for path, match in self._matching(name) if is_marked(path)]

    def _matching(self, name: re.Pattern[str]) -> Sequence[tuple[Path, re.Match[str]]]:
        # Whatever else is in there is somebody's own.
        found = [(path, name.fullmatch(path.name)) for path in sorted(self._directory.glob("*"))]
        return [(path, match) for path, match in found if match is not None]

    def list(self) -> list[Template]:
        """Return all intact templates, the one used last first."""
        found: list[Template] = []
        for directory in self._entries():
            with suppress(OSError, ValueError):
                found.append(_read(directory))
        return sorted(found, key=lambda template: -template.used)


def _is_template(directory: Path) -> bool:
    """Tell whether a directory with the name of a template is one, intact or damaged, and ours to remove."""
    # The manifest is as good as a mark, which templates of earlier versions do not have.
    return is_marked(directory) or (is_own_directory(directory) and (directory / _MANIFEST).is_file())


def _last_used(directory: Path) -> float:
    """Tell when a template was used, in Unix seconds; 0 for one without a manifest."""
    try:
        return (directory / _MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _try_to_remove(directory: Path) -> None:
    """Remove a directory of ours. What can't be removed is tried again by `TemplateStore.prune`."""
    try:
        remove_marked(directory)
    except OSError as exc:
        _log.warning("%s can't be removed: %s", directory, exc)


def _has_image(template: Template) -> bool:
    """Tell whether the image that a template's disk is a layer on is still there."""
    image = _disk_below(template.overlay)
    return image is None or image.exists()  # where nobody can tell, whoever opens it notices


def _disk_below(overlay: Path) -> Path | None:
    """Return the file that an overlay stands on; None where it can't be told."""
    try:
        below = read_qcow2_info(overlay).backing_file
    except (Qcow2FormatError, OSError):
        return None
    return None if below is None else Path(below)


def file_identities(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return what tells by a file's name whether it is as it was. Raises `OSError` if one is missing."""
    # Times tell of any change, and cost nothing to look at. Hashing the RAM takes longer than restoring it.
    statuses = {path.name: os.stat(path) for path in paths}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


def sync_files(paths: Iterable[Path]) -> None:
    """Bring files, or directories, to the disk, so that a power failure can't leave them in parts. Takes a while."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def place_templates(cache_dir: Path, others: Iterable[Path]) -> Path:
    """Return where templates can be kept: *cache_dir*, or the first of *others* if that can't be written."""
    for directory in (cache_dir, *others):
        existing = directory.absolute() / "templates"
        while not os.path.exists(existing):  # or out of our reach
            existing = existing.parent
        # It tells of a file system that is mounted read-only, too.
        if os.access(existing, os.W_OK | os.X_OK):
            return directory
    return cache_dir


def _write_manifest(template: Template) -> None:
    value = {
        "format": _FORMAT,
        "key": template.key,
        "image": template.image,
        "memory_mib": template.memory_mib,
        "vcpus": template.vcpus,
        "warmup": template.warmup,
        "marker": template.marker.hex(),
        "created": template.created,
        "files": file_identities(template.directory / name for name in _FILES),
    }
    write_new_file(template.directory / _MANIFEST, json.dumps(value, indent=2) + "\n")


def _read(directory: Path) -> Template:
    """Read and check a template.

    Raises:
      ValueError: if the manifest or a file is not what was written.
      OSError: if something can't be read.

    """
    manifest = directory / _MANIFEST
    check_trusted(directory.parent, directory, manifest)
    fields = Fields(read_json(manifest, longest=_LONGEST_MANIFEST))
    fields.check_format(_FORMAT)
    if fields.text("key") != directory.name:
        raise ValueError("its manifest is of another template")
    template = Template(
        key=fields.text("key"),
        directory=directory,
        image=fields.text("image"),
        memory_mib=fields.number("memory_mib"),
        vcpus=fields.number("vcpus"),
        warmup=fields.text("warmup"),
        marker=fields.data("marker"),
        created=fields.time("created"),
        used=manifest.stat().st_mtime,
        size_bytes=disk_usage(directory),
    )
    files = fields.fields("files").values()
    identities = file_identities(directory / name for name in _FILES)
    changed: Sequence[str] = [name for name, identity in identities.items() if files.get(name) != identity]
    if changed:
        raise ValueError(f"changed since it was made: {', '.join(changed)}")
    return template


def new_template(key: str, *, image: str, memory_mib: int, vcpus: int, warmup: str) -> Template:
    """Describe a template that is to be made."""
    return Template(
        key=key,
        directory=Path(),
        image=image,
        memory_mib=memory_mib,
        vcpus=vcpus,
        warmup=warmup,
        marker=secrets.token_bytes(16),
        created=time.time(),
    )


def disk_usage(path: Path) -> int:
    """Return the bytes that a file or a directory takes on the disk; what somebody removes meanwhile takes none."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(disk_usage(child) for child in path.iterdir())
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0
