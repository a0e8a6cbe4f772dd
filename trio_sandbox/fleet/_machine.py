"""A machine on another node, as requests need it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, final

import trio

from .._errors import LinkError, NodeLostError, VmDiedError
from .._nurseries import hide_nursery
from .._observe import part_logger
from ..qemu import Accelerator
from ..wire import Channel, ChannelError, ChannelStream, Role, StreamHandler
from ._client import SILENCE, NodeClient
from ._links import connect, open_link, why
from ._messages import Ended, Offer, Status

_log = part_logger("fleet")

#: Seconds for the news of a machine's end to come, after its link was found closed.
_NEWS_SECONDS: Final = 3.0


@final
class RemoteMachine:
    """A machine that a node has offered: a `client.Machine`.

    Args:
      node: The node that it is on.
      offer: What the node said.

    """

    def __init__(self, node: NodeClient, offer: Offer) -> None:
        self.guest_handler: StreamHandler | None = None
        self._node = node
        self._offer = offer
        self._guest: Channel | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._console = self._qmp_log = ""
        self._ended = trio.Event()
        self._left = trio.Event()

    @property
    def number(self) -> int:
        """What its node calls it."""
        return self._offer.machine

    @property
    def guest(self) -> Channel:
        """The channel to its guest's agent, by way of the node."""
        assert self._guest is not None
        return self._guest

    @property
    def accelerator(self) -> Accelerator:
        """What runs its instructions."""
        return self._offer.accelerator

    @property
    def pid(self) -> int:
        """The process id of its QEMU, on its node."""
        return self._offer.pid

    @property
    def failure(self) -> Exception | None:
        """Why it is gone, though its block was not left; None while it is not."""
        if self._failure is None and not self._closed and self._guest is not None and self._guest.failure is not None:
            return self._link_lost(self._guest.failure)  # until its node says more
        return self._failure

    @property
    def closed(self) -> bool:
        """Whether its block was left."""
        return self._closed

    def console(self) -> str:
        """Return the last of its console, as its node last said."""
        return self._console

    def qmp_log(self) -> str:
        """Return the end of the conversation with its QEMU, as its node last said."""
        return self._qmp_log

    def note(self, status: Status) -> None:
        """Take what its node says of it."""
        self._console, self._qmp_log = status.console or "", status.qmp_log or ""

    def retire(self, reason: str) -> None:
        """Give it up: its link is closed, upon which its node ends it. Again is no error."""
        self._fail(VmDiedError(f"the virtual machine was ended: {reason}", console=self._console))

    def close(self) -> None:
        """Remember that it is not used any more, and wake those that wait. Its link is closed."""
        self._closed = True
        self._ended.set()
        self._left.set()

    async def wait_ended(self) -> Exception | None:
        """Block until it is gone; return why, None if its block was left."""
        await self._ended.wait()
        return self._failure

    def _fail(self, failure: Exception) -> None:
        if self._failure is None and not self._closed:
            self._failure = failure
            self._ended.set()

    def _link_lost(self, failure: Exception | None) -> NodeLostError:
        name = self._node.name
        lost = NodeLostError(f"the connection to a machine of node {name} ended: {why(failure)}", node=name)
        return self._node.failure or lost

    def _accept(self, stream: ChannelStream, header: dict[str, object]) -> Awaitable[object] | None:
        if self.guest_handler is not None:
            return self.guest_handler(stream, header)
        stream.reset("refused")
        return None

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Connect to it, and keep the connection until one of its ends is gone, or this is cancelled.

        Raises:
          LinkError, WrongNodeError: if it does not come about.

        """
        node = self._node
        node.hear(Ended, self.number, lambda ended: self._fail(ended.failure))
        try:
            stream = await connect(node.address, self._offer.secret, lease=node.lease)
            async with open_link(stream, Role.HOST, self._accept, silence=SILENCE) as self._guest:
                task_status.started()
                await self._wait_end(self._guest)
                if self._failure is not None:
                    # Its requests find out from their streams, which break, and are not closed: that is for the block's end.
                    stream.close()
                    await self._guest.wait_closed()
                await self._left.wait()
        except ChannelError as exc:
            raise LinkError(f"the connection to a machine of node {node.name} did not come about: {exc}") from exc
        finally:
            node.ignore(Ended, self.number)
            self.close()

    async def _wait_end(self, guest: Channel) -> None:
        """Wait until it is given up, here or by its node, or its link or its node is lost."""
        with hide_nursery("a link"):
            async with trio.open_nursery() as nursery:

                async def wait_link() -> None:
                    failure = await guest.wait_closed()
                    # Its node knows more, and says it over the other connection.
                    with trio.move_on_after(_NEWS_SECONDS):
                        await self._ended.wait()
                    self._fail(self._link_lost(failure))

                async def wait_node() -> None:
                    if (failure := await self._node.wait_lost()) is not None:
                        self._fail(failure)

                nursery.start_soon(wait_link)
                nursery.start_soon(wait_node)
                await self._ended.wait()
                nursery.cancel_scope.cancel(reason="the machine has ended")
