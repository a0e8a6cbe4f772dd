"""A connection whose TLS ends here: the guest's by a certificate of our own, the server's by one that is verified."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Mapping
from typing import Final, final

import trio

from ..wire import ChannelStream
from ._http import HttpProxy, RequestRefusedError
from ._relay import receive_hello

#: Seconds for each of the two handshakes.
_HANDSHAKE_PATIENCE: Final = 30.0
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


@final
class Termination:
    """Carries one connection, as `Relay` does.

    Args:
      stream: The guest's end.
      upstream: The other end, closed when it is over.
      count: Told how many bytes the guest sent, and how many it gets, before they go on.
      port: The port that the guest connected to.
      values: The secrets of the host, by placeholder.
      server: What our end of the guest's TLS is made with.
      client: What ours of the server's is made with.

    """

    def __init__(
        self,
        stream: ChannelStream,
        upstream: trio.abc.Stream,
        count: Callable[[int, int], object],
        *,
        port: int,
        values: Mapping[bytes, bytes],
        server: ssl.SSLContext,
        client: ssl.SSLContext,
    ) -> None:
        self._stream = stream
        self._upstream = upstream
        self._count = count
        self._port = port
        self._values = values
        self._server = server
        self._client = client
        self.complete: bool = False
        """Whether both sides have ended it in good order."""

    async def run(self, host: str) -> None:
        """Carry it until one side ends it; then the other one's is ended, too.

        Args:
          host: What the guest's TLS hello must name, the server's certificate must be for, and each request must be for.

        Raises:
          WrongServerNameError: if the guest's hello names another, or none. Nothing of it was sent.
          RequestRefusedError: if something is wrong with the server's certificate, a request or an answer.

        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            try:
                await self._carry(host)
                self.complete = True
            except _BROKEN:
                pass  # one side broke it off
            except Exception as exc:  # noqa: BLE001 - raised outside, where it is in no group
                failure = exc
                if not (isinstance(exc, RequestRefusedError) and exc.told):
                    self._stream.reset("the host ended the connection")
            finally:
                await trio.aclose_forcefully(self._upstream)
            nursery.cancel_scope.cancel(reason="the connection is over")
        if failure is not None:
            raise failure

    async def _watch(self, scope: trio.CancelScope) -> None:
        await self._stream.wait_given_up()
        scope.cancel(reason="the guest broke the connection off")

    async def _carry(self, host: str) -> None:
        hello = await receive_hello(self._stream, host)
        # The server's first: a guest has no connection to one whose certificate is wrong.
        upstream = await self._open_upstream(host)
        guest = trio.SSLStream(_Prefixed(self._stream, hello), self._server, server_side=True, https_compatible=True)
        await _shake_hands(guest)
        names = (host, f"{host}:{self._port}")
        proxy = HttpProxy(
            guest,
            upstream,
            authorities=frozenset(name.encode("ascii") for name in names),
            values=self._values,
            count=self._count,
        )
        try:
            await proxy.run()
        except RequestRefusedError as exc:
            if exc.told:
                await self._end(guest)  # noqa: ASYNC120 - who cancels wants no answer
            raise
        await self._end(guest)
        with contextlib.suppress(*_BROKEN):
            await upstream.aclose()

    async def _end(self, guest: trio.SSLStream[_Prefixed]) -> None:
        """End the guest's connection after all that it was sent."""
        await guest.aclose()
        await self._stream.send_eof()

    async def _open_upstream(self, host: str) -> trio.SSLStream[trio.abc.Stream]:
        stream = trio.SSLStream(self._upstream, self._client, server_hostname=host, https_compatible=True)
        try:
            await _shake_hands(stream)
        except trio.BrokenResourceError as exc:
            why = exc.__cause__ if isinstance(exc.__cause__, ssl.SSLError) else "it broke the connection off"
            raise RequestRefusedError(
                502, "failed", f"no TLS with the server {host}, and nothing was sent: {why}"
            ) from exc
        return stream


async def _shake_hands(stream: trio.SSLStream[trio.abc.Stream] | trio.SSLStream[_Prefixed]) -> None:
    try:
        with trio.fail_after(_HANDSHAKE_PATIENCE):
            await stream.do_handshake()
    except trio.TooSlowError:
        raise trio.BrokenResourceError(f"no TLS handshake within {_HANDSHAKE_PATIENCE:g} s") from None


@final
class _Prefixed(trio.abc.Stream):
    """A guest's stream of which something was read already. Closing it does not close the guest's."""

    def __init__(self, stream: ChannelStream, data: bytes) -> None:
        self._stream = stream
        self._data = data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._data:
            await trio.lowlevel.checkpoint()
            data, self._data = self._data, b""
            return data
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
