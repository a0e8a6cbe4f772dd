"""Service "disk": how much the users may write to their disk from now on.

    {"service": "disk", "limit": n}       n bytes more than what is on it now
    {"service": "disk", "limit": null}    all of it
    {"service": "disk", "seal": true}     nothing, and nobody else may any more: all of their processes are ended

The first two are answered by "limited", the last by "sealed": the file system is whole then, and has no more to write. The kernel holds the rest of the file system back as reserved, from root too: who writes more gets ENOSPC, and nothing
is wrong with the disk. What is removed can be written again, and is given back to the host.

Source: the kernel's Documentation/ABI/testing/sysfs-fs-ext4 (reserved_clusters), ext4(5) (discard).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final, final

import trio

from ...wire import ChannelStream
from ..spawner import mounts
from .children import Children

#: What ext4 holds back of a file system by itself, in clusters: the least of this and a fiftieth.
_OWN_RESERVE: Final = 4096
# linux/fs.h
_FITRIM: Final = 0xC0185879
#: How often it is tried to end all writing, and seconds between two tries.
_SEAL_TRIES: Final = 100
_SEAL_PAUSE: Final = 0.05


@final
class DiskService:
    """Sets the limit.

    Args:
      device: The disk's device.
      directory: Where it is mounted.
      cgroup: That of all users' processes.
      children: What keeps files of the users' open, to say in them which machine this is.

    """

    def __init__(self, device: str, directory: str, cgroup: str, children: Children) -> None:
        self._device = device
        self._directory = directory
        self._cgroup = cgroup
        self._children = children

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
        if header.get("seal") is True:
            await self._seal(stream)
            return
        limit = header.get("limit")
        if limit is not None and (type(limit) is not int or limit < 0):
            stream.reset(f"a limit is a whole number of bytes, not {limit!r:.80}")
            return
        try:
            if limit is not None:
                mounts.mount(self._device, self._directory, "ext4", mounts.MS_REMOUNT | mounts.MS_NOATIME, "discard")
            self._reserve(clusters_to_reserve(os.statvfs(self._directory), limit))
        except OSError as exc:
            stream.reset(f"the disk can't be limited: {exc}")
            return
        await stream.send_all(b"limited", end=True)

    async def _seal(self, stream: ChannelStream) -> None:
        try:
            self._end_users()
            self._children.forget_identity()
            self._discard_free()
            await self._end_writing()
        except OSError as exc:
            stream.reset(f"the disk can't be sealed: {exc}")
            return
        await stream.send_all(b"sealed", end=True)

    def _end_users(self) -> None:
        with open(f"{self._cgroup}/cgroup.kill", "wb", buffering=0) as file:
            file.write(b"1")

    def _discard_free(self) -> None:
        """Give what was removed back to the host."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(directory, _FITRIM, struct.pack("QQQ", 0, 2**64 - 1, 0))
        finally:
            os.close(directory)

    async def _end_writing(self) -> None:
        for left in reversed(range(_SEAL_TRIES)):
            try:
                mounts.mount(self._device, self._directory, "ext4", mounts.MS_REMOUNT | mounts.MS_RDONLY)
            except OSError as exc:
                # Processes that were killed have files open for a moment more.
                if exc.errno != errno.EBUSY or not left:
                    raise
                await trio.sleep(_SEAL_PAUSE)
            else:
                return

    def _reserve(self, clusters: int) -> None:
        with open(f"/sys/fs/ext4/{os.path.basename(self._device)}/reserved_clusters", "wb", buffering=0) as file:
            file.write(b"%d" % clusters)


def clusters_to_reserve(disk: os.statvfs_result, limit: int | None) -> int:
    """Return how much is held back where *limit* more bytes may be written, or all of them, in the file system's blocks."""
    own = min(_OWN_RESERVE, disk.f_blocks // 50)
    return own if limit is None else max(own, disk.f_bfree - limit // disk.f_frsize)
