"""The QMP channel: two tasks around a `QMPConnection`, one that writes and one that reads."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import attrs
import outcome
import trio

from .._config import Timeouts
from .._entries import open_block
from .._errors import QMPClosedError, QMPCommandError, QMPConnectError, QMPError, QMPProtocolError
from .._nurseries import open_services
from ..constants import QMP_EVENT_BUFFER
from ._process import BoundedTail
from ._qmp_codec import QMPConnection, QMPEvent, QMPGreeting, QMPMessage, QMPReply, encode_command

#: QEMU takes no more descriptors than this with one message (its TCP_MAX_FDS).
_MAXIMUM_FDS = 16
_READ_BYTES = 8 * 2**10
#: How much of the conversation is kept for reports.
_LOG_BYTES = 16 * 2**10


@attrs.frozen(kw_only=True)
class QMPStatistics:
    """Numbers about a `QMPChannel`."""

    commands_in_flight: int
    """Commands that were sent and have no reply yet, abandoned ones included."""
    late_replies: int
    """Replies that came after their caller had been cancelled, and were dropped."""
    events_received: int
    """Events that came, whether anybody had subscribed or not."""
    events_lost: int
    """Events that a slow subscriber lost; each subscriber's loss counts."""
    subscribers: int
    """Subscriptions that are open."""


class _Request:
    """One command on its way, and the task that waits for its reply."""

    __slots__ = ("_result", "_task", "abandoned", "command", "encoded", "fds")

    def __init__(self, command: str, encoded: str, fds: tuple[int, ...]) -> None:
        self.command = command
        self.encoded = encoded
        self.fds = fds  # our own duplicates
        self.abandoned = False
        self._result: outcome.Outcome[Any] | None = None
        self._task: trio.lowlevel.Task | None = None

    def settle(self, result: outcome.Outcome[Any]) -> None:
        self._result = result
        # Rescheduling the waiter is an `Event` and a look at its result less, and it is the
        # reader's every message that pays for them.
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    async def wait(self) -> Any:
        if self._result is None:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abandon)
            assert self._result is not None
        return self._result.unwrap()  # noqa: ASYNC910 # settled before we waited, the hand-over was a checkpoint

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        self.abandoned = True
        return trio.lowlevel.Abort.SUCCEEDED

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)


@attrs.define(eq=False)
class _Subscriber:
    names: frozenset[str]
    send: trio.MemorySendChannel[QMPEvent]
    receive: trio.MemoryReceiveChannel[QMPEvent]


@final
class QMPChannel:
    """A connection to a QMP server, for any number of tasks at once; made by `open_qmp` only."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._connection = QMPConnection()
        self._greeting: QMPGreeting | None = None
        self._greeted = trio.Event()
        # No buffer: a request is either handed over or it was not sent; "queued, but unsent"
        # can't exist.
        self._submit, self._inbox = trio.open_memory_channel[_Request](0)
        self._requests: dict[int, _Request] = {}
        # QEMU keeps the descriptors of the last message that had some until a command takes
        # them. A second such message before that would close them: so one at a time.
        self._fd_turn = trio.Semaphore(1, max_value=1)
        self._writing = trio.CancelScope()
        self._subscribers: list[_Subscriber] = []
        self._failure: QMPError | None = None
        self._closed = trio.Event()
        self._log = BoundedTail(_LOG_BYTES)
        self._late_replies = self._events_received = self._events_lost = 0

    def __repr__(self) -> str:
        state = "open" if self._failure is None else f"closed: {self._failure}"
        return f"<QMPChannel: {state}, {len(self._requests)} commands in flight>"

    @property
    def greeting(self) -> QMPGreeting:
        """What QEMU said first: its version and capabilities."""
        assert self._greeting is not None, "open_qmp() waits for it"
        return self._greeting

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """Run a command in QEMU, and wait for its reply.

        There is no timeout here; put a cancel scope around the call. Cancelled before the command
        is handed to the task that writes, it was not sent. Cancelled later it may run or have run;
        its reply will be dropped and counted, and the channel stays usable.

        Args:
          command: The command's name, for instance ``"query-status"``.
          arguments: Its arguments, of what JSON has; None for none.
          fds: At most 16 file descriptors to go with it (``getfd``, ``add-fd``). They are
            duplicated at once, so the caller may close its own at any time. Commands with
            descriptors wait for each other.

        Returns:
          The reply's ``return`` value, as `json.loads` gives it.

        Raises:
          QMPCommandError: if QEMU refused the command.
          QMPClosedError: if the connection is gone. `retry_safe` is True if the command was not sent.
          QMPProtocolError: if the peer broke the protocol.
          TypeError, ValueError: if the command can't be expressed in JSON, or *fds* are too many;
            nothing was sent.

        Source: QEMU's docs/interop/qmp-spec.rst; the commands are in its QMP Reference Manual.

        """
        encoded = encode_command(command, arguments)
        if len(fds) > _MAXIMUM_FDS:
            raise ValueError(f"`fds` may hold {_MAXIMUM_FDS} descriptors, not {len(fds)}: QEMU takes no more at once")
        if self._failure is not None:
            await trio.lowlevel.checkpoint()
            raise self._closed_error(command, sent=False)
        await trio.lowlevel.checkpoint_if_cancelled()
        if not fds:
            request = _Request(command, encoded, ())
            await self._hand_over(request)
            return await request.wait()
        await self._fd_turn.acquire()
        request = _Request(command, encoded, ())
        try:
            request.fds = _duplicate(fds)
            await self._hand_over(request)
        except BaseException:
            request.close_fds()
            self._fd_turn.release()
            raise
        return await request.wait()

    async def _hand_over(self, request: _Request) -> None:  # noqa: ASYNC910 # see below
        try:
            try:
                # While the writer waits, this spares a pass through the scheduler. The wait
                # for the reply is the checkpoint.
                self._submit.send_nowait(request)
            except trio.WouldBlock:
                await self._submit.send(request)  # Cancelled here: nothing was sent
        except trio.BrokenResourceError:
            raise self._closed_error(request.command, sent=False) from self._failure

    @contextmanager
    def subscribe(self, *events: str) -> Generator[trio.MemoryReceiveChannel[QMPEvent]]:
        """Receive events for the length of a block.

        The channel holds `constants.QMP_EVENT_BUFFER` events. A subscriber that lags behind
        further loses the oldest, which `statistics` counts: it never holds up replies. After the
        connection is gone the channel ends, once what it holds has been received.

        Args:
          *events: The names of the events, for instance ``"BALLOON_CHANGE"``; none means all.

        """
        send, receive = trio.open_memory_channel[QMPEvent](QMP_EVENT_BUFFER)
        subscriber = _Subscriber(frozenset(events), send, receive)
        with send, receive:
            if self._failure is not None:
                send.close()
            self._subscribers.append(subscriber)
            try:
                yield receive
            finally:
                self._subscribers.remove(subscriber)

    def log(self) -> str:
        """Return the end of the conversation, 16 KiB at most: what we sent after ``->``, what came after ``<-``."""
        return str(self._log).replace("\r\n", "\n")

    async def wait_closed(self) -> QMPError:
        """Block until the connection is gone or its block left; return why. Cancelling does nothing."""
        await self._closed.wait()
        assert self._failure is not None
        return self._failure

    def statistics(self) -> QMPStatistics:
        """Give the channel's numbers."""
        return QMPStatistics(
            commands_in_flight=len(self._requests),
            late_replies=self._late_replies,
            events_received=self._events_received,
            events_lost=self._events_lost,
            subscribers=len(self._subscribers),
        )

    # --- The two tasks ---

    async def write_requests(  # noqa: ASYNC910 # a task's own function
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Send what comes over the memory channel. The only writer: callers can't tear a message."""
        # Closing the inbox turns later callers away.
        with self._writing, self._inbox:
            task_status.started()
            try:
                async for request in self._inbox:
                    if request.abandoned:
                        self._drop(request)
                    elif self._failure is not None:
                        self._drop(request)
                        request.settle(outcome.Error(self._closed_error(request.command, sent=False)))
                    else:
                        await self._write(request)
            except OSError as exc:
                self.fail(_because(QMPClosedError("the connection to QEMU was lost while sending"), exc))

    def _drop(self, request: _Request) -> None:
        """Forget a request that was handed over, but will not be sent."""
        request.close_fds()
        self._release_turn(request)

    def _release_turn(self, request: _Request) -> None:
        if request.fds:
            self._fd_turn.release()

    async def _write(self, request: _Request) -> None:  # noqa: ASYNC910 # the wait for the next request is one
        number, data = self._connection.send(request.command, request.encoded)
        self._requests[number] = request
        self._log.append(b"-> " + data)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", request.fds))] if request.fds else []
        try:
            while data:
                try:
                    sent = self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                else:
                    data, ancillary = data[sent:], []
        finally:
            request.close_fds()

    async def read_messages(  # noqa: ASYNC910 # a task's own function
        self, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Settle commands and pass events on, until the connection ends."""
        task_status.started()
        try:
            while self._failure is None:
                # Waiting comes first: there is hardly ever something to read already.
                await trio.lowlevel.wait_readable(self._sock)
                try:
                    data = self._sock.recv(_READ_BYTES)
                except BlockingIOError:
                    continue
                if not data:
                    self.fail(_because(QMPClosedError("QEMU closed the connection"), EOFError("end of file")))
                    return
                began = trio.current_time()
                self._log.append(b"<- " + data)
                for message in self._connection.receive(data):
                    self._dispatch(message)
                if len(data) == _READ_BYTES:
                    # Much at once: others have their turn. A QEMU that was taken over may never stop.
                    await trio.sleep(trio.current_time() - began)
        except QMPProtocolError as exc:
            self.fail(exc)
        except OSError as exc:
            self.fail(_because(QMPClosedError("the connection to QEMU was lost"), exc))
        except trio.ClosedResourceError:
            pass  # The writer noticed first.

    def _dispatch(self, message: QMPMessage) -> None:
        if isinstance(message, QMPReply):
            request = self._requests.pop(message.id)
            self._release_turn(request)
            if request.abandoned:
                self._late_replies += 1
            else:
                request.settle(message.result)
        elif isinstance(message, QMPEvent):
            self._publish(message)
        else:
            self._greeting = message
            self._greeted.set()

    def _publish(self, event: QMPEvent) -> None:
        self._events_received += 1
        for subscriber in self._subscribers:
            if subscriber.names and event.name not in subscriber.names:
                continue
            try:
                try:
                    subscriber.send.send_nowait(event)
                except trio.WouldBlock:
                    subscriber.receive.receive_nowait()
                    self._events_lost += 1
                    subscriber.send.send_nowait(event)
            except trio.BrokenResourceError:
                pass  # The subscriber closed its end, but has not left its block yet.

    # --- The beginning and the end ---

    async def negotiate(self) -> None:
        """Wait for the greeting and answer it: QEMU refuses commands until then."""
        await self._greeted.wait()
        if self._failure is not None:
            raise self._failure
        await self.execute("qmp_capabilities")

    def fail(self, failure: QMPError) -> None:
        """Close the channel for the reason *failure*; the first reason stays."""
        if self._failure is not None:
            return
        self._failure = failure
        # One failure, one route: the callers report it, and the tasks just end. The writer may
        # be stuck in the middle of a message.
        self._writing.cancel(reason=f"the QMP channel is closed: {failure}")
        for request in self._requests.values():
            self._release_turn(request)
            request.settle(outcome.Error(self._closed_error(request.command, sent=True)))
        self._requests.clear()
        for subscriber in self._subscribers:
            subscriber.send.close()
        self._greeted.set()
        self._closed.set()
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    def _closed_error(self, command: str, *, sent: bool) -> QMPError:
        # Each caller gets an exception of its own: one that several tasks raise would collect
        # the tracebacks of all.
        kind = QMPProtocolError if isinstance(self._failure, QMPProtocolError) else QMPClosedError
        error = kind(f"{self._failure}; {command} {'may have run' if sent else 'was not sent'}")
        error.retry_safe = not sent
        error.__cause__ = self._failure
        return error


@open_block
async def open_qmp(
    path_or_socket: str | os.PathLike[str] | socket.socket,
    *,
    expected_uid: int | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncGenerator[QMPChannel]:
    """Connect to a QMP server for the length of a block.

    Both ends of the block are checkpoints. Cancelling closes the connection. Commands which other
    tasks still have in flight when the block is left raise `QMPClosedError` there. The connection
    getting lost does not cancel the block; see `QMPChannel.wait_closed`.

    Args:
      path_or_socket: The path of QEMU's Unix socket, or a connected socket. The block closes it.
      expected_uid: The user that the server must run as, by what the kernel says (SO_PEERCRED: for
        a path, the user that made the socket listen). None accepts anyone who could take the
        path; its directory's permissions are the guard then.
      timeouts: `Timeouts.qmp_connect` bounds the time until the connection is negotiated.

    Raises:
      QMPConnectError: if nobody listens at the path, if the peer is another user's, or if it hangs
        up or has not negotiated in time (then `trio.TooSlowError` is the cause).
      QMPProtocolError: if the peer's greeting is none.

    """
    timeouts = Timeouts() if timeouts is None else timeouts
    if isinstance(path_or_socket, socket.socket):
        sock, peer = path_or_socket, "the QMP server"
    else:
        peer = f"the QMP server at {os.fspath(path_or_socket)}"
        sock = _connect(path_or_socket, peer)
    with sock:
        await trio.lowlevel.checkpoint()
        sock.setblocking(False)
        if expected_uid is not None:
            _check_uid(sock, expected_uid, peer)
        channel = QMPChannel(sock)
        try:
            async with open_services("open_qmp()") as services:
                await services.start(channel.read_messages)
                await services.start(channel.write_requests)
                try:
                    with trio.fail_after(timeouts.qmp_connect):
                        await channel.negotiate()
                except trio.TooSlowError as exc:
                    raise QMPConnectError(
                        f"{peer} did not negotiate within {timeouts.qmp_connect:g} s; does it serve another client?"
                    ) from exc
                except (QMPClosedError, QMPCommandError) as exc:
                    raise QMPConnectError(f"{peer} did not let us in: {exc}") from exc
                yield channel
        finally:
            channel.fail(QMPClosedError("the block of open_qmp() was left"))


def _connect(path: str | os.PathLike[str], peer: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Connecting to a Unix socket never waits while it is non-blocking: it succeeds or not.
        sock.setblocking(False)
        sock.connect(os.fspath(path))
    except BlockingIOError as exc:
        sock.close()
        raise QMPConnectError(f"{peer} has too many clients waiting; QEMU serves one at a time") from exc
    except OSError as exc:
        sock.close()
        raise QMPConnectError(f"can't connect to {peer}: {exc.strerror or exc}") from exc
    return sock


def _check_uid(sock: socket.socket, expected_uid: int, peer: str) -> None:
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != expected_uid:
        raise QMPConnectError(f"{peer} (PID {pid}) runs as user {uid}, not as {expected_uid}")


def _because(error: QMPError, cause: BaseException) -> QMPError:
    error.__cause__ = cause
    return error


def _duplicate(fds: Sequence[int]) -> tuple[int, ...]:
    duplicates: list[int] = []
    try:
        for fd in fds:
            duplicates.append(os.dup(fd))  # noqa: PERF401 # those made so far must be closable
    except BaseException:
        for fd in duplicates:
            os.close(fd)
        raise
    return tuple(duplicates)
