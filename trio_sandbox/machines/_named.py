"""The store of named templates: sandboxes that a user has saved, to restore others from.

They are the user's data: nothing removes them but the user, and nothing can make them again. One is a manifest,
``NAME.json``, and the directory that it tells of, ``NAME~TOKEN``. The manifest comes last and takes its place at
once, so that a name means a whole template, the old one or the new one, whenever this process is killed. The
directory is locked while it is being made: one with our mark that is not, and that no manifest tells of, is a leftover.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, final

import attrs

from .._errors import TemplateError, TemplateExistsError, TemplateUnusableError, UnknownTemplateError
from .._private import check_trusted, make_private_directory, write_new_file
from .._stored_json import Fields, OtherVersionError, read_json
from ..image import try_lock_directory
from ..qemu import copy_memory, is_marked, link_file, make_marked, remove_marked
from ._templates import disk_usage, file_identities, sync_files

#: Changes with whatever the files mean.
_FORMAT: Final = 1
_MEMORY, _DEVICES, _MOUNTS = "memory", "devices", "mounts"
_MANIFEST_SUFFIX: Final = ".json"
#: Not in any name, so that whose a directory is can be told.
_SEPARATOR: Final = "~"
#: How often what others remove under our hands is tried again.
_ATTEMPTS: Final = 3
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
#: What follows the separator in a directory's name.
_TOKEN: Final = re.compile("[0-9a-f]{16}")


@final
@attrs.frozen(kw_only=True)
class NamedTemplate:
    """A sandbox that was saved under a name, or is being saved."""

    name: str
    directory: Path
    image: str
    """The name of the image."""
    image_digest: str
    """Of the recipe that the image was built by."""
    memory_mib: int
    vcpus: int
    guest_namespaces: bool = False
    """What `SandboxConfig.guest_namespaces` was."""
    machine: str
    """The digest of everything else that must be the same for the state to load."""
    qemu: str
    """What ran it, in words."""
    marker: bytes = attrs.field(repr=False)
    """What wakes up the agent of a machine restored from here."""
    with_memory: bool
    """The RAM is in `devices`, too."""
    balloon: bool
    """It has a memory balloon."""
    mounted: bool
    """It has a disk of `SandboxConfig.mounts`."""
    mounts_bytes: int = 0
    """How much of that is in use."""
    layer_count: int
    created: float = attrs.field(factory=time.time)
    """When it was saved, in Unix seconds."""
    size_bytes: int = 0
    """What it takes on the host's disk; what it shares with other templates counts in full."""

    @property
    def memory(self) -> Path | None:
        """The RAM's file, if it has one."""
        return None if self.with_memory else self.directory / _MEMORY

    @property
    def devices(self) -> Path:
        """The devices' state."""
        return self.directory / _DEVICES

    @property
    def layers(self) -> tuple[Path, ...]:
        """What was written to the disk, over the image, the lowest first."""
        return tuple(self.directory / f"layer{number}.qcow2" for number in range(self.layer_count))

    @property
    def mounts(self) -> Path | None:
        """The disk of mounts, if it has one."""
        return self.directory / _MOUNTS if self.mounted else None

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it consists of."""
        return (self.devices, *self.layers, *(path for path in (self.memory, self.mounts) if path is not None))


@final
class StagedTemplate:
    """A template that is being made. Made by `NamedTemplateStore.make`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where its files belong."""
        self.template: NamedTemplate | None = None
        """What it is; for the block to say."""

    def fill(self, template: NamedTemplate) -> None:
        """Make it *template*, with links to, or copies of, its files, and bring them to the disk. Takes a while."""
        for path in template.files:
            target = self.directory / path.name
            if path != template.memory:
                link_file(path, target)
                continue
            try:
                os.link(path, target)
            except OSError:  # another file system: most of it is holes
                copy_memory(path, target)
        self.template = attrs.evolve(template, directory=self.directory)
        sync_files(self.template.files)


def check_template_name(name: object) -> None:
    """Refuse what can't be a template's name.

    Raises:
      TypeError, ValueError: which says what can.

    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a saved sandbox must be str, not {type(name).__name__}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            "the name of a saved sandbox must be 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_' and '-', "
            f"the first a letter or digit, not {name!r:.100}"
        )


@final
class NamedTemplateStore:
    """A directory of saved sandboxes, which any number of processes may share. Making the object touches nothing.

    Args:
      cache_dir: Where it is, or will be: in ``saved`` there.

    """

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir.absolute() / "saved"

    def __repr__(self) -> str:
        return f"<trio_sandbox NamedTemplateStore in {str(self._directory)!r}>"

    def names(self) -> list[str]:
        """Return the names of all templates, damaged ones included, in alphabetical order."""
        found = [path.name.removesuffix(_MANIFEST_SUFFIX) for path in self._directory.glob(f"*{_MANIFEST_SUFFIX}")]
        return sorted(name for name in found if _NAME.fullmatch(name))

    def images_below(self) -> dict[str, tuple[str, str]]:
        """Return the name and the digest of the image that each template stands on, by its name; those of other versions included.

        One that is damaged so badly that it does not say stands on nothing any more.
        """
        found: dict[str, tuple[str, str]] = {}
        for name in self.names():
            with suppress(OSError, ValueError):
                fields = Fields(read_json(self._manifest(name)))
                found[name] = fields.text("image"), fields.text("image_digest")
        return found

    def find(self, name: str) -> NamedTemplate:
        """Return the template of that name.

        Raises:
          TypeError, ValueError: for what can't be a name.
          UnknownTemplateError: if there is none.
          TemplateUnusableError: if it is damaged, or another version of the library saved it.

        """
        check_template_name(name)
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return self._read(name)
            except FileNotFoundError as exc:
                if not self._manifest(name).exists():
                    raise self._unknown(name) from None
                reason = f"{exc.filename} is missing"  # unless it was replaced while we looked
            except OtherVersionError as exc:
                raise TemplateUnusableError(
                    f"the saved sandbox {name!r} was saved by another version of trio-sandbox: {exc}. Use it with that version, or "
                    f"remove it with `trio-sandbox template rm {name}` and save such a sandbox anew"
                ) from exc
            except (OSError, ValueError) as exc:
                reason = str(exc).removeprefix("it is damaged: ")
                break
        raise TemplateUnusableError(
            f"the saved sandbox {name!r} is damaged: {reason}. It can't be made again; "
            f"`trio-sandbox template rm {name}` removes it"
        )

    @contextmanager
    def make(self, name: str, *, memory_mib: int, replace: bool = False) -> Generator[StagedTemplate]:
        """Yield a template for the block to fill; after the block it is in the store.

        An error or a cancellation in the block leaves nothing.

        Args:
          name: What to call it.
          memory_mib: Its RAM.
          replace: Whether a template of that name may be there, whose place it takes then.

        Raises:
          TypeError, ValueError: for what can't be a name.
          TemplateExistsError: if one is there that may not be replaced, before the block or after it.
          TemplateError: if the directory can't be written, or others may write to it; before the block.
          OSError: if there is no room for it.

        """
        check_template_name(name)
        self._check_free(name, replace=replace)
        self._make_directory()
        self._remove_leftovers(name)
        self._require_room(memory_mib)
        with self._new_directory(name) as directory:
            staged = StagedTemplate(directory)
            yield staged
            assert staged.template is not None
            self._publish(staged.template, replace=replace)
        self._remove_leftovers(name)  # the one that was replaced

    def _make_directory(self) -> None:
        try:
            # The RAM's file can be written to by whoever gets at it, QEMU's user being another.
            make_private_directory(self._directory)
            check_trusted(self._directory)
            # It tells of a file system that is mounted read-only, too.
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(self._directory))
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise TemplateError(
                f"nothing can be saved in the cache directory {self._directory.parent} ({exc.strerror}: {exc.filename}); "
                "choose another with HostConfig.cache_dir, --cache-dir or XDG_CACHE_HOME. The sandbox lives on"
            ) from exc

    @contextmanager
    def _new_directory(self, name: str) -> Generator[Path]:
        """Make a directory, locked for the block; an error in the block removes it."""
        with ExitStack() as stack:
            while True:
                directory = self._directory / f"{name}{_SEPARATOR}{secrets.token_hex(8)}"
                make_marked(directory)
                with suppress(FileNotFoundError):
                    # Before it is locked, another process may take it for a leftover.
                    if stack.enter_context(try_lock_directory(directory)) and directory.exists():
                        break
            try:
                yield directory
            except BaseException:
                with suppress(OSError):  # what is left is a leftover for the next one
                    remove_marked(directory)
                raise

    def _check_free(self, name: str, *, replace: bool) -> None:
        if not replace and self._manifest(name).exists():
            raise TemplateExistsError(
                f"there is a saved sandbox {name!r} already; choose another name, say replace=True, "
                f"or remove it with `trio-sandbox template rm {name}`"
            )

    def _require_room(self, memory_mib: int) -> None:
        status = os.statvfs(self._directory)
        room = status.f_bavail * status.f_frsize // 2**20
        if room < memory_mib:
            raise OSError(
                errno.ENOSPC, f"no room for {memory_mib} MiB of RAM, but for {room} MiB", str(self._directory)
            )

    def _publish(self, template: NamedTemplate, *, replace: bool) -> None:
        temporary = template.directory / "manifest"
        write_new_file(temporary, _to_json(template))
        sync_files([template.directory])
        if replace:
            os.rename(temporary, self._manifest(template.name))
        else:
            try:
                os.link(temporary, self._manifest(template.name))
            except FileExistsError:
                self._check_free(template.name, replace=False)
                raise
            temporary.unlink()
        sync_files([self._directory])

    def remove(self, name: str) -> int:
        """Remove a template; return the bytes that came free. Machines restored from it are not disturbed.

        Raises:
          UnknownTemplateError: if there is none of that name.
          OSError: if it can't be removed.

        """
        check_template_name(name)
        try:
            self._manifest(name).unlink()
        except FileNotFoundError:
            raise self._unknown(name) from None
        return self._remove_leftovers(name)

    def prune(self) -> int:
        """Remove what was left by killed processes; return the bytes that came free."""
        return sum(
            map(self._remove_leftovers, sorted({path.name.partition(_SEPARATOR)[0] for path in self._directories()}))
        )

    def _remove_leftovers(self, name: str) -> int:
        freed = 0
        for directory in self._directories(name):
            with suppress(OSError), try_lock_directory(directory) as locked:  # somebody else may be faster
                # Looked at only now: it may have been finished before we had the lock.
                if locked and not self._is_used(name, directory):
                    size = disk_usage(directory)
                    remove_marked(directory)
                    freed += size
        return freed

    def _is_used(self, name: str, directory: Path) -> bool:
        try:
            used = Fields(read_json(self._manifest(name))).text("directory")
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            used = ""
        # Where nobody can tell it stays until its user removes it.
        return used == directory.name or used.partition(_SEPARATOR)[0] != name

    def _directories(self, wanted: str | None = None) -> Sequence[Path]:
        """Return the directories of ours for the template *wanted*, or for all. What else is there is somebody's own."""
        found: list[Path] = []
        for path in self._directory.glob(f"*{_SEPARATOR}*"):
            name, _, token = path.name.partition(_SEPARATOR)
            if wanted in (None, name) and _NAME.fullmatch(name) and _TOKEN.fullmatch(token) and is_marked(path):
                found.append(path)
        return found

    def _manifest(self, name: str) -> Path:
        return self._directory / f"{name}{_MANIFEST_SUFFIX}"

    def _unknown(self, name: str) -> UnknownTemplateError:
        known = ", ".join(self.names()) or "none"
        return UnknownTemplateError(f"there is no saved sandbox {name!r}; there are: {known}")

    def _read(self, name: str) -> NamedTemplate:
        """Read and check a template.

        Raises:
          ValueError: if the manifest or a file is not what was written.
          OSError: if something can't be read.

        """
        check_trusted(self._directory, self._manifest(name))
        fields = Fields(read_json(self._manifest(name)))
        fields.check_format(_FORMAT)
        own_name, _, token = fields.text("directory").partition(_SEPARATOR)
        if (fields.text("name"), own_name) != (name, name) or not _TOKEN.fullmatch(token):
            raise ValueError("its manifest is of another template")
        directory = self._directory / fields.text("directory")
        check_trusted(directory)
        files = fields.fields("files").values()
        template = NamedTemplate(
            name=name,
            directory=directory,
            image=fields.text("image"),
            image_digest=fields.text("image_digest"),
            memory_mib=fields.number("memory_mib"),
            vcpus=fields.number("vcpus"),
            # Earlier versions had none.
            guest_namespaces="guest_namespaces" in fields.names() and fields.flag("guest_namespaces"),
            machine=fields.text("machine"),
            qemu=fields.text("qemu"),
            marker=fields.data("marker"),
            with_memory=fields.flag("with_memory"),
            balloon=fields.flag("balloon"),
            mounted=fields.flag("mounted"),
            # Earlier versions did not say; nothing is restored from what they saved.
            mounts_bytes=fields.number("mounts_bytes") if "mounts_bytes" in fields.names() else 0,
            # More than there are files of it could be as many as memory holds.
            layer_count=min(fields.number("layer_count"), len(files) + 1),
            created=fields.time("created"),
            size_bytes=disk_usage(directory),
        )
        changed = [name for name, identity in file_identities(template.files).items() if files.get(name) != identity]
        if changed:
            raise ValueError(f"changed since it was saved: {', '.join(changed)}")
        return template


def _to_json(template: NamedTemplate) -> str:
    value = {
        "format": _FORMAT,
        "name": template.name,
        "directory": template.directory.name,
        "image": template.image,
        "image_digest": template.image_digest,
        "memory_mib": template.memory_mib,
        "vcpus": template.vcpus,
        "guest_namespaces": template.guest_namespaces,
        "machine": template.machine,
        "qemu": template.qemu,
        "marker": template.marker.hex(),
        "with_memory": template.with_memory,
        "balloon": template.balloon,
        "mounted": template.mounted,
        "mounts_bytes": template.mounts_bytes,
        "layer_count": template.layer_count,
        "created": template.created,
        "files": file_identities(template.files),
    }
    return json.dumps(value, indent=2) + "\n"
