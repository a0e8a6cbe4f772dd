"""Listing a guest's directories, and searching them."""

from __future__ import annotations

import errno
import os
from fnmatch import translate
from pathlib import PurePosixPath
from re import compile as compile_pattern
from typing import final

import trio

from ..guest.trees import LISTING_BYTES, LISTING_LIMIT, LISTING_NAMES, MAXIMUM_DEPTH, NAME_COST
from ._files import CONTENT, REPLY, FileSession, encode_request

_KINDS = (b"d", b"f", b"l", b"o")
_NAME_LIMIT = 255
#: A record ends with the name that makes it longer than a batch.
_RECORD_LIMIT = LISTING_BYTES + LISTING_NAMES + 2 * _NAME_LIMIT


@final
class Walk:
    """Lists directories, of which a guest may have no end.

    All names together may cost `LISTING_LIMIT`, with `NAME_COST` for each and for each listing. The event loop turns
    after each record, which has no more names than the guest's own batches.
    """

    def __init__(self, session: FileSession) -> None:
        self._session = session
        self._cost = 0
        self._found: dict[str, None] = {}

    async def entries(self, path: PurePosixPath) -> dict[str, bytes]:
        """Return the names of what is in a directory, and the kind of each.

        Raises:
          OSError: of the guest; EOVERFLOW if it is too much.

        """
        self._charge(NAME_COST, path)
        await self._session.send(encode_request("list", path))
        found: dict[str, bytes] = {}
        while True:
            await trio.lowlevel.checkpoint()  # what is received may be there already
            tag, payload = await self._session.receive()
            if tag == REPLY:
                return found
            if tag != CONTENT:
                raise self._session.violation(f"a record {tag!r} where names were expected")
            count = payload.count(b"\0") + 1
            if len(payload) > _RECORD_LIMIT or count > LISTING_NAMES:
                raise self._session.violation(f"{count} names in {len(payload)} bytes at once")
            self._charge(len(payload) + NAME_COST * count, path)
            expected = len(found) + count
            entry = b""
            for entry in payload.split(b"\0"):
                kind, name = entry[:1], entry[1:]
                # A name that is a path would lead out of the directory.
                if (
                    kind not in _KINDS
                    or not 0 < len(name) <= _NAME_LIMIT
                    or name == b"."
                    or name == b".."
                    or b"/" in name
                ):
                    raise self._session.violation(f"an entry that is none: {entry[:80]!r}")
                found[os.fsdecode(name)] = kind
            if len(found) != expected:
                raise self._session.violation(f"a name twice, among those up to {entry[:80]!r}")

    def _charge(self, cost: int, path: PurePosixPath) -> None:
        self._cost += cost
        if self._cost > LISTING_LIMIT:
            raise OSError(
                errno.EOVERFLOW,
                f"there is too much in there: names may cost {LISTING_LIMIT} bytes, and {NAME_COST} for each besides",
                str(path),
            )

    async def glob(self, directory: PurePosixPath, parts: list[str]) -> dict[str, None]:
        """Return the paths that the pattern matches in and below *directory*, each once. Errors as `entries`."""
        await self._glob(directory, parts, 0)
        return self._found

    async def _glob(self, directory: PurePosixPath, parts: list[str], depth: int) -> None:
        try:
            entries = await self.entries(directory)
        except OSError as exc:
            if exc.errno == errno.EOVERFLOW:
                raise
            # Not there, no directory, or not for us to read.
            return  # noqa: ASYNC910 - the request is a checkpoint
        if depth > MAXIMUM_DEPTH:
            raise OSError(errno.ENAMETOOLONG, f"directories are nested deeper than {MAXIMUM_DEPTH}", str(directory))
        first, *rest = parts
        if first == "**":
            if rest:
                await self._glob(directory, rest, depth + 1)
            else:
                self._found[str(directory)] = None
            below = [name for name, kind in entries.items() if kind == b"d"]
            for name in below:
                await self._glob(directory / name, parts, depth + 1)
            return
        if first == "..":
            matching = [first]
        else:
            matches = compile_pattern(translate(first)).match
            matching = list[str]()
            for number, name in enumerate(entries):
                if number % LISTING_NAMES == 0:
                    await trio.lowlevel.checkpoint()
                if matches(name):
                    matching.append(name)
        if rest:
            for name in matching:
                await self._glob(directory / name, rest, depth + 1)
        else:
            start = str(directory / "x")[:-1]
            self._found.update(dict.fromkeys(start + name for name in matching))
