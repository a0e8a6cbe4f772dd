"""What the store hands out: images and system disks that are there, and where the store is."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import attrs

from .._errors import SandboxError
from .._stored_json import Fields
from ._manifest import Manifest

#: What the disk of an image, or of a layer, is called in its directory.
IMAGE_NAME: Final = "image.qcow2"
#: Of those that take code in runs.
OLDEST_PYTHON: Final = (3, 11)
#: Of a user or a group.
HIGHEST_ID: Final = 2**32 - 2
#: The kernel's command line says where programs start, and has room for so many bytes.
LONGEST_DIRECTORY: Final = 500
#: Bytes of a command, as the kernel counts them: each word with its end and the pointer to it.
_MOST_COMMAND_BYTES: Final = 64 * 2**10
_WORD_COST: Final = 1 + 8
#: Bytes of labels, and what each of them takes besides. They are of no use but to be shown, and some images have whole pages in them.
_MOST_LABEL_BYTES: Final = 64 * 2**10
_LABEL_COST: Final = 16


@attrs.frozen(kw_only=True)
class ImageSettings:
    """How programs are started in a container image, unless somebody says otherwise."""

    user: int
    """Number of the user."""
    group: int
    """Number of the group."""
    directory: str
    """Where they start, absolute."""
    command: tuple[str, ...] = ()
    """The image's own program and its arguments; empty if it has none."""
    labels: Mapping[str, str] = attrs.field(factory=dict[str, str], repr=False)
    """What its maker has written about it."""

    def to_value(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {**attrs.asdict(self), "command": list(self.command), "labels": dict(self.labels)}

    @classmethod
    def from_value(cls, value: object) -> ImageSettings:
        """Read what `to_value` returned, or what a stranger has put in its place.

        Raises:
          ValueError: if it is none of ours.

        """
        fields = Fields(value)
        labels = fields.fields("labels")
        command = fields.values().get("command")
        if not isinstance(command, list) or not all(isinstance(each, str) for each in cast("list[object]", command)):
            raise ValueError(f"it is damaged: 'command' is {command!r:.80}")
        settings = cls(
            user=fields.number("user"),
            group=fields.number("group"),
            directory=fields.text("directory"),
            command=tuple(cast("list[str]", command)),
            labels={name: labels.text(name) for name in labels.names()},
        )
        directory = settings.directory
        if max(settings.user, settings.group) > HIGHEST_ID:
            raise ValueError("it is damaged: its user or group is no number of one")
        if not directory.startswith("/") or "\0" in directory or len(directory.encode()) > LONGEST_DIRECTORY:
            raise ValueError(f"it is damaged: programs can't start in {directory!r:.80}")
        check_command(settings.command)
        if settings.labels != bounded_labels(settings.labels):
            raise ValueError("it is damaged: its labels are longer than any of ours")
        return settings


def check_command(command: Sequence[str]) -> None:
    """Refuse a command that is longer than a program is started with, or that none can be.

    Raises:
      ValueError: which says so.

    """
    size = sum(len(word.encode()) + _WORD_COST for word in command)
    if size > _MOST_COMMAND_BYTES or any("\0" in word for word in command):
        raise ValueError("its command is longer than any program takes, or has a zero byte")


def bounded_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """Return the labels there is room for, the first ones."""
    kept: dict[str, str] = {}
    room = _MOST_LABEL_BYTES
    for name, text in labels.items():
        room -= len(name.encode()) + len(text.encode()) + _LABEL_COST
        if room >= 0:
            kept[name] = text
    return kept


@attrs.frozen(kw_only=True)
class BuiltImage:
    """An image of the store: what a sandbox's own disk stands on."""

    name: str
    digest: str
    """Digest of the recipe that it was built by."""
    path: Path
    """The qcow2 file at the bottom, absolute. It must not be written to."""
    size_bytes: int
    """What it takes on the host's disk."""
    virtual_size: int
    """What programs inside see as the size of the disk, in bytes."""
    manifest: Manifest
    """Of what is on top."""
    languages: tuple[str, ...] = ("python",)
    """Languages that it has an interpreter of, the main one first; a container image may have none."""
    settings: ImageSettings | None = None
    """How programs are started in it; None: as our own images have it."""
    layers: tuple[Path, ...] = ()
    """Qcow2 files on top of `path`, the lowest first, absolute. They must not be written to either."""

    system_packages: Mapping[str, object] = attrs.field(factory=dict[str, object], repr=False)
    """Versions of the Debian packages of the image at the bottom, by name."""
    packages: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Versions of the Python packages that layers have added, by name."""
    npm_lock: str = ""
    """The name of the stored lock of the npm packages that layers have added; "" if there are none."""

    @property
    def top(self) -> Path:
        """The file on top."""
        return (self.path, *self.layers)[-1]

    @property
    def entries(self) -> tuple[Path, ...]:
        """The directories of the store that it consists of, the lowest first."""
        return tuple(file.parent for file in (self.path, *self.layers))

    @property
    def language(self) -> str:
        """The language that it is for; "" if it has none."""
        return self.languages[0] if self.languages else ""

    @property
    def command(self) -> tuple[str, ...]:
        """Its own program and the arguments of that; only a container image has one."""
        return () if self.settings is None else self.settings.command

    @property
    def content(self) -> str:
        """The digest of the disk on top. What stands on it stands on no other, whatever recipe that was built by."""
        return self.manifest.files[IMAGE_NAME].sha256


@attrs.frozen(kw_only=True)
class SystemDisk:
    """What every VM boots from."""

    digest: str
    """Digest of the recipe, the agent's sources included."""
    kernel: Path
    initrd: Path
    disk: Path
    """A raw disk, to be attached read-only, before the image's."""
    kernel_args: tuple[str, ...]
    """The kernel's command line."""


def are_there(image: BuiltImage, system: SystemDisk) -> bool:
    """Tell whether the files are still where they were found: somebody may have removed the image since, or all of the cache."""
    return all(path.exists() for path in (image.path, *image.layers, system.kernel, system.initrd, system.disk))


@attrs.frozen(kw_only=True)
class StoredImage:
    """One thing that the store holds."""

    name: str
    digest: str
    path: Path
    """Its directory."""
    created: float
    """When it was built, in Unix seconds."""
    size_bytes: int
    """What it takes on the host's disk."""
    current: bool
    """Whether this version of the library would use it."""
    used: float = 0.0
    """When it was last used, in Unix seconds."""
    below: str = ""
    """The name of what it is a layer on; "" for what stands by itself."""
    step: str = ""
    """What a layer adds, in words."""
    details: Mapping[str, object] = attrs.field(factory=dict[str, object], repr=False)
    """What its builder has to say about it."""


def default_cache_directory() -> Path:
    """Return the directory of images unless one was configured: ``trio-sandbox`` in the user's cache (XDG).

    Raises:
      SandboxError: if neither the environment nor the password database says where that is.

    """
    # The XDG specification has relative paths ignored.
    for name, below in (("XDG_CACHE_HOME", ""), ("HOME", ".cache")):
        if os.path.isabs(base := os.environ.get(name, "")):
            return Path(base, below, "trio-sandbox")
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise SandboxError(
            "there is no cache directory: neither XDG_CACHE_HOME nor HOME is set to an absolute path, and the password "
            f"database has no user {os.getuid()}. Set one of them, HostConfig.cache_dir or --cache-dir"
        ) from None
    return Path(home, ".cache", "trio-sandbox")
