"""The guest's resolver: which names there are the host says, and what they stand for `names`."""

from __future__ import annotations

import contextlib
from typing import Final, final

import trio

from ....wire import Channel, StreamLimitError
from ..carried import STREAM_GONE
from . import dns
from .dns import Query
from .names import Names

#: Seconds that the host's word counts: that there is a name, and that there is none.
_FRESH, _FRESH_REFUSAL = 10.0, 1.0
#: Names that the host's word is remembered of.
_REMEMBERED: Final = 4096
#: Seconds that programs may remember an answer.
_TTL: Final = 60

# What the host says, in a byte.
_THERE_IS, _REFUSED, _NO_SUCH_NAME, _TRY_LATER = range(4)
_BLOCKED: Final = "this sandbox's network does not allow it"
_LOCALHOST: Final = {dns.A: b"\x7f\0\0\1", dns.AAAA: bytes(15) + b"\1"}


@final
class Lookups:
    """Answers queries during one conversation with a host."""

    def __init__(self, channel: Channel, names: Names) -> None:
        self._channel = channel
        self._names = names
        self._known: dict[str, tuple[float, int]] = {}
        self._asking: dict[str, _Asking] = {}

    def forget(self) -> None:
        """Ask anew for every name: the host decides by other rules now."""
        self._known.clear()
        self._asking.clear()  # who asked by then gets the answer, and nobody else

    def answer_now(self, query: Query) -> bytes | None:
        """Return the answer to *query*; None if it takes the host."""
        name = query.name
        if not query.supported:
            return dns.answer(query, dns.NOTIMP)
        if name == "localhost" or name.endswith(".localhost"):
            return _answer_with(query, _LOCALHOST.get(query.kind))
        if name.endswith(".in-addr.arpa"):
            address = dns.parse_reverse_name(name)
            target = self._names.name(address) if address is not None and query.kind == dns.PTR else None
            return dns.answer(query, dns.NXDOMAIN) if target is None else _answer_with(query, dns.encode_name(target))
        if not name:
            return dns.answer(query, dns.NXDOMAIN)
        expires, word = self._known.get(name, (0.0, 0))
        return self._answer(query, word) if trio.current_time() < expires else None

    async def answer(self, query: Query) -> bytes:
        """Return the answer to *query* as the host gives it."""
        name = query.name
        asking = self._asking.get(name)
        if asking is None:
            # Clients ask for IPv4 and IPv6 at the same time: the host is asked once.
            asking = self._asking[name] = _Asking()
            try:
                asking.word = await self._ask(name)
            finally:
                if self._asking.get(name) is asking:  # else it is forgotten already
                    del self._asking[name]
                    self._remember(name, asking.word)
                asking.over.set()
        else:
            await asking.over.wait()
        return self._answer(query, asking.word)

    def _remember(self, name: str, word: int) -> None:
        if len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[name] = (trio.current_time() + (_FRESH if word == _THERE_IS else _FRESH_REFUSAL), word)

    async def _ask(self, name: str) -> int:
        try:
            stream = self._channel.open_stream({"service": "lookup", "name": name}, flush=True)
        except (*STREAM_GONE, StreamLimitError):
            return _TRY_LATER  # noqa: ASYNC910 - nobody was asked
        try:
            with contextlib.suppress(*STREAM_GONE):
                data = await stream.receive_some(1)
                return data[0] if data else _TRY_LATER
            return _TRY_LATER
        finally:
            stream.close()

    def _answer(self, query: Query, word: int) -> bytes:
        if word == _THERE_IS:
            return _answer_with(query, self._names.address(query.name) if query.kind == dns.A else None)
        # Not REFUSED or SERVFAIL, for which programs wait; and the same for all kinds: some libraries stop at the first.
        if word == _REFUSED:
            return dns.answer(query, dns.NXDOMAIN, why=_BLOCKED)
        return dns.answer(query, dns.NXDOMAIN if word == _NO_SUCH_NAME else dns.SERVFAIL)


@final
class _Asking:
    """A question that the host has to answer."""

    def __init__(self) -> None:
        self.word = _TRY_LATER
        self.over = trio.Event()


def _answer_with(query: Query, data: bytes | None) -> bytes:
    """Answer with *data* as the record that was asked for, None: there is the name, and no such record."""
    return dns.answer(query, records=() if data is None else [(query.kind, _TTL, data)])
