"""Files and trees between the host and the guest."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from operator import index
from os import PathLike
from typing import Final, Protocol, final

import attrs
import trio

from .._errors import GuestProtocolError
from ..client import Machine
from ..guest.changes import STATES
from ..guest.trees import (
    TreeError,
    TreeReader,
    TreeWriter,
    check_replaceable,
    extents,
    is_sparse,
    open_directory,
    remove,
)
from ..wire import RecordDecoder
from ._changes import Changes
from ._files import ERROR, REPLY, FileSession, encode_request, open_session, parse_error
from ._slot import Slot

_PERMISSIONS: Final = 0o777
_WRITABLE_FOR_OTHERS: Final = 0o022


@final
@attrs.frozen
class TransferStatistics:
    """The progress of a transfer, or its result."""

    files: int
    """Files and symbolic links that were copied."""
    size: int
    """Bytes of content that were copied. Holes of sparse files don't count: they stay holes."""
    total_size: int | None
    """Bytes of content in all, if that is known: for uploads with a progress callback."""


ProgressCallback = Callable[[TransferStatistics], object]


class _MakeWriter(Protocol):
    def __call__(self, parent: int, name: str, *, max_bytes: int | None, mask: int) -> TreeWriter: ...


async def upload(
    slot: Slot,
    user: str | int | None,
    local: str | PathLike[str],
    remote: str,
    progress: ProgressCallback | None,
    take_states: Callable[[bytes, Machine], None] | None = None,
) -> TransferStatistics:
    """What `Sandbox.upload` does, and `push`, which takes the files' states as well."""
    request = encode_request("upload" if take_states is None else "push", remote)
    source = os.fspath(local)
    # Of our own: a slow disk must not hold up what others do in threads.
    limiter = trio.CapacityLimiter(1)
    total = None if progress is None else await trio.to_thread.run_sync(_measure, source, limiter=limiter)
    reader = TreeReader(source)
    batches = reader.batches()
    try:
        # What can't be read at all is known before anything is sent.
        batch = await trio.to_thread.run_sync(next, batches, None, limiter=limiter)
        async with open_session(slot, user, f"upload to {remote!r:.200}") as session:
            try:
                await session.send(request)
                while batch is not None:
                    await session.send(batch)
                    if progress is not None:
                        progress(TransferStatistics(reader.files, reader.size, total))
                    batch = await trio.to_thread.run_sync(next, batches, None, limiter=limiter)
                await session.send(b"", end=True)
                await _receive_result(session, take_states)
            except BaseException:
                await session.take_back()  # noqa: ASYNC102 - it is shielded and bounded by itself
                raise
    finally:
        batches.close()
    return TransferStatistics(reader.files, reader.size, total)


async def _receive_result(session: FileSession, take_states: Callable[[bytes, Machine], None] | None) -> None:
    while (received := await session.receive())[0] != REPLY:
        if received[0] != STATES or take_states is None:
            raise session.violation(f"a record {received[0]!r} where a result was expected")
        try:
            take_states(received[1], session.machine)
        except ValueError as exc:
            raise session.violation(str(exc)) from exc


def _measure(path: str) -> int:
    total = 0 if os.path.isdir(path) else _content_size(path, os.stat(path))
    for directory, _, names in os.walk(path):
        for name in names:
            entry = os.path.join(directory, name)
            total += _content_size(entry, os.lstat(entry))
    return total


def _content_size(path: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        return 0
    if not is_sparse(status):
        return status.st_size
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return sum(end - start for start, end in extents(descriptor, status.st_size))
    finally:
        os.close(descriptor)


async def download(
    slot: Slot,
    user: str | int | None,
    remote: str,
    local: str | PathLike[str],
    progress: ProgressCallback | None,
    max_bytes: int,
    umask: int | None,
    changes: Changes | None = None,
) -> TransferStatistics:
    """What `Sandbox.download` does; of a directory only *changes*, if they are given."""
    check_max_bytes(max_bytes)
    if umask is not None and not 0 <= index(umask) <= _PERMISSIONS:
        raise ValueError(f"`umask` must be from 0 to {_PERMISSIONS:#o}, not {umask:#o}")
    request = encode_request("download", remote) if changes is None else changes.request(remote)
    make_writer = TreeWriter if changes is None else changes.make_writer
    limiter = trio.CapacityLimiter(1)
    target = await trio.to_thread.run_sync(_Target, os.fspath(local), max_bytes, umask, make_writer, limiter=limiter)
    try:
        async with open_session(slot, user, f"download of {remote!r:.200}") as session:
            await session.send(request, end=changes is None)
            if changes is not None:
                for more in changes.knowledge(session.machine):
                    await session.send(more)
                await session.send(b"", end=True)
            while data := await session.receive_raw():
                error = await trio.to_thread.run_sync(target.take, data, limiter=limiter)
                if error is not None:
                    raise _explained(
                        parse_error(error, session.what), "" if changes is None else ", or name it in `exclude`"
                    )
                if progress is not None:
                    progress(target.statistics())
            if not target.complete:
                raise session.violation("less than a whole tree")
        await trio.to_thread.run_sync(target.commit, limiter=limiter)
    finally:
        with trio.CancelScope(shield=True):
            # Bounded by what was written: removing that is all it does.
            await trio.to_thread.run_sync(target.close, limiter=limiter)
    return target.statistics()


def check_max_bytes(max_bytes: int) -> None:
    """Refuse what is no number of bytes, NaN for instance, which nothing would be too much for."""
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`max_bytes` must be a whole number of bytes, not {max_bytes!r:.100}")
    if max_bytes < 0:
        raise ValueError(f"`max_bytes` must not be negative, but is {max_bytes}")


def _explained(error: OSError, way_out: str) -> OSError:
    """Say what can't be copied, where the guest has sent no more than a number."""
    if error.errno != errno.EOPNOTSUPP:
        return error
    reason = f"it is a named pipe, a device or a socket, which can't be copied: remove it{way_out}"
    return OSError(error.errno, reason, error.filename)


@final
class _Target:
    """What is being downloaded, beside the place that it is to take. Its methods block; call them in a thread.

    Raises:
      OSError: if the directory that it is to be in is not there, or something stands in its place.

    """

    def __init__(self, path: str, max_bytes: int, umask: int | None, make_writer: _MakeWriter = TreeWriter) -> None:
        self._path = path
        mask = _WRITABLE_FOR_OTHERS | _read_umask() if umask is None else umask
        directory, self._name = os.path.split(os.path.normpath(path))
        if self._name in ("", ".", ".."):
            raise IsADirectoryError(errno.EISDIR, "the name to give to what is downloaded is missing", path)
        try:
            self._parent = open_directory(directory or ".", follow=True)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, path) from None
        try:
            check_replaceable(self._parent, self._name)
        except OSError as exc:
            os.close(self._parent)
            raise OSError(exc.errno, exc.strerror, path) from None
        self._temporary = f".trio-sandbox-{os.urandom(8).hex()}"
        self._writer = make_writer(self._parent, self._temporary, max_bytes=max_bytes, mask=mask)
        self._decoder = RecordDecoder()
        self.complete = False
        """The tree is there, and the guest said that this was all."""

    def take(self, data: bytes) -> bytes | None:
        """Write what came; return the guest's error if it sent one."""
        self._decoder.feed(data)
        while (record := self._decoder.next_record()) is not None:
            tag, payload = record
            if tag == ERROR:
                return payload
            if self.complete:
                raise GuestProtocolError("the guest sent more after the end of a download")
            if tag == REPLY and self._writer.finished:
                self.complete = True
                continue
            try:
                self._writer.write(tag, payload)
            except TreeError as exc:
                raise GuestProtocolError(f"the guest sent no tree: {exc}") from exc
            except OSError as exc:
                raise OSError(exc.errno, exc.strerror, self._path) from exc
        return None

    def statistics(self) -> TransferStatistics:
        """Return how far it is."""
        return TransferStatistics(self._writer.files, self._writer.size, None)

    def commit(self) -> None:
        """Put it in its place."""
        try:
            os.rename(self._temporary, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self._path) from None

    def close(self) -> None:
        """Remove what was not committed."""
        try:
            self._writer.close()
            remove(self._parent, self._temporary)
        finally:
            os.close(self._parent)


def _read_umask() -> int:
    """Return this process's umask; os.umask() would have to set it, for all threads."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), _WRITABLE_FOR_OTHERS)
