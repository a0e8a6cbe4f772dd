"""Connections between a node and its user: TCP, TLS 1.3, a secret, and then a channel as between a host and a guest.

The user is the channel's host and the node its guest. So a stream of the user's has the same meaning, credit and end on both wires.
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, cast, final

import trio

from .._errors import LinkError, LinkProtocolError
from ..wire import Channel, ChannelStream, PortStream, Role, StreamHandler, open_channel
from ._lease import Lease
from ._messages import HEAD_BYTES, Decoder, NodeAddress, decode_all, encode, length_of
from ._security import SECRET_BYTES, Identity, check_fingerprint, client_context
from ._tls import TlsStream

#: Seconds for a peer to prove who it is.
PATIENCE: Final = 10.0
#: Connections that may be proving who they are at a time.
_MOST_STRANGERS: Final = 64
#: What is said first on every channel of a fleet.
_HELLO: Final = {"fleet": 1}


async def connect(address: NodeAddress, secret: bytes, *, lease: Lease) -> TlsStream:
    """Connect to a node and say *secret*, within `PATIENCE` seconds; cancelled, it leaves nothing.

    Raises:
      LinkError: if it can't be reached, or breaks the connection off.
      WrongNodeError: if it is another; nothing was said.

    """
    what = f"the connection to node {address.name}, at {address.host}, port {address.port}, did not come about"
    try:
        with trio.fail_after(PATIENCE):
            tcp = await _open_tcp(address)
            stream = _take_over(tcp, client_context(), lease)
            try:
                await stream.do_handshake()
                check_fingerprint(stream.peer_certificate(), address.fingerprint)
                await stream.send_all(secret)
            except BaseException:
                stream.close()
                raise
    except trio.TooSlowError as exc:
        raise LinkError(f"{what}: no answer within {PATIENCE:g} s") from exc
    except (OSError, trio.BrokenResourceError) as exc:  # ssl.SSLError is an OSError
        raise LinkError(f"{what}: {exc}") from exc
    return stream


async def _open_tcp(address: NodeAddress) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(address.host, address.port)
    except OSError as exc:
        # There is one address to try as a rule, and what came of that says more.
        first = exc.__cause__
        while isinstance(first, BaseExceptionGroup):
            first = cast("BaseExceptionGroup[BaseException]", first).exceptions[0]
        raise first or exc from None


def _take_over(
    tcp: trio.SocketStream, context: ssl.SSLContext, lease: Lease, *, server_side: bool = False
) -> TlsStream:
    """Speak TLS over a connection, which *lease* watches."""
    stream = TlsStream(PortStream(tcp.socket.detach()), context, server_side=server_side)
    lease.watch(stream)
    return stream


@asynccontextmanager
async def open_link(
    stream: trio.abc.Stream, role: Role, handler: StreamHandler | None, *, silence: float
) -> AsyncGenerator[Channel]:
    """Run a channel over a connection for a block; the user is the host, the node the guest. Errors are those of `open_channel`."""
    async with open_channel(stream, role=role, hello=_HELLO, handler=handler, silence_timeout=silence) as channel:
        if channel.peer_hello.get("fleet") != _HELLO["fleet"]:
            raise LinkProtocolError(f"the other side of a link introduced itself with {channel.peer_hello!r:.200}")
        yield channel


async def serve_links(
    listener: trio.SocketListener,
    identity: Identity,
    serve: Callable[[TlsStream, bytes], Awaitable[object]],
    *,
    lease: Lease,
    handlers: trio.Nursery,
) -> None:
    """Accept connections until cancelled, and have *serve* care for each, given what came as its secret.

    Strangers cost little: few at a time, for some seconds, and nothing is read of them but a secret's length. Who comes never waits for
    them: when there are as many as there may be, one is broken off.
    """
    strangers = _Strangers()

    async def welcome(tcp: trio.SocketStream) -> None:
        try:
            host = str(tcp.socket.getpeername()[0])
        except OSError:  # it has gone already
            await trio.aclose_forcefully(tcp)
            return
        stream = _take_over(tcp, identity.context, lease, server_side=True)
        try:
            try:
                with trio.fail_after(PATIENCE) as patience, strangers.counted(patience, host):
                    await stream.do_handshake()
                    secret = await _receive_secret(stream)
            except (trio.BrokenResourceError, trio.TooSlowError, OSError):
                return
            await serve(stream, secret)
        finally:
            stream.close()

    await trio.serve_listeners(welcome, [listener], handler_nursery=handlers)


@final
class _Strangers:
    """Who has not said a secret yet. For one more than there may be, one is broken off, of the machine that most of them are on."""

    def __init__(self) -> None:
        self._known: dict[trio.CancelScope, str] = {}  # and where they are; who came first is first

    @contextmanager
    def counted(self, patience: trio.CancelScope, host: str) -> Generator[None]:
        """Count one for a block, which *patience* ends."""
        if len(self._known) >= _MOST_STRANGERS:
            ((busiest, _),) = Counter(self._known.values()).most_common(1)
            oldest = next(scope for scope, where in self._known.items() if where == busiest)
            del self._known[oldest]
            oldest.cancel(reason="there are too many strangers")
        self._known[patience] = host
        try:
            yield
        finally:
            self._known.pop(patience, None)


async def _receive_secret(stream: trio.abc.Stream) -> bytes:
    secret = b""
    while len(secret) < SECRET_BYTES:
        data = await stream.receive_some(SECRET_BYTES - len(secret))
        if not data:
            break
        secret += bytes(data)
    return secret


def why(failure: Exception | None) -> str:
    """Say why a channel failed, and what its connection said of that."""
    return f"{failure}: {failure.__cause__}" if failure is not None and failure.__cause__ is not None else str(failure)


# --- Messages on one stream of a link ---


class MessageStream:
    """Messages over one stream of a channel, and their end.

    Args:
      stream: Owned from now on.

    """

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream
        self._decoder = Decoder()
        self._received: list[object] = []
        self._sending = trio.Lock()

    async def send(self, message: object) -> None:
        """Send a message; cancelled in the middle, the stream is of no use any more. Errors are those of the stream."""
        data = encode(message)
        async with self._sending:
            await self._stream.send_all(data)

    async def end(self) -> None:
        """Say that no more messages come."""
        async with self._sending:
            await self._stream.send_eof()

    def give_up(self) -> None:
        """Let the other side know that nobody waits any more; after both have ended that is no news. Again is no error."""
        self._stream.close()

    async def receive(self) -> object | None:
        """Return the next message; None at the end.

        Raises:
          LinkProtocolError: if what came is none.
          Exception: besides, what the stream raises.

        """
        while not self._received:
            data = await self._stream.receive_some()
            if not data:
                return None
            self._received = self._decoder.feed(bytes(data))
        return self._received.pop(0)


async def receive_message(stream: ChannelStream) -> object:
    """Return the one message that a stream begins with; what follows it stays in the stream.

    Raises:
      LinkProtocolError: if what came is none.
      Exception: besides, what the stream raises.

    """
    head = await _receive_exactly(stream, HEAD_BYTES)
    (message,) = decode_all(head + await _receive_exactly(stream, length_of(head)))
    return message


async def _receive_exactly(stream: ChannelStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise LinkProtocolError("a stream ended within a message")
        data += more
    return data
