"""The disk of a sandbox's mounts: the host's directories, copied into one file system each.

`mke2fs` copies them, unprivileged, and `debugfs` changes what it can't: whose the files are. Both belong to e2fsprogs.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, final

import attrs
import trio
import trio.from_thread

from .._errors import MountError
from .._nurseries import hide_nursery
from ..constants import MOUNTS_DISK_BYTES
from ..guest.trees import extents, is_sparse
from ..qemu import InheritedFds, copy_data, describe_exit, minimal_environment, run_owned

_BLOCK: Final = 4096
#: File systems start at multiples of this; what kernels and disks like is less.
_ALIGNMENT: Final = 2**20
_BLOCKS_PER_INODE_TABLE_BLOCK: Final = _BLOCK // 256
#: Numbers below this are ext4's own, but for the root directory's.
_FIRST_INODE, _ROOT_INODE = 12, 2
#: A directory that mke2fs makes in each file system, for fsck, and its inode. What the source has of that name comes into it.
_LOST_FOUND, _LOST_FOUND_INODE = "lost+found", 11
#: Parts of a file that one block of its tree of extents has room for.
_EXTENTS_PER_BLOCK: Final = 340
#: Bytes of a path in the file system, its slash included, at which mke2fs 1.47.0 writes one byte too many, and is killed for that.
_DEADLY_PATH: Final = 2040
_SPARE_INODES: Final = 32
#: Where a file system's superblock is, which begins with the number of its inodes.
_SUPERBLOCK: Final = 1024
#: The user that code in the guest runs as, and his group.
_OWNER: Final = (1000, 1000)
#: Nothing that a kernel reads only needs a journal or checksums; the rest is said for the host's mke2fs.conf not to matter.
_FEATURES: Final = (
    "none,extent,filetype,sparse_super,large_file,huge_file,dir_index,dir_nlink,ext_attr,extra_isize,flex_bg"
)
#: Seconds between two reports of progress.
_LOOK: Final = 0.5
_MESSAGE_LENGTH: Final = 1000

Report = Callable[[str, float | None], object]


@final
@attrs.frozen
class Place:
    """Where on the disk a directory's file system is, and where it belongs in the guest."""

    target: str
    offset: int
    """In bytes, as `size`."""
    size: int


@final
@attrs.frozen
class _Survey:
    entries: int
    blocks: int
    lost_found: bool = False
    """Whether there is a directory of that name."""

    @property
    def size(self) -> int:
        """Bytes for a file system that certainly has room for all. What stays free takes no room on the host."""
        # Inodes, extended attributes, and for each 128 MiB two bitmaps and a descriptor.
        blocks = self.blocks + self.entries // _BLOCKS_PER_INODE_TABLE_BLOCK + self.entries + 2048
        blocks += blocks // 50
        return -(-blocks * _BLOCK // _ALIGNMENT) * _ALIGNMENT


def check_directory(source: Path) -> None:
    """Make sure that *source* is a directory that can be read.

    Raises:
      MountError: if not.

    """
    try:
        with os.scandir(source):
            pass
    except OSError as exc:
        raise unreadable_mount(source, source, exc) from exc


@asynccontextmanager
async def open_mounts_disk(
    mounts: Mapping[str, Path],
    path: Path,
    *,
    environment: Mapping[str, str],
    report: Report,
    owner: tuple[int, int] = _OWNER,
    before: tuple[Path, int] | None = None,
) -> AsyncGenerator[list[Place]]:
    """Make the disk *path* of directories as they are now; remove it at the block's end.

    Cancelled at any point, it leaves no process and no file.

    Args:
      mounts: Directories by their places in the guest.
      path: The new file, `constants.MOUNTS_DISK_BYTES` long; it takes what the directories take.
      environment: `Runtime.environment`.
      report: Told what is done, and how much of that.
      owner: Numbers of the guest's user and group that all of it belongs to.
      before: Another such disk, and how much of it is in use: the new one starts with that.

    Raises:
      MountError: if a directory can't be copied.
      MissingProgramError: if a program is not installed.

    """
    with open_empty_mounts_disk(path):
        start = 0
        if before is not None:
            disk, start = before
            _check_room(path.parent, disk.stat().st_blocks * 512)
            await trio.to_thread.run_sync(_copy_disk, disk, path)
        yield await _fill(mounts, path, environment=environment, report=report, owner=owner, start=start)


@contextmanager
def open_empty_mounts_disk(path: Path) -> Generator[None]:
    """Make the disk *path*, which reads as zeros; remove it at the block's end.

    A machine may have it already when somebody fills it: its kernel looks at it when it mounts something.
    """
    with open(path, "xb", buffering=0, opener=_open_private) as disk:
        disk.truncate(MOUNTS_DISK_BYTES)  # a hole
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def _fill(
    mounts: Mapping[str, Path],
    path: Path,
    *,
    environment: Mapping[str, str],
    report: Report,
    owner: tuple[int, int] = _OWNER,
    start: int = 0,
) -> list[Place]:
    """Copy directories to the disk *path*, which is empty from *start*; other arguments and errors as `open_mounts_disk`.

    Cancelled, it leaves a part of them there.
    """
    surveys: list[_Survey] = []
    room = MOUNTS_DISK_BYTES - start
    for source in mounts.values():
        report(f"looking at {source}", None)
        surveys.append(await trio.to_thread.run_sync(_survey, source, room))
        room -= surveys[-1].size
    _check_room(path.parent, sum(survey.blocks for survey in surveys) * _BLOCK)
    places: list[Place] = []
    offset = start
    with open(path, "r+b", buffering=0) as disk:  # noqa: ASYNC230 (an empty file)
        fd = disk.fileno()  # noqa: ASYNC232 (no call at all)
        for (target, source), survey in zip(mounts.items(), surveys, strict=True):
            places.append(Place(target, offset, survey.size))
            offset += survey.size
            await _copy(fd, places[-1], source, survey, environment, report)
            await _hand_over(fd, places[-1], source, survey, environment, owner)
    return places  # noqa: ASYNC910 (there is a mount)


def _copy_disk(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "r+b") as new:
        copy_data(old.fileno(), new.fileno())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _survey(source: Path, room: int) -> _Survey:
    """Look at all of a tree, in a thread: what is there, whether it can be read, and whether it fits."""
    entries = blocks = 0
    lost_found = False
    root = len(os.fsencode(os.path.join(source, ""))) - 1
    directories = [os.fspath(source)]
    while directories:
        trio.from_thread.check_cancelled()
        directory = directories.pop()
        names = 0
        try:
            with os.scandir(directory) as children:
                for child in children:
                    names += 12 + len(os.fsencode(child.name))
                    entries += 1
                    status = child.stat(follow_symlinks=False)
                    if len(os.fsencode(child.path)) - root == _DEADLY_PATH:
                        raise OSError(
                            errno.EINVAL,
                            f"below it this path is of exactly {_DEADLY_PATH} bytes, which e2fsprogs can't copy; "
                            "rename it, or mount a directory further down",
                            child.path,
                        )
                    if stat.S_ISDIR(status.st_mode):
                        directories.append(child.path)
                    elif stat.S_ISREG(status.st_mode):
                        if not os.access(child.path, os.R_OK):
                            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), child.path)
                        blocks += _content_blocks(child.path, status)
                    else:
                        blocks += 1  # a long link
                    if child.name == _LOST_FOUND and directory == os.fspath(source):
                        lost_found = True
                        if not stat.S_ISDIR(status.st_mode):
                            raise OSError(
                                errno.EEXIST,
                                "it is not a directory, as it is in every file system; rename it",
                                child.path,
                            )
        except OSError as exc:
            raise unreadable_mount(source, exc.filename or directory, exc) from exc
        blocks += 2 + names // (_BLOCK // 2)
        if _Survey(entries, blocks).size > room:
            limit = MOUNTS_DISK_BYTES // 2**30
            raise MountError(
                f"{source} is too large to be mounted: all mounts of a sandbox together may take {limit} GiB. Mount "
                "parts of it, or copy what is needed with Sandbox.upload"
            )
    return _Survey(entries, blocks, lost_found)


def _content_blocks(path: str, status: os.stat_result) -> int:
    """Return how many blocks a file's content takes, without its holes, and what says where those are."""
    if not is_sparse(status):
        return -(-status.st_size // _BLOCK)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        parts = blocks = 0
        for start, end in extents(descriptor, status.st_size):
            trio.from_thread.check_cancelled()
            parts += 1
            blocks += -(-end // _BLOCK) - start // _BLOCK
    finally:
        os.close(descriptor)
    return blocks + parts // _EXTENTS_PER_BLOCK + 1


def unreadable_mount(source: Path, path: str | Path, exc: OSError) -> MountError:
    """Return the error for a directory in which *path* can't be read."""
    what = "" if os.fspath(path) == os.fspath(source) else f"{path}: "
    return MountError(f"{source} can't be mounted: {what}{exc.strerror}; nothing was started")


def _check_room(directory: Path, wanted: int) -> None:
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if wanted > free:
        raise MountError(
            f"the mounts take {wanted >> 20} MiB, and {directory} has only {free >> 20} MiB free; "
            "free some, or use another HostConfig.runtime_dir"
        )


async def _copy(
    fd: int, place: Place, source: Path, survey: _Survey, environment: Mapping[str, str], report: Report
) -> None:
    """Make the file system of one directory."""
    message = f"copying {survey.entries} files from {source}"

    before = os.fstat(fd).st_blocks
    report(message, 0.0)

    async def watch() -> None:
        while True:
            await trio.sleep(_LOOK)
            # They are of 512 bytes there.
            done = (os.fstat(fd).st_blocks - before) * 512 / _BLOCK
            report(message, min(done / survey.blocks, 1.0))

    with InheritedFds() as inherited, hide_nursery("the making of a mount"):
        argv = _mke2fs(place, source, survey, _lend(fd, inherited))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            process = await run_owned(argv, environment={**minimal_environment(), **environment}, inherited=inherited)
            nursery.cancel_scope.cancel(reason="the directory is copied")
    if process.returncode != 0:
        raise _failure(source, process.output())


def _mke2fs(place: Place, source: Path, survey: _Survey, disk: str) -> list[str]:
    return [
        *("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-m", "0", "-O", _FEATURES),
        *("-N", str(survey.entries + _SPARE_INODES)),
        *("-E", f"lazy_itable_init=1,nodiscard,offset={place.offset}"),
        *("-d", os.path.abspath(source), disk, str(place.size // _BLOCK)),
    ]


async def _hand_over(
    fd: int, place: Place, source: Path, survey: _Survey, environment: Mapping[str, str], owner: tuple[int, int]
) -> None:
    """Make it all the guest's user's, as numbers of users here mean others there; and remove what mke2fs adds."""
    count: int
    (count,) = struct.unpack("<I", os.pread(fd, 4, place.offset + _SUPERBLOCK))
    inodes = [_ROOT_INODE, *range(_FIRST_INODE, count + 1)]
    if survey.lost_found:
        inodes.append(_LOST_FOUND_INODE)
    removal = "" if survey.lost_found else f"rmdir {_LOST_FOUND}\n"
    user, group = owner
    commands = "".join(f"sif <{number}> uid {user}\nsif <{number}> gid {group}\n" for number in inodes)
    complaints = _Complaints()
    with InheritedFds() as inherited:
        script = _lend_text(removal + commands, inherited)
        disk = f"{_lend(fd, inherited)}?offset={place.offset}"
        process = await run_owned(
            ["debugfs", "-w", "-f", script, disk],
            environment={**minimal_environment(), **environment},
            inherited=inherited,
            on_output=complaints.feed,
        )
    if process.returncode != 0 or complaints.text:
        raise _failure(source, complaints.text or describe_exit(process.returncode or 0))


def _lend(fd: int, inherited: InheritedFds) -> str:
    return f"/proc/self/fd/{inherited.add(os.dup(fd))}"


def _lend_text(text: str, inherited: InheritedFds) -> str:
    fd = inherited.add(os.memfd_create("text", os.MFD_CLOEXEC))
    with open(os.dup(fd), "w", encoding="utf-8") as file:
        file.write(text)
    os.lseek(fd, 0, os.SEEK_SET)
    return f"/proc/self/fd/{fd}"


class _Complaints:
    """What debugfs says beside echoing its commands, with its own name before each; it exits with 0 whatever happens."""

    def __init__(self) -> None:
        self._line = b""
        self.text = ""

    def feed(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line and not line.startswith(b"debugfs") and len(self.text) < _MESSAGE_LENGTH:
                self.text += line.decode("utf-8", "replace") + "\n"


def _failure(source: Path, output: str) -> MountError:
    why = output.strip()[-_MESSAGE_LENGTH:]
    if "No space left" in why:
        why = "the disk is full; free some, or use another HostConfig.runtime_dir"
    return MountError(f"{source} could not be copied for being mounted; nothing was started: {why}")
