"""A node: a host on one machine, for one user who is on another.

The user's first connection is the lease: as long as it lives, so does all that was asked for over it. Each stream of it asks for one
thing, and what is kept, a sandbox or copies of one, is kept until its stream ends. Each machine has a connection of its own.
"""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import AsyncGenerator, Awaitable, Generator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, Protocol, final

import trio

from .._config import SandboxConfig
from .._errors import DrainingError, LinkProtocolError
from .._image import AnyImage
from .._nurseries import hide_nursery
from .._observe import part_logger
from ..host import HostStatistics
from ..image import Cargo
from ..machines import SavedCargo
from ..sandbox import Sandbox
from ..wire import ChannelError, ChannelStream, Role
from ._keeper import Keeper, gone
from ._lease import Lease
from ._links import MessageStream, open_link, serve_links
from ._messages import (
    Answered,
    Ask,
    Call,
    Deliver,
    Delivered,
    Failure,
    Fetch,
    FetchSaved,
    Fork,
    Lend,
    LendSaved,
    Lent,
    NodeAddress,
    NodeStatus,
    Open,
    OpenedTogether,
    Prepare,
)
from ._progress import ProgressNotes
from ._security import Secrets, make_identity
from ._shipping import CONNECTIONS, Loan, fetch, fetch_saved
from ._stock import Stock
from ._tls import TlsStream

_log = part_logger("fleet")

#: What the secret of the user's first connection is good for; machines have numbers from 1.
_USER: Final = 0
#: Seconds between two looks at what may have changed.
_LOOK: Final = 1.0


class NodeHost(Protocol):
    """What a node needs of its host; `Host` is one."""

    def open_sandbox(
        self, image: AnyImage, config: SandboxConfig | None = None, *, template: str | None = None
    ) -> AbstractAsyncContextManager[Sandbox]:
        """Open a sandbox for a block."""
        ...

    async def prepare(self, image: AnyImage) -> None:
        """See to it that an image is there."""
        ...

    def statistics(self) -> HostStatistics:
        """Return numbers about the host."""
        ...


@final
class Node:
    """Serves one user with the sandboxes of one host. Made by `serve_node`."""

    def __init__(self, host: NodeHost, stock: Stock, notes: ProgressNotes, lease: Lease) -> None:
        self.secrets: Secrets = Secrets()
        self.connected: trio.Event = trio.Event()
        """Set when the user has come."""
        self.left: trio.Event = trio.Event()
        """Set when the user has gone."""
        self.draining: bool = False
        """Whether no more sandboxes are to be opened here."""
        self._host = host
        self._stock = stock
        self._notes = notes
        self._lease = lease
        self._numbers = itertools.count(1)
        self._keepers: dict[int, Keeper] = {}
        self._loans: dict[int, Loan] = {}
        self._opening = 0
        self._fewer = trio.Event()  # of both

    def statistics(self) -> HostStatistics:
        """Return numbers about its host."""
        return self._host.statistics()

    async def drain(self, seconds: float | None) -> int:
        """Open no more sandboxes, and wait until there are none, or for so many *seconds*; return how many there are still."""
        self.draining = True
        with trio.move_on_after(math.inf if seconds is None else seconds):
            while self._keepers or self._opening:
                await self._fewer.wait()
        return len(self._keepers) + self._opening

    async def serve(self, stream: TlsStream, secret: bytes) -> None:
        """Serve a connection, whatever it is for."""
        purpose = self.secrets.redeem(secret)
        try:
            if purpose == _USER:
                await self._serve_user(stream)
            elif purpose is not None:
                keeper = next((keeper for keeper in self._keepers.values() if keeper.owns(purpose)), None)
                if keeper is not None:
                    await keeper.serve_machine(purpose, stream)
                elif (loan := self._loans.get(purpose)) is not None:
                    await loan.serve(stream)
            else:
                _log.warning("a connection with a wrong secret was broken off")
        except (ChannelError, LinkProtocolError, trio.BrokenResourceError) as exc:
            # Also who has a secret may say what nobody understands. That costs nothing else here.
            _log.info("a connection ended before it was one: %s", exc)

    async def _serve_user(self, stream: trio.abc.Stream) -> None:
        self.connected.set()
        try:
            async with open_link(stream, Role.GUEST, self._accept, silence=float("inf")) as link:
                failure = await link.wait_closed()
                _log.info("the user is gone, and so are its sandboxes: %s", failure)
        finally:
            self.left.set()

    def _accept(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object]:
        return self._serve_request(MessageStream(stream))

    async def _serve_request(self, messages: MessageStream) -> None:
        """Do what one stream asks for, for as long as its user waits for that or keeps it."""
        with trio.CancelScope() as scope:
            answer: object
            try:
                request = await messages.receive()
            except LinkProtocolError as exc:
                answer = Failure(exc)
            else:
                answer = await self._obey(messages, request, scope)
            try:
                await messages.send(answer)
            except ValueError as exc:  # it is too long
                await messages.send(Failure(LinkProtocolError(f"the answer can't be sent: {exc}")))
            await messages.end()

    async def _obey(self, messages: MessageStream, request: object, scope: trio.CancelScope) -> object:
        """Do what is asked; given up as soon as the stream ends."""
        answer: object = Answered()

        async def wait_end(kept: trio.CancelScope) -> None:
            try:
                await messages.receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError, LinkProtocolError):
                scope.cancel(reason="its user gave it up")
            kept.cancel(reason="its user needs it no more")

        try:
            with hide_nursery("a request to a node"):
                async with trio.open_nursery() as nursery:
                    if not isinstance(request, Deliver):  # of which more is to come
                        nursery.start_soon(wait_end, nursery.cancel_scope)
                    match request:
                        case Deliver():
                            async with self._stock.trees.receive(messages) as path:
                                nursery.start_soon(wait_end, nursery.cancel_scope)
                                await messages.send(Delivered(str(path)))
                                await trio.sleep_forever()
                        case Open(image, config, template):
                            self._check_open()
                            async with self._open(messages, image, config, template) as keepers:
                                await self._report(messages, keepers)
                        case Fork(number, count):
                            self._check_open()
                            async with self._fork(messages, self._find(number), count) as keepers:
                                await self._report(messages, keepers)
                        case Prepare(image):
                            await self._host.prepare(image)
                            answer = Answered(self._stock.images.name_of(image))
                        case Lend(image):
                            async with self._lend(messages, self._stock.images.lend(image)):
                                await trio.sleep_forever()
                        case LendSaved(name, marker):
                            async with self._lend(messages, self._stock.saved.lend(name, marker)):
                                await trio.sleep_forever()
                        case FetchSaved(source, lent):
                            await fetch_saved(self._stock.saved, source, lent, lease=self._lease)
                        case Fetch(image, source, lent):
                            await fetch(self._stock.images, image, source, lent, lease=self._lease)
                        case Call(operation, arguments):
                            answer = Answered(await self._stock.ask(operation, arguments))
                        case Ask(number, operation, arguments):
                            answer = Answered(await self._find(number).ask(operation, arguments))
                        case "watch":
                            await self._watch(messages)
                        case _:
                            raise LinkProtocolError(f"a node can't do {request!r:.100}")
                    nursery.cancel_scope.cancel(reason="it is done")
        except Exception as exc:  # noqa: BLE001 - whatever it is, its user is told
            answer = Failure(exc)
        return answer

    def _check_open(self) -> None:
        if self.draining:
            raise DrainingError("this node is being drained, and opens no more sandboxes; nothing was started")

    def _find(self, number: int) -> Keeper:
        keeper = self._keepers.get(number)
        if keeper is None:
            raise gone(number)
        return keeper

    # --- What is kept ---

    @asynccontextmanager
    async def _open(
        self, messages: MessageStream, image: AnyImage, config: SandboxConfig | None, template: str | None
    ) -> AsyncGenerator[list[Keeper]]:
        async with AsyncExitStack() as stack:
            self._opening += 1
            try:
                sandbox = await stack.enter_async_context(self._host.open_sandbox(image, config, template=template))
            finally:
                self._opening -= 1
                self._tell_fewer()
            with self._kept([sandbox], messages) as keepers:
                await messages.send(keepers[0].opened())
                yield keepers

    @asynccontextmanager
    async def _fork(self, messages: MessageStream, parent: Keeper, count: int) -> AsyncGenerator[list[Keeper]]:
        async with parent.sandbox.fork(count) as sandboxes:
            with self._kept(sandboxes, messages) as keepers:
                await messages.send(OpenedTogether(tuple(keeper.opened() for keeper in keepers)))
                yield keepers

    @asynccontextmanager
    async def _lend(
        self,
        messages: MessageStream,
        lending: AbstractAsyncContextManager[tuple[Cargo | SavedCargo, tuple[Path, ...]]],
    ) -> AsyncGenerator[None]:
        async with lending as (cargo, directories):
            number, loan = next(self._numbers), Loan(directories)
            self._loans[number] = loan
            try:
                await messages.send(Lent(cargo, tuple(self.secrets.issue(number) for _ in range(CONNECTIONS))))
                yield
            finally:
                del self._loans[number]
                self.secrets.revoke(number)
                loan.end()

    @contextmanager
    def _kept(self, sandboxes: Iterable[Sandbox], messages: MessageStream) -> Generator[list[Keeper]]:
        """Have sandboxes found by their numbers, for a block."""
        numbers = self._numbers
        keepers = [Keeper(next(numbers), sandbox, self.secrets, numbers, messages.send) for sandbox in sandboxes]
        self._keepers |= {keeper.number: keeper for keeper in keepers}
        try:
            yield keepers
        finally:
            for keeper in keepers:
                keeper.close()
                del self._keepers[keeper.number]
            self._tell_fewer()

    def _tell_fewer(self) -> None:
        self._fewer.set()
        self._fewer = trio.Event()

    async def _report(self, messages: MessageStream, keepers: list[Keeper]) -> NoReturn:
        """Say what sandboxes are like when that has changed since they were opened, until cancelled.

        Most are gone before there is anything to say: each look takes a node as long as a short run.
        """
        while True:
            await trio.sleep(_LOOK)
            for keeper in keepers:
                if (status := keeper.news()) is not None:
                    await messages.send(status)

    async def _watch(self, messages: MessageStream) -> NoReturn:
        before: NodeStatus | None = None
        while True:
            status = NodeStatus(self._host.statistics(), self.draining, self._notes.take())
            if status != before:
                before = status
                await messages.send(status)
            await trio.sleep(_LOOK)


async def _listen(address: str) -> trio.SocketListener:
    """Listen where the user reaches this machine; everywhere, if the machine itself does not know that address, as behind NAT."""
    try:
        listener, *others = await trio.open_tcp_listeners(0, host=address)
    except OSError as exc:
        if exc.errno != errno.EADDRNOTAVAIL:
            raise
        everywhere = "::" if ":" in address else "0.0.0.0"
        listener, *others = await trio.open_tcp_listeners(0, host=everywhere)
    for other in others:  # of a name with several addresses, which all have other ports
        await other.aclose()
    return listener


async def serve_node(
    host: NodeHost,
    stock: Stock,
    notes: ProgressNotes,
    name: str,
    *,
    address: str = "127.0.0.1",
    lease: float,
    patience: float,
    task_status: trio.TaskStatus[tuple[NodeAddress, Node]],
) -> None:
    """Serve one user with the sandboxes of a host, until that is gone; then all of them have ended.

    Args:
      host: It.
      stock: What is on its disk.
      notes: What its long work says.
      name: What to call this node.
      address: Where the user reaches this machine.
      lease: See `FleetConfig.lease`.
      patience: Seconds for the user to come.
      task_status: Told where the node is, and what it is like.

    Raises:
      OSError: if it can't listen there.

    """
    identity = make_identity()
    watch = Lease(lease)
    node = Node(host, stock, notes, watch)
    async with await _listen(address) as listener:
        port = listener.socket.getsockname()[1]
        with hide_nursery("serve_node()"):
            async with trio.open_nursery() as handlers:
                await handlers.start(watch.serve)
                async with trio.open_nursery() as accepting:
                    accepting.start_soon(
                        partial(serve_links, listener, identity, node.serve, lease=watch, handlers=handlers)
                    )
                    secret = node.secrets.issue(_USER)
                    task_status.started((NodeAddress(name, address, port, identity.fingerprint, secret), node))
                    with trio.move_on_after(patience):
                        await node.connected.wait()
                    if node.connected.is_set():
                        await node.left.wait()
                    accepting.cancel_scope.cancel(reason="the user is gone")
                handlers.cancel_scope.cancel(reason="the user is gone")
