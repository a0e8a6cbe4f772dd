"""Overlays by the thousand: the daemon makes one for each base, the others are stamped from it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections import OrderedDict
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, final
from weakref import WeakValueDictionary

import attrs
import trio

from .._entries import open_block
from .._errors import QemuStorageDaemonError
from .._private import make_private_directory
from ._qcow2 import FileIdentity, Stamp
from ._storage_daemon import QemuStorageDaemon, absolute_path, new_file

#: Bases whose prototypes are kept, a few KiB each; the one used longest ago is forgotten first.
_MAXIMUM_PROTOTYPES: Final = 256


@attrs.frozen
class _Prototype:
    """An overlay that the daemon made, kept in memory; valid while its base is the same file."""

    base: FileIdentity
    stamp: Stamp


@attrs.frozen(kw_only=True)
class OverlayPoolStatistics:
    """Numbers about an `OverlayPool`."""

    prototypes: int
    """Bases that the pool has a prototype for."""
    hits: int
    """Overlays that were made from a prototype which was there already."""
    misses: int
    """Overlays that had to wait for the daemon to make a prototype."""


@final
class OverlayPool:
    """Makes overlays from prototypes; made by `open_overlay_pool` only."""

    def __init__(self, daemon: QemuStorageDaemon, directory: Path) -> None:
        self._daemon = daemon
        self._directory = directory
        self._prototypes: OrderedDict[str, _Prototype] = OrderedDict()
        self._making: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._hits = self._misses = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<OverlayPool: {'closed' if self._closed else 'open'}, {len(self._prototypes)} prototypes>"

    @property
    def directory(self) -> Path:
        """Where prototypes are made, each for a moment."""
        return self._directory

    async def acquire(self, base: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
        """Make a qcow2 overlay of *base* at *target*, which does not exist.

        The same as `QemuStorageDaemon.create_overlay`, and byte for byte the same file, but a
        hundred times faster once the base is known. A base that was replaced or changed on disk
        is noticed. An error or a cancellation leaves no file.

        Args:
          base: The backing file, a qcow2 image. Recorded as an absolute path, symlinks unresolved.
          target: The path of the file to make. Its directory exists, it does not.

        Returns:
          True if the prototype was there already, False if the daemon had to make it first.

        Raises:
          QemuStorageDaemonError: as `QemuStorageDaemon.create_overlay`; only a base that the pool
            does not know yet needs a daemon that runs. A full disk is an `OSError` as its cause.
          ValueError: if a path is not valid UTF-8 or has a zero byte.
          trio.ClosedResourceError: if the pool's block has been left.

        """
        base_path, target_path = absolute_path(base), absolute_path(target)
        await trio.lowlevel.checkpoint()  # Cancelled here: nothing happened
        if self._closed:
            raise trio.ClosedResourceError("the overlay pool's block has exited")
        stamp = self._known(base_path)
        hit = stamp is not None
        if stamp is None:
            stamp = await self._make_prototype(base_path)
        # Blocks the Trio thread for an open(), two writes of a few KiB to the page cache and a
        # ftruncate(): some 60 us on a local disk. A thread would cost more than it would give.
        with new_file(target_path) as fd:
            try:
                stamp.write(fd)
            except OSError as exc:
                raise QemuStorageDaemonError(f"can't write the overlay {target_path}: {exc.strerror or exc}") from exc
            finally:
                os.close(fd)
        if hit:
            self._hits += 1
        else:
            self._misses += 1
        return hit

    def statistics(self) -> OverlayPoolStatistics:
        """Give the pool's numbers."""
        return OverlayPoolStatistics(prototypes=len(self._prototypes), hits=self._hits, misses=self._misses)

    def close(self) -> None:
        """Forget the prototypes; the overlays stay. For `open_overlay_pool` only."""
        self._closed = True
        self._prototypes.clear()

    def _known(self, base: str) -> Stamp | None:
        identity, _ = self._daemon.read_base(base)
        prototype = self._prototypes.get(base)
        if prototype is None or prototype.base != identity:
            return None
        self._prototypes.move_to_end(base)
        return prototype.stamp

    async def _make_prototype(self, base: str) -> Stamp:
        # Those who want the same base wait for one prototype. If its maker fails or is
        # cancelled, the next in line makes it.
        lock = self._making.setdefault(base, trio.Lock())
        async with lock:
            stamp = self._known(base)
            if stamp is not None:
                return stamp
            # Taken before the daemon reads the base: replaced in between, the base will differ
            # from this next time, and the prototype is made anew.
            identity, _ = self._daemon.read_base(base)
            path = self._directory / f"prototype-{secrets.token_hex(8)}.qcow2"
            try:
                # It may have vanished since the last time: temporary files get cleaned up.
                make_private_directory(self._directory)
                await self._daemon.create_overlay(base, path)
                try:
                    stamp = Stamp.of(path.read_bytes())
                finally:
                    path.unlink(missing_ok=True)
            except OSError as exc:
                raise QemuStorageDaemonError(f"can't make a prototype in {self._directory}: {exc}") from exc
            self._prototypes[base] = _Prototype(identity, stamp)
            self._prototypes.move_to_end(base)
            if len(self._prototypes) > _MAXIMUM_PROTOTYPES:
                self._prototypes.popitem(last=False)
            return stamp


@open_block
async def open_overlay_pool(  # noqa: ASYNC911 - the pool has them
    daemon: QemuStorageDaemon, *, directory: str | os.PathLike[str] | None = None
) -> AsyncGenerator[OverlayPool]:
    """Keep a pool of prototype overlays for the length of a block; entering it is a checkpoint.

    Args:
      daemon: What makes the prototypes.
      directory: Where they are made, each for a moment; made when it is missing. None: a directory
        of the pool's own, beside the daemon's socket.

    """
    await trio.lowlevel.checkpoint()
    if directory is None:
        pool = OverlayPool(daemon, daemon.directory / f"pool-{secrets.token_hex(4)}")
    else:
        pool = OverlayPool(daemon, Path(absolute_path(directory)))
    try:
        yield pool
    finally:
        pool.close()
        if directory is None:
            shutil.rmtree(pool.directory, ignore_errors=True)  # It may never have been made.
