"""Service "disk": how much the users may write to their disk from now on.

    {"service": "disk", "limit": n}       n bytes more than what is on it now
    {"service": "disk", "limit": null}    all of it

Answered by "limited". The kernel holds the rest of the file system back as reserved, from root too: who writes more gets ENOSPC, and nothing
is wrong with the disk. What is removed can be written again, and is given back to the host.

Source: the kernel's Documentation/ABI/testing/sysfs-fs-ext4 (reserved_clusters), ext4(5) (discard).
"""

from __future__ import annotations

import os
from typing import Final, final

from ...wire import ChannelStream
from ..spawner import mounts

#: What ext4 holds back of a file system by itself, in clusters: the least of this and a fiftieth.
_OWN_RESERVE: Final = 4096


@final
class DiskService:
    """Sets the limit.

    Args:
      device: The disk's device.
      directory: Where it is mounted.

    """

    def __init__(self, device: str, directory: str) -> None:
        self._device = device
        self._directory = directory

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one request."""
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

    def _reserve(self, clusters: int) -> None:
        with open(f"/sys/fs/ext4/{os.path.basename(self._device)}/reserved_clusters", "wb", buffering=0) as file:
            file.write(b"%d" % clusters)


def clusters_to_reserve(disk: os.statvfs_result, limit: int | None) -> int:
    """Return how much is held back where *limit* more bytes may be written, or all of them, in the file system's blocks."""
    own = min(_OWN_RESERVE, disk.f_blocks // 50)
    return own if limit is None else max(own, disk.f_bfree - limit // disk.f_frsize)
