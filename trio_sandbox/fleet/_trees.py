"""Directories and files of the user's machine, on their way to a node: read there, written here, and kept as long as they are needed."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn, final

import trio

from .._errors import LinkProtocolError, MountError
from .._nurseries import open_services
from ..guest.trees import TreeError, TreeReader, TreeWriter, open_directory, remove
from ..image import unreadable_mount
from ..wire import RecordDecoder
from ._client import NodeClient
from ._links import MessageStream
from ._messages import Deliver, Delivered

#: Makes the error of a source in which a path can't be read.
Unreadable = Callable[[Path, str | Path, OSError], Exception]


@asynccontextmanager
async def deliver(client: NodeClient, source: Path, unreadable: Unreadable) -> AsyncGenerator[Path]:
    """Have a copy of *source* on a node, for a block; yield where it is.

    Names, contents, holes, symbolic links and permission bits go over; times, owners, extended attributes and hard links do not.

    Raises:
      OSError: if the node can't write it.
      Exception: what *unreadable* returns, if it can't be read; besides, what `NodeClient.hold` raises.

    """

    async def send(messages: MessageStream) -> None:
        limiter = trio.CapacityLimiter(1)  # of its own: a slow disk must not hold up what others do in threads
        batches = TreeReader(os.fspath(source)).batches()
        try:
            while (batch := await trio.to_thread.run_sync(_next, batches, limiter=limiter)) is not None:
                await messages.send(batch)
        except OSError as exc:
            raise unreadable(source, exc.filename or source, exc) from exc
        finally:
            batches.close()
        await messages.send(b"")

    async with client.hold(Deliver(), f"copying {source}", send) as delivered:
        assert isinstance(delivered, Delivered)
        yield Path(delivered.path)


def _next(batches: Generator[bytes]) -> bytes | None:
    return next(batches, None)


@asynccontextmanager
async def deliver_mounts(
    client: NodeClient, mounts: Mapping[str, Path]
) -> AsyncGenerator[tuple[dict[str, Path], Callable[[], Awaitable[object]]]]:
    """Have copies of directories on a node, for a block; yield where they are, by their places in the guest, and what removes them before its end.

    Raises:
      MountError: if one can't be read, or written there.
      Exception: besides, what `NodeClient.hold` raises.

    """
    if not mounts:
        yield {}, trio.lowlevel.checkpoint
        return
    places: dict[str, Path] = {}
    async with open_services("copying mounts") as services:
        for target, source in mounts.items():
            try:
                places[target] = await services.start(_keep_copy, client, source)
            except OSError as exc:
                raise MountError(
                    f"{source} can't be copied to node {client.name}: {exc.strerror or exc}; nothing was started"
                ) from exc
        yield places, services.stop


async def _keep_copy(client: NodeClient, source: Path, *, task_status: trio.TaskStatus[Path]) -> NoReturn:
    async with deliver(client, source, unreadable_mount) as path:
        task_status.started(path)
        await trio.sleep_forever()


@final
class Trees:
    """The copies that a node has.

    Args:
      directory: Where they are; made when there is one.

    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @asynccontextmanager
    async def receive(self, messages: MessageStream) -> AsyncGenerator[Path]:
        """Take what comes, and yield where it is; it is removed at the block's end. Cancelled or failed, it leaves nothing.

        Raises:
          LinkProtocolError: if what comes is no tree.
          OSError: if it can't be written; all of it has been received nonetheless.
          Exception: besides, what `MessageStream.receive` raises.

        """
        limiter = trio.CapacityLimiter(1)
        tree = _Tree(self._directory)
        try:
            await _receive(messages, tree, limiter)
            yield tree.path
        finally:
            with trio.CancelScope(shield=True):  # bounded by what was written
                await trio.to_thread.run_sync(tree.remove, limiter=limiter)


@final
class _Tree:
    """A tree that is being received. Its methods block; call them in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._parent = -1
        self._writer: TreeWriter | None = None
        self._decoder = RecordDecoder()
        self._name = secrets.token_hex(8)
        self.path: Path = directory / self._name
        """Where it is."""

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return self._writer is not None and self._writer.finished

    def write(self, data: bytes) -> None:
        """Take some more of its records."""
        if self._writer is None:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._parent = open_directory(os.fspath(self._directory))
            self._writer = TreeWriter(self._parent, self._name)
        self._decoder.feed(data)
        while (record := self._decoder.next_record()) is not None:
            self._writer.write(*record)

    def remove(self) -> None:
        """Be rid of what there is. Again is no error."""
        if self._parent < 0:
            return
        parent, self._parent = self._parent, -1
        try:
            if self._writer is not None:
                self._writer.close()
            remove(parent, self._name)
        finally:
            os.close(parent)


async def _receive(messages: MessageStream, tree: _Tree, limiter: trio.CapacityLimiter) -> None:
    failure: OSError | None = None
    while data := await messages.receive():
        if not isinstance(data, bytes):
            raise LinkProtocolError(f"a part of a tree was to come, not {data!r:.100}")
        if failure is None:
            try:
                await trio.to_thread.run_sync(tree.write, data, limiter=limiter)
            except OSError as exc:
                failure = exc  # whoever sends does not listen before the end
            except TreeError as exc:
                raise LinkProtocolError(f"no tree came: {exc}") from exc
    if failure is not None:
        raise failure
    if not tree.finished:
        raise LinkProtocolError("less than a whole tree came")
