"""HTTP/1.1 between a guest and a server, message by message, with secrets put into requests and filtered out of responses.

Each message is parsed by h11 and written anew. So guest and server can't take one for two, and nothing gets through that is no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, final

import trio

from ._connections import Outcome
from ._substitution import Headers, ResponseFilter, substitute

if TYPE_CHECKING:
    import h11

_CHUNK: Final = 1 << 16
#: Bytes of a head, and its fields.
_LONGEST_HEAD: Final = 1 << 16
_MOST_FIELDS: Final = 256
#: Of what is said of another's bytes.
_QUOTED: Final = 200
#: What a request says of how the answer is to be: nothing could be found in what is compressed, or comes in parts.
_WHOLE_ANSWER: Final = frozenset({b"accept-encoding", b"range", b"if-range"})
#: Seconds for the rest of a request that was answered before its end.
_LATE_BODY: Final = 2.0
#: Of one connection, and no business of the other's (RFC 9110, section 7.6.1); what frames a body is written anew by h11.
_HOP_BY_HOP: Final = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"})
_PROXY: Final = b"proxy-"
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")


class RequestRefusedError(Exception):
    """A guest's request does not go on, or there is no answer to it that can be passed on."""

    def __init__(self, status: int, outcome: Outcome, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.outcome: Outcome = outcome
        self.told = False
        """The guest got an answer that says so."""


@final
class HttpProxy:
    """Carries the requests of one connection, one after the other, and the responses.

    Args:
      guest: The guest's connection, in the clear.
      upstream: The server's.
      authorities: What the header Host of each request must be.
      values: The secrets, by placeholder.
      count: Told how many bytes the guest sent, and how many it gets, before they go on.

    """

    def __init__(
        self,
        guest: trio.abc.Stream,
        upstream: trio.abc.Stream,
        *,
        authorities: frozenset[bytes],
        values: Mapping[bytes, bytes],
        count: Callable[[int, int], object],
    ) -> None:
        import h11

        self._h11 = h11
        self._guest = guest
        self._upstream = upstream
        self._authorities = authorities
        self._values = values
        self._count = count
        self._server = h11.Connection(h11.SERVER, max_incomplete_event_size=_LONGEST_HEAD)
        self._client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        self._filter = ResponseFilter({value: placeholder for placeholder, value in values.items()})
        self._next = trio.Event()
        """Set when the next request may come."""
        self._lines = 0
        """That the head of a request has so far; and its last bytes, by which it may end with the next ones."""
        self._last = b""

    async def run(self) -> None:
        """Carry them until one side ends its connection between two messages, or says that it will.

        Raises:
          RequestRefusedError: if the guest sends what does not go on, or the server what is no answer. The guest was told,
            if that was possible still.
          trio.BrokenResourceError: if one side breaks off in the middle.

        """
        failures: list[Exception] = []

        async def responses() -> None:
            try:
                await self._take_responses()
            except (RequestRefusedError, trio.BrokenResourceError) as exc:
                failures.append(exc)  # raised outside, where it is in no group
            nursery.cancel_scope.cancel(reason="there are no more responses")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(responses)
            try:
                await self._take_requests()
            except (RequestRefusedError, trio.BrokenResourceError) as exc:
                failures.append(exc)
            nursery.cancel_scope.cancel(reason="there are no more requests")
        if failures:
            if isinstance(failures[0], RequestRefusedError):
                await self._refuse(failures[0])
            raise failures[0]

    # --- Requests ---

    async def _take_requests(self) -> None:
        while True:
            done = self._next
            self._lines, self._last = 0, b""
            self._count_lines(self._server.trailing_data[0])
            event = await self._receive_request()
            if isinstance(event, self._h11.ConnectionClosed):
                return
            assert isinstance(event, self._h11.Request)
            try:
                head = self._client.send(self._rewrite(event))
            except self._h11.LocalProtocolError:  # what h11 says may quote a value
                raise RequestRefusedError(400, "failed", "a request of the guest can't be written anew") from None
            await self._to_upstream(head)
            while True:
                event = await self._receive_request()
                if isinstance(event, self._h11.EndOfMessage):
                    break
                assert isinstance(event, self._h11.Data)
                await self._to_upstream(self._client.send(self._h11.Data(event.data)))
            await self._to_upstream(self._client.send(self._h11.EndOfMessage()))
            self._begin_next()
            await done.wait()

    async def _receive_request(self) -> h11.Event:
        try:
            while True:
                event = self._server.next_event()
                if event is self._h11.PAUSED:  # only where the guest has ended it
                    return self._h11.ConnectionClosed()
                if event is not self._h11.NEED_DATA:
                    assert isinstance(event, self._h11.Event)
                    return event
                data = bytes(await self._guest.receive_some(_CHUNK))
                if self._server.their_state is self._h11.IDLE:
                    self._count_lines(data)
                self._server.receive_data(data)
        except self._h11.RemoteProtocolError as exc:
            # It may quote a whole head.
            raise RequestRefusedError(
                exc.error_status_hint, "failed", f"the guest sent malformed HTTP: {exc!s:.{_QUOTED}}"
            ) from None

    def _count_lines(self, data: bytes) -> None:
        """Refuse a head of very many lines before it is parsed: that would keep this process from all else for a while."""
        data = self._last + data
        self._lines += _END_OF_HEAD.split(data, 1)[0].count(b"\n") - self._last.count(b"\n")
        self._last = data[-3:]
        if self._lines > _MOST_FIELDS:
            raise RequestRefusedError(
                431, "failed", f"a request of the guest has more than {_MOST_FIELDS} header fields"
            )

    def _rewrite(self, request: h11.Request) -> h11.Request:
        """Return the request as it goes on."""
        self._check(request)
        fields, hidden = substitute(_end_to_end(request.headers.raw_items()), self._values)
        self._filter = ResponseFilter(hidden)
        fields = [(name, value) for name, value in fields if name.lower() not in _WHOLE_ANSWER]
        fields.append((b"Accept-Encoding", b"identity"))
        return self._h11.Request(method=request.method, target=request.target, headers=fields)

    def _check(self, request: h11.Request) -> None:
        hosts = [value for name, value in request.headers if name == b"host"]
        if request.http_version not in (b"1.0", b"1.1"):
            raise RequestRefusedError(505, "failed", "a request of the guest is not HTTP/1.1")
        if len(hosts) != 1:
            raise RequestRefusedError(400, "wrong server name", "a request of the guest has no header Host, or several")
        if hosts[0].lower() not in self._authorities:
            raise RequestRefusedError(
                421, "wrong server name", f"a request of the guest is for the host {hosts[0][:253].decode('latin-1')!r}"
            )
        if _has_two_lengths(request.headers.raw_items()):
            raise RequestRefusedError(400, "failed", "a request of the guest has a length and is chunked")
        if request.method in (b"CONNECT", b"TRACE"):
            method = request.method.decode()
            raise RequestRefusedError(501, "failed", f"the guest sent a {method}, which no host with secrets gets")
        if not request.target.startswith(b"/") and request.target != b"*":
            raise RequestRefusedError(
                400, "wrong server name", "a request of the guest names more than a path on its server"
            )
        if any(name == b"upgrade" and b"websocket" in value.lower() for name, value in request.headers):
            raise RequestRefusedError(501, "failed", "the guest asked for a WebSocket, which no host with secrets gets")

    # --- Responses ---

    async def _take_responses(self) -> None:
        while True:
            data = bytes(await self._upstream.receive_some(_CHUNK))
            if self._client.our_state is self._h11.IDLE:
                if data:
                    raise _no_answer("it sent something that nobody asked for")
                return
            try:
                self._client.receive_data(data)
                if await self._pass_on():
                    return
            except self._h11.ProtocolError:
                # What h11 says may quote the answer, and that the value.
                raise _no_answer("a head, a chunk or a length is wrong, or it is cut short") from None

    async def _pass_on(self) -> bool:
        """Pass on what there is of a response; return whether it was the last of the connection."""
        while True:
            event = self._client.next_event()
            if event is self._h11.NEED_DATA:
                return False
            if isinstance(event, self._h11.InformationalResponse):
                if self._server.their_http_version != b"1.0":
                    fields = self._filtered(event.headers.raw_items())
                    await self._to_guest(self._h11.InformationalResponse(status_code=event.status_code, headers=fields))
            elif isinstance(event, self._h11.Response):
                await self._to_guest(self._response(event))
            elif isinstance(event, self._h11.Data):
                await self._body_to_guest(self._filter.feed(bytes(event.data)))
            elif isinstance(event, self._h11.EndOfMessage):
                await self._body_to_guest(self._filter.finish())
                await self._to_guest(self._h11.EndOfMessage())
                return await self._end_response()
            else:
                raise _no_answer("it ended before its answer")

    def _response(self, event: h11.Response) -> h11.Response:
        fields = self._filtered(event.headers.raw_items())
        if _has_two_lengths(fields):
            raise _no_answer("it has a length and is chunked")
        if event.http_version != b"1.1" or b"close" in _options(event.headers.raw_items()):
            fields.append((b"Connection", b"close"))
        return self._h11.Response(
            status_code=event.status_code, headers=fields, reason=self._filter.text(bytes(event.reason))
        )

    def _filtered(self, headers: Headers) -> Headers:
        if len(headers) > _MOST_FIELDS:
            raise _no_answer(f"it has more than {_MOST_FIELDS} header fields")
        return [(name, self._filter.text(value)) for name, value in _end_to_end(headers)]

    async def _end_response(self) -> bool:
        """Have the next request come; return whether there can be none."""
        data, ended = self._client.trailing_data
        if data:
            raise _no_answer("it sent more than its answer")
        done = self._next
        self._begin_next()
        if not done.is_set():
            if self._server.our_state is not self._h11.DONE or self._client.their_state is not self._h11.DONE:
                return True  # one of both has said that it was the last
            with trio.move_on_after(_LATE_BODY):
                await done.wait()
        return ended or not done.is_set()

    def _begin_next(self) -> None:
        connections = self._server, self._client
        if all(conn.our_state is conn.their_state is self._h11.DONE for conn in connections):
            for connection in connections:
                connection.start_next_cycle()
            self._next.set()
            self._next = trio.Event()

    # --- Both ---

    async def _refuse(self, refusal: RequestRefusedError) -> None:
        if self._server.our_state not in (self._h11.IDLE, self._h11.SEND_RESPONSE):
            return
        text = f"trio-sandbox: {refusal}\n".encode("ascii", "replace")
        fields = [
            (b"Content-Type", b"text/plain"),
            (b"Content-Length", str(len(text)).encode()),
            (b"Connection", b"close"),
        ]
        await self._to_guest(self._h11.Response(status_code=refusal.status, headers=fields))
        await self._body_to_guest(text)
        refusal.told = True

    async def _body_to_guest(self, data: bytes) -> None:
        if data:
            await self._to_guest(self._h11.Data(data))

    async def _to_guest(self, event: h11.Event) -> None:
        data = self._server.send(event)
        if data:
            self._count(0, len(data))
            await self._guest.send_all(data)

    async def _to_upstream(self, data: bytes | None) -> None:
        if data:
            self._count(len(data), 0)
            await self._upstream.send_all(data)


def _no_answer(what: str) -> RequestRefusedError:
    return RequestRefusedError(502, "failed", f"the server's answer is not HTTP as it should be: {what}")


def _has_two_lengths(headers: Headers) -> bool:
    """Tell whether a message could be taken for two different ones (RFC 9112, section 6.3)."""
    return {b"content-length", b"transfer-encoding"} <= {name.lower() for name, _ in headers}


def _options(headers: Headers) -> set[bytes]:
    """Return what the header Connection has in it."""
    return {
        option.strip().lower()
        for name, value in headers
        if name.lower() == b"connection"
        for option in value.split(b",")
    }


def _end_to_end(headers: Headers) -> Headers:
    """Return the headers that are not of one connection only."""
    # None can be called off that says how long a message is, or whose it is.
    dropped = _HOP_BY_HOP | (_options(headers) - {b"content-length", b"transfer-encoding", b"host"})
    return [
        (name, value) for name, value in headers if name.lower() not in dropped and not name.lower().startswith(_PROXY)
    ]
