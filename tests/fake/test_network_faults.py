"""The host's side of a guest's connections, where a guest, a resolver or this machine does not do what one hopes for."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import trio
import trio.testing

from tests._leaks import wait_until
from tests.fake.test_network_gateway import (
    NO_SUCH_NAME,
    REFUSED,
    TRY_LATER,
    echo,
    local,
    open_network,
    open_server,
    receive_all,
    receive_exactly,
)
from trio_sandbox import Network, NetworkRule
from trio_sandbox._quiet_log import MOST_LINES
from trio_sandbox._rate import Rate
from trio_sandbox.network import (
    HostResolver,
    Proxy,
    _connect as connect_module,
    _gateway as gateway_module,
    _journal as journal_module,
    look_up,
)
from trio_sandbox.network._connect import connect
from trio_sandbox.network._resolver import Resolver
from trio_sandbox.wire import StreamResetError, WireError

PUBLIC = "93.184.215.14"


class Gate:
    """A function of `NetworkRule.to` that opens when it is told to, and counts who came."""

    def __init__(self) -> None:
        self.came = 0
        self.open = trio.Event()

    async def __call__(self) -> Any:
        self.came += 1
        await self.open.wait()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


# --- Waiting for room ---


async def test_what_waits_for_room_ends_with_its_policy_and_is_never_dialled() -> None:
    gate = Gate()
    async with open_network(Network.allow("a.org")) as site:
        with site.gateway.layer(Network.allow(NetworkRule("slow.local", to=gate), max_connections=1)):
            streams = [
                site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80}) for _ in range(3)
            ]
            await trio.testing.wait_all_tasks_blocked()
        for stream in streams:
            with pytest.raises(StreamResetError, match="the policy that allowed this connection is over"):
                await receive_all(stream)
        assert gate.came == 1
    assert [event.outcome for event in site.events] == ["reset"] * 3


async def test_a_guest_that_gives_up_needs_no_room_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "_MOST_STREAMS", 5)
    gate = Gate()
    async with open_network(Network.allow(NetworkRule("slow.local", to=gate), max_connections=1)) as site:
        for count in range(1, 6):  # twenty in all: as after a guest's network was switched off and on again
            streams = [
                site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80}) for _ in range(4)
            ]
            # A guest that asks for much at once is read more slowly.
            await wait_until(lambda: gate.came == count and site.host.statistics().peer_streams == 4)  # noqa: B023
            for stream in streams:
                stream.reset("changed my mind")
            await wait_until(lambda: site.host.statistics().peer_streams == 0)
        assert site.host.failure is None
        assert gate.came == 5


async def test_a_guest_that_gives_a_lookup_up_ends_it() -> None:
    release = threading.Event()

    def slow() -> Iterable[Iterable[str]]:
        release.wait(30)
        yield [PUBLIC]

    try:
        async with open_network(Network.allow("slow.org"), {"slow.org": iter(slow())}) as site:
            stream = site.guest.open_stream({"service": "lookup", "name": "slow.org"}, flush=True)
            while not site.dns.asked:
                await trio.sleep(0.01)
            stream.reset("changed my mind")
            await trio.testing.wait_all_tasks_blocked()
            assert site.host.statistics().peer_streams == 0
    finally:
        release.set()


async def test_requests_count_from_when_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "_MOST_STREAMS", 3)
    async with open_network(Network.allow(NetworkRule("slow.local", to=Gate()))) as site:
        for _ in range(4):  # in one write
            site.guest.open_stream({"service": "connect", "host": "slow.local", "port": 80})
        assert isinstance(await site.host.wait_closed(), WireError)


async def test_who_waits_for_a_turn_and_gives_up_takes_none(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    rate = Rate(1.0, 1)
    await rate.wait()
    for _ in range(50):
        with trio.move_on_after(0.001):
            await rate.wait()
    start = trio.current_time()
    await rate.wait()
    assert trio.current_time() - start < 2


async def test_who_comes_later_gets_no_turn_before_who_waits(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    rate = Rate(1.0, 3)
    came: list[tuple[str, float]] = []

    async def come(name: str) -> None:
        await rate.wait()
        came.append((name, trio.current_time() - start))

    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        for name in "abcde":
            nursery.start_soon(come, name)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.999)  # just before the first in line has its turn
        nursery.start_soon(come, "f")
    assert "".join(name for name, _ in came) == "abcdef"
    assert [round(when) for _, when in came] == [0, 0, 0, 1, 2, 3]


# --- Resolvers that are slow, dead or gone ---


async def test_a_slow_resolver_stalls_only_the_lookups_of_its_own_sandbox() -> None:
    release = threading.Event()
    busy = 0

    def lookup(name: str) -> list[str]:
        nonlocal busy
        if name.startswith("slow"):
            busy += 1
            release.wait(30)
        return [PUBLIC]

    host = HostResolver(lookup)
    hostile, neighbour = Resolver(host), Resolver(host)
    try:
        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(hostile.resolve, f"slow{number}.org.")
            while busy < 4:
                await trio.sleep(0.01)
            assert await neighbour.resolve("a.org.") == (PUBLIC,)
            nursery.cancel_scope.cancel(reason="the guest gives them all up")
        # Threads that nobody waits for still are the hostile one's: it gets no more of them.
        with trio.move_on_after(0.1):
            await hostile.resolve("slow.org.")
        assert busy == 4
        assert await neighbour.resolve("b.org.") == (PUBLIC,)
    finally:
        release.set()


async def test_a_lookup_has_so_long() -> None:
    release = threading.Event()

    def dead() -> Iterable[Iterable[str]]:
        release.wait(30)
        yield [PUBLIC]

    try:
        async with open_network(Network.allow("dead.org"), {"dead.org": iter(dead())}, timeout=0.05) as site:
            assert await site.look_up("dead.org") == TRY_LATER
        assert site.events[0].outcome == "failed"
    finally:
        release.set()


async def test_an_answer_that_comes_after_the_policy_has_changed_is_not_given() -> None:
    release = threading.Event()

    def slow() -> Iterable[Iterable[str]]:
        release.wait(30)
        yield [PUBLIC]

    answers: list[int] = []

    async def ask() -> None:
        answers.append(await site.look_up("slow.org"))

    async with open_network(Network.allow("slow.org"), {"slow.org": iter(slow())}) as site:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not site.dns.asked:
                await trio.sleep(0.01)
            with site.gateway.layer(Network.allow("other.org")):
                release.set()
                while not answers:
                    await trio.sleep(0.01)
    assert answers == [REFUSED]


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many open files"), OSError(errno.ENOENT, "no resolver")])
async def test_what_this_machine_lacks_is_an_answer_and_no_bug(
    error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_network(Network.allow("a.org"), {"a.org": error}) as site:
        assert await site.look_up("a.org") == TRY_LATER
        assert await site.refusal("a.org") == errno.EHOSTUNREACH
    assert [event.outcome for event in site.events] == ["failed", "failed"]
    assert "report this" not in caplog.text


async def test_a_name_of_the_users_is_looked_up_as_this_machine_knows_it() -> None:
    assert look_up("localhost")
    async with open_server(echo) as port:
        rule = NetworkRule("db.local", to=("LocalHost", port))
        async with open_network(Network.allow(rule), {"LocalHost": ["127.0.0.1"]}) as site:
            stream = await site.connect("db.local")
            await stream.send_all(b"hi", end=True)
            assert await receive_all(stream) == b"hi"
        assert site.dns.asked == ["LocalHost"]


async def test_a_proxy_is_looked_up_in_threads_of_the_sandbox() -> None:
    async def proxy(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        await echo(stream)

    async with open_server(proxy) as port:
        through = Proxy("proxy.corp", port)
        async with open_network(Network.allow("a.org"), {"proxy.corp": ["127.0.0.1"]}, proxy=through) as site:
            stream = await site.connect("a.org")
            await stream.send_all(b"hi", end=True)
            assert await receive_all(stream) == b"hi"
        assert site.dns.asked == ["proxy.corp"]


# --- Addresses ---


async def test_only_vetted_addresses_are_tried_whichever_is_first_and_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def connect_one(address: str, port: int) -> trio.SocketStream:
        tried.append(address)
        if ":" in address:
            await trio.sleep_forever()
        return await trio.open_tcp_stream("127.0.0.1", port)

    monkeypatch.setattr(connect_module, "_connect_one", connect_one)
    mixed = ["2606:4700::1111", "127.0.0.1", "10.0.0.1", PUBLIC, "fd00:ec2::254", "169.254.169.254"]
    async with open_server(echo) as port:
        async with open_network(Network.allow(NetworkRule("mixed.org", port=port)), {"mixed.org": mixed}) as site:
            stream = await site.connect("mixed.org", port)
            await stream.send_all(b"hi", end=True)
            assert await receive_all(stream) == b"hi"
    assert tried == ["2606:4700::1111", PUBLIC]
    assert site.events[0].address == PUBLIC


async def test_a_machine_without_a_family_uses_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trio.socket.socket

    def make(family: int, kind: int, protocol: int = 0) -> trio.socket.SocketType:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, kind, protocol)

    monkeypatch.setattr(trio.socket, "socket", make)
    async with open_server(echo) as port:
        stream, address = await connect(["::1", "127.0.0.1"], port, trio.Semaphore(1))
        await stream.aclose()
        assert address == "127.0.0.1"
        with pytest.raises(OSError, match="not supported"):
            await connect(["::1"], port, trio.Semaphore(1))


async def test_so_many_addresses_are_tried_and_no_more(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    tried: list[str] = []

    async def connect_one(address: str, _port: int) -> trio.SocketStream:
        tried.append(address)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(connect_module, "_connect_one", connect_one)
    with trio.move_on_after(100):
        await connect([f"93.184.215.{number}" for number in range(200)], 80, trio.Semaphore(100))
    assert len(tried) == 8


async def test_many_connections_to_silent_addresses_take_few_descriptors(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    underway = most = 0
    tried: list[str] = []

    async def connect_one(address: str, _port: int) -> trio.SocketStream:
        nonlocal underway, most
        tried.append(address)
        underway += 1
        most = max(most, underway)
        try:
            await trio.sleep(20 if address.endswith(".1") else 5)
            raise OSError(errno.EHOSTUNREACH, "nobody there")
        finally:
            underway -= 1

    monkeypatch.setattr(connect_module, "_connect_one", connect_one)
    spare = trio.Semaphore(3)

    async def dial() -> None:
        with pytest.raises(OSError, match="nobody there"):
            await connect([f"93.184.215.{number}" for number in range(1, 5)], 80, spare)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(dial)
    assert most == 13
    assert len(tried) == 40
    assert spare.value == 3


# --- What is told ---


async def test_a_guest_fills_no_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_MOST_WARNINGS", 3)
    caplog.set_level(logging.INFO, "trio_sandbox.network")
    async with open_network(Network.allow("a.org")) as site:
        for number in range(20):
            assert await site.look_up(f"n{number}.evil.org") == REFUSED
        assert len(caplog.records) == 3
        monkeypatch.setattr(journal_module, "_MOST_WARNINGS", 4)
        await site.look_up("late.evil.org")
    assert caplog.records[3].getMessage() == "17 more refusals were not logged: there were too many"
    assert len(site.events) == 21


@pytest.mark.parametrize(
    "name", ["evil\0.a.org", "a.org\r\nX: y", "\x1b[31m.a.org", "a%2eorg", "a@b.org", "[a.org]", "é.org"]
)
async def test_no_name_of_a_guest_gets_into_a_log_as_it_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_sandbox.network")
    async with open_network(Network.open()) as site:
        assert await site.look_up(name) == NO_SUCH_NAME
        assert await site.refusal(name)
    assert all(record.getMessage().isprintable() and name not in record.getMessage() for record in caplog.records)
    assert all(event.host == "" and event.error.isprintable() for event in site.events)
    assert site.dns.asked == []


async def test_bytes_up_to_the_limit_go_through() -> None:
    async with open_server(echo) as port:
        async with open_network(Network.allow(local(port), max_sent_bytes=1000, max_received_bytes=1000)) as site:
            stream = await site.connect("db.local")
            await stream.send_all(bytes(1000), end=True)
            assert await receive_all(stream) == bytes(1000)
            assert await site.refusal("db.local") == errno.EACCES
    assert [event.outcome for event in site.events] == ["closed", "over the limit"]


async def test_a_function_that_returns_no_stream_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong() -> Any:
        return "a stream"

    async with open_network(Network.allow(NetworkRule("bad.local", to=wrong))) as site:
        assert await site.refusal("bad.local") == errno.EHOSTUNREACH
    assert "which is no stream" in site.events[0].error
    assert "trio.abc.HalfCloseableStream" in caplog.text


async def test_a_guest_fills_no_log_by_connections_whose_function_fails(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async def fail() -> Any:
        raise RuntimeError("no server today")

    async with open_network(Network.allow(NetworkRule("bad.local", to=fail))) as site:
        for _ in range(MOST_LINES + 30):
            assert await site.refusal("bad.local") == errno.EHOSTUNREACH
        assert len(caplog.records) == MOST_LINES
        await trio.sleep(60)
        await site.refusal("bad.local")
        assert caplog.messages[-2:] == [
            "30 more were not logged: there were too many",
            "the function of a NetworkRule failed",
        ]


# --- Cancelled anywhere ---


@pytest.mark.parametrize("steps", range(0, 40, 1))
@pytest.mark.parametrize("by", ["policy", "guest", "channel"])
async def test_an_end_at_any_moment_leaves_nothing(by: str, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    ended = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await echo(stream)
        finally:
            ended.set()

    connected = False
    async with open_server(serve) as port, open_network(Network.allow("a.org")) as site:
        gateway = site.gateway

        async def use() -> None:
            nonlocal connected
            try:
                stream = await site.connect("db.local")
                connected = True
                await stream.send_all(b"x" * 100_000)
                await receive_exactly(stream, 100_000)
                await trio.sleep_forever()
            except (OSError, AssertionError, trio.BrokenResourceError, trio.ClosedResourceError):
                return

        async with trio.open_nursery() as nursery:
            with gateway.layer(Network.allow(local(port))):
                (layer,) = gateway._layers[1:]  # pyright: ignore[reportPrivateUsage]
                nursery.start_soon(use)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                if by == "guest":
                    for stream in list(site.guest._streams.values()):  # pyright: ignore[reportPrivateUsage]
                        stream.reset("enough")
                elif by == "channel":
                    site.host.feed(b"\xff" * 64)
                if by != "policy":
                    await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel(reason="it is over")
        await trio.testing.wait_all_tasks_blocked()
        assert gateway.statistics().open_connections == 0
        assert gateway._streams == 0  # pyright: ignore[reportPrivateUsage]
        assert layer.room.value == 128
        assert not layer.connections
        if connected:
            await ended.wait()
    assert "report this" not in caplog.text
    assert len(site.events) <= 1
