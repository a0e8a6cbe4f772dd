"""Listing a guest's directories, and searching them."""

from __future__ import annotations

import errno
import os
from fnmatch import translate
from pathlib import PurePosixPath
from re import compile as compile_pattern
from typing import final

from ..guest.trees import MAXIMUM_DEPTH
from ._files import CONTENT, REPLY, FileSession, encode_request

#: Bytes of all the names in one walk.
_LISTING_LIMIT = 64 * 2**20


@final
class Walk:
    """Lists directories, of which a guest may have no end."""

    def __init__(self, session: FileSession) -> None:
        self._session = session
        self._size = 0

    async def entries(self, path: PurePosixPath) -> list[tuple[bytes, str]]:
        """Return the kind and the name of what is in a directory."""
        await self._session.send(encode_request("list", path))
        found: list[tuple[bytes, str]] = []
        while True:
            tag, payload = await self._session.receive()
            if tag == REPLY:
                return found
            if tag != CONTENT:
                raise self._session.violation(f"a record {tag!r} where names were expected")
            self._size += len(payload)
            if self._size > _LISTING_LIMIT:
                raise OSError(errno.EOVERFLOW, f"the names in there are longer than {_LISTING_LIMIT} bytes", str(path))
            for entry in payload.split(b"\0"):
                kind, name = entry[:1], entry[1:]
                # A name that is a path would lead out of the directory.
                if kind not in (b"d", b"f", b"l", b"o") or name in (b"", b".", b"..") or b"/" in name:
                    raise self._session.violation(f"an entry that is none: {entry[:80]!r}")
                found.append((kind, os.fsdecode(name)))

    async def glob(self, directory: PurePosixPath, parts: list[str], depth: int = 0) -> list[PurePosixPath]:
        """Return what the pattern matches in and below *directory*."""
        try:
            entries = await self.entries(directory)
        except OSError as exc:
            if exc.errno == errno.EOVERFLOW:
                raise
            # Not there, no directory, or not for us to read.
            return []  # noqa: ASYNC910 - the request is a checkpoint
        if depth > MAXIMUM_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories are nested deeper than {MAXIMUM_DEPTH}", str(directory))
        first, *rest = parts
        found: list[PurePosixPath] = []
        if first == "**":
            found += await self.glob(directory, rest, depth + 1) if rest else [directory]
            for kind, name in entries:
                if kind == b"d":
                    found += await self.glob(directory / name, parts, depth + 1)
            return found
        if first == "..":
            return await self.glob(directory / "..", rest, depth + 1) if rest else [directory / ".."]
        matches = compile_pattern(translate(first)).match
        for _, name in entries:
            if matches(name):
                found += await self.glob(directory / name, rest, depth + 1) if rest else [directory / name]
        return found
