"""Messages between the agent and the processes that it trusts, over a local SOCK_SEQPACKET socket.

Both ends run the same Python on the same machine and neither is a user's process, so `marshal` is
safe here. It is part of the interpreter: nothing needs importing before the spawner is forked.
"""

from __future__ import annotations

import array
import marshal
import os
import socket
from collections.abc import Sequence

#: Longer messages travel in a memory file: a packet may not exceed the socket's send buffer (208 KiB by default).
INLINE_LIMIT = 60_000
#: Descriptors in one message. The kernel's own limit is 253.
MAXIMUM_DESCRIPTORS = 16
#: Any interpreter since Python 2.5 reads this version; the worker's may be older or newer than ours.
_MARSHAL_VERSION = 2

_INLINE = b"I"
_MEMORY_FILE = b"M"


def send_message(sock: socket.socket, message: object, descriptors: Sequence[int] = (), flags: int = 0) -> None:
    """Send *message*, made of plain values, and copies of *descriptors*.

    Raises:
      OSError: the peer is gone, or (`BlockingIOError`) the socket is full and may not block.

    """
    data = _encode(message)
    if len(data) <= INLINE_LIMIT:
        _send(sock, _INLINE + data, descriptors, flags)
        return
    with open(write_memory_file(data), "rb", buffering=0) as file:
        file.seek(0)  # a worker reads it from where it is
        _send(sock, _MEMORY_FILE, [*descriptors, file.fileno()], flags)


def _send(sock: socket.socket, data: bytes, descriptors: Sequence[int], flags: int) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([data], ancillary, flags)


def receive_message(sock: socket.socket, flags: int = 0) -> tuple[object, list[int]] | None:
    """Receive one message and its descriptors, which the caller then owns; None at the end.

    Raises:
      OSError: the peer is gone, or (`BlockingIOError`) nothing is there and we may not block.

    """
    space = socket.CMSG_SPACE((MAXIMUM_DESCRIPTORS + 1) * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(INLINE_LIMIT + 1, space, flags | socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload)
    fds = descriptors.tolist()
    if data[:1] == _MEMORY_FILE:
        with open(fds.pop(), "rb", buffering=0) as file:
            return read_message_file(file.fileno()), fds
    return marshal.loads(data[1:]), fds


def write_message_file(message: object) -> int:
    """Return the descriptor of a memory file with *message*, for a process to pass on that is not to have it in its own memory.

    Raises:
      OSError: there is no memory or no descriptor for it.

    """
    return write_memory_file(_encode(message))


def read_message_file(descriptor: int) -> object:
    """Return the message in a memory file."""
    return marshal.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def _encode(message: object) -> bytes:
    return marshal.dumps(message, _MARSHAL_VERSION)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def write_memory_file(data: bytes) -> int:
    """Return the descriptor of a memory file with *data*, at its end; errors as `write_message_file`."""
    descriptor = os.memfd_create("message")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
