"""The guest's resolver: which names there are the host says, and what they stand for `names`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import trio

from ....wire import StreamLimitError
from ..carried import STREAM_GONE
from . import dns
from .dns import Query
from .names import Names
from .questions import Question, Questions

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

    def __init__(self, questions: Questions, names: Names) -> None:
        self._questions = questions
        self._names = names
        self._known: dict[str, tuple[float, int]] = {}
        self._asking: dict[str, _Asking] = {}
        """Whom others can join who ask for the same."""
        self._under_way: dict[Question, _Asking] = {}

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

    def ask(self, query: Query, answered: Callable[[bytes | None], object]) -> None:
        """Have *answered* called with the answer to *query* as the host gives it, now or later; with None if there will be none.

        It must neither wait nor raise.
        """
        name = query.name
        asking = self._asking.get(name)
        if asking is None:
            try:
                question = self._questions.ask({"service": "lookup", "name": name}, 1, self._hear)
            except (*STREAM_GONE, StreamLimitError):
                answered(self._answer(query, _TRY_LATER))
                return
            # Clients ask for IPv4 and IPv6 at the same time: the host is asked once.
            asking = self._asking[name] = self._under_way[question] = _Asking(name)
        asking.waiting.append((query, answered))

    def _hear(self, question: Question) -> None:
        asking = self._under_way.pop(question)
        word = question.answer[0] if question.answer else _TRY_LATER
        if self._asking.get(asking.name) is asking:  # else it is forgotten already
            del self._asking[asking.name]
            self._remember(asking.name, word)
        for query, answered in asking.waiting:
            answered(self._answer(query, word))

    def close(self) -> None:
        """Ask nothing any more: who waits still gets no answer."""
        self._asking.clear()
        while self._under_way:
            question, asking = self._under_way.popitem()
            question.close()
            for _, answered in asking.waiting:
                answered(None)

    def _remember(self, name: str, word: int) -> None:
        if len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[name] = (trio.current_time() + (_FRESH if word == _THERE_IS else _FRESH_REFUSAL), word)

    def _answer(self, query: Query, word: int) -> bytes:
        if word == _THERE_IS:
            return _answer_with(query, self._names.address(query.name) if query.kind == dns.A else None)
        # Not REFUSED or SERVFAIL, for which programs wait; and the same for all kinds: some libraries stop at the first.
        if word == _REFUSED:
            return dns.answer(query, dns.NXDOMAIN, why=_BLOCKED)
        return dns.answer(query, dns.NXDOMAIN if word == _NO_SUCH_NAME else dns.SERVFAIL)


@final
class _Asking:
    """A name that the host was asked for, and who wants to know."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: list[tuple[Query, Callable[[bytes | None], object]]] = []


def _answer_with(query: Query, data: bytes | None) -> bytes:
    """Answer with *data* as the record that was asked for, None: there is the name, and no such record."""
    return dns.answer(query, records=() if data is None else [(query.kind, _TTL, data)])
