"""What steps of an image are once all is known that decides what they make, and what a virtual machine does for each."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from .._errors import ImageBuildError
from .._image_steps import AptStep, EnvironmentStep, FilesStep, ScriptStep
from .._network import Network
from ._bytecode import TESTS, check_magic, compile_tree
from ._interpreters import ImageNode, in_guest_program
from ._layer import PLACE, Work
from ._npm import fetch_npm
from ._npm_lock import NpmLock
from ._npm_tree import NODE_MODULES, unpack_npm
from ._package_archive import pack
from ._package_tree import arrange
from ._pylock import Lock
from ._recipe import BuildContext
from ._target import Target
from ._uv import unpack

#: What was fetched, in a build's directory.
_DOWNLOADS: Final = "packages"
_VARIABLES: Final = "/etc/environment"
_ROOT: Final = (0, 0)
#: Copies what is below one directory into another; what is there besides stays. Everything becomes root's.
_COPY: Final = "cp -RP --preserve=mode,timestamps,links"
#: Unpacks what `_pack` made, all at the same time; everything becomes root's. It fails if one of them does.
_UNPACK: Final = (
    f"processes=; for archive in {PLACE}/*.tar; do\n"
    '  tar -C / -x -p --same-owner -b 2048 -f "$archive" & processes="$processes $!"\n'
    'done; for process in $processes; do wait "$process"; done'
)
#: As many as a machine that makes a layer has processors, at most.
_ARCHIVES: Final = 2
#: What the guest does where the host could not. A file that can't be compiled is nothing unusual, and is status 1.
_COMPILE: Final = f"python3 -m compileall -q -j 0 -x '{TESTS}' {{site}} > /run/image-compile.log 2>&1 || [ $? = 1 ]"
#: What apt is told: to fail where anything failed, to wait for no answer, to write without waiting for the disk, which is sealed in the end.
_APT: Final = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o APT::Update::Error-Mode=any -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::EnableSrvRecords=false "
    "-o Acquire::Retries=2 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-unsafe-io"
)
_APT_NEEDED: Final = (
    "command -v apt-get > /dev/null || { echo 'the image has no apt-get, which .apt() needs: take an image of Debian, or have "
    ".script() call its own package manager' >&2; exit 127; }\n"
)
_APT_UPDATE: Final = f"{_APT} update\n"
#: Services are not started: see invoke-rc.d(8). The lists of packages would be of no use to anybody later.
_APT_INSTALL: Final = (
    "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d\n"
    f"{_APT} install --no-install-recommends {{names}} < /dev/null\n"
    "rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/cache/apt/*\n"
)


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
    answer: str = attrs.field(default="", eq=False)
    """The name of what the Python of a container image said; "" for one of ours."""
    languages: tuple[str, ...] = attrs.field(default=(), eq=False)
    """What runs can be in by that, perhaps since an earlier step."""

    def key(self) -> object:
        """Return what decides."""
        way = self._work().program or (_UNPACK, _COMPILE)
        return ["packages", 1, *way, self.missing.text, attrs.astuple(self.target)]

    def _work(self) -> Work:
        """Say what the machine does; a container image may have nothing but its Python for it."""
        site, magic = f"/{self.target.site}", f"{PLACE}/magic"
        if self.target.container:
            arguments = f"{PLACE}/content", site, magic, TESTS
            return Work(program=in_guest_program(self.target.interpreter, "python_place.py", *arguments))
        return Work(script=f"{_UNPACK}\n{check_magic(magic, _COMPILE.format(site=site))}\n")

    async def prepare(self, context: BuildContext) -> Work:
        """Say what is fetched and unpacked while the machine boots."""
        packages = {pin.name: pin.version for pin in self.lock.pins}
        details = {"packages": packages, "pylock": self.memo, "python": self.answer, "languages": list(self.languages)}
        tree = context.staging / "tree"
        tree.mkdir()
        await trio.lowlevel.checkpoint()
        if not self.missing.pins:
            # A layer all the same, which does nothing.
            nothing = Work(program=(self.target.interpreter, "-V")) if self.target.container else Work(script=":")
            return attrs.evolve(nothing, details=details)
        fill = partial(self._fill, context, tree)
        return attrs.evolve(
            self._work(), tree=tree, fill=fill, spent=(tree, context.staging / _DOWNLOADS), details=details
        )

    async def _fill(self, context: BuildContext, tree: Path) -> None:
        """Fetch, unpack and compile them, and put into *tree* what the machine takes, and by which Python they were compiled."""
        downloads = context.staging / _DOWNLOADS
        downloads.mkdir()
        content = (tree if self.target.container else downloads) / "content"
        content.mkdir()
        context.report(f"fetching {len(self.missing.pins)} packages", None)
        unpacked = downloads / "unpacked"
        await unpack(self.missing, self.target, downloads, unpacked, context.environment, context.report)
        await trio.to_thread.run_sync(arrange, unpacked, content, self.target)
        context.report("compiling them", None)
        magic = await compile_tree(self.system, content, self.target, downloads, context.environment)
        (tree / "magic").write_text(magic, "ascii")
        if not self.target.container:
            context.report("packing them", None)
            await _pack(content, content / self.target.site, tree)


@final
@attrs.frozen(kw_only=True)
class NpmContent:
    """Packages of Node.js that were chosen."""

    lock: NpmLock
    """All of them."""
    earlier: NpmLock | None
    """Those that are there already."""
    memo: str
    """The name of the stored lock."""
    node: ImageNode | None = attrs.field(default=None, eq=False)
    """The Node.js of a container image; None for one of ours."""
    answer: str = attrs.field(default="", eq=False)
    """The name of what that said."""

    def key(self) -> object:
        """Return what decides."""
        missing, cleared = self.lock.change(self.earlier)
        way = self._work(cleared).program or (_UNPACK,)
        return ["npm", 1, *way, [attrs.astuple(package) for package in missing], cleared, self.lock.wanted]

    def _work(self, cleared: Iterable[str]) -> Work:
        """Say what the machine does; a container image may have nothing but its Node.js for it."""
        places = [f"/{place}" for place in cleared]
        if self.node is not None:
            return Work(program=in_guest_program(self.node.interpreter, "node_place.js", PLACE, *places))
        removal = f"rm -rf {' '.join(map(shlex.quote, places))}\n" if places else ""
        return Work(script=f"{removal}{_UNPACK}\n")

    async def prepare(self, context: BuildContext) -> Work:
        """Say what is fetched and unpacked while the machine boots."""
        missing, cleared = self.lock.change(self.earlier)
        details = {"npm_lock": self.memo, "node": self.answer, "languages": ["javascript"] if self.node else []}
        tree = context.staging / "tree"
        tree.mkdir()
        await trio.lowlevel.checkpoint()
        if not missing:
            # A layer all the same, which does nothing.
            nothing = Work(script=":") if self.node is None else Work(program=(self.node.interpreter, "-v"))
            return attrs.evolve(nothing, details=details)
        fill = partial(self._fill, context, tree)
        return attrs.evolve(
            self._work(cleared),
            tree=tree,
            fill=fill,
            spent=(tree, context.staging / _DOWNLOADS),
            details=details,
        )

    async def _fill(self, context: BuildContext, tree: Path) -> None:
        missing, _ = self.lock.change(self.earlier)
        downloads = context.staging / _DOWNLOADS
        downloads.mkdir()
        context.report(f"fetching {len(missing)} packages", None)
        archives = await fetch_npm(missing, downloads, context.environment)
        context.report("unpacking them", None)
        content = tree if self.node is not None else downloads / "content"
        await trio.to_thread.run_sync(unpack_npm, missing, archives, self.lock.wanted, content)
        if self.node is None:
            context.report("packing them", None)
            await _pack(content, content / NODE_MODULES, tree)


@final
@attrs.frozen(kw_only=True)
class AptContent:
    """Debian packages by name; which versions they are apt finds out in the machine."""

    step: AptStep

    def key(self) -> object:
        """Return what decides."""
        return ["apt", 1, self._script(), _network_key(self.step.network)]

    def _script(self) -> str:
        network = self.step.network
        names = " ".join(map(shlex.quote, self.step.names))
        return (_APT_UPDATE if network else "") + _APT_INSTALL.format(names=names)

    async def prepare(self, context: BuildContext) -> Work:
        """Say how apt is told."""
        await trio.lowlevel.checkpoint()
        return Work(script=_APT_NEEDED + self._script(), network=self.step.network)


@final
@attrs.frozen(kw_only=True)
class FilesContent:
    """Files of the host's, as they were when they were looked at."""

    step: FilesStep
    digests: tuple[str, ...]
    """Of each place's content."""

    def key(self) -> object:
        """Return what decides."""
        return ["files", 2, [[target, digest] for (target, _), digest in self._each()]]

    def _each(self) -> Iterator[tuple[tuple[str, Path], str]]:
        return zip(self.step.places, self.digests, strict=True)

    async def prepare(self, context: BuildContext) -> Work:
        """Take copies, and make sure that they are of what was looked at."""
        context.report("copying files", None)
        tree = context.staging / "tree"
        tree.mkdir()
        requests: list[tuple[str, ...]] = []
        for number, ((target, source), digest) in enumerate(self._each()):
            copy = tree / f"{number}"
            await trio.to_thread.run_sync(_copy, source, copy)
            if await trio.to_thread.run_sync(digest_of_tree, copy) != digest:
                raise ImageBuildError(f"{source} changed while it was copied into the image; it is safe to try again")
            requests.append(("merge", f"{PLACE}/{number}", target))
        return Work(file_requests=tuple(requests), tree=tree)  # noqa: ASYNC910 - there is a file at least


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
        lines = "".join(f"{name}={value}\n" for name, value in self.step.variables)
        return Work(file_requests=(("append", _VARIABLES, lines),))


@final
@attrs.frozen(kw_only=True)
class ScriptContent:
    """A script of the user's."""

    step: ScriptStep

    def key(self) -> object:
        """Return what decides."""
        return ["script", 1, self.step.command, *_network_key(self.step.network)]

    async def prepare(self, context: BuildContext) -> Work:
        """Say it."""
        await trio.lowlevel.checkpoint()
        return Work(script=self.step.command, network=self.step.network)


async def _pack(content: Path, inside: Path, tree: Path) -> None:
    """Make archives in *tree* of *content*, which is to be / in the guest, and where all is ours that is in the directory *inside*."""
    archives = [tree / f"{number}.tar" for number in range(_ARCHIVES)]
    await trio.to_thread.run_sync(pack, content, inside, archives, _ROOT)


def _network_key(network: Network) -> list[object]:
    return [[repr(rule) for rule in network.rules], network.open_ports]


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
    """Copy what `digest_of_tree` reads; the first thing that goes wrong is the error.

    Raises:
      ImageBuildError: if *target* is in *source*: the copy would have no end.

    """
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ImageBuildError(
            f"{source} has the cache directory in it, where images are made: have another directory copied into the image, or use "
            "another cache directory (HostConfig.cache_dir, --cache-dir, XDG_CACHE_HOME)"
        )
    directories: list[tuple[Path, Path]] = []
    for path in _walk(source):
        copy = target / path.relative_to(source)
        if path.is_symlink() and path != source:
            copy.symlink_to(path.readlink())
        elif path.is_dir():
            copy.mkdir()
            directories.append((path, copy))
        else:
            shutil.copy2(path, copy)
    for path, copy in reversed(directories):  # those that may not be written to, too
        shutil.copystat(path, copy)
