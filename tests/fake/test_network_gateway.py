"""The host's side of a guest's connections, with a guest that the tests play."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from tests.unit.test_network_hello import hello
from trio_sandbox import Network, NetworkEvent, NetworkRule
from trio_sandbox.network import (
    Gateway,
    HostResolver,
    Proxy,
    Trust,
    _gateway as gateway_module,
    _resolver as resolver_module,
    find_proxy,
)
from trio_sandbox.wire import Channel, ChannelStream, Role, StreamResetError, WireError, open_channel

THERE_IS, REFUSED, NO_SUCH_NAME, TRY_LATER = range(4)


@attrs.define
class FakeDns:
    """Addresses of names, and how often each was asked for."""

    addresses: dict[str, Iterable[str]]
    asked: list[str] = attrs.field(factory=list[str])

    def look_up(self, name: str) -> Iterable[str]:
        name = name.removesuffix(".")
        self.asked.append(name)
        found = self.addresses.get(name)
        if found is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if isinstance(found, Exception):
            raise found
        return next(found) if hasattr(found, "__next__") else found  # type: ignore[call-overload]


@attrs.define
class Site:
    gateway: Gateway
    guest: Channel
    host: Channel
    dns: FakeDns
    events: list[NetworkEvent]

    async def look_up(self, name: str) -> int:
        async with self.guest.open_stream({"service": "lookup", "name": name}) as stream:
            (answer,) = await receive_all(stream)
            return answer

    async def connect(self, host: str, port: int = 80) -> ChannelStream:
        stream = self.guest.open_stream({"service": "connect", "host": host, "port": port})
        number = int.from_bytes(await receive_exactly(stream, 2), "big")
        if number:
            assert await stream.receive_some(1) == b""
            stream.close()
            raise RefusedError(number, "")
        return stream

    async def refusal(self, host: str, port: int = 80) -> int:
        """Return the errno by which a connection fails."""
        with pytest.raises(RefusedError) as caught:
            await self.connect(host, port)
        assert caught.value.errno is not None
        return caught.value.errno


class RefusedError(OSError):
    """The host did not connect."""


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    while piece := await stream.receive_some(10_000):
        data += piece
    return data


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        assert piece
        data += piece
    return data


@asynccontextmanager
async def open_network(
    network: Network,
    addresses: dict[str, Any] | None = None,
    *,
    proxy: Proxy | None = None,
    timeout: float = 30,
    trust: Trust | None = None,
) -> AsyncGenerator[Site]:
    dns = FakeDns(addresses or {})
    gateway = Gateway(network, HostResolver(dns.look_up), connect_timeout=timeout, proxy=proxy, trust=trust)
    ours, theirs = trio.testing.memory_stream_pair()
    events: list[NetworkEvent] = []

    hosts: list[Channel] = []
    opened, done = trio.Event(), trio.Event()

    async def note() -> None:
        with gateway.watch() as watch:
            async for event in watch:
                events.append(event)  # noqa: PERF401 - seen at once

    async def serve() -> None:
        async with open_channel(ours, role=Role.HOST, hello={}, handler=gateway.handle) as host:
            hosts.append(host)
            opened.set()
            await done.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(note)
        nursery.start_soon(serve)  # noqa: ASYNC113 - the block waits for what it does
        async with open_channel(theirs, role=Role.GUEST, hello={}) as guest:
            await opened.wait()
            yield Site(gateway, guest, hosts[0], dns, events)
            await trio.testing.wait_all_tasks_blocked()
        done.set()
        nursery.cancel_scope.cancel(reason="the test is over")


@asynccontextmanager
async def open_server(serve: Callable[[trio.SocketStream], Any]) -> AsyncGenerator[int]:
    """Serve TCP on loopback; yield the port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel(reason="the test is over")


async def echo(stream: trio.abc.HalfCloseableStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(10_000):
            await stream.send_all(data)
        await stream.send_eof()


def local(port: int, **more: Any) -> NetworkRule:
    return NetworkRule("db.local", to=("127.0.0.1", port), **more)


# --- Names ---


async def test_names_are_looked_up_by_the_policy_first() -> None:
    addresses = {
        "good.org": ["93.184.215.14"],
        "mixed.org": ["10.0.0.1", "93.184.215.14"],
        "inside.org": ["10.0.0.1", "::1"],
        "later.org": socket.gaierror(socket.EAI_AGAIN, "later"),
    }
    async with open_network(Network.allow(*addresses, "none.org", "db.local:5432"), addresses) as site:
        assert await site.look_up("good.org") == THERE_IS
        assert await site.look_up("mixed.org") == THERE_IS
        assert await site.look_up("inside.org") == REFUSED
        assert await site.look_up("none.org") == NO_SUCH_NAME
        assert await site.look_up("later.org") == TRY_LATER
        site.dns.asked.clear()
        assert await site.look_up("secret.evil.org") == REFUSED
        assert await site.look_up("good.org.evil.org") == REFUSED
        assert await site.look_up("GOOD.org") == NO_SUCH_NAME
        assert await site.look_up("good.org.") == NO_SUCH_NAME
        assert await site.look_up("127.0.0.1") == NO_SUCH_NAME
        assert await site.look_up("good.org\r\nevil: yes") == NO_SUCH_NAME
        assert site.dns.asked == []
    outcomes = {event.host: event.outcome for event in site.events}
    assert outcomes["secret.evil.org"] == "refused by policy"
    assert outcomes["inside.org"] == "not a public address"
    assert all(event.host.isprintable() and event.error.isprintable() for event in site.events)
    assert site.gateway.statistics().lookups == 11


async def test_an_answer_counts_for_a_while_and_for_this_sandbox() -> None:
    async with open_network(Network.allow("a.org"), {"a.org": ["93.184.215.14"]}) as site:
        for _ in range(5):
            await site.look_up("a.org")
        assert site.dns.asked == ["a.org"]


async def test_so_many_names_below_a_wildcard_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "_MOST_NAMES", 3)
    async with open_network(Network.allow("*.a.org"), {f"n{n}.a.org": ["93.184.215.14"] for n in range(5)}) as site:
        answers = [await site.look_up(f"n{n}.a.org") for n in range(5)]
        assert answers == [THERE_IS] * 3 + [REFUSED] * 2
        assert await site.look_up("n1.a.org") == THERE_IS
    assert site.events[-1].outcome == "over the limit"


# --- Connections ---


async def test_bytes_go_both_ways_and_ends_by_themselves() -> None:
    async with open_server(echo) as port, open_network(Network.allow(local(port))) as site:
        stream = await site.connect("db.local")
        await stream.send_all(b"x" * 300_000)
        await stream.send_eof()
        assert await receive_all(stream) == b"x" * 300_000
        await stream.aclose()
    (event,) = site.events
    assert (event.host, event.port, event.address, event.outcome, event.error) == (
        "db.local",
        80,
        "127.0.0.1",
        "closed",
        "",
    )
    assert (event.bytes_sent, event.bytes_received) == (300_000, 300_000)
    numbers = site.gateway.statistics()
    assert (numbers.open_connections, numbers.connections, numbers.bytes_sent) == (0, 1, 300_000)


async def test_an_answer_comes_after_the_guest_has_ended() -> None:
    async def answer_late(stream: trio.SocketStream) -> None:
        assert await receive_all(stream) == b"question"
        await stream.send_all(b"answer")

    async with open_server(answer_late) as port, open_network(Network.allow(local(port))) as site:
        stream = await site.connect("db.local")
        await stream.send_all(b"question", end=True)
        assert await receive_all(stream) == b"answer"


async def test_what_a_slow_server_does_not_take_at_once_comes_whole_and_counts_once() -> None:
    message = bytes(number * number % 251 for number in range(1000)) * 6000
    may_read = trio.Event()
    got = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        await may_read.wait()
        while data := await stream.receive_some(9999):
            got.extend(data)
        await stream.send_eof()

    async with open_server(serve) as port, open_network(Network.allow(local(port))) as site:
        stream = await site.connect("db.local")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(stream.send_all, message, end=True))
            await trio.testing.wait_all_tasks_blocked(0.01)  # the socket is full, and the credit is used up
            assert 0 < site.gateway.statistics().bytes_sent < len(message)
            may_read.set()
            assert await receive_all(stream) == b""
    assert got == message
    assert [(event.outcome, event.bytes_sent) for event in site.events] == [("closed", len(message))]


async def test_a_server_that_breaks_an_upload_off_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def break_off(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    async with open_server(break_off) as port, open_network(Network.allow(local(port))) as site:
        stream = await site.connect("db.local")
        with pytest.raises(StreamResetError):
            while True:
                await stream.send_all(bytes(10_000))
    assert [event.outcome for event in site.events] == ["reset"]
    assert "report this" not in caplog.text


async def test_a_reset_is_a_reset_both_ways() -> None:
    seen = trio.Event()

    async def break_off(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1) == b"?":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.socket.close()
        else:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            seen.set()

    async with open_server(break_off) as port, open_network(Network.allow(local(port))) as site:
        stream = await site.connect("db.local")
        await stream.send_all(b"?")
        with pytest.raises(StreamResetError):
            await receive_all(stream)
        stream = await site.connect("db.local")
        await stream.send_all(b"!")
        await trio.testing.wait_all_tasks_blocked()
        stream.reset("enough")
        await seen.wait()
    assert [event.outcome for event in site.events] == ["reset", "reset"]


async def test_what_may_not_be_connected_to_is_not() -> None:
    async with open_server(echo) as port:
        addresses = {
            "inside.org": ["127.0.0.1"],
            "metadata.org": ["169.254.169.254", "fd00:ec2::254"],
            "mapped.org": ["::ffff:127.0.0.1", "64:ff9b::7f00:1"],
        }
        async with open_network(
            Network.allow(*(NetworkRule(name, port=port) for name in addresses)), addresses
        ) as site:
            for name in addresses:
                assert await site.refusal(name, port) == errno.EHOSTUNREACH
            for host, wrong in (("inside.org", 22), ("other.org", port), ("a b", port)):
                assert await site.refusal(host, wrong) == errno.EACCES
    assert [event.outcome for event in site.events] == ["not a public address"] * 3 + [
        "refused by policy",
        "refused by policy",
        "no such host",
    ]
    assert "private=True" in site.events[0].error
    assert "Network.allow('inside.org:22')" in site.events[3].error


async def test_private_addresses_take_a_word_and_this_machine_another() -> None:
    async with open_server(echo) as port:
        addresses = {"inside.org": ["127.0.0.1"]}
        for private in (True, "loopback"):
            rule = NetworkRule("inside.org", port=port, private=private)
            async with open_network(Network.allow(rule), addresses) as site:
                if private is True:
                    assert await site.refusal("inside.org", port)
                else:
                    stream = await site.connect("inside.org", port)
                    await stream.send_all(b"hi", end=True)
                    assert await receive_all(stream) == b"hi"


async def test_a_name_that_leads_elsewhere_the_next_time_does_not_lead_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "_FRESH", 0.0)
    answers = iter([["93.184.215.14"], ["127.0.0.1"], ["127.0.0.1"]])
    async with open_server(echo) as port:
        async with open_network(Network.allow(NetworkRule("evil.org", port=port)), {"evil.org": answers}) as site:
            assert await site.look_up("evil.org") == THERE_IS
            assert await site.refusal("evil.org", port) == errno.EHOSTUNREACH


async def test_the_guest_hears_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_server(echo) as port:
        pass  # nobody listens there now
    async with open_network(Network.allow(local(port), "none.org")) as site:
        assert await site.refusal("db.local") == errno.ECONNREFUSED
        assert await site.refusal("none.org") == errno.EHOSTUNREACH
    assert [event.outcome for event in site.events] == ["failed", "no such host"]
    del monkeypatch


async def test_a_connection_has_so_long_to_come_about() -> None:
    async def never() -> Any:
        await trio.sleep_forever()

    async with open_network(Network.allow(NetworkRule("slow.local", to=never)), timeout=0.05) as site:
        assert await site.refusal("slow.local") == errno.ETIMEDOUT


async def test_a_name_can_lead_to_a_function() -> None:
    async def open_pair() -> trio.testing.MemorySendStream:
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(echo, theirs)
        return ours  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    async with trio.open_nursery() as nursery:
        async with open_network(Network.allow(NetworkRule("db.local", port=5432, to=open_pair))) as site:  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            assert await site.look_up("db.local") == THERE_IS
            stream = await site.connect("db.local", 5432)
            await stream.send_all(b"select 1", end=True)
            assert await receive_all(stream) == b"select 1"
            assert site.dns.asked == []


async def test_a_function_that_fails_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> Any:
        raise RuntimeError("the database is on fire")

    async with open_server(echo) as port:
        rules = NetworkRule("bad.local", to=fail), local(port)
        async with open_network(Network.allow(*rules)) as site:
            assert await site.refusal("bad.local")
            stream = await site.connect("db.local")
            await stream.send_all(b"hi", end=True)
            assert await receive_all(stream) == b"hi"
    assert "the database is on fire" in site.events[0].error
    assert "the function of a NetworkRule failed" in caplog.text


async def test_a_bug_in_one_connection_is_told_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server(echo) as port, open_network(Network.allow(local(port))) as site:
        with monkeypatch.context() as patch:
            patch.setattr(gateway_module, "Relay", None)
            stream = site.guest.open_stream({"service": "connect", "host": "db.local", "port": 80})
            with pytest.raises((StreamResetError, AssertionError)):
                await receive_exactly(stream, 3)
        stream = await site.connect("db.local")
        await stream.send_all(b"hi", end=True)
        assert await receive_all(stream) == b"hi"
    assert "please report this" in caplog.text
    caplog.clear()


# --- Server names ---


async def test_on_port_443_the_guest_must_name_whom_it_asked_for() -> None:
    got: list[bytes] = []

    async def note(stream: trio.SocketStream) -> None:
        data = b""
        with pytest.raises(trio.BrokenResourceError):
            while True:
                data += await stream.receive_some(10_000) or pytest.fail("an end instead of a reset")
                got.append(data)

    async with open_server(note) as port:
        rules = Network.allow(local(port, tls="named"))
        for sent in (hello("evil.org"), hello(None), b"GET / HTTP/1.1\r\n\r\n"):
            async with open_network(rules) as site:
                stream = await site.connect("db.local", 443)
                with pytest.raises((StreamResetError, trio.BrokenResourceError)):
                    await stream.send_all(sent)
                    await receive_all(stream)
            assert site.events[0].outcome == "wrong server name"
            assert "tls='any'" in site.events[0].error
    assert got == []


async def test_the_right_name_goes_through_in_pieces_and_the_server_may_speak_first() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 ready")
        await echo(stream)

    data = hello("db.local") + b"early"
    async with open_server(greet) as port, open_network(Network.allow(local(port, tls="named"))) as site:
        stream = await site.connect("db.local", 443)
        assert await receive_exactly(stream, 9) == b"220 ready"
        for piece in (data[:1], data[1:100], data[100:]):
            await stream.send_all(piece)
        await stream.send_eof()
        assert await receive_all(stream) == data


# --- Limits ---


async def test_bytes_have_a_limit() -> None:
    async with open_server(echo) as port:
        async with open_network(Network.allow(local(port), max_sent_bytes=1000)) as site:
            stream = await site.connect("db.local")
            with pytest.raises((StreamResetError, trio.BrokenResourceError)):
                await stream.send_all(bytes(2000))
                await receive_all(stream)
            assert await site.refusal("db.local") == errno.EACCES
            assert await site.look_up("db.local") == REFUSED
    assert [event.outcome for event in site.events] == ["over the limit"] * 3
    assert "max_sent_bytes is 1000" in site.events[0].error


async def test_what_is_over_the_limit_never_goes_on() -> None:
    got = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                got.extend(data)

    async with open_server(serve) as port:
        async with open_network(Network.allow(local(port), max_sent_bytes=1000)) as site:
            stream = await site.connect("db.local")
            await stream.send_all(bytes(900))
            while len(got) < 900:
                await trio.sleep(0.001)
            with pytest.raises((StreamResetError, trio.BrokenResourceError)):
                while True:  # in one write, and in any number of them
                    await stream.send_all(bytes(101))
    assert len(got) == 900
    assert [event.outcome for event in site.events] == ["over the limit"]


async def test_so_many_connections_at_a_time_and_others_wait() -> None:
    async with open_server(echo) as port:
        async with open_network(Network.allow(local(port), max_connections=2)) as site:
            first, _second = await site.connect("db.local"), await site.connect("db.local")
            third = site.guest.open_stream({"service": "connect", "host": "db.local", "port": 80})
            await trio.testing.wait_all_tasks_blocked()
            assert site.gateway.statistics().open_connections == 2
            await first.send_eof()
            assert await receive_all(first) == b""
            assert await receive_exactly(third, 2) == b"\0\0"


async def test_a_flood_of_requests_is_let_through_slowly(autojump_clock: trio.testing.MockClock) -> None:
    addresses = {f"n{n}.a.org": ["93.184.215.14"] for n in range(201)}
    async with open_network(Network.allow("*.a.org"), addresses) as site:
        # By a lookup without a thread: the clock of this test does not wait for threads.
        async with trio.open_nursery() as nursery:
            site.gateway.dialer.resolve = lambda name: _at_once(addresses[name.removesuffix(".")])  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]
            for name in addresses:
                nursery.start_soon(site.look_up, name)
        assert trio.current_time() - 0 >= 2.0
    del autojump_clock


async def _at_once(value: list[str]) -> tuple[str, ...]:
    await trio.lowlevel.checkpoint()
    return tuple(value)


@pytest.mark.parametrize(
    "header",
    [
        {"service": "exec", "argv": ["rm"]},
        {"service": "lookup"},
        {"service": "lookup", "name": 1},
        {"service": "connect", "host": "db.local"},
        {"service": "connect", "host": "db.local", "port": "80"},
        {"service": "connect", "host": "db.local", "port": 0},
        {"service": "connect", "host": "db.local", "port": 65536},
        {"service": "connect", "host": "db.local", "port": True},
        {"service": "connect", "host": None, "port": 80},
    ],
)
async def test_a_guest_that_asks_as_no_agent_does_breaks_the_protocol(header: dict[str, Any]) -> None:
    async with open_network(Network.allow("db.local")) as site:
        site.guest.open_stream(header, flush=True)
        assert isinstance(await site.host.wait_closed(), WireError)


async def test_a_guest_with_too_many_requests_breaks_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "_MOST_STREAMS", 3)

    async def never() -> Any:
        await trio.sleep_forever()

    async with open_network(Network.allow(NetworkRule("slow.local", to=never))) as site:
        for _ in range(4):
            site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80}, flush=True)
            await trio.testing.wait_all_tasks_blocked()
        assert isinstance(await site.host.wait_closed(), WireError)


async def test_a_guest_that_gives_up_ends_the_attempt() -> None:
    ended = trio.Event()

    async def never() -> Any:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with open_network(Network.allow(NetworkRule("slow.local", to=never))) as site:
        stream = site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80})
        await trio.testing.wait_all_tasks_blocked()
        stream.reset("changed my mind")
        await ended.wait()
    assert site.events[0].outcome == "reset"


# --- Policies for a block ---


async def test_a_policy_for_a_block_ends_with_its_connections() -> None:
    async with open_server(echo) as port, open_network(Network.allow(local(port))) as site:
        outer = await site.connect("db.local")
        with site.gateway.layer(Network.allow(NetworkRule("inner.local", to=("127.0.0.1", port)))):
            assert await site.refusal("db.local")
            inner = await site.connect("inner.local")
            await inner.send_all(b"hi")
            assert await receive_exactly(inner, 2) == b"hi"
        with pytest.raises(StreamResetError, match="the policy that allowed this connection is over"):
            await receive_all(inner)
        assert await site.refusal("inner.local")
        await outer.send_all(b"still here", end=True)
        assert await receive_all(outer) == b"still here"


async def test_a_connection_that_comes_about_after_its_policy_is_not_one() -> None:
    go_on = trio.Event()

    async def wait() -> Any:
        await go_on.wait()
        return await trio.open_tcp_stream("127.0.0.1", port)

    async with open_server(echo) as port:
        async with open_network(Network.allow(NetworkRule("slow.local", to=wait))) as site:
            stream = site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80})
            await trio.testing.wait_all_tasks_blocked()
            with site.gateway.layer(Network.none()):
                go_on.set()
                assert int.from_bytes(await receive_exactly(stream, 2), "big") == errno.EACCES


async def test_a_copy_has_the_policy_in_force_and_nothing_else() -> None:
    async with open_network(Network.allow("a.org"), {"a.org": ["93.184.215.14"]}) as site:
        await site.look_up("a.org")
        with site.gateway.layer(Network.allow("b.org")):
            copy = site.gateway.copy()
        assert copy.network == Network.allow("b.org")
        assert copy.statistics().lookups == 0
        assert copy.handler is not None
        assert Gateway(Network.none(), HostResolver(), connect_timeout=1).handler is None


# --- Proxies ---


async def test_connections_go_through_a_proxy_by_name() -> None:
    heads: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(1)
        heads.append(head)
        await stream.send_all(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nhello")
        await echo(stream)

    async with open_server(proxy) as port:
        through = Proxy.parse(f"http://user:p%40ss@127.0.0.1:{port}")
        assert "p@ss" not in repr(through)
        async with open_network(Network.allow("a.org"), proxy=through) as site:
            assert await site.look_up("a.org") == THERE_IS
            assert await site.look_up("b.org") == REFUSED
            stream = await site.connect("a.org")
            assert await receive_exactly(stream, 5) == b"hello"
            await stream.send_all(b"hi", end=True)
            assert await receive_all(stream) == b"hi"
        assert site.dns.asked == []
    assert heads[0].startswith(
        b"CONNECT a.org:80 HTTP/1.1\r\nHost: a.org:80\r\nProxy-Authorization: Basic dXNlcjpwQHNz\r\n"
    )


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", errno.EHOSTUNREACH),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", errno.ECONNREFUSED),
        (b"HTTP/1.1 504 Gateway Timeout\r\n\r\n", errno.ETIMEDOUT),
        (b"HTTP/1.1 2000 Odd\r\n\r\n", errno.EHOSTUNREACH),
        (b"SSH-2.0-x\r\n\r\n", errno.EHOSTUNREACH),
        (b"HTTP/1.1 200 OK\r\n", errno.EHOSTUNREACH),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(20_000) + b"\r\n\r\n", errno.EHOSTUNREACH),
    ],
)
async def test_what_a_proxy_says_is_told_to_the_guest(answer: bytes, number: int) -> None:
    async def proxy(stream: trio.SocketStream) -> None:
        with pytest.MonkeyPatch.context():
            try:
                await stream.receive_some(1000)
                await stream.send_all(answer)
            except trio.BrokenResourceError:
                return

    async with open_server(proxy) as port:
        async with open_network(Network.allow("a.org"), proxy=Proxy("127.0.0.1", port)) as site:
            assert await site.refusal("a.org") == number


@pytest.mark.parametrize(
    "url", ["proxy:3128", "https://proxy:3128", "socks5://proxy", "http://", "http://proxy:99999", "http://p/x"]
)
def test_what_is_no_proxy_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="a proxy must be a URL") as caught:
        Proxy.parse(url.replace("://", "://u:secret@"))
    assert "secret" not in str(caught.value)


def test_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert find_proxy(None) is None
    assert find_proxy("environment") is None
    monkeypatch.setenv("https_proxy", "http://proxy.corp:8080")
    assert find_proxy("environment") == Proxy("proxy.corp", 8080)


# --- Logs ---


async def test_refusals_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_sandbox.network")
    async with open_network(Network.allow("a.org")) as site:
        for _ in range(3):
            await site.look_up("b.org")
    assert len([record for record in caplog.records if "b.org" in record.getMessage()]) == 1
    assert len(site.events) == 3


async def test_a_watch_keeps_the_newest() -> None:
    async with open_network(Network.allow("a.org")) as site:
        with site.gateway.watch() as watch:
            for number in range(1003):
                site.gateway._journal.tell(  # pyright: ignore[reportPrivateUsage]
                    NetworkEvent(
                        host=f"n{number}", port=None, address=None, outcome="closed", error="", started=0, duration=0,
                        bytes_sent=0, bytes_received=0,
                    )
                )  # fmt: skip
            assert watch.lost == 3
            assert (await anext(watch)).host == "n3"
        rest = [event async for event in watch]
        assert len(rest) == 999
