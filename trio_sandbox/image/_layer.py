"""Layers: what one step adds to an image, made by a virtual machine of that image whose disk is then frozen.

Nothing is done as root on the host. Whatever a step is, it is a shell script that runs as root in the guest, and directories
that it reads there; the machine's overlay becomes the layer.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol, final

import attrs
import trio

from .._errors import ImageBuildError
from .._image import EnvironmentStep, FilesStep, ScriptStep
from .._network import Network
from ._bytecode import TESTS, check_magic, compile_tree
from ._package_tree import arrange
from ._pylock import Lock
from ._recipe import BuildContext, digest_of
from ._stored import IMAGE_NAME, BuiltImage, SystemDisk
from ._target import Target
from ._uv import Report, unpack

#: Between the name of the image below and the layer's own digits.
LAYER_MARK: Final = "+"
_NAME_DIGITS: Final = 12
#: Where the guest finds the directories of a step: in memory, so that nothing of them stays.
_PLACE: Final = "/run/image-step"
_VARIABLES: Final = "/etc/environment"
#: Copies what is below one directory into another; what is there besides stays. Everything becomes root's.
_COPY: Final = "cp -RP --preserve=mode,timestamps,links"
#: What the guest does where the host could not. A file that can't be compiled is nothing unusual, and is status 1.
_COMPILE: Final = f"python3 -m compileall -q -j 0 -x '{TESTS}' {{site}} > /run/image-compile.log 2>&1 || [ $? = 1 ]"


@final
@attrs.frozen(kw_only=True)
class Work:
    """What a virtual machine does to make a layer."""

    script: str
    """Run by ``sh -e`` as root, in /."""
    trees: Mapping[str, Path] = attrs.field(factory=dict[str, Path])
    """Directories of the host's, by where the script finds copies of them."""
    network: Network = attrs.field(factory=Network.none)
    """What the script may reach."""
    details: Mapping[str, object] = attrs.field(factory=dict[str, object])
    """What the manifest is to say."""


@final
@attrs.frozen(kw_only=True)
class LayerJob:
    """What a virtual machine is opened for, to make a layer."""

    image: BuiltImage
    """What it stands on."""
    system: SystemDisk
    work: Work
    overlay: Path
    """The new file for what it writes to its disk: complete, and nobody's any more, when the job is done."""
    mounts: Path
    """The new file for the disk of `Work.trees`; of no use afterwards."""


RunLayer = Callable[[LayerJob, Report], Awaitable[None]]


class Content(Protocol):
    """What a step is once all is known that decides what it makes."""

    def key(self) -> object:
        """Return that as JSON values."""
        ...

    async def prepare(self, context: BuildContext) -> Work:
        """Return what is to be done; files of it are in `BuildContext.staging`."""
        ...


@final
@attrs.frozen(kw_only=True)
class PackagesContent:
    """Packages that were chosen."""

    lock: Lock
    """All of them."""
    missing: Lock
    """Those that are not there yet."""
    target: Target
    system: Path = attrs.field(eq=False)
    """The system disk, whose Python compiles them."""
    memo: str
    """The name of the stored lock; "" if the user has brought it."""

    def key(self) -> object:
        """Return what decides."""
        return ["packages", 2, _COPY, _COMPILE, self.missing.text, attrs.astuple(self.target)]

    async def prepare(self, context: BuildContext) -> Work:
        """Fetch and unpack them."""
        details = {"packages": {pin.name: pin.version for pin in self.lock.pins}, "pylock": self.memo}
        tree, downloads = context.staging / "tree", context.staging / "packages"
        tree.mkdir()
        await trio.lowlevel.checkpoint()
        if not self.missing.pins:
            return Work(script=":", details=details)
        downloads.mkdir()
        context.report(f"fetching {len(self.missing.pins)} packages", None)
        unpacked = downloads / "unpacked"
        await unpack(self.missing, self.target, downloads, unpacked, context.environment, context.report)
        await trio.to_thread.run_sync(arrange, unpacked, tree, self.target)
        context.report("compiling them", None)
        magic = await compile_tree(self.system, tree, self.target, downloads, context.environment)
        script = f"{_COPY} {_PLACE}/. /\n{check_magic(magic, _COMPILE.format(site=f'/{self.target.site}'))}\n"
        return Work(script=script, trees={_PLACE: tree}, details=details)


@final
@attrs.frozen(kw_only=True)
class FilesContent:
    """Files of the host's, as they were when they were looked at."""

    step: FilesStep
    digests: tuple[str, ...]
    """Of each place's content."""

    def key(self) -> object:
        """Return what decides."""
        return ["files", 1, _COPY, [[target, digest] for (target, _), digest in self._each()]]

    def _each(self) -> Iterator[tuple[tuple[str, Path], str]]:
        return zip(self.step.places, self.digests, strict=True)

    async def prepare(self, context: BuildContext) -> Work:
        """Take copies, and make sure that they are of what was looked at."""
        context.report("copying files", None)
        trees: dict[str, Path] = {}
        lines: list[str] = []
        for number, ((target, source), digest) in enumerate(self._each()):
            tree = context.staging / f"tree{number}"
            tree.mkdir()
            copy = tree / "content"
            await trio.to_thread.run_sync(_copy, source, copy)
            if await trio.to_thread.run_sync(digest_of_tree, copy) != digest:
                raise ImageBuildError(f"{source} changed while it was copied into the image; it is safe to try again")
            place = f"{_PLACE}/{number}"
            trees[place] = tree
            parent, name = os.path.split(target)
            # What is a directory on both sides is merged.
            lines.append(
                f"mkdir -p {shlex.quote(parent)}; {_COPY} -T {place}/content {shlex.quote(f'{parent}/{name}')}"
            )
        return Work(script="\n".join(lines), trees=trees)  # noqa: ASYNC910 - there is a file at least


@final
@attrs.frozen(kw_only=True)
class EnvironmentContent:
    """Variables of the environment."""

    step: EnvironmentStep

    def key(self) -> object:
        """Return what decides."""
        return ["environment", 1, self.step.variables]

    async def prepare(self, context: BuildContext) -> Work:
        """Say how they are written down; of two lines with one name the last one counts."""
        await trio.lowlevel.checkpoint()
        lines = [f"{name}={value}" for name, value in self.step.variables]
        return Work(
            script=f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} >> {_VARIABLES}; chmod 644 {_VARIABLES}"
        )


@final
@attrs.frozen(kw_only=True)
class ScriptContent:
    """A script of the user's."""

    step: ScriptStep

    def key(self) -> object:
        """Return what decides."""
        network = self.step.network
        return ["script", 1, self.step.command, [repr(rule) for rule in network.rules], network.open_ports]

    async def prepare(self, context: BuildContext) -> Work:
        """Say it."""
        await trio.lowlevel.checkpoint()
        return Work(script=self.step.command, network=self.step.network)


@final
@attrs.frozen(kw_only=True)
class LayerRecipe:
    """How to make a layer: a recipe for the store."""

    image: BuiltImage
    """What it stands on."""
    system: SystemDisk = attrs.field(eq=False)
    content: Content
    step: str
    """In words."""
    run: RunLayer = attrs.field(eq=False)

    @property
    def name(self) -> str:
        """What it can be called: each layer has a name, and a lock, of its own."""
        return layer_name(self.image.name, self.digest())

    @property
    def files(self) -> tuple[str, ...]:
        """The one disk."""
        return (IMAGE_NAME,)

    @property
    def base(self) -> None:
        """Nothing: what it stands on is there already."""
        return

    @property
    def languages(self) -> tuple[str, ...]:
        """Those of the image below."""
        return self.image.languages

    def digest(self) -> str:
        """Return a digest of the step and of the very disk that it stands on."""
        return digest_of("layer", self.image.content, self.content.key())

    async def build(self, context: BuildContext) -> Mapping[str, object]:
        """Make the layer."""
        work = await self.content.prepare(context)
        overlay = context.output / IMAGE_NAME
        job = LayerJob(
            image=self.image, system=self.system, work=work, overlay=overlay, mounts=context.staging / "mounts"
        )
        await self.run(job, context.report)
        return {
            **work.details,
            "step": self.step,
            "below": {"name": self.image.name, "content": self.image.content},
            "virtual_size": self.image.virtual_size,
        }


def layer_name(image: str, digest: str) -> str:
    """Return the name of the layer with that digest, on an image or on another layer."""
    return f"{image.partition(LAYER_MARK)[0]}{LAYER_MARK}{digest[:_NAME_DIGITS]}"


def digest_of_tree(source: Path) -> str:
    """Return a digest of a file, or of all that is in a directory: names, permission bits, contents. Blocks: call it in a thread.

    Raises:
      ImageBuildError: if it can't be read, or has something else in it than files, directories and symbolic links.

    """
    whole = hashlib.sha256()
    try:
        for path in _walk(source):
            status = path.lstat()
            relative = os.fsencode(path.relative_to(source))
            if stat.S_ISLNK(status.st_mode) and path != source:
                kind, content = b"link", os.fsencode(path.readlink())
            elif path.is_dir():
                kind, content = b"directory", b""
            elif path.is_file():
                status = path.stat()
                with path.open("rb", buffering=0) as file:
                    kind, content = b"file", hashlib.file_digest(file, "sha256").digest()
            else:
                raise ImageBuildError(
                    f"{path} is neither a file, a directory nor a symbolic link: it can't be in an image"
                )
            mode = 0 if kind == b"link" else stat.S_IMODE(status.st_mode) & 0o777
            for part in (relative, kind, b"%o" % mode, content):
                whole.update(b"%d:%b" % (len(part), part))
    except OSError as exc:
        raise ImageBuildError(f"{exc.filename or source} can't be read for an image: {exc.strerror}") from exc
    return whole.hexdigest()


def _walk(source: Path) -> Iterator[Path]:
    yield source
    if source.is_dir():
        directories = [source]
        while directories:
            for path in sorted(directories.pop().iterdir()):
                yield path
                if path.is_dir() and not path.is_symlink():
                    directories.append(path)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)
