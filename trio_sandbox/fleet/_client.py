"""A node, as its user sees it: requests go over one connection, and what is kept there is kept as long as a block here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, final

import trio

from .._config import Progress
from .._errors import (
    CapacityError,
    LinkError,
    LinkProtocolError,
    NodeLostError,
    OutcomeUnknownError,
    SandboxClosedError,
)
from .._nurseries import open_services
from .._observe import part_logger
from ..host import HostStatistics
from ..image import Cargo
from ..machines import SavedCargo
from ..wire import MAX_STREAMS, Channel, ChannelError, Role, StreamLimitError, StreamResetError
from ._lease import Lease
from ._links import MessageStream, connect, open_link, why
from ._messages import (
    Answered,
    Ask,
    Delivered,
    Ended,
    Failure,
    Lent,
    NodeAddress,
    NodeStatus,
    Offer,
    Opened,
    OpenedTogether,
    Status,
    is_sound,
)

_log = part_logger("fleet")

#: Messages about different things that are kept for who will listen to them, of one block; the oldest go first.
_MOST_NEWS: Final = 256
#: Sandboxes that one program may have on a node: each keeps a stream of the connection to it, as long as it is open.
MOST_SANDBOXES: Final = MAX_STREAMS * 3 // 4
#: Requests to a node at a time; further ones wait. What is left is for what is copied, lent and forked.
_MOST_REQUESTS: Final = MAX_STREAMS // 8
#: Seconds for a node's event loop to answer a ping, before the node is taken for lost. Its kernel is asked more often.
SILENCE: Final = 30.0


@final
class NodeClient:
    """One node. Made by `open_node`.

    Args:
      address: Where it is.
      lease: Watches its connections.
      end_timeout: See `FleetConfig.end_timeout`.

    """

    def __init__(self, address: NodeAddress, *, lease: Lease, end_timeout: float) -> None:
        self.address: NodeAddress = address
        self.lease: Lease = lease
        self.failure: NodeLostError | None = None
        """Why it is lost; None while it is not."""
        self.statistics: HostStatistics | None = None
        """What it last said of its host."""
        self.draining: bool = False
        """Whether it opens no more sandboxes."""
        self.on_news: Callable[[], object] = lambda: None
        """Called when one of these has changed."""
        self.on_progress: Callable[[Progress], object] = lambda _: None
        """Told what its long work says; what it raises ends the fleet's block."""
        self._end_timeout = end_timeout
        self._link: Channel | None = None
        self._requests = trio.CapacityLimiter(_MOST_REQUESTS)
        self._lost = trio.Event()
        self._known = trio.Event()
        self._silence: Exception | None = None  # why it does not say what it is like
        self._hears: dict[tuple[type[object], int], Callable[[Any], object]] = {}
        self._unheard: dict[tuple[type[object], int], object] = {}  # the newest of what nobody listens to, yet

    @property
    def name(self) -> str:
        """What to call it."""
        return self.address.name

    async def wait_lost(self) -> NodeLostError | None:
        """Wait until it is lost, and return why; None: its block was left."""
        await self._lost.wait()
        return self.failure

    def hear(self, kind: type[object], number: int, function: Callable[[Any], object]) -> None:
        """Have *function* called with each message of a kind that is about the sandbox, or machine, of that number."""
        self._hears[kind, number] = function
        if (message := self._unheard.pop((kind, number), None)) is not None:
            function(message)

    def ignore(self, kind: type[object], number: int) -> None:
        """Have nobody called any more. Again is no error."""
        self._hears.pop((kind, number), None)

    # --- Requests ---

    def _open(self, what: str) -> MessageStream:
        if self.failure is not None:
            raise SandboxClosedError(f"{what} was not sent: node {self.name} is lost") from self.failure
        assert self._link is not None
        try:
            return MessageStream(self._link.open_stream({}))
        except StreamLimitError as exc:
            raise CapacityError(
                f"{what} was not sent: too much is under way between this program and node {self.name} (at most {MAX_STREAMS} "
                "requests, open sandboxes and mounts that are copied); try again later, or add nodes"
            ) from exc
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise SandboxClosedError(f"{what} was not sent: node {self.name} is lost") from (self._look() or exc)

    async def request(self, message: object, what: str) -> Any:
        """Ask for something, and return the answer.

        Cancelled: the node gives it up, as the same function does that is cancelled there.

        Raises:
          SandboxClosedError: if the node is lost; nothing was sent.
          CapacityError: if too much is under way already; nothing was sent.
          OutcomeUnknownError: if it is lost meanwhile.
          Exception: what it raised there.

        """
        async with self._requests:
            messages = self._open(what)
            try:
                async with self._failures(what):
                    await messages.send(message)
                    answer = await messages.receive()
            finally:
                messages.give_up()
        return self._unwrap(answer)

    def request_soon(self, services: trio.Nursery, message: object, what: str) -> None:
        """Ask for something that nobody waits for."""

        async def ask() -> None:
            try:
                await self.request(message, what)
            except Exception as exc:  # noqa: BLE001 - there is nobody to raise it to
                _log.info("%s on node %s failed: %s", what, self.name, exc)

        services.start_soon(ask)

    async def ask(self, sandbox: int, operation: str, *arguments: object) -> Any:
        """Call a method of a sandbox's keeper. Errors are those of `request`."""
        return await self.request(Ask(sandbox, operation, arguments), f"{operation} of a sandbox")

    @asynccontextmanager
    async def hold(
        self, message: object, what: str, send: Callable[[MessageStream], Awaitable[object]] | None = None
    ) -> AsyncGenerator[Any]:
        """Ask for something that is kept for the block, and yield what it is. Errors are those of `request`, and of *send*.

        When the block is left the node gives it up, and that is waited for, `FleetConfig.end_timeout` at most. A failure to
        do so is raised, if nothing else is. Cancelled on the way in: nothing is kept.
        """
        messages = self._open(what)
        ended = trio.Event()
        last: list[object] = []
        about: dict[tuple[type[object], int], None] = {}

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            try:
                while (heard := await messages.receive()) is not None:
                    if isinstance(heard, (Answered, Failure)):
                        last[:] = [heard]
                    else:
                        self._dispatch(heard, about)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the node is lost: whoever uses what was kept is told
            except LinkProtocolError as exc:
                last.append(Failure(exc))
            ended.set()

        try:
            async with self._failures(what):
                await messages.send(message)
                if send is not None:
                    await send(messages)
                answer = await messages.receive()
            kept = self._unwrap(answer, kept=True)
            async with open_services("a block of a node") as services:
                await services.start(listen)
                try:
                    yield kept
                finally:
                    with trio.move_on_after(self._end_timeout, shield=True) as patience:
                        if await _end(messages):
                            await ended.wait()
                    if patience.cancelled_caught:
                        _log.warning(
                            "node %s did not clean up after %s within %g s", self.name, what, self._end_timeout
                        )
            if last:
                self._unwrap(last[0])
        finally:
            messages.give_up()
            for key in about:
                self._unheard.pop(key, None)

    def _dispatch(self, heard: object, ours: dict[tuple[type[object], int], None]) -> None:
        match heard:
            case Ended(machine=number) | Status(sandbox=number):
                key = type(heard), number
            case _:
                raise LinkProtocolError(f"node {self.name} said {heard!r:.100}")
        if (function := self._hears.get(key)) is not None:
            function(heard)
            return
        ours[key] = None
        self._unheard[key] = heard
        if len(ours) > _MOST_NEWS:
            oldest = next(iter(ours))
            del ours[oldest]
            self._unheard.pop(oldest, None)

    @asynccontextmanager
    async def _failures(self, what: str) -> AsyncGenerator[None]:
        try:
            yield
        except StreamResetError as exc:
            raise OutcomeUnknownError(f"node {self.name} gave {what} up: {exc.reason}") from exc
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise OutcomeUnknownError(f"node {self.name} was lost during {what}, which may have had its effect") from (
                self._look() or exc
            )

    def _unwrap(self, answer: object, *, kept: bool = False) -> Any:
        """Return the value of an answer, or what is kept; raise what it raised there."""
        match answer:
            case Failure(Exception() as error):
                error.add_note(f"on node {self.name}")
                raise error
            case Answered(value) if not kept:
                return value
            case (
                Opened(sandbox=int(), offer=Offer(machine=int(), secret=bytes()), status=Status())
                | OpenedTogether(sandboxes=tuple())
                | Lent(cargo=Cargo() | SavedCargo(), secrets=tuple())
                | Delivered(path=str())
            ) if kept:
                return answer
            case _:
                raise LinkProtocolError(f"node {self.name} answered a request with {answer!r:.100}")

    # --- The connection ---

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Connect, and keep the connection until it is lost or this is cancelled.

        Raises:
          LinkError, WrongNodeError: if it does not come about.

        """
        stream = await connect(self.address, self.address.secret, lease=self.lease)
        try:
            async with open_link(stream, Role.HOST, None, silence=SILENCE) as link:
                self._link = link
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch)
                    await self._known.wait()
                    if self.statistics is None:
                        raise LinkError(f"node {self.name} did not say what it has: {self._silence or link.failure}")
                    task_status.started()
                    nursery.start_soon(self._wait_link, link)
                    await self._lost.wait()
                    stream.close()  # whoever took it for lost, it is to know
                    nursery.cancel_scope.cancel(reason="the node is lost")
                await trio.sleep_forever()  # the channel stays, failed, for those that ask it why
        except ChannelError as exc:
            raise LinkError(f"the connection to node {self.name} did not come about: {exc}") from exc
        finally:
            self._lost.set()

    async def _wait_link(self, link: Channel) -> None:
        await link.wait_closed()
        self._look()

    def _look(self) -> NodeLostError | None:
        """Return why it is lost, be it just now: of those that an end of its connection wakes any may come first."""
        if self._link is not None and self._link.failure is not None:
            self.lose(f"the connection to it ended: {why(self._link.failure)}")
        return self.failure

    def lose(self, reason: str) -> None:
        """Take it for lost. Again is no error."""
        if self.failure is None:
            self.failure = NodeLostError(f"node {self.name} is lost: {reason}", node=self.name)
            _log.warning("%s", self.failure)
            self._lost.set()
            self.on_news()

    async def _watch(self) -> None:
        messages = self._open("watching")
        while (status := await self._next_status(messages)) is not None:
            self.statistics, self.draining = status.statistics, status.draining
            self._known.set()
            self.on_news()
            for each in status.progress:
                self.on_progress(each)
        self._known.set()

    async def _next_status(self, messages: MessageStream) -> NodeStatus | None:
        """Return what it says next of itself; None if it says nothing any more."""
        try:
            if not self._known.is_set():
                await messages.send("watch")
            match await messages.receive():
                case None:
                    return None
                case NodeStatus() as status if is_sound(status):
                    return status
                case Failure() as failure:
                    self._unwrap(failure)
                case heard:
                    raise LinkProtocolError(f"node {self.name} said {heard!r:.100} of itself")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the connection's end says so
        except LinkProtocolError as exc:
            self._silence = exc
            self.lose(str(exc))
        except Exception as exc:  # noqa: BLE001 - what its host raised when it was asked
            self._silence = exc
            _log.warning("node %s no longer reports its state: %s", self.name, exc)
        return None


async def _end(messages: MessageStream) -> bool:
    """Say that what is kept is needed no more; False if nobody hears it."""
    try:
        await messages.end()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True
