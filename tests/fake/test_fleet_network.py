"""Connections that a guest's node makes, at the word of the program's gateway: `FleetConfig.connections`."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from tests._leaks import nothing_left, wait_until
from trio_sandbox import LinkProtocolError, Network, NetworkRule
from trio_sandbox.fleet import FleetConfig
from trio_sandbox.fleet._dial import MARK, NodeDialer
from trio_sandbox.fleet._links import receive_message
from trio_sandbox.fleet._messages import Failure
from trio_sandbox.network import Proxy
from trio_sandbox.sandbox import Sandbox

from ._fleet import Fleet, open_fake_fleet
from .test_network_gateway import (
    NO_SUCH_NAME,
    REFUSED,
    THERE_IS,
    FakeDns,
    Site,
    echo,
    open_network,
    open_server,
    receive_all,
)


@attrs.frozen
class Far:
    """A gateway here, and a node that connects for it."""

    site: Site
    dialer: NodeDialer
    sandbox: Sandbox
    fleet: Fleet
    dns: FakeDns
    """What the node knows of names."""


@asynccontextmanager
async def open_far(
    network: Network, addresses: dict[str, Any] | None = None, *, proxy: Proxy | None = None, timeout: float = 30
) -> AsyncGenerator[Far]:
    dns = FakeDns(addresses or {})
    async with (
        open_fake_fleet("one", fleet=FleetConfig(connections="node", end_timeout=10)) as fleet,
        fleet.host.open_sandbox() as sandbox,
        open_network(network, proxy=proxy, timeout=timeout) as site,
    ):
        (keeper,) = fleet.nodes["one"].node._keepers.values()  # pyright: ignore[reportPrivateUsage]
        keeper._resolver.lookup = dns.look_up  # pyright: ignore[reportPrivateUsage]
        dialer = NodeDialer(sandbox._slot)  # pyright: ignore[reportPrivateUsage]
        site.gateway.dialer = dialer
        yield Far(site, dialer, sandbox, fleet, dns)


async def test_names_are_resolved_and_vetted_on_the_node() -> None:
    addresses = {"good.org": ["93.184.215.14"], "inside.org": ["10.0.0.1", "::1"]}
    async with open_far(Network.allow("good.org", "inside.org", "none.org"), addresses) as far:
        assert await far.site.look_up("good.org") == THERE_IS
        assert await far.site.look_up("inside.org") == REFUSED
        assert await far.site.look_up("none.org") == NO_SUCH_NAME
        assert far.dns.asked == ["good.org", "inside.org", "none.org"]
        assert far.site.dns.asked == [], "nobody asks here"
        assert await far.site.look_up("other.org") == REFUSED
        assert far.dns.asked[3:] == [], "the policy is asked first, and it is here"


async def test_a_connection_is_made_by_the_node() -> None:
    with nothing_left():
        async with open_server(echo) as port:
            rule = NetworkRule("db.org", port=port, private="loopback")
            async with open_far(Network.allow(rule), {"db.org": ["127.0.0.1"]}) as far:
                async with await far.site.connect("db.org", port) as stream:
                    data = bytes(range(256)) * 1000
                    async with trio.open_nursery() as nursery:

                        async def send() -> None:
                            await stream.send_all(data)
                            await stream.send_eof()

                        nursery.start_soon(send)
                        assert await receive_all(stream) == data
                await wait_until(lambda: far.site.gateway.statistics().open_connections == 0)
                (event,) = far.site.events
                assert (event.outcome, event.address) == ("closed", "127.0.0.1")
                assert far.site.gateway.statistics().bytes_sent == len(data)


async def test_what_the_node_can_not_reach_is_said_as_it_would_be_here() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listener.socket.getsockname()[1]
    await listener.aclose()
    rule = NetworkRule("db.org", port=port, private="loopback")
    async with open_far(Network.allow(rule, "gone.org"), {"db.org": ["127.0.0.1"]}) as far:
        assert await far.site.refusal("db.org", port) == errno.ECONNREFUSED
        assert await far.site.refusal("gone.org") == errno.EHOSTUNREACH
        assert [event.outcome for event in far.site.events] == ["failed", "no such host"]


@pytest.mark.parametrize("side", ["guest", "server"])
async def test_who_breaks_it_off_is_seen_on_the_other_side(side: str) -> None:
    begun, broken = trio.Event(), trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        assert await stream.receive_some(5) == b"begin"
        begun.set()
        if side == "server":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        try:
            await stream.receive_some(1)
        except trio.BrokenResourceError:
            broken.set()

    async with open_server(serve) as port:
        rule = NetworkRule("db.org", port=port, private="loopback")
        async with open_far(Network.allow(rule), {"db.org": ["127.0.0.1"]}) as far:
            stream = await far.site.connect("db.org", port)
            await stream.send_all(b"begin")
            await begun.wait()
            if side == "server":
                with pytest.raises(trio.BrokenResourceError):
                    await receive_all(stream)
                stream.close()
            else:
                stream.reset("broken off")
                await broken.wait()
            await wait_until(lambda: far.site.events != [])
            assert far.site.events[0].outcome == "reset"


async def test_a_policy_that_ends_ends_the_nodes_connections() -> None:
    ended = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some(1)
        except trio.BrokenResourceError:
            pass
        ended.set()

    async with open_server(serve) as port, open_far(Network.none(), {"db.org": ["127.0.0.1"]}) as far:
        with far.site.gateway.layer(Network.allow(NetworkRule("db.org", port=port, private="loopback"))):
            stream = await far.site.connect("db.org", port)
        await ended.wait()
        with pytest.raises(trio.BrokenResourceError):
            await receive_all(stream)
        stream.close()


async def test_a_connection_that_nobody_waits_for_is_given_up_on_the_node() -> None:
    async with open_far(Network.none()) as far:
        (keeper,) = far.fleet.nodes["one"].node._keepers.values()  # pyright: ignore[reportPrivateUsage]
        begun, given_up = trio.Event(), trio.Event()

        async def resolve(dialer: object, name: str) -> tuple[str, ...]:
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                given_up.set()
            raise AssertionError(dialer, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trio_sandbox.network._dialer.HostDialer.resolve", resolve)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(far.dialer.resolve, "slow.org.")
                await begun.wait()
                nursery.cancel_scope.cancel()
            await given_up.wait()
        assert keeper.sandbox.statistics().runs == 0


async def test_a_proxy_is_connected_to_by_the_node() -> None:
    heads: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(100)
        heads.append(head)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await echo(stream)

    async with open_server(serve) as port:
        proxy = Proxy("proxy.inside", port)
        async with open_far(Network.allow("good.org"), {"proxy.inside": ["127.0.0.1"]}, proxy=proxy) as far:
            stream = await far.site.connect("good.org")
            assert await stream.receive_some(5) == b"hello"
            stream.close()
            assert heads[0].startswith(b"CONNECT good.org:80 HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "header",
    [
        {MARK: "else"},
        {MARK: "resolve", "name": 1},
        {MARK: "vet", "addresses": ["1.1.1.1"], "private": "all"},
        {MARK: "connect", "addresses": "1.1.1.1", "port": 1},
    ],
)
async def test_what_can_not_be_asked_for(header: dict[str, object]) -> None:
    async with open_far(Network.none()) as far:
        stream = far.sandbox._slot.machine.guest.open_stream(header)  # pyright: ignore[reportPrivateUsage]
        answer = await receive_message(stream)
        assert isinstance(answer, Failure)
        assert isinstance(answer.error, LinkProtocolError)
        stream.close()
        assert (await far.sandbox.run("print(1)")).stdout == "1\n"


async def test_the_programs_own_network_is_the_default() -> None:
    seen: list[object] = []
    for connections in ("program", "node"):
        fleet_config = FleetConfig(connections=connections, end_timeout=10)
        async with open_fake_fleet("one", fleet=fleet_config) as fleet, fleet.host.open_sandbox() as sandbox:
            network = sandbox._network  # pyright: ignore[reportPrivateUsage]
            seen.append(type(network._gateway.dialer).__name__)  # pyright: ignore[reportPrivateUsage]
    assert FleetConfig().connections == "program"
    assert seen == ["HostDialer", "NodeDialer"]
