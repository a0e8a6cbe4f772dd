"""Images and saved sandboxes from node to node: the one that has one lends it, the other fetches the files that it lacks.

The user's program says who fetches from whom, and nothing of what is fetched goes through it. A connection that breaks off is made again, and the
file goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, final

import attrs
import trio

from .._errors import LinkError, LinkProtocolError
from .._image import AnyImage
from .._nurseries import Services, open_services
from .._observe import part_logger
from ..image import Cargo, Receive
from ..machines import Images, SavedCargo, SavedExchange
from ..wire import Channel, ChannelError, ChannelStream, Role, StreamResetError
from ._lease import Lease
from ._links import MessageStream, connect, open_link
from ._messages import Lent, NodeAddress, Piece

_log = part_logger("fleet")

#: Connections that one fetch may take, one after the other: so often it may break off.
CONNECTIONS: Final = 6
#: Seconds before the second of them; before each further one it is twice as long.
_PAUSE: Final = 0.2
#: Seconds of silence after which the other node is taken for lost.
_SILENCE: Final = 30.0
#: Seconds for the next bytes of a file to come; a node that answers pings and sends nothing is as good as lost.
_STALL: Final = 60.0
#: Bytes that are read at once.
_PIECE: Final = 2**18


class NodeImages(Images, Protocol):
    """What a node needs of its images; `HostImages` is one."""

    def name_of(self, image: AnyImage) -> str:
        """Return the name of an image that is ready: that of its top layer."""
        ...


# --- The one that lends ---


@final
class Loan:
    """Files that another node may read, for as long as a block.

    Args:
      directories: Where the files are, by the number of their entry.

    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._over = trio.Event()

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Send what is asked for over one connection, until that ends or the loan is over."""
        async with (
            open_link(stream, Role.GUEST, self._accept, silence=_SILENCE) as link,
            trio.open_nursery() as nursery,
        ):

            async def wait_over() -> None:
                await self._over.wait()
                nursery.cancel_scope.cancel(reason="the loan is over")

            nursery.start_soon(wait_over)
            await link.wait_closed()
            nursery.cancel_scope.cancel(reason="the link is closed")

    def end(self) -> None:
        """Send nothing any more."""
        self._over.set()

    def _accept(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object]:
        return self._send(stream)

    async def _send(self, stream: ChannelStream) -> None:
        try:
            wanted = await MessageStream(stream).receive()
            with await trio.to_thread.run_sync(self._open, wanted) as file:
                while data := await trio.to_thread.run_sync(file.read, _PIECE):
                    await stream.send_all(data)
            await stream.send_eof()
        except (OSError, LinkProtocolError) as exc:
            stream.reset(f"{exc}"[:200])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # whoever asked has gone, or has enough
        finally:
            stream.close()

    def _open(self, wanted: object) -> BinaryIO:
        """Open what a message asks for. Whoever sent that had a secret, and is not believed anything else."""
        match wanted:
            case Piece(int(entry), str(name), int(offset)) if 0 <= entry < len(self._directories):
                directory = self._directories[entry]
                if name in os.listdir(directory):
                    file = (directory / name).open("rb")
                    if 0 <= offset <= os.fstat(file.fileno()).st_size:
                        file.seek(offset)
                        return file
                    file.close()
            case _:
                pass
        raise LinkProtocolError(f"there is no file {wanted!r:.100}")


# --- The one that fetches ---


@final
class Fetcher:
    """Reads files of another node. Made by `open_fetcher`."""

    def __init__(self, services: Services, source: NodeAddress, lent: Lent, lease: Lease) -> None:
        self._services = services
        self._source = source
        self._secrets = list(lent.secrets)
        self._lease = lease
        self._pause = _PAUSE
        self._link: Channel | None = None

    def open_file(self, entry: int, name: str) -> Receive:
        """Return what reads a file from its beginning; what that raises is a `LinkError`."""
        return _Part(self, entry, name).receive

    async def open_stream(self, piece: Piece) -> ChannelStream:
        """Ask for a file, over a new connection if there is none.

        Raises:
          LinkError: if there have been as many connections as there may be.

        """
        if self._link is None or self._link.failure is not None:
            self._link = await self._services.start(self._connect)
        assert self._link is not None
        stream = self._link.open_stream({})
        messages = MessageStream(stream)
        await messages.send(piece)
        await messages.end()
        return stream

    async def recover(self, failure: Exception) -> None:
        """Wait a little after the connection has failed.

        Raises:
          LinkError: if it has failed often enough.

        """
        if not self._secrets:
            raise LinkError(
                f"node {self._source.name} was lost while something was fetched from it: {failure}"
            ) from failure
        _log.info("fetching from node %s goes on over a new connection: %s", self._source.name, failure)
        self._link = None
        await trio.sleep(self._pause)
        self._pause *= 2

    async def _connect(self, *, task_status: trio.TaskStatus[Channel]) -> None:
        # One that did not come about may have used its secret up.
        stream = await connect(self._source, self._secrets.pop(), lease=self._lease)
        try:
            async with open_link(stream, Role.HOST, None, silence=_SILENCE) as link:
                task_status.started(link)
                await trio.sleep_forever()
        except ChannelError as exc:
            raise LinkError(f"the connection to node {self._source.name} did not come about: {exc}") from exc


@final
class _Part:
    """What has come of one file."""

    def __init__(self, fetcher: Fetcher, entry: int, name: str) -> None:
        self._fetcher = fetcher
        self._piece = Piece(entry, name)
        self._stream: ChannelStream | None = None

    async def receive(self) -> bytes:
        """Return its next bytes, b"" at its end."""
        while True:
            try:
                with trio.fail_after(_STALL):
                    if self._stream is None:
                        self._stream = await self._fetcher.open_stream(self._piece)
                    data = await self._stream.receive_some()
            except StreamResetError as exc:
                raise LinkError(f"a file can't be fetched: {exc.reason}") from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, LinkError) as exc:
                self._stream = None
                await self._fetcher.recover(exc)
                continue
            self._piece = attrs.evolve(self._piece, offset=self._piece.offset + len(data))
            return data


@asynccontextmanager
async def open_fetcher(source: NodeAddress, lent: Lent, *, lease: Lease) -> AsyncGenerator[Fetcher]:
    """Yield what reads the files that another node has lent; its connections end with the block."""
    async with open_services("fetching an image") as services:
        yield Fetcher(services, source, lent, lease)


async def fetch(images: NodeImages, image: AnyImage, source: NodeAddress, lent: Lent, *, lease: Lease) -> None:
    """Have an image that another node has lent, unless it is there.

    Cancelled or failed, it leaves whole entries of the store only.

    Raises:
      LinkError: if the other node can't be reached, or is lost.
      ImageError: as `take_cargo`.

    """
    if not isinstance(lent.cargo, Cargo):
        raise LinkProtocolError("an image was to be lent, and something else was")
    if not await images.has(image):
        async with open_fetcher(source, lent, lease=lease) as fetcher:
            await images.take(lent.cargo, fetcher.open_file)


async def fetch_saved(saved: SavedExchange, source: NodeAddress, lent: Lent, *, lease: Lease) -> None:
    """Have a saved sandbox that another node has lent, unless it is there.

    Cancelled or failed, it leaves whole entries of the store only.

    Raises:
      LinkError: if the other node can't be reached, or is lost.
      Exception: besides, what `SavedExchange.take` raises.

    """
    if not isinstance(lent.cargo, SavedCargo):
        raise LinkProtocolError("a saved sandbox was to be lent, and something else was")
    async with open_fetcher(source, lent, lease=lease) as fetcher:
        await saved.take(lent.cargo, fetcher.open_file)
