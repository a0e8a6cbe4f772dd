"""Changes of files in the guest, as the guest's kernel reports them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias, final

import attrs
import trio

from ._files import ERROR, REPLY, FileSession, encode_request, parse_error
from ._path import GuestPath
from ._slot import Slot

ChangeKind: TypeAlias = Literal[
    "created", "modified", "written", "attributes", "deleted", "moved_from", "moved_to", "overflow"
]

_CHANGE = b"W"
#: By the bits of inotify(7).
_KINDS: Mapping[int, ChangeKind] = {
    0x2: "modified",
    0x4: "attributes",
    0x8: "written",
    0x40: "moved_from",
    0x80: "moved_to",
    0x100: "created",
    0x200: "deleted",
    0x400: "deleted",
    0x800: "moved_from",
    0x4000: "overflow",
}
_IN_IGNORED = 0x8000
_IN_UNMOUNT = 0x2000
_IN_ISDIR = 0x40000000
_MASK_DIGITS = 10
_NAME_LIMIT = 255


@final
@attrs.frozen
class FileChange:
    """Something happened to a file or directory."""

    kind: ChangeKind
    """What happened: "created"; "modified": its content changed; "written": a program that had it open for writing closed it;
    "attributes": mode, owner, times or number of names; "deleted"; "moved_from": it was renamed, or moved away from here;
    "moved_to": it got this name, or was moved to here; "overflow": changes were lost here, because nobody took them in time."""
    path: GuestPath
    """What it happened to; for "overflow" what is watched."""
    is_dir: bool
    """Whether that is a directory."""


@final
class FileChanges(trio.abc.ReceiveChannel[FileChange]):
    """The changes of a watched file or directory, in order. Made by `Sandbox.watch`.

    Changes wait in the guest until you receive them. Its kernel keeps some thousands; if it drops more, you get a change of
    the kind "overflow".
    """

    def __init__(self, session: FileSession, path: GuestPath) -> None:
        self._session = session
        self._path = path
        self._closed = False
        self._ended = False
        self._pending: deque[FileChange] = deque()

    async def receive(self) -> FileChange:
        """Wait for the next change. Cancelled: nothing is lost.

        Raises:
          trio.EndOfChannel: if the watched file or directory is gone.
          trio.ClosedResourceError: if this was closed.

        It raises what methods of `GuestPath` raise, too.
        """
        await trio.lowlevel.checkpoint()
        while not self._pending:
            if self._closed:
                raise trio.ClosedResourceError("these changes were closed")
            if self._ended:
                raise trio.EndOfChannel
            record = await self._next_record()
            async with self._session.failures():
                self._take(*record)
        return self._pending.popleft()

    async def start(self) -> None:
        """Wait until the guest watches."""
        tag, payload = await self._next_record()
        async with self._session.failures():
            if tag == ERROR:
                raise parse_error(payload, self._session.what)
            if tag != REPLY:
                raise self._session.violation(f"a record {tag!r} where a result was expected")

    async def _next_record(self) -> tuple[bytes, bytes]:
        async with self._session.failures():
            return await self._session.receive_record()

    def _take(self, tag: bytes, payload: bytes) -> None:
        mask, _, name = payload.partition(b"\0")
        if (
            tag != _CHANGE
            or not mask.isdigit()
            or len(mask) > _MASK_DIGITS
            or len(name) > _NAME_LIMIT
            or b"/" in name
            or b"\0" in name
            or name in (b".", b"..")
        ):
            raise self._session.violation(f"a change that is none: {payload[:80]!r}")
        bits = int(mask)
        self._ended = self._ended or bool(bits & (_IN_IGNORED | _IN_UNMOUNT))
        path = self._path / os.fsdecode(name) if name else self._path
        self._pending += [FileChange(kind, path, bool(bits & _IN_ISDIR)) for bit, kind in _KINDS.items() if bits & bit]

    async def aclose(self) -> None:
        """Stop watching."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Stop watching, at once."""
        self._closed = True
        self._pending.clear()
        self._session.close()


@asynccontextmanager
async def watch(slot: Slot, path: GuestPath) -> AsyncGenerator[FileChanges]:
    """What `Sandbox.watch` does."""
    request = encode_request("watch", path)
    what = f"watch of {str(path)!r:.200}"
    session = FileSession(await slot.resolve(what), path.user, what)
    try:
        await session.send(request)
        changes = FileChanges(session, path)
        await changes.start()
        try:
            yield changes
        finally:
            changes.close()
    finally:
        session.close()
