"""Listing a guest's directories, and searching them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
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


#: Parts of what was found. A table of all of it would stop the event loop for some milliseconds whenever it grows.
_PARTS = 64
#: So many take a millisecond to give back.
_MANY = 20_000


@final
class _Seen:
    """A set of texts, in parts."""

    def __init__(self) -> None:
        self._parts = tuple(set[str]() for _ in range(_PARTS))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, texts: Iterable[str]) -> list[str]:
        """Return those that are new."""
        new: list[str] = []
        for text in texts:
            part = self._parts[hash(text) % _PARTS]
            if text not in part:
                part.add(text)
                new.append(text)
        return new

    async def forget(self) -> None:  # noqa: ASYNC910 - there are always parts
        """Give back what they take, which takes about as long as to find them; cancelled, all at once."""
        for part in self._parts:
            part.clear()
            await trio.lowlevel.checkpoint()


@final
class Walk:
    """Lists directories, of which a guest may have no end.

    All names together may cost `LISTING_LIMIT`, with `NAME_COST` for each and for each listing. The event loop turns
    after each record, which has no more names than the guest's own batches.
    """

    def __init__(self, session: FileSession) -> None:
        self._session = session
        self._cost = 0
        self._found: list[str] = []
        self._seen = _Seen()

    async def entries(self, path: PurePosixPath) -> list[dict[str, bytes]]:
        """Return the names of what is in a directory, and the kind of each, in batches.

        Raises:
          OSError: of the guest; EOVERFLOW if it is too much.

        """
        self._charge(NAME_COST, path)
        await self._session.send(encode_request("list", path))
        batches: list[dict[str, bytes]] = []
        names, complete = _Seen(), False
        try:
            while not complete:
                complete = await self._take(path, batches, names)
        finally:
            while batches and not complete:
                batches.pop()
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102 - cancelled, the rest goes at once
            if len(names) > _MANY:
                await names.forget()  # noqa: ASYNC102 - as above
        return batches

    async def _take(self, path: PurePosixPath, batches: list[dict[str, bytes]], names: _Seen) -> bool:
        """Take the next batch; return whether there was none more."""
        await trio.lowlevel.checkpoint()  # what is received may be there already
        tag, payload = await self._session.receive()
        if tag == REPLY:
            return True
        if tag != CONTENT:
            raise self._session.violation(f"a record {tag!r} where names were expected")
        count = payload.count(b"\0") + 1
        if len(payload) > _RECORD_LIMIT or count > LISTING_NAMES:
            raise self._session.violation(f"{count} names in {len(payload)} bytes at once")
        self._charge(len(payload) + NAME_COST * count, path)
        batch: dict[str, bytes] = {}
        entry = b""
        for entry in payload.split(b"\0"):
            kind, name = entry[:1], entry[1:]
            # A name that is a path would lead out of the directory.
            if kind not in _KINDS or not 0 < len(name) <= _NAME_LIMIT or name == b"." or name == b".." or b"/" in name:
                raise self._session.violation(f"an entry that is none: {entry[:80]!r}")
            batch[os.fsdecode(name)] = kind
        batches.append(batch)
        if len(names.add(batch)) != count:
            raise self._session.violation(f"a name twice, among those up to {entry[:80]!r}")
        return False

    def _charge(self, cost: int, path: PurePosixPath) -> None:
        self._cost += cost
        if self._cost > LISTING_LIMIT:
            raise OSError(
                errno.EOVERFLOW,
                f"there is too much in there: names may cost {LISTING_LIMIT} bytes, and {NAME_COST} for each besides",
                str(path),
            )

    async def glob(self, directory: PurePosixPath, parts: list[str]) -> Iterator[str]:
        """Return the paths that the pattern matches in and below *directory*, each once. Errors as `entries`."""
        await self._glob(directory, parts, 0)
        return iter(self._found)

    async def _glob(self, directory: PurePosixPath, parts: list[str], depth: int) -> None:
        try:
            batches = await self.entries(directory)
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
                self._found += self._seen.add([str(directory)])
            for batch in batches:
                await trio.lowlevel.checkpoint()
                for name, kind in batch.items():
                    if kind == b"d":
                        await self._glob(directory / name, parts, depth + 1)
            return
        if first == "..":
            batches = [{first: b"d"}]
        matches = compile_pattern(translate(first)).match
        start = str(directory / "x")[:-1]
        for batch in batches:
            await trio.lowlevel.checkpoint()
            matching = [name for name in batch if matches(name)]
            if rest:
                for name in matching:
                    await self._glob(directory / name, rest, depth + 1)
            else:
                self._found += self._seen.add(start + name for name in matching)
