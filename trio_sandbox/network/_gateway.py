"""What answers a guest's wishes for the network: each is decided by name and port, and only then anything is done.

    {"service": "lookup", "name": str}                 answered by a byte, and the end: see `Answer`
    {"service": "connect", "host": str, "port": int}   answered by an errno in two bytes, big-endian; after 0 the stream is the connection

The order is: rate, room, policy, resolve, vet, connect, answer, server name, copy, tell. No step comes before the one ahead of it,
so a name that no rule allows never leaves this process. Until there is an answer, all of it ends when the guest gives up.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from contextvars import Context
from enum import IntEnum
from functools import partial
from ipaddress import ip_address
from typing import Final, TypeVar, final

import trio

from .._network import Network, NetworkRule, StreamFactory, is_host_name
from .._observe import part_logger
from .._quiet_log import QuietLog
from .._rate import Rate
from ..wire import ChannelStream, StreamHandler, WireError
from ._connections import NetworkStatistics, NetworkWatch, Outcome
from ._dialer import Dialer, HostDialer
from ._http import RequestRefusedError
from ._journal import Attempt, Journal
from ._proxy import Proxy
from ._relay import Relay, WrongServerNameError
from ._resolver import HostResolver
from ._termination import Termination
from ._trust import Trust
from ._vault import Vault, bundle_environment

_log = part_logger("network")

#: Streams that a guest may have open to us. Its agent keeps within that: a guest with more has another agent.
_MOST_STREAMS: Final = 512
#: Lookups and connections of a sandbox a second, and how many may come at once. Further ones wait.
_PER_SECOND, _BURST = 50.0, 100
#: Different names that a sandbox may look up in its life. Each could carry a little of what the guest knows to the
#: name servers of an allowed domain.
_MOST_NAMES: Final = 4096
_TLS_PORT: Final = 443
#: What a guest is told as it is; any other error of ours is EHOSTUNREACH to it.
_TOLD: Final = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT})
_T = TypeVar("_T")
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
class Gateway:
    """The network of one sandbox, whatever machine it has at the moment.

    Args:
      network: The policy that it begins with.
      resolver: What resolves names for all sandboxes of the host.
      connect_timeout: Seconds for a connection to come about.
      proxy: What all connections go through; None: none. It resolves the names, so that no address is vetted here.
      trust: Whose certificates count; None: whose the system says.
      vault: Placeholders of secrets that there are already; None: none.

    Raises:
      ModuleNotFoundError: if *network* has secrets, and what they take is not installed.

    """

    def __init__(
        self,
        network: Network,
        resolver: HostResolver,
        *,
        connect_timeout: float,
        proxy: Proxy | None = None,
        trust: Trust | None = None,
        vault: Vault | None = None,
    ) -> None:
        self._layers = [Layer(network)]
        self._trust = Trust() if trust is None else trust
        self._vault = Vault() if vault is None else vault
        self._vault.authority(network)
        self._host_resolver = resolver
        self.dialer: Dialer = HostDialer(resolver)
        """What makes its connections: this machine, unless somebody says otherwise."""
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._rate = Rate(_PER_SECOND, _BURST)
        self._names: set[str] = set()
        self._streams = 0
        self._journal = Journal()
        self._log = QuietLog(_log)

    @property
    def network(self) -> Network:
        """The policy in force: that of the innermost block."""
        return self._layers[-1].network

    @property
    def handler(self) -> StreamHandler | None:
        """What serves the streams that a guest opens; None while nothing may be reached."""
        return self.handle if self.network else None

    def observe_in(self, context: Context) -> None:
        """Tell of decisions in *context*, that of the sandbox, whoever carries them out."""
        self._journal.context = context

    @property
    def certificates(self) -> str:
        """Certificates, as PEM, that the guest's programs are to trust besides their own."""
        if not self.network:
            return ""
        authority = self._vault.authority(self.network, renew=True)
        return self._trust.certificates + ("" if authority is None else authority.pem)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the guest's programs get: placeholders of secrets, and where certificates are."""
        if not self.network:
            return {}
        placeholders = self._vault.environment(self.network)
        if not placeholders and not self._trust.certificates:
            return {}
        return {**bundle_environment(), **placeholders}

    def copy(self) -> Gateway:
        """Return a gateway for a copy of the sandbox: with the policy in force and its placeholders, and nothing else of this one."""
        return Gateway(
            self.network,
            self._host_resolver,
            connect_timeout=self._connect_timeout,
            proxy=self._proxy,
            trust=self._trust,
            vault=self._vault,
        )

    def statistics(self) -> NetworkStatistics:
        """Return numbers about the network."""
        return self._journal.statistics()

    @contextmanager
    def layer(self, network: Network) -> Generator[None]:
        """Put *network* in force for the block; its connections are broken off at the end.

        Raises:
          ModuleNotFoundError: if it has secrets, and what they take is not installed.

        """
        self._vault.authority(network)
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
        with self._journal.watch() as watch:
            yield watch

    def handle(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[None] | None:
        """Serve a stream that a guest opened: a `wire.StreamHandler`.

        Raises:
          WireError: if no agent of ours asks like that.

        """
        serve: Callable[[], Awaitable[None]]
        match header:
            case {"service": "lookup", "name": str(name)}:
                serve = partial(self._look_up, stream, name)
            case {"service": "connect", "host": str(host), "port": int(port)} if type(port) is int and 0 < port < 65536:
                serve = partial(self._connect, stream, host, port)
            case _:
                raise WireError(f"something that is not a request for the network: {header!r:.200}")
        if self._streams >= _MOST_STREAMS:
            raise WireError(f"more than {_MOST_STREAMS} requests for the network at a time")
        # Counted here, not in its task: that begins when all that came with this request has been taken.
        self._streams += 1
        return self._contained(serve)

    async def _contained(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Keep to itself what goes wrong with one connection: the sandbox, and its user's block, go on."""
        try:
            await serve()
        except* _BROKEN:
            pass  # the guest, or its machine, does not want it any more
        except* Exception:  # noqa: BLE001 - one connection's bug is told, and must not end a sandbox
            _log.exception("a connection of a sandbox failed in a way that it should not; please report this")
        finally:
            self._streams -= 1

    # --- Lookups ---

    async def _look_up(self, stream: ChannelStream, name: str) -> None:
        attempt = Attempt(name if is_host_name(name) else "", None)
        self._journal.lookups += 1
        answer = await _while_wanted(stream, partial(self._decide, attempt))
        if answer is not None:
            await stream.send_and_close(bytes([answer]))

    async def _decide(self, attempt: Attempt) -> Answer:
        name = attempt.host
        try:
            await self._rate.wait()
            rule = self._find(name, None)
            if rule.to is None and self._proxy is None:
                with trio.fail_after(self._connect_timeout):
                    await self._vet(name, rule)
                self._find(name, None)  # it may be refused by now
        except _RefusedError as exc:
            self._tell(attempt, exc.outcome, str(exc))
            return Answer.NO_SUCH_NAME if exc.outcome == "no such host" else Answer.REFUSED
        except socket.gaierror as exc:
            self._tell(attempt, "no such host", f"{name}: {exc.strerror}")
            return Answer.TRY_LATER if exc.errno == socket.EAI_AGAIN else Answer.NO_SUCH_NAME
        except trio.TooSlowError:
            self._tell(attempt, "failed", f"{name}: no answer within {self._connect_timeout:g} s")
            return Answer.TRY_LATER
        except OSError as exc:  # of this machine: no descriptors, a resolver that is not there
            self._tell(attempt, "failed", f"{name}: {exc.strerror or exc}")
            return Answer.TRY_LATER
        return Answer.THERE_IS

    def _find(self, host: str, port: int | None) -> NetworkRule:
        if not host:
            raise _RefusedError("no such host", "the guest asked for something that is not a host name")
        network = self.network
        rule = network.find(host, port)
        if rule is None:
            where = host if port is None else f"{host}:{port}"
            raise _RefusedError(
                "refused by policy", f"no rule allows {where}; Network.allow({where!r}) would, or --network {where}"
            )
        self._check_bytes(network, 1)
        if host not in self._names:
            if len(self._names) >= _MOST_NAMES:
                raise _RefusedError("over the limit", f"the sandbox has asked for {_MOST_NAMES} names already")
            self._names.add(host)
        return rule

    def _check_bytes(self, network: Network, more: int) -> None:
        """Return if *more* bytes may still be sent, and received."""
        for limit, count, name in (
            (network.max_sent_bytes, self._journal.sent, "max_sent_bytes"),
            (network.max_received_bytes, self._journal.received, "max_received_bytes"),
        ):
            if limit is not None and count + more > limit:
                raise _RefusedError("over the limit", f"Network.{name} is {limit}, and used up")

    async def _vet(self, name: str, rule: NetworkRule) -> list[str]:
        """Return the addresses of *name* that may be connected to."""
        addresses = await self.dialer.resolve(f"{name}.")
        allowed = await self.dialer.vet(addresses, rule.private)
        if not allowed:
            raise _RefusedError(
                "not a public address",
                f"{name} leads to {', '.join(addresses[:3]) or 'no address'}; NetworkRule({name!r}, private=True) would allow "
                "what is in a private network, and private='loopback' this machine, too",
                errno.EHOSTUNREACH,
            )
        return allowed

    # --- Connections ---

    async def _connect(self, stream: ChannelStream, host: str, port: int) -> None:
        attempt = Attempt(host if is_host_name(host) else "", port)
        layer = self._layers[-1]
        with trio.CancelScope() as scope:
            layer.connections.add(scope)
            try:
                number = await self._serve(stream, attempt, layer, scope)
                if number:
                    await stream.send_and_close(struct.pack(">H", number))
            finally:
                layer.connections.discard(scope)
                if attempt.room is not None:
                    attempt.room.release()
                if attempt.upstream is not None:
                    await trio.aclose_forcefully(attempt.upstream)
        if scope.cancelled_caught:
            stream.reset("the policy that allowed this connection is over")
            if not attempt.told:
                self._tell(attempt, "reset", "the policy ended before there was a connection")

    async def _serve(self, stream: ChannelStream, attempt: Attempt, layer: Layer, scope: trio.CancelScope) -> int:
        """Carry one connection; return 0 after it, or the errno by which it did not come about."""
        try:
            rule = await _while_wanted(stream, partial(self._open, attempt, layer))
        except _RefusedError as exc:
            self._tell(attempt, exc.outcome, str(exc))
            return exc.errno
        except socket.gaierror as exc:
            self._tell(attempt, "no such host", f"{attempt.host}: {exc.strerror}")
            return errno.EHOSTUNREACH
        except OSError as exc:
            self._tell(attempt, "failed", f"{attempt.host}:{attempt.port}: {exc.strerror or exc}")
            return exc.errno if exc.errno in _TOLD else errno.EHOSTUNREACH
        if rule is None:
            self._tell(attempt, "reset", "the guest gave up before there was a connection")
            return 0
        await self._carry(stream, attempt, rule, layer, scope)
        return 0

    def _tell(self, attempt: Attempt, outcome: Outcome, error: str) -> None:
        attempt.told = True
        self._journal.tell(attempt.event(outcome, error))

    async def _open(self, attempt: Attempt, layer: Layer) -> NetworkRule:
        """Open the attempt's upstream, and return the rule that allows it."""
        assert attempt.port is not None
        await self._rate.wait()
        self._find(attempt.host, attempt.port)  # what is refused need not wait for room
        await layer.room.acquire()
        attempt.room = layer.room
        self._check_layer(layer)
        rule = self._find(attempt.host, attempt.port)
        try:
            with trio.fail_after(self._connect_timeout):
                await self._open_upstream(attempt, attempt.port, rule)
        except trio.TooSlowError:
            raise OSError(errno.ETIMEDOUT, f"no connection within {self._connect_timeout:g} s") from None
        self._check_layer(layer)
        return rule

    def _check_layer(self, layer: Layer) -> None:
        if layer is not self._layers[-1]:
            raise _RefusedError("refused by policy", "the policy changed while the connection was being made")

    async def _open_upstream(self, attempt: Attempt, port: int, rule: NetworkRule) -> None:
        if callable(rule.to):
            attempt.upstream = await self._call(rule.to)
        elif rule.to is not None:
            host, port = rule.to
            attempt.upstream, attempt.address = await self.dialer.connect(await self._resolve_own(host), port)
        elif self._proxy is not None:
            addresses = await self._resolve_own(self._proxy.host)
            attempt.upstream, _ = await self.dialer.connect(addresses, self._proxy.port)
            await self._proxy.connect(attempt.upstream, attempt.host, port)
        else:
            vetted = await self._vet(attempt.host, rule)
            attempt.upstream, attempt.address = await self.dialer.connect(vetted, port)

    async def _call(self, factory: StreamFactory) -> trio.abc.HalfCloseableStream:
        try:
            stream = await factory()
        except OSError:
            raise
        except Exception as exc:
            # The user's own function: this connection fails, and the sandbox goes on.
            self._log.warning("the function of a NetworkRule failed", cause=exc)
            raise OSError(errno.EHOSTUNREACH, f"the function of NetworkRule.to failed: {exc!r}") from exc
        if not isinstance(stream, trio.abc.HalfCloseableStream):  # pyright: ignore[reportUnnecessaryIsInstance]
            self._log.warning(
                "the function of a NetworkRule returned %r, and not a trio.abc.HalfCloseableStream", stream
            )
            raise OSError(errno.EHOSTUNREACH, f"the function of NetworkRule.to returned {stream!r}, which is no stream")
        return stream

    async def _resolve_own(self, host: str) -> tuple[str, ...]:
        """Return the addresses of a host that the user names, not the guest: as this machine knows it, and not vetted."""
        try:
            ip_address(host.partition("%")[0])
        except ValueError:
            return await self.dialer.resolve(host)
        return (host,)

    async def _carry(
        self, stream: ChannelStream, attempt: Attempt, rule: NetworkRule, layer: Layer, scope: trio.CancelScope
    ) -> None:
        assert attempt.upstream is not None
        over: list[_RefusedError] = []

        def count(sent: int, received: int) -> bool:
            attempt.sent += sent
            attempt.received += received
            self._journal.sent += sent
            self._journal.received += received
            try:
                self._check_bytes(layer.network, 0)
            except _RefusedError as exc:
                over.append(exc)
                scope.cancel(reason="the sandbox's bytes are used up")
                return False
            return True

        outcome: Outcome = "reset"
        error = ""
        self._journal.open += 1
        self._journal.connections += 1
        try:
            await stream.send_all(b"\0\0")
            if await self._relay(stream, attempt.upstream, count, attempt, rule, layer):
                outcome = "closed"
            else:
                stream.reset("the other side broke the connection off")
        except RequestRefusedError as exc:
            outcome, error = exc.outcome, f"{attempt.host}:{attempt.port}: {exc}"
        except WrongServerNameError as exc:
            stream.reset("the server name in its TLS hello is another one")
            outcome = "wrong server name"
            error = f"{exc}; NetworkRule({attempt.host!r}, tls='any') would pass on whatever the guest sends"
        finally:
            self._journal.open -= 1
            if over:
                outcome, error = over[0].outcome, str(over[0])
            self._tell(attempt, outcome, error)

    async def _relay(
        self,
        stream: ChannelStream,
        upstream: trio.abc.HalfCloseableStream,
        count: Callable[[int, int], bool],
        attempt: Attempt,
        rule: NetworkRule,
        layer: Layer,
    ) -> bool:
        """Carry the bytes both ways; return whether both sides have ended it in good order."""
        assert attempt.port is not None
        authority = self._vault.authority(layer.network) if rule.secrets else None
        if authority is None:
            relay = Relay(stream, upstream, count)
            named = rule.tls == "named" and attempt.port == _TLS_PORT
            await relay.run(attempt.host if named else None)
            return relay.complete
        termination = Termination(
            stream,
            upstream,
            count,
            port=attempt.port,
            values=self._vault.values(rule),
            server=authority.context(attempt.host),
            client=self._trust.context,
        )
        await termination.run(attempt.host)
        return termination.complete


async def _while_wanted(stream: ChannelStream, work: Callable[[], Awaitable[_T]]) -> _T | None:
    """Return what *work* does; None, with *work* cancelled, if the guest gives *stream* up before."""
    scope = trio.CancelScope()

    def notice() -> None:
        if stream.is_given_up:
            scope.cancel(reason="the guest gave the request up")

    with scope:
        stream.call_on_news(notice)
        try:
            return await work()
        finally:
            stream.call_on_news(None)
    return None
