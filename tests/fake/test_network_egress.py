"""The guest's side of connections to the outside, with a kernel and a host that the tests play."""

from __future__ import annotations

import contextlib
import errno
import itertools
import operator
import os
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.unit.test_guest_network import encoded, query
from trio_sandbox.guest.agent.network import dns, egress as egress_module, lookups as lookups_module
from trio_sandbox.guest.agent.network.egress import Egress
from trio_sandbox.guest.agent.network.names import RESOLVER, Names
from trio_sandbox.guest.agent.network.packets import Syn
from trio_sandbox.wire import Channel, ChannelStream, Role, open_channel

LOOPBACK = socket.inet_aton("127.0.0.1")
THERE_IS, REFUSED, NO_SUCH_NAME, TRY_LATER = range(4)


class LoopbackNames(Names):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """The one name of loopback, where the listener of these tests is."""

    def name(self, address: bytes) -> str | None:
        return "web.test" if address == LOOPBACK else super().name(address)


class FakeKernel:
    """Sockets on loopback, and packets that the tests write."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.queries = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.queries.bind(("127.0.0.1", 0))
        self.syns, self._packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syns.setblocking(False)
        self.sent: dict[int, Syn] = {}
        self._numbers = itertools.count()
        self.let_in_ports: list[int] = []
        self.refused: list[tuple[int, int]] = []
        self.down = 0
        """How often `receive_syn` fails still."""

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def send_syn(self, source_port: int, *, target: bytes = LOOPBACK, target_port: int | None = None) -> None:
        packet = bytes(24) + next(self._numbers).to_bytes(4, "big") + bytes(12)
        syn = Syn(packet, 20, LOOPBACK, target, source_port, self.port if target_port is None else target_port)
        self.sent[source_port] = syn
        self.send_again(source_port)

    def send_again(self, source_port: int) -> None:
        """Send the last SYN of that port once more."""
        self._packets.send(source_port.to_bytes(2, "big"))

    def receive_syn(self) -> Syn | None:
        if self.down:
            self.down -= 1
            raise OSError(errno.ENETDOWN, "Network is down")
        return self.sent[int.from_bytes(self.syns.recv(2), "big")]

    def let_in(self, syn: Syn) -> None:
        self.let_in_ports.append(syn.source_port)

    def refuse(self, syn: Syn, number: int) -> None:
        self.refused.append((syn.source_port, number))

    def close(self) -> None:
        for sock in (self.listener, self.queries, self.syns, self._packets):
            sock.close()


@attrs.define
class Guest:
    kernel: FakeKernel
    egress: Egress
    host: Channel
    channel: Channel
    requests: list[dict[str, Any]]
    serve: Callable[[ChannelStream, dict[str, Any]], Awaitable[None]]

    @asynccontextmanager
    async def program(self) -> AsyncGenerator[tuple[int, socket.socket]]:
        """Yield a program's socket, bound, and its port, whose first packet is held."""
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            self.kernel.send_syn(port)
            yield port, sock

    async def ask(self, name: str, kind: int = dns.A) -> bytes:
        """Ask over UDP; return the answer."""
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect(self.kernel.queries.getsockname())
            await sock.send(query(encoded(name), kind))
            return await sock.recv(4096)

    def assert_nothing_is_left(self) -> None:
        assert self.egress._connections == 0  # pyright: ignore[reportPrivateUsage]
        assert self.egress._queries == 0  # pyright: ignore[reportPrivateUsage]
        assert self.egress._pending == {}  # pyright: ignore[reportPrivateUsage]
        assert self.channel._streams == {}  # pyright: ignore[reportPrivateUsage]


async def refuse_all(stream: ChannelStream, _header: dict[str, Any]) -> None:
    await stream.send_all(struct.pack(">H", errno.ECONNREFUSED), end=True)


async def echo(stream: ChannelStream, _header: dict[str, Any]) -> None:
    await stream.send_all(b"\0\0")
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def never(_stream: ChannelStream, _header: dict[str, Any]) -> None:
    await trio.sleep_forever()


def words(*answers: int) -> Callable[[ChannelStream, dict[str, Any]], Awaitable[None]]:
    """Answer lookups with *answers*, one after the other, the last for ever."""
    left = list(answers)

    async def answer(stream: ChannelStream, _header: dict[str, Any]) -> None:
        await stream.send_all(bytes([left.pop(0) if len(left) > 1 else left[0]]), end=True)

    return answer


@asynccontextmanager
async def open_guest(serve: Callable[[ChannelStream, dict[str, Any]], Awaitable[None]]) -> AsyncGenerator[Guest]:
    ours, theirs = trio.testing.memory_stream_pair()
    kernel = FakeKernel()
    requests: list[dict[str, Any]] = []
    hosts: list[Channel] = []
    opened, done = trio.Event(), trio.Event()
    guest: Guest | None = None

    def handle(stream: ChannelStream, header: dict[str, object]) -> Awaitable[None]:
        requests.append(header)
        assert guest is not None
        return guest.serve(stream, header)

    async def host() -> None:
        async with open_channel(ours, role=Role.HOST, hello={}, handler=handle) as channel:
            hosts.append(channel)
            opened.set()
            await done.wait()

    with contextlib.closing(kernel):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host)
            async with open_channel(theirs, role=Role.GUEST, hello={}) as channel:
                await opened.wait()
                egress = Egress(kernel, channel, LoopbackNames())
                guest = Guest(kernel, egress, hosts[0], channel, requests, serve)
                async with trio.open_nursery() as programs:
                    programs.start_soon(egress.run)
                    yield guest
                    programs.cancel_scope.cancel(reason="the test is over")
                guest.assert_nothing_is_left()
            done.set()


async def connected(sock: socket.socket, port: int) -> trio.SocketStream:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    await stream.socket.connect(("127.0.0.1", port))
    return stream


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.005)


# --- Connections ---


async def test_a_program_is_let_in_when_the_host_has_connected_and_both_ends_end_by_themselves() -> None:
    async with open_guest(echo) as guest, guest.program() as (port, sock):
        await until(lambda: guest.kernel.let_in_ports == [port])
        assert guest.requests == [{"service": "connect", "host": "web.test", "port": guest.kernel.port}]
        stream = await connected(sock, guest.kernel.port)
        await stream.send_all(b"hello")
        await stream.send_eof()
        assert b"".join([data async for data in stream]) == b"hello"
        await until(lambda: not guest.channel._streams)  # pyright: ignore[reportPrivateUsage]
        await trio.testing.wait_all_tasks_blocked()
        guest.assert_nothing_is_left()
        assert guest.kernel.refused == []


async def test_a_program_that_is_there_when_it_is_let_in_waits_for_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a real kernel, which has completed the connection when the packet was sent."""
    async with open_guest(echo) as guest:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))

            def let_in(syn: Syn) -> None:
                guest.kernel.let_in_ports.append(syn.source_port)
                sock.connect(("127.0.0.1", guest.kernel.port))

            monkeypatch.setattr(guest.kernel, "let_in", let_in)
            port = sock.getsockname()[1]
            guest.kernel.send_syn(port)
            await until(lambda: guest.kernel.let_in_ports == [port])
            sock.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert b"".join([data async for data in stream]) == b"hello"
        await until(lambda: not guest.channel._streams)  # pyright: ignore[reportPrivateUsage]
        guest.assert_nothing_is_left()


async def test_an_answer_in_two_pieces_with_all_that_there_is_to_say_behind_it() -> None:
    """The host has closed the stream before anything of it is read: the program gets all of it."""

    async def serve(stream: ChannelStream, _header: dict[str, Any]) -> None:
        await stream.send_all(b"\0")
        await trio.testing.wait_all_tasks_blocked()
        assert guest.kernel.let_in_ports == []
        await stream.send_and_close(b"\0" + b"x" * 100_000)

    async with open_guest(serve) as guest, guest.program() as (port, sock):
        await until(lambda: guest.kernel.let_in_ports == [port])
        stream = await connected(sock, guest.kernel.port)
        assert b"".join([data async for data in stream]) == b"x" * 100_000
        await until(lambda: not guest.channel._streams)  # pyright: ignore[reportPrivateUsage]
        await until(lambda: guest.egress._connections == 0)  # pyright: ignore[reportPrivateUsage]
        guest.assert_nothing_is_left()


async def test_a_question_that_is_answered_takes_no_further_write() -> None:
    """The host closes with its answer, and the agent has nothing to say to that: a port's write wakes the other side."""

    async def serve(stream: ChannelStream, _header: dict[str, Any]) -> None:
        lookup = _header["service"] == "lookup"
        await stream.send_and_close(bytes([THERE_IS]) if lookup else struct.pack(">H", errno.ECONNREFUSED))

    async with open_guest(serve) as guest:
        before = guest.channel.statistics().writes
        assert code(await guest.ask("a.org")) == dns.NOERROR
        async with guest.program():
            await until(lambda: guest.kernel.refused)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.channel.statistics().writes == before + 2
        guest.assert_nothing_is_left()


@pytest.mark.parametrize("number", [errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES])
async def test_a_program_sees_the_error_of_the_host(number: int) -> None:
    async def refuse(stream: ChannelStream, _header: dict[str, Any]) -> None:
        await stream.send_all(struct.pack(">H", number), end=True)

    async with open_guest(refuse) as guest, guest.program() as (port, _):
        await until(lambda: guest.kernel.refused == [(port, number)])
        await trio.testing.wait_all_tasks_blocked()
        assert guest.kernel.let_in_ports == []
        guest.assert_nothing_is_left()


@pytest.mark.parametrize("answer", [struct.pack(">H", errno.ETIMEDOUT), None])
async def test_a_program_hears_nothing_of_a_timeout_or_a_host_that_goes_away_and_asks_again(
    answer: bytes | None,
) -> None:
    async def serve(stream: ChannelStream, _header: dict[str, Any]) -> None:
        if answer is None:
            stream.reset("refused")
        else:
            await stream.send_all(answer, end=True)

    async with open_guest(serve) as guest, guest.program() as (port, _):
        await until(lambda: guest.requests)
        await trio.testing.wait_all_tasks_blocked()
        assert (guest.kernel.refused, guest.kernel.let_in_ports) == ([], [])
        guest.assert_nothing_is_left()
        guest.serve = refuse_all
        guest.kernel.send_again(port)
        await until(lambda: guest.kernel.refused == [(port, errno.ECONNREFUSED)])


async def test_an_address_that_means_no_name_is_refused_and_asks_nobody() -> None:
    async with open_guest(never) as guest:
        guest.kernel.send_syn(40_000, target=socket.inet_aton("198.18.77.77"), target_port=443)
        guest.kernel.send_syn(40_001, target=RESOLVER.packed, target_port=80)
        guest.kernel.send_syn(39_999, target_port=0)
        guest.kernel.send_syn(40_002, target=RESOLVER.packed, target_port=53)
        await until(lambda: guest.kernel.let_in_ports == [40_002])
        assert guest.kernel.refused == [
            (40_000, errno.EHOSTUNREACH),
            (40_001, errno.ECONNREFUSED),
            (39_999, errno.ECONNREFUSED),
        ]
        assert guest.requests == []


async def test_a_packet_that_is_sent_again_dials_once() -> None:
    async with open_guest(never) as guest, guest.program() as (port, _):
        for _ in range(5):
            guest.kernel.send_again(port)
        await trio.testing.wait_all_tasks_blocked()
        await until(lambda: guest.requests)
        await trio.testing.wait_all_tasks_blocked()
        assert len(guest.requests) == 1


async def test_a_packet_that_is_seen_after_its_answer_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine it was sent again before the answer, and comes to us after it."""
    monkeypatch.setattr(egress_module, "_MOST_CONNECTIONS", 3)
    async with open_guest(echo) as guest, guest.program() as (port, sock):
        await until(lambda: guest.kernel.let_in_ports)
        stream = await connected(sock, guest.kernel.port)
        await until(lambda: not guest.egress._pending)  # pyright: ignore[reportPrivateUsage]
        guest.kernel.send_again(port)
        stream.socket.close()
        await trio.testing.wait_all_tasks_blocked()
        guest.kernel.send_again(port)
        await trio.testing.wait_all_tasks_blocked()
        assert (len(guest.requests), guest.kernel.let_in_ports, guest.kernel.refused) == (1, [port], [])
        # A refusal is said again.
        guest.serve = refuse_all
        refused = guest.kernel.refused
        for count in range(1, 11):
            guest.kernel.send_syn(40_000 + count)
            await until(partial(operator.contains, refused, (40_000 + count, errno.ECONNREFUSED)))
        guest.kernel.send_again(40_010)
        await until(lambda: refused[9:] == [(40_010, errno.ECONNREFUSED)] * 2)
        assert len(guest.requests) == 11
        assert len(guest.egress._settled) == 3  # pyright: ignore[reportPrivateUsage]


async def test_a_program_that_gave_up_has_the_host_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "_ACCEPT_PATIENCE", 0.05)
    ended = trio.Event()

    async def serve(stream: ChannelStream, _header: dict[str, Any]) -> None:
        await stream.send_all(b"\0\0")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        ended.set()

    async with open_guest(serve) as guest:
        guest.kernel.send_syn(40_000)
        await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        guest.assert_nothing_is_left()


async def test_a_connection_that_nobody_asked_for_is_reset() -> None:
    async with open_guest(never) as guest:
        with socket.socket() as sock:
            sock.setblocking(False)
            stream = await connected(sock, guest.kernel.port)
            with pytest.raises(trio.BrokenResourceError) as caught:
                await stream.receive_some()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert guest.requests == []


async def test_so_many_connections_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "_MOST_CONNECTIONS", 3)
    async with open_guest(never) as guest:
        for port in range(40_000, 40_010):
            guest.kernel.send_syn(port)
        await until(lambda: len(guest.requests) == 3)
        await trio.testing.wait_all_tasks_blocked()
        assert guest.kernel.refused == []
        for stream in list(guest.host._streams.values()):  # pyright: ignore[reportPrivateUsage]
            stream.reset("over")
        await trio.testing.wait_all_tasks_blocked()
        guest.kernel.send_syn(40_009)
        await until(lambda: len(guest.requests) == 4)


async def test_without_descriptors_accepting_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    class Listener:
        def __init__(self, real: socket.socket) -> None:
            self._real = real
            self.fileno = real.fileno
            self.close = real.close
            self.getsockname = real.getsockname

        def accept(self) -> Any:
            nonlocal tries
            tries += 1
            if tries <= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return self._real.accept()

    monkeypatch.setattr(egress_module, "_PAUSE", 0.01)
    async with open_guest(echo) as guest:
        guest.kernel.listener = Listener(guest.kernel.listener)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        with socket.socket() as first:  # has the task that accepts look at the new listener
            first.setblocking(False)
            (await connected(first, guest.kernel.port)).socket.close()
            async with guest.program() as (_, sock):
                await until(lambda: guest.kernel.let_in_ports)
                stream = await connected(sock, guest.kernel.port)
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
        assert 3 < tries < 20


async def test_an_interface_that_is_down_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "_PAUSE", 0.01)
    async with open_guest(refuse_all) as guest:
        guest.kernel.down = 3
        guest.kernel.send_syn(40_000)
        await until(lambda: guest.kernel.refused)
        assert guest.kernel.down == 0


async def test_a_port_that_is_used_again_belongs_to_the_new_connection() -> None:
    """A program resets its connection, and connects from the same port, while the host has not read the first one's data."""

    async def serve(stream: ChannelStream, _header: dict[str, Any]) -> None:
        if len(guest.requests) == 1:
            await stream.send_all(b"\0\0")
            await first_may_end.wait()
        else:
            await second_may_connect.wait()
            await echo(stream, _header)

    first_may_end, second_may_connect = trio.Event(), trio.Event()
    async with open_guest(serve) as guest, guest.program() as (port, sock):
        await until(lambda: guest.kernel.let_in_ports)
        stream = await connected(sock, guest.kernel.port)
        pending = guest.egress._pending  # pyright: ignore[reportPrivateUsage]
        await until(lambda: not pending)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        guest.kernel.send_syn(port)
        await until(lambda: len(guest.requests) == 2)
        first_may_end.set()
        stream.socket.close()
        await until(lambda: guest.egress._connections == 1)  # pyright: ignore[reportPrivateUsage]
        assert list(pending) == [guest.kernel.sent[port].key]
        second_may_connect.set()
        await until(lambda: len(guest.kernel.let_in_ports) == 2)
        with socket.socket() as again:
            again.setblocking(False)
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
            stream = await connected(again, guest.kernel.port)
            await stream.send_all(b"second")
            await stream.send_eof()
            assert b"".join([data async for data in stream]) == b"second"


# --- Names ---


def code(answer: bytes) -> int:
    return answer[3] & 15


async def test_a_name_that_there_is_has_an_address_of_ours_and_nothing_else() -> None:
    async with open_guest(words(THERE_IS)) as guest:
        answer = await guest.ask("Web.Example.org")
        assert (code(answer), answer[-4:-2]) == (dns.NOERROR, b"\xc6\x12")
        for kind in (dns.AAAA, 65, 64, 16, 15, 33, 10, 255):  # HTTPS, SVCB, TXT, MX, SRV, NULL, ANY
            other = await guest.ask("web.example.org", kind)
            assert code(other) == dns.NOERROR
            assert struct.unpack_from(">H", other, 6) == (0,)
        assert guest.requests == [{"service": "lookup", "name": "web.example.org"}]


@pytest.mark.parametrize(
    ("word", "expected"), [(REFUSED, dns.NXDOMAIN), (NO_SUCH_NAME, dns.NXDOMAIN), (TRY_LATER, dns.SERVFAIL), (77, dns.SERVFAIL)]
)  # fmt: skip
async def test_all_kinds_of_records_have_the_same_code(word: int, expected: int) -> None:
    async with open_guest(words(word)) as guest:
        for kind in (dns.A, dns.AAAA, 65, 16):
            assert code(await guest.ask("a.org", kind)) == expected
        assert len(guest.requests) == 1


async def test_the_host_is_asked_once_for_both_families() -> None:
    go_on = trio.Event()

    async def slow(stream: ChannelStream, _header: dict[str, Any]) -> None:
        await go_on.wait()
        await stream.send_all(bytes([THERE_IS]), end=True)

    answers: list[bytes] = []

    async def ask(kind: int) -> None:
        answers.append(await guest.ask("a.org", kind))

    async with open_guest(slow) as guest:
        async with trio.open_nursery() as nursery:
            for kind in (dns.A, dns.AAAA, dns.A):
                nursery.start_soon(ask, kind)
            await until(lambda: guest.egress._queries == 3)  # pyright: ignore[reportPrivateUsage]
            go_on.set()
        assert len(guest.requests) == 1
        assert [code(answer) for answer in answers] == [dns.NOERROR] * 3


async def test_nobody_is_asked_for_what_the_guest_knows_itself() -> None:
    async with open_guest(never) as guest:
        assert (await guest.ask("localhost"))[-4:] == LOOPBACK
        assert (await guest.ask("a.localhost", dns.AAAA))[-16:] == bytes(15) + b"\1"
        assert code(await guest.ask("1.0.0.127.in-addr.arpa", dns.PTR)) == dns.NOERROR
        assert code(await guest.ask("9.9.9.9.in-addr.arpa", dns.PTR)) == dns.NXDOMAIN
        assert guest.requests == []


async def test_names_over_tcp_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "_RESOLVER", socket.inet_ntoa(LOOPBACK))  # where the test's listener is
    async with open_guest(words(THERE_IS)) as guest:
        async with await trio.open_tcp_stream("127.0.0.1", guest.kernel.port) as stream:
            for name in ("a.org", "b.org"):
                data = query(encoded(name))
                for piece in (len(data).to_bytes(2, "big")[:1], len(data).to_bytes(2, "big")[1:] + data[:5], data[5:]):
                    await stream.send_all(piece)
                answer = b""
                while len(answer) < 2 or len(answer) < 2 + int.from_bytes(answer[:2], "big"):
                    answer += await stream.receive_some() or pytest.fail("it ended")
                assert code(answer[2:]) == dns.NOERROR
            await stream.send_all(b"\0\0")  # a frame of no length
            assert await stream.receive_some() == b""
        for junk in (b"\xff\xff" + bytes(100), b"\0\5hello", b"\0"):
            async with await trio.open_tcp_stream("127.0.0.1", guest.kernel.port) as stream:
                await stream.send_all(junk)
                await stream.send_eof()
                with contextlib.suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
        await until(lambda: guest.egress._queries == 0)  # pyright: ignore[reportPrivateUsage]


async def test_so_many_lookups_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "_MOST_LOOKUPS", 3)
    async with open_guest(never) as guest:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for number in range(10):
                sock.sendto(query(encoded(f"n{number}.org")), guest.kernel.queries.getsockname())
            sock.sendto(query(encoded("localhost")), guest.kernel.queries.getsockname())
            await trio.lowlevel.wait_readable(sock)  # what needs no host is answered still
        await until(lambda: len(guest.requests) == 3)
        await trio.testing.wait_all_tasks_blocked()
        assert len(guest.requests) == 3


async def test_junk_has_no_answer_and_ends_nothing() -> None:
    async with open_guest(words(THERE_IS)) as guest:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for data in (
                b"",
                b"x",
                b"\xff" * 4000,
                query(b"\xc0\x0c"),
                query(encoded("a.b"), counts="2 0 0 0"),
                os.urandom(300),
            ):
                sock.sendto(data, guest.kernel.queries.getsockname())
        assert code(await guest.ask("a.org")) == dns.NOERROR


async def test_an_answer_that_comes_after_the_policy_has_changed_is_not_kept() -> None:
    go_on = trio.Event()

    async def late(stream: ChannelStream, _header: dict[str, Any]) -> None:
        if len(guest.requests) == 1:
            await go_on.wait()
            await stream.send_all(bytes([REFUSED]), end=True)
        else:
            await stream.send_all(bytes([THERE_IS]), end=True)

    async with open_guest(late) as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.ask, "a.org")
            await until(lambda: guest.requests)
            guest.egress.forget()
            assert code(await guest.ask("a.org")) == dns.NOERROR  # not what the first one is told
            go_on.set()
        assert code(await guest.ask("a.org")) == dns.NOERROR
        assert len(guest.requests) == 2


async def test_what_the_host_says_is_forgotten_when_the_policy_changes() -> None:
    async with open_guest(words(REFUSED, THERE_IS)) as guest:
        assert code(await guest.ask("a.org")) == dns.NXDOMAIN
        assert code(await guest.ask("a.org")) == dns.NXDOMAIN
        guest.egress.forget()
        assert code(await guest.ask("a.org")) == dns.NOERROR


async def test_words_are_kept_of_so_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups_module, "_REMEMBERED", 4)
    async with open_guest(words(THERE_IS)) as guest:
        for number in range(20):
            await guest.ask(f"n{number}.org")
        lookups = guest.egress._lookups  # pyright: ignore[reportPrivateUsage]
        assert len(lookups._known) == 4  # pyright: ignore[reportPrivateUsage]
        assert not lookups._asking  # pyright: ignore[reportPrivateUsage]


# --- Conversations that end ---


@pytest.mark.parametrize("steps", range(30))
async def test_a_conversation_that_ends_at_any_moment_leaves_nothing(steps: int) -> None:
    async def serve(stream: ChannelStream, header: dict[str, Any]) -> None:
        await (words(THERE_IS)(stream, header) if header["service"] == "lookup" else echo(stream, header))

    descriptors = len(os.listdir("/proc/self/fd"))
    async with open_guest(serve) as guest, guest.program() as (_, sock):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(query(encoded("a.org")), guest.kernel.queries.getsockname())
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", guest.kernel.port))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
                with contextlib.suppress(OSError):
                    sock.send(b"x")
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_channel_that_is_lost_during_a_lookup_a_dial_and_a_transfer() -> None:
    async def serve(stream: ChannelStream, header: dict[str, Any]) -> None:
        if len(guest.requests) == 1:
            await echo(stream, header)
        else:
            await trio.sleep_forever()

    async with open_guest(serve) as guest, guest.program() as (_, sock):
        await until(lambda: guest.kernel.let_in_ports)
        stream = await connected(sock, guest.kernel.port)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        async with guest.program() as (held, _):
            asked: list[bytes] = []

            async def ask() -> None:
                asked.append(await guest.ask("a.org"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await until(lambda: len(guest.requests) == 3)
                guest.host.feed(b"\xff" * 100)  # the host breaks it off
            assert code(asked[0]) == dns.SERVFAIL
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            await trio.testing.wait_all_tasks_blocked()
            guest.assert_nothing_is_left()
            assert guest.kernel.refused == []
            guest.kernel.send_syn(held)  # it comes again, and nobody is there to ask: no answer, no end
            await trio.testing.wait_all_tasks_blocked()
            guest.assert_nothing_is_left()
