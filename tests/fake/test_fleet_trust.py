"""What nodes, their user and strangers can do to each other: who lies, is slow, or only knocks, costs nobody else anything."""

from __future__ import annotations

import math
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio

from tests._leaks import wait_until
from trio_sandbox import HostConfig, HostStatistics, LinkProtocolError, Progress, SandboxClosedError
from trio_sandbox.fleet import FleetConfig, _actor, _client, _links, _shipping
from trio_sandbox.fleet._host import open_fleet
from trio_sandbox.fleet._lease import Lease, is_silent, keepalive
from trio_sandbox.fleet._links import MessageStream, connect, open_link
from trio_sandbox.fleet._machine import RemoteMachine
from trio_sandbox.fleet._messages import Decoder, Lend, Lent, NodeStatus, Piece, Status, is_sound
from trio_sandbox.fleet._tls import TlsStream
from trio_sandbox.wire import ChannelStream, Role, StreamResetError

from ._fleet import Fleet, LocalHost, open_fake_fleet, start_node
from .test_fleet_images import IMAGE, open_stores

LEASE = 1.0


async def assert_serves(fleet: Fleet) -> None:
    assert (await fleet.host.run("print(1)")).stdout == "1\n"


# --- Strangers ---


async def test_whoever_comes_does_not_wait_for_strangers() -> None:
    """They are as many as they like, and say nothing."""
    async with open_fake_fleet("one") as fleet:
        with ExitStack() as stack:
            address = "127.0.0.1", fleet.nodes["one"].wire.to
            knocking = [stack.enter_context(socket.create_connection(address)) for _ in range(200)]
            await assert_serves(fleet)
            await wait_until(lambda: len(still_open(knocking)) <= _links._MOST_STRANGERS)  # pyright: ignore[reportPrivateUsage]
            assert knocking[-1] in still_open(knocking), "the oldest go"
            await assert_serves(fleet)


def still_open(connections: list[socket.socket]) -> list[socket.socket]:
    def is_open(connection: socket.socket) -> bool:
        connection.setblocking(False)
        try:
            return bool(connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except ConnectionError:
            return False

    return list(filter(is_open, connections))


async def test_strangers_of_one_machine_take_no_place_of_others() -> None:
    strangers, here, there = _links._Strangers(), trio.CancelScope(), trio.CancelScope()  # pyright: ignore[reportPrivateUsage]
    with there, strangers.counted(there, "10.0.0.1"), ExitStack() as stack:
        stack.enter_context(here)
        stack.enter_context(strangers.counted(here, "10.0.0.2"))
        for _ in range(100):
            stack.enter_context(strangers.counted(trio.CancelScope(), "10.0.0.2"))
        assert here.cancel_called
        assert not there.cancel_called


# --- Who has a secret ---


@asynccontextmanager
async def lent_by_one(tmp_path: Path) -> AsyncGenerator[tuple[Fleet, TlsStream]]:
    """Yield a fleet, and a connection to the node that lends an image, with a secret of that loan."""
    async with open_stores(tmp_path, "one") as (fleet, _):
        await fleet.host.prepare(IMAGE)
        (client,) = fleet.members.clients
        async with client.hold(Lend(IMAGE), "lending") as lent:
            assert isinstance(lent, Lent)
            async with await connect(client.address, lent.secrets[0], lease=Lease(4)) as stream:
                yield fleet, stream


async def test_who_has_a_secret_and_speaks_no_protocol(tmp_path: Path) -> None:
    async with lent_by_one(tmp_path) as (fleet, stream):
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        while await stream.receive_some():
            pass
        await assert_serves(fleet)


NOT_LENT = (
    Piece(0, "\0"),
    Piece(0, "../system-0/manifest.json"),
    Piece(0, ".."),
    Piece(0, "other"),
    Piece(99, "manifest.json"),
    Piece(-1, "manifest.json"),
    Piece("0", "manifest.json"),  # type: ignore[arg-type]
    Piece(0, 7),  # type: ignore[arg-type]
    Piece(0, "manifest.json", 2**80),
    Piece(0, "manifest.json", -1),
    "manifest.json",
)


async def test_a_node_lends_what_it_has_lent_and_nothing_else(tmp_path: Path) -> None:
    async with lent_by_one(tmp_path) as (fleet, stream):
        async with open_link(stream, Role.HOST, None, silence=30) as link:
            for wanted in NOT_LENT:
                asked = link.open_stream({})
                await MessageStream(asked).send(wanted)
                with pytest.raises(StreamResetError, match="there is no file"):
                    await asked.receive_some()
            asked = link.open_stream({})
            await MessageStream(asked).send(Piece(0, "manifest.json", 1))
            assert b'"format"' in bytes(await asked.receive_some())
        await assert_serves(fleet)


async def test_a_secret_of_a_loan_is_good_once_and_while_it_is_lent(tmp_path: Path) -> None:
    async with open_stores(tmp_path, "one") as (fleet, _):
        await fleet.host.prepare(IMAGE)
        (client,) = fleet.members.clients

        async def is_served(secret: bytes) -> bool:
            async with await connect(client.address, secret, lease=Lease(4)) as stream:
                return bool(await stream.receive_some())

        async with client.hold(Lend(IMAGE), "lending") as lent:
            assert [await is_served(lent.secrets[0]) for _ in range(2)] == [True, False]
        assert not await is_served(lent.secrets[1])
        await assert_serves(fleet)


async def test_a_secret_of_a_machine_is_good_once() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        machine = cast("RemoteMachine", sandbox._slot.machine)  # pyright: ignore[reportPrivateUsage]
        secret = machine._offer.secret  # pyright: ignore[reportPrivateUsage]
        async with await connect(_first(fleet).address, secret, lease=Lease(4)) as stream:
            assert await stream.receive_some() == b""
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_a_node_that_has_lent_and_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers pings, so its connection is fine: the file goes on over another."""
    stuck: list[object] = []
    send = _shipping.Loan._send  # pyright: ignore[reportPrivateUsage]

    async def send_late(self: _shipping.Loan, stream: ChannelStream) -> None:
        if not stuck:
            stuck.append(self)
            await trio.sleep_forever()
        await send(self, stream)

    monkeypatch.setattr(_shipping.Loan, "_send", send_late)
    monkeypatch.setattr(_shipping, "_STALL", 1.0)
    async with open_stores(tmp_path, "one", "two") as (fleet, hosts):
        await fleet.host.prepare(IMAGE)
        assert stuck
        assert hosts["one"].entries() == hosts["two"].entries()
        assert sum(len(host.site.jobs) for host in hosts.values()) == 2, "it was fetched, and built once"


# --- A node that says what no node says ---


@attrs.define(eq=False)
class Liar(LocalHost):
    """A host that says of itself what can't be, once it is told to."""

    lies: bool = False

    def statistics(self) -> HostStatistics:
        return cast("Any", {"memory_mib_budget": "all"}) if self.lies else super().statistics()


async def test_a_node_that_lies_of_itself_is_lost_and_no_other() -> None:
    liar = Liar()
    async with open_fake_fleet("one", "two", one=liar) as fleet:
        liar.lies = True
        await wait_until(lambda: [node.lost for node in fleet.host.statistics().nodes] == [True, False])
        async with fleet.host.open_sandbox() as sandbox:
            assert sandbox.node == "two"
        with pytest.raises(SandboxClosedError, match="node one is lost"):
            await _first(fleet).request("watch", "something")


def _first(fleet: Fleet) -> _client.NodeClient:
    return fleet.members._members["one"].client  # pyright: ignore[reportPrivateUsage]


SOUND = LocalHost().statistics()


@pytest.mark.parametrize(
    ("status", "sound"),
    [
        (NodeStatus(SOUND, False), True),
        (NodeStatus(SOUND, True, (Progress("a", "b"), Progress("a", "b", 0.5))), True),
        (NodeStatus(SOUND, False, (Progress("a", "b", "c"),)), False),  # type: ignore[arg-type]
        (NodeStatus(SOUND, False, 7), False),  # type: ignore[arg-type]
        (NodeStatus(SOUND, "no"), False),  # type: ignore[arg-type]
        (NodeStatus(attrs.evolve(SOUND, admission=None), False), False),  # type: ignore[arg-type]
        (NodeStatus(HostStatistics.__new__(HostStatistics), False), False),
    ],
    ids=range(7),
)
def test_what_can_be_reckoned_with(status: NodeStatus, sound: bool) -> None:
    assert is_sound(status) == sound


async def test_news_that_nobody_asked_for_are_not_kept_for_ever() -> None:
    async with open_fake_fleet("one") as fleet, fleet.host.open_sandbox() as sandbox:
        (keeper,) = fleet.nodes["one"].node._keepers.values()  # pyright: ignore[reportPrivateUsage]
        status = keeper.opened().status
        for number in range(1000, 2000):
            await keeper._tell(attrs.evolve(status, sandbox=number))  # pyright: ignore[reportPrivateUsage]
        await sandbox.run("1")
        unheard = _first(fleet)._unheard  # pyright: ignore[reportPrivateUsage]
        await wait_until(lambda: (Status, 1999) in unheard)
        assert len(unheard) <= _client._MOST_NEWS  # pyright: ignore[reportPrivateUsage]


# --- What may be in a message ---


class Made:
    """Pickled, it is a call of what has that name."""

    def __init__(self, kind: Any, *arguments: object) -> None:
        self.call = kind, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call


def test_a_message_makes_values_and_no_nodes() -> None:
    body = pickle.dumps(Made(_actor.NodeProcess, "name", "127.0.0.1", HostConfig(), FleetConfig()), protocol=5)
    with pytest.raises(LinkProtocolError, match="none of ours"):
        Decoder().feed(struct.pack(">I", len(body)) + body)


def test_a_message_imports_nothing() -> None:
    module = "trio_sandbox.guest.interpreters.python_worker"
    body = b"\x80\x04\x8c%c%b\x8c\x01x\x93." % (len(module), module.encode())
    script = f"""
import struct, sys
from trio_sandbox import LinkProtocolError
from trio_sandbox.fleet._messages import Decoder
body = {body!r}
try:
    Decoder().feed(struct.pack(">I", len(body)) + body)
except LinkProtocolError:
    print({module!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- Silence, and what is none ---


async def test_who_does_not_read_for_a_while_is_not_lost() -> None:
    """As a program that computes, or a node that hangs: its kernel answers, and says that it has no room."""
    async with trio.open_nursery() as nursery:
        fake = await start_node(nursery, "one", LocalHost(), lease=LEASE)
        async with open_fleet(HostConfig(), FleetConfig(lease=LEASE)) as (host, members):
            await members.join(fake.address)
            async with host.open_sandbox() as sandbox:
                flood = ["head", "-c", "3000000", "/dev/zero"]
                async with sandbox.open_process(flood, stdin=False) as process:
                    assert process.stdout is not None
                    await process.stdout.receive_some()
                    fake.wire.stall()
                    await trio.sleep(3 * LEASE + 1)
                    fake.wire.go_on()
                    async for _ in process.stdout:
                        pass
                    assert await process.wait() == 0
                assert (await sandbox.run("print(1)")).stdout == "1\n"
            assert not host.statistics().nodes[0].lost
        nursery.cancel_scope.cancel()


def tcp_info(*, retransmits: int = 0, probes: int = 0, milliseconds: int = 0) -> bytes:
    return struct.pack("8B13I", 1, 0, retransmits, probes, *[0] * 16, milliseconds) + bytes(100)


@pytest.mark.parametrize(
    ("info", "silent"),
    [
        (tcp_info(retransmits=3, milliseconds=4001), True),
        (tcp_info(probes=3, milliseconds=4001), True),
        (tcp_info(retransmits=3, milliseconds=3999), False),
        (tcp_info(milliseconds=100_000), False),
        (b"", False),
    ],
    ids=["unanswered data", "unanswered questions", "not yet", "nobody was asked", "unknown"],
)
def test_what_is_silence(info: bytes, silent: bool) -> None:
    assert is_silent(info, 4.0) == silent


@pytest.mark.parametrize("seconds", [0.1, 1, 4, 127, 300, 10**9, math.inf])
async def test_any_lease_can_be_watched(seconds: float) -> None:
    idle, interval, count = keepalive(seconds).values()
    assert idle == interval
    if 1 <= seconds <= 10_000:
        assert seconds <= interval * count <= 1.01 * seconds + interval
    async with open_fake_fleet("one", fleet=FleetConfig(lease=seconds)) as fleet:
        await assert_serves(fleet)
