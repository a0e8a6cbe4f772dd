"""Service "file": file helpers, and the bytes between them and the host.

The host opens a stream with ``{"service": "file", "user": name | number | null}`` and talks with a file helper
that runs as that user; `file_helper` has the protocol. Nothing here understands what they say: the agent is root,
and what root does in directories that a hostile user may rearrange meanwhile has to be nothing.

The host's END lets the helper finish what it has, and takes back what is incomplete. A reset does the latter at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, final

import trio

from ...wire import PIECE_SIZE, ChannelStream, StreamResetError, encode_record
from ..helpers.file_helper import CONTROL, IDLE
from ..messages import send_message
from .children import Child, Children

if TYPE_CHECKING:
    from ..spawner.becoming import Request

#: Helpers of one user that are kept for further sessions, and users that they are kept for.
_IDLE_LIMIT = 4
_USERS_LIMIT = 4
#: Seconds that a helper may take to notice that its session is over before it is killed. One that waits
#: for a disk or at the end of a named pipe does not notice.
_PATIENCE = 5.0
#: Seconds until the spawner's word about a helper that it could not start.
_WORD_PATIENCE = 5.0
#: What a socket of a session is told that it may hold, which the kernel doubles, and what everybody may ask for. With the
#: kernel's own default, half of what comes of it, agent and helper take turns twice as often.
_SOCKET_BUFFER = 212992
#: Bytes of an answer that may be an operation's only one.
_SHORT = 4096


class _Helper:
    """A helper process, and the socket that it gets its sessions by."""

    def __init__(self, child: Child, control: socket.socket) -> None:
        self.child = child
        self._control = control

    def begin(self, session: socket.socket) -> bool:
        """Give it a session; False if it is not there any more."""
        try:
            send_message(self._control, None, [session.fileno()], socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    async def wait_idle(self) -> bool:
        """Wait until it is through with its session; False if it is not there any more."""
        while True:
            try:
                return self._control.recv(1, socket.MSG_DONTWAIT) == IDLE
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._control)
            except OSError:
                return False

    def close(self) -> None:
        """End it."""
        self._control.close()
        self.child.kill()


@final
class FileService:
    """Connects the host with file helpers.

    Args:
      children: Where helpers come from.

    """

    def __init__(self, children: Children) -> None:
        self._children = children
        self._idle: dict[str | int | None, list[_Helper]] = {}

    async def run(self) -> None:
        """Let the helpers that are kept go when cancelled."""
        try:
            await trio.sleep_forever()
        finally:
            for helpers in self._idle.values():
                for helper in helpers:
                    helper.close()
            self._idle.clear()

    def count_idle(self) -> int:
        """Tell how many helpers wait for a session."""
        return sum(map(len, self._idle.values()))

    async def serve(self, stream: ChannelStream, header: dict[str, object]) -> None:
        """Serve one session."""
        user = header.get("user")
        if not (user is None or type(user) is str or type(user) is int):
            stream.reset(f"user must be a name, a number or null, not {user!r:.80}")
            return
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        with ours:
            try:
                with theirs:
                    helper = self._begin(user, theirs)
            except OSError as exc:
                await _refuse(stream, exc)
                return
            idle = False
            try:
                last = await _carry(stream, ours)
                ours.close()
                with trio.move_on_after(_PATIENCE):
                    idle = await helper.wait_idle()
            finally:
                # Before the host has the answer, so that its next request finds the helper there.
                if idle:
                    self._keep(user, helper)
                else:
                    helper.close()
            if last is not None and idle:
                await stream.send_and_close(last)
            elif last is not None:
                await self._explain(stream, helper)

    def _begin(self, user: str | int | None, session: socket.socket) -> _Helper:
        idle = self._idle.get(user, [])
        while idle:
            helper = idle.pop()
            if helper.begin(session):
                return helper
            helper.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            request: Request = {
                "user": user,
                "targets": [CONTROL],
                "blocked": [],
            }
            # Without a program: which is how the spawner is asked for a file helper.
            helper = _Helper(self._children.start(request, [theirs.fileno()]), ours)
        # It finds its first session waiting, or else that session's end is how we learn that it was not started.
        helper.begin(session)
        return helper

    def _keep(self, user: str | int | None, helper: _Helper) -> None:
        idle = self._idle.setdefault(user, [])
        idle.append(helper)
        if len(idle) > _IDLE_LIMIT:
            idle.pop(0).close()
        if len(self._idle) > _USERS_LIMIT:
            for other in self._idle.pop(next(iter(self._idle))):
                other.close()

    async def _explain(self, stream: ChannelStream, helper: _Helper) -> None:
        """Tell the host why a session ended that the helper did not end."""
        with trio.move_on_after(_WORD_PATIENCE):
            try:
                await helper.child.wait_started()
            except OSError as exc:
                await _refuse(stream, exc)
                return
        stream.reset("the file helper was killed")


async def _carry(stream: ChannelStream, session: socket.socket) -> bytes | None:
    """Carry bytes both ways until the helper ended the session or the host gave it up.

    Returns:
      The last that the helper said, which is still to be sent; None if the host gave the session up.

    """
    last = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_feed, stream, session, nursery.cancel_scope)
        with contextlib.suppress(StreamResetError):
            last = await _drain(session, stream)
        nursery.cancel_scope.cancel(reason="the session is over")
    return last


async def _feed(stream: ChannelStream, session: socket.socket, scope: trio.CancelScope) -> None:
    def send(data: bytes | memoryview) -> int:
        try:
            return session.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    try:
        while data := await stream.relay(send):
            while data := data[send(data) :]:
                await trio.lowlevel.wait_writable(session)
        session.shutdown(socket.SHUT_WR)
        await stream.wait_given_up()
        scope.cancel(reason="the host gave the session up")
    except StreamResetError:
        scope.cancel(reason="the host gave the session up")
    except OSError:
        pass  # the helper does not want more; what it has to say about that comes the other way


async def _drain(session: socket.socket, stream: ChannelStream) -> bytes:
    while True:
        await trio.lowlevel.wait_readable(session)
        data = _receive(session)
        if data is None:
            continue
        if not data:
            return b""
        if len(data) < _SHORT:
            # A short answer and the end of its session come together, as a rule: then they are sent together.
            rest = _receive(session)
            if rest == b"":
                return data
            data += rest or b""
        await stream.send_all(data)


def _receive(session: socket.socket) -> bytes | None:
    """Return what is there, or None; ``b""`` at the end."""
    try:
        return session.recv(PIECE_SIZE)
    except BlockingIOError:
        return None
    except ConnectionResetError:  # it closed the session with something of ours unread
        return b""


async def _refuse(stream: ChannelStream, error: OSError) -> None:
    """Tell the host that there is no helper."""
    payload = b"%d\0%s\0" % (error.errno or errno.EIO, os.fsencode(str(error.filename or "")))
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_and_close(encode_record(b"X", payload))
