"""What answers a guest's wishes for the network: each is decided by name and port, and only then anything is done.

    {"service": "lookup", "name": str}                 answered by a byte, and the end: see `Answer`
    {"service": "connect", "host": str, "port": int}   answered by an errno in two bytes, big-endian; after 0 the stream is the connection

The order is: policy, limits, resolve, vet, connect, answer, server name, copy, tell. No step comes before the one ahead of it,
so a name that no rule allows never leaves this process.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final, final

import trio

from .._network import Network, NetworkRule, StreamFactory, is_host_name
from ..wire import ChannelStream, StreamHandler, WireError
from ._addresses import may_connect
from ._connect import connect
from ._connections import EventQueue, NetworkEvent, NetworkStatistics, NetworkWatch, Outcome
from ._proxy import Proxy
from ._rate import Rate
from ._relay import Relay, WrongServerNameError
from ._resolver import HostResolver, Resolver

_log = logging.getLogger("trio_sandbox.network")

#: Streams that a guest may have open to us. Its agent keeps within that: a guest with more has another agent.
_MOST_STREAMS: Final = 512
#: Lookups and connections of a sandbox a second, and how many may come at once. Further ones wait.
_PER_SECOND, _BURST = 50.0, 100
#: Different names that a sandbox may look up in its life. Each could carry a little of what the guest knows to the
#: name servers of an allowed domain.
_MOST_NAMES: Final = 4096
#: Seconds between two warnings of one refused name.
_QUIET: Final = 60.0
_TLS_PORT: Final = 443
#: What a guest is told as it is; any other error of ours is EHOSTUNREACH to it.
_TOLD: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT})
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class Answer(IntEnum):
    """What a lookup comes to."""

    THERE_IS = 0
    REFUSED = 1
    NO_SUCH_NAME = 2
    TRY_LATER = 3


class _RefusedError(Exception):
    """A guest does not get what it wants."""

    def __init__(self, outcome: Outcome, error: str, number: int = errno.EACCES) -> None:
        super().__init__(error)
        self.outcome: Outcome = outcome
        self.errno = number


@final
class Layer:
    """One policy while it is in force or under another, with the connections that were opened by it."""

    def __init__(self, network: Network) -> None:
        self.network: Network = network
        self.connections: set[trio.CancelScope] = set()
        self.room: trio.Semaphore = trio.Semaphore(network.max_connections)

    def end(self) -> None:
        """Break its connections off."""
        for scope in tuple(self.connections):
            scope.cancel(reason="the policy that allowed this connection is over")


@final
class _Attempt:
    """What is known of one connection so far, for its event."""

    def __init__(self, host: str, port: int | None) -> None:
        self.host = host
        self.port = port
        self.address: str | None = None
        self.sent = self.received = 0
        self._started = time.time()
        self._clock = trio.current_time()

    def event(self, outcome: Outcome, error: str = "") -> NetworkEvent:
        return NetworkEvent(
            host=self.host,
            port=self.port,
            address=self.address,
            outcome=outcome,
            error=error,
            started=self._started,
            duration=trio.current_time() - self._clock,
            bytes_sent=self.sent,
            bytes_received=self.received,
        )


@final
class Gateway:
    """The network of one sandbox, whatever machine it has at the moment.

    Args:
      network: The policy that it begins with.
      resolver: What resolves names for all sandboxes of the host.
      connect_timeout: Seconds for a connection to come about.
      proxy: What all connections go through; None: none. It resolves the names, so that no address is vetted here.

    """

    def __init__(
        self, network: Network, resolver: HostResolver, *, connect_timeout: float, proxy: Proxy | None = None
    ) -> None:
        self._layers = [Layer(network)]
        self._host_resolver = resolver
        self._resolver = Resolver(resolver)
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._rate = Rate(_PER_SECOND, _BURST)
        self._names: set[str] = set()
        self._warned: dict[str, float] = {}
        self._watches: set[EventQueue] = set()
        self._streams = 0
        self._open = self._connections = self._lookups = self._refused = self._failed = 0
        self._sent = self._received = 0

    @property
    def network(self) -> Network:
        """The policy in force: that of the innermost block."""
        return self._layers[-1].network

    @property
    def handler(self) -> StreamHandler | None:
        """What serves the streams that a guest opens; None while nothing may be reached."""
        return self.handle if self.network else None

    def copy(self) -> Gateway:
        """Return a gateway for a copy of the sandbox: with the policy in force, and nothing else of this one."""
        return Gateway(self.network, self._host_resolver, connect_timeout=self._connect_timeout, proxy=self._proxy)

    def statistics(self) -> NetworkStatistics:
        """Return numbers about the network."""
        return NetworkStatistics(
            open_connections=self._open,
            connections=self._connections,
            lookups=self._lookups,
            refused=self._refused,
            failed=self._failed,
            bytes_sent=self._sent,
            bytes_received=self._received,
        )

    @contextmanager
    def layer(self, network: Network) -> Generator[None]:
        """Put *network* in force for the block; its connections are broken off at the end."""
        layer = Layer(network)
        self._layers.append(layer)
        try:
            yield
        finally:
            self._layers.remove(layer)
            layer.end()

    @contextmanager
    def watch(self) -> Generator[NetworkWatch]:
        """Yield a watch that is told of every decision during the block."""
        events = EventQueue()
        self._watches.add(events)
        try:
            yield NetworkWatch(events)
        finally:
            self._watches.discard(events)
            events.close()

    def handle(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[None] | None:
        """Serve a stream that a guest opened: a `wire.StreamHandler`.

        Raises:
          WireError: if no agent of ours asks like that.

        """
        match header:
            case {"service": "lookup", "name": str(name)}:
                serving = self._look_up(stream, name)
            case {"service": "connect", "host": str(host), "port": int(port)} if type(port) is int and 0 < port < 65536:
                serving = self._connect(stream, host, port)
            case _:
                raise WireError(f"a request for the network that is none: {header!r:.200}")
        if self._streams >= _MOST_STREAMS:
            serving.close()
            raise WireError(f"more than {_MOST_STREAMS} requests for the network at a time")
        return self._contained(serving)

    async def _contained(self, serving: Awaitable[None]) -> None:
        """Keep to itself what goes wrong with one connection: the sandbox, and its user's block, go on."""
        self._streams += 1
        try:
            await serving
        except* _BROKEN:
            pass  # the guest, or its machine, does not want it any more
        except* Exception:  # noqa: BLE001 - one connection's bug is told, and must not end a sandbox
            _log.exception("a connection of a sandbox failed in a way that it should not; please report this")
        finally:
            self._streams -= 1

    # --- Lookups ---

    async def _look_up(self, stream: ChannelStream, name: str) -> None:
        attempt = _Attempt(name if is_host_name(name) else "", None)
        answer = Answer.THERE_IS
        try:
            self._lookups += 1
            await self._check_name(attempt.host, self._find(attempt.host, None))
        except _RefusedError as exc:
            answer = Answer.NO_SUCH_NAME if exc.outcome == "no such host" else Answer.REFUSED
            self._tell(attempt.event(exc.outcome, str(exc)))
        except socket.gaierror as exc:
            answer = Answer.TRY_LATER if exc.errno == socket.EAI_AGAIN else Answer.NO_SUCH_NAME
            self._tell(attempt.event("no such host", f"{attempt.host}: {exc.strerror}"))
        await stream.send_all(bytes([answer]), end=True)

    async def _check_name(self, name: str, rule: NetworkRule) -> None:
        """Return if *name* leads somewhere that its rule allows."""
        if rule.to is None and self._proxy is None:
            await self._rate.wait()
            await self._vet(name, rule)
        else:
            await trio.lowlevel.checkpoint()
        self._find(name, None)  # it may be refused by now

    def _find(self, host: str, port: int | None) -> NetworkRule:
        if not host:
            raise _RefusedError("no such host", "what the guest asked for is no host name")
        network = self.network
        rule = network.find(host, port)
        if rule is None:
            where = host if port is None else f"{host}:{port}"
            raise _RefusedError("refused by policy", f"no rule allows {where}; Network.allow({where!r}) would")
        if host not in self._names:
            if len(self._names) >= _MOST_NAMES:
                raise _RefusedError("over the limit", f"the sandbox has asked for {_MOST_NAMES} names already")
            self._names.add(host)
        self._check_bytes(network)
        return rule

    def _check_bytes(self, network: Network) -> None:
        for limit, count, name in (
            (network.max_sent_bytes, self._sent, "max_sent_bytes"),
            (network.max_received_bytes, self._received, "max_received_bytes"),
        ):
            if limit is not None and count >= limit:
                raise _RefusedError("over the limit", f"Network.{name} is {limit}, and used up")

    async def _vet(self, name: str, rule: NetworkRule) -> list[str]:
        """Return the addresses of *name* that may be connected to."""
        addresses = await self._resolver.resolve(name)
        allowed = [address for address in addresses if may_connect(address, rule.private)]
        if not allowed:
            raise _RefusedError(
                "not a public address",
                f"{name} leads to {', '.join(addresses[:3])}; NetworkRule({name!r}, private=True) would allow what is in a "
                "private network, and private='loopback' this machine, too",
                errno.EHOSTUNREACH,
            )
        return allowed

    # --- Connections ---

    async def _connect(self, stream: ChannelStream, host: str, port: int) -> None:
        attempt = _Attempt(host if is_host_name(host) else "", port)
        layer = self._layers[-1]
        number = 0
        try:
            rule = self._find(attempt.host, port)
            async with layer.room:
                with trio.CancelScope() as scope:
                    layer.connections.add(scope)
                    try:
                        await self._serve(stream, attempt, rule, layer, scope)
                    finally:
                        layer.connections.discard(scope)
                if scope.cancelled_caught:
                    stream.reset("the policy that allowed this connection is over")
            return
        except _RefusedError as exc:
            number = exc.errno
            self._tell(attempt.event(exc.outcome, str(exc)))
        except socket.gaierror as exc:
            number = errno.EHOSTUNREACH
            self._tell(attempt.event("no such host", f"{host}: {exc.strerror}"))
        except OSError as exc:
            number = exc.errno if exc.errno in _TOLD else errno.EHOSTUNREACH
            self._tell(attempt.event("failed", f"{host}:{port}: {exc.strerror or exc}"))
        await stream.send_all(struct.pack(">H", number), end=True)

    async def _serve(
        self, stream: ChannelStream, attempt: _Attempt, rule: NetworkRule, layer: Layer, scope: trio.CancelScope
    ) -> None:
        upstream = await self._dial(stream, attempt, rule)
        if upstream is None:
            self._tell(attempt.event("reset", "the guest gave up before there was a connection"))
            return
        over: list[_RefusedError] = []

        def count(sent: int, received: int) -> None:
            attempt.sent += sent
            attempt.received += received
            self._sent += sent
            self._received += received
            try:
                self._check_bytes(layer.network)
            except _RefusedError as exc:
                over.append(exc)
                scope.cancel(reason="the sandbox's bytes are used up")

        try:
            if layer is not self._layers[-1]:
                raise _RefusedError("refused by policy", "the policy changed while the connection was being made")
            named = rule.tls == "named" and attempt.port == _TLS_PORT
            relay = Relay(stream, upstream, count)
            outcome: Outcome = "reset"
            error = ""
            self._open += 1
            self._connections += 1
            try:
                await stream.send_all(b"\0\0")
                await relay.run(attempt.host if named else None)
                if relay.complete:
                    outcome = "closed"
                else:
                    stream.reset("the other side broke the connection off")
            except WrongServerNameError as exc:
                stream.reset("the server name in its TLS hello is another one")
                outcome = "wrong server name"
                error = f"{exc}; NetworkRule({attempt.host!r}, tls='any') would pass on whatever the guest sends"
            finally:
                self._open -= 1
                if over:
                    outcome, error = over[0].outcome, str(over[0])
                self._tell(attempt.event(outcome, error))
        finally:
            await trio.aclose_forcefully(upstream)

    async def _dial(
        self, stream: ChannelStream, attempt: _Attempt, rule: NetworkRule
    ) -> trio.abc.HalfCloseableStream | None:
        """Return the other end of a connection; None if the guest gives up first."""
        upstream: trio.abc.HalfCloseableStream | None = None
        failure: Exception | None = None

        async def watch() -> None:
            await stream.wait_given_up()
            nursery.cancel_scope.cancel(reason="the guest gave the connection up")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                await self._rate.wait()
                upstream = await self._open_upstream(attempt, rule)
            except (OSError, _RefusedError) as exc:
                failure = exc  # raised outside, where it is in no group
            nursery.cancel_scope.cancel(reason="there is an answer")
        if failure is not None:
            raise failure
        return upstream

    async def _open_upstream(self, attempt: _Attempt, rule: NetworkRule) -> trio.abc.HalfCloseableStream:
        assert attempt.port is not None
        try:
            with trio.fail_after(self._connect_timeout):
                if callable(rule.to):
                    return await self._call(rule.to)
                port = attempt.port
                if rule.to is not None:
                    host, port = rule.to
                    addresses = await self._resolver.resolve(host) if is_host_name(host) else [host]
                elif self._proxy is not None:
                    return await self._proxy.connect(attempt.host, port)
                else:
                    addresses = await self._vet(attempt.host, rule)
                stream, attempt.address = await connect(addresses, port)
                return stream
        except trio.TooSlowError:
            raise OSError(errno.ETIMEDOUT, f"no connection within {self._connect_timeout:g} s") from None

    @staticmethod
    async def _call(factory: StreamFactory) -> trio.abc.HalfCloseableStream:
        try:
            return await factory()
        except OSError:
            raise
        except Exception as exc:
            # The user's own function: this connection fails, and the sandbox goes on.
            _log.exception("the function of a NetworkRule failed")
            raise OSError(errno.EHOSTUNREACH, f"the function of NetworkRule.to failed: {exc!r}") from exc

    # --- What is told ---

    def _tell(self, event: NetworkEvent) -> None:
        where = event.host if event.port is None else f"{event.host}:{event.port}"
        if event.outcome in ("closed", "reset"):
            _log.info(
                "%s (%s) %s after %.3f s; sent %d bytes, received %d",
                where,
                event.address,
                event.outcome,
                event.duration,
                event.bytes_sent,
                event.bytes_received,
            )
        elif event.outcome in ("failed", "no such host"):
            self._failed += 1
            _log.info("%s: %s: %s", where, event.outcome, event.error)
        else:
            self._refused += 1
            self._warn(where, event)
        for events in self._watches:
            events.put(event)

    def _warn(self, where: str, event: NetworkEvent) -> None:
        now = trio.current_time()
        if now < self._warned.get(where, 0.0):
            return
        if len(self._warned) >= _MOST_NAMES:
            self._warned.clear()
        self._warned[where] = now + _QUIET
        _log.warning("%s: %s: %s", where or "a request", event.outcome, event.error)
