"""TCP connections to servers in the guest, over the guest channel and without any network device."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import final

import trio

from .._errors import GuestProtocolError, SandboxClosedError, SandboxError
from .._nurseries import hide_nursery
from ..client import check_open, guest_failures, open_stream
from ..wire import ChannelStream, receive_up_to
from ._slot import Slot

#: Connections that one `forward_port` carries at a time; further ones wait to be accepted. A guest's channel has 1024
#: streams, of which other requests need some.
FORWARD_LIMIT = 256

_HIGHEST_PORT = 65535
_CHUNK = 1 << 16


def check_port(port: object, name: str, *, lowest: int = 1) -> None:
    """Refuse what is no port's number."""
    if type(port) is not int:
        raise TypeError(f"`{name}` must be int, not {type(port).__name__}")
    if not lowest <= port <= _HIGHEST_PORT:
        raise ValueError(f"`{name}` must be from {lowest} to {_HIGHEST_PORT}, not {port}")


async def open_tcp_stream(slot: Slot, port: int) -> ChannelStream:
    """What `Sandbox.open_tcp_stream` does."""
    what = f"the connection to port {port}"
    vm = await slot.resolve(what)
    stream = open_stream(vm, {"service": "tcp", "port": port}, what)
    try:
        async with guest_failures(vm, what):
            error = await _receive_answer(stream)
    except BaseException:
        stream.close()
        raise
    if error:
        stream.close()
        raise OSError(error, f"{os.strerror(error)} (port {port} of the sandbox)")
    return stream


async def wait_port(slot: Slot, port: int) -> None:
    """What `Sandbox.wait_port` does."""
    what = f"the wait for port {port}"
    vm = await slot.resolve(what)
    stream = open_stream(vm, {"service": "tcp", "port": port, "wait": True}, what)
    try:
        async with guest_failures(vm, what):
            if error := await _receive_answer(stream):
                raise GuestProtocolError(f"the guest answered a wait with the error {error}")
    finally:
        stream.close()


async def _receive_answer(stream: ChannelStream) -> int:
    answer = await receive_up_to(stream, 2)
    if len(answer) < 2:
        raise GuestProtocolError("the guest ended a connection's stream without an answer")
    error: int
    (error,) = struct.unpack(">H", answer)
    if error and error not in errno.errorcode:
        raise GuestProtocolError(f"the guest answered a connection with {error}, which is not an error number")
    return error


async def forward_port(
    slot: Slot, guest_port: int, host_port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """What `Sandbox.forward_port` does."""
    check_open(slot.machine, f"the forwarding to port {guest_port}")
    (listener,) = await trio.open_tcp_listeners(host_port, host="127.0.0.1")
    async with listener:
        bounded = _BoundedListener(listener)

        async def serve(client: trio.SocketStream) -> None:
            try:
                await _serve_client(slot, guest_port, client)
            finally:
                bounded.release()

        with hide_nursery("Sandbox.forward_port()"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, serve, [bounded])
                address: tuple[str, int] = listener.socket.getsockname()
                task_status.started(address[1])
                failure = await slot.wait_ended()
                raise SandboxClosedError(
                    f"port {guest_port} is forwarded no more: the sandbox's "
                    + ("block was left" if failure is None else "virtual machine is gone")
                ) from failure


@final
class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts no more than `FORWARD_LIMIT` connections at a time. Whoever is done with one calls `release`."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self._room = trio.Semaphore(FORWARD_LIMIT)

    async def accept(self) -> trio.SocketStream:
        await self._room.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._room.release()
            raise

    def release(self) -> None:
        self._room.release()

    async def aclose(self) -> None:
        await self._listener.aclose()


async def _serve_client(  # noqa: ASYNC910 (a task of its own, which nobody waits for)
    slot: Slot, port: int, client: trio.SocketStream
) -> None:
    """Carry one connection. What goes wrong with it is told to its two ends, in the way of TCP, and to nobody else."""
    # An end would look like a server that has nothing more to say.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError, SandboxError):
        server = await open_tcp_stream(slot, port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, client, server)
                await _copy(server, client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            # After both ends this says nothing any more.
            server.reset("the other side of a forwarded connection broke")


async def _copy(source: trio.abc.HalfCloseableStream, sink: trio.abc.HalfCloseableStream) -> None:
    while data := await source.receive_some(_CHUNK):
        await sink.send_all(data)
    await sink.send_eof()
