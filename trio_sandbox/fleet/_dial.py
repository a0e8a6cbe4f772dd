"""Connections of a guest that its node makes, and the user's program decides on.

The gateway is the program's as ever: policies, secrets, limits and events. Only names are resolved, addresses are vetted, and connections are
made by the node, each at the program's word, on a stream of the machine's own connection. A guest can't ask for any of it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Sequence
from typing import Any, Final, Literal, cast, final

import trio

from .._errors import LinkProtocolError
from .._nurseries import hide_nursery
from ..network import Dialer, Private, Relay
from ..sandbox import Slot
from ..wire import ChannelStream, StreamLimitError
from ._links import receive_message
from ._messages import Answered, Failure, Unresolved, encode

#: What the header of such a stream has, and no other.
MARK: Final = "fleet"
#: Addresses of a name that are sent to the node, which tries fewer.
_MOST_ADDRESSES: Final = 32

Operation = Literal["resolve", "vet", "connect"]


# --- The program ---


@final
class NodeDialer:
    """Connects from the node of a sandbox: a `Dialer`.

    Args:
      slot: Where the sandbox's machine is.

    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    async def resolve(self, name: str) -> tuple[str, ...]:
        """Return the addresses that the node knows of *name*. Errors are those of `Resolver.resolve`."""
        return cast("tuple[str, ...]", await self._ask("resolve", name=name))

    async def vet(self, addresses: Sequence[str], private: Private) -> list[str]:
        """Return those that are allowed from there: the node's own addresses are as private as this machine's would be here."""
        return cast("list[str]", await self._ask("vet", addresses=addresses[:_MOST_ADDRESSES], private=private))

    async def connect(self, addresses: Sequence[str], port: int) -> tuple[trio.abc.HalfCloseableStream, str]:
        """Have the node connect. Errors are those of `network.connect`."""
        stream = self._open("connect", addresses=addresses[:_MOST_ADDRESSES], port=port)
        try:
            address = cast("str", _value(await receive_message(stream)))
            return _Connection(stream), address
        except BaseException:
            stream.close()
            raise

    async def _ask(self, operation: Operation, **arguments: object) -> object:
        stream = self._open(operation, **arguments)
        try:
            return _value(await receive_message(stream))
        finally:
            stream.close()

    def _open(self, operation: Operation, **arguments: object) -> ChannelStream:
        try:
            return self._slot.machine.guest.open_stream({MARK: operation, **arguments})
        except StreamLimitError as exc:
            raise OSError(errno.EMFILE, "as many connections as there may be") from exc


@final
class _Connection(trio.abc.HalfCloseableStream):
    """A connection of the node's. Closed before both sides have ended it, it is broken off: nobody takes that for the end of what was said."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._ends = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()
        self._ends += 1

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self._stream.receive_some(max_bytes)
        self._ends += not data
        return data

    async def aclose(self) -> None:
        if self._ends < 2:
            self._stream.reset("broken off")
        self._stream.close()
        await trio.lowlevel.checkpoint()


def _value(answer: object) -> object:
    match answer:
        case Answered(value):
            return value
        case Failure(error):
            raise error
        case Unresolved(number, why):
            raise socket.gaierror(number, why)
        case _:
            raise LinkProtocolError(f"a node answered {answer!r:.100} where it was to connect")


# --- The node ---


@final
class Operator:
    """Does what a `NodeDialer` asks for, for the user of one machine.

    Args:
      dialer: What connects from here.

    """

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer

    def accept(self, stream: ChannelStream, header: dict[str, Any]) -> Awaitable[object]:
        """Serve a stream whose header has the `MARK`."""
        return self._serve(stream, header)

    async def _serve(self, stream: ChannelStream, header: dict[str, Any]) -> None:
        upstream: list[trio.abc.HalfCloseableStream] = []
        try:
            with hide_nursery("a connection from a node"):
                answer = await self._answer(stream, header, upstream)
                await stream.send_all(encode(answer), end=not upstream)
                if upstream:
                    relay = Relay(stream, upstream[0], _count)
                    await relay.run(None)
                    if not relay.complete:
                        stream.reset("the other side broke the connection off")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # nobody waits for it any more
        finally:
            stream.close()
            for each in upstream:
                await trio.aclose_forcefully(each)

    async def _answer(
        self, stream: ChannelStream, header: dict[str, Any], upstream: list[trio.abc.HalfCloseableStream]
    ) -> object:
        """Return what to answer; a connection that was made is added to *upstream*. Given up with *stream*."""
        answer: object = None
        async with trio.open_nursery() as nursery:

            async def wait_given_up() -> None:
                await stream.wait_given_up()
                nursery.cancel_scope.cancel(reason="nobody waits for it any more")

            nursery.start_soon(wait_given_up)
            try:
                answer = Answered(await self._do(header, upstream))
            except socket.gaierror as exc:
                answer = Unresolved(exc.errno or socket.EAI_FAIL, exc.strerror or str(exc))
            except (OSError, LinkProtocolError) as exc:
                answer = Failure(exc)
            nursery.cancel_scope.cancel(reason="it is done")
        return answer

    async def _do(self, header: dict[str, Any], upstream: list[trio.abc.HalfCloseableStream]) -> object:
        match header:
            case {"fleet": "resolve", "name": str(name)}:
                return await self._dialer.resolve(name)
            case {"fleet": "vet", "addresses": list(), "private": (bool() | "loopback") as private}:
                return await self._dialer.vet(_addresses(header), private)
            case {"fleet": "connect", "addresses": list(), "port": int(port)}:
                connection, address = await self._dialer.connect(_addresses(header), port)
                upstream.append(connection)
                return address
            case _:
                raise LinkProtocolError(f"a node can't connect as it is asked to: {header!r:.200}")


def _addresses(header: dict[str, Any]) -> list[str]:
    return [str(each) for each in header["addresses"]]


def _count(*_: int) -> bool:
    """Count nothing: the program's gateway does."""
    return True
