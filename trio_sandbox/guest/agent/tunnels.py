"""Service "tcp": a stream of the channel is a connection to a server in the guest.

The header says what is wanted, and two bytes answer it, big endian: 0, or the errno of the failure and the end.

    {"service": "tcp", "port": n}                  connect; after the answer the stream carries what the connection carries
    {"service": "tcp", "port": n, "wait": true}    answer once somebody listens there, and the end

The guest has no network device: there is its loopback interface, and nothing that could be reached through it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from functools import partial

import trio
from trio.socket import SocketType

from ...wire import ChannelStream
from .carried import Carried

#: Seconds between two looks for somebody who listens, the first and the longest: there is nothing that would tell us.
_LOOKS = 0.005, 0.05
_HIGHEST_PORT = 65535
#: Which of these a server that was told "localhost" listens at is its affair.
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
#: Local addresses at which a connection to one of these arrives, as /proc/net/tcp and tcp6 have them: words of 32 bits
#: in the machine's order, which is little endian wherever we run.
_LOCAL_ADDRESSES = (
    "00000000",  # any
    "0100007F",
    "0" * 32,  # any
    "00000000000000000000000001000000",
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
)


async def serve(stream: ChannelStream, header: dict[str, object]) -> None:
    """Serve one stream of the service."""
    port = header.get("port")
    if type(port) is not int or not 0 < port <= _HIGHEST_PORT:
        stream.reset(f"a port is a number from 1 to {_HIGHEST_PORT}, not {port!r:.80}")
    elif header.get("wait") is True:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when_given_up, stream, nursery.cancel_scope)
            await _wait_listening(port)
            await stream.send_all(_answer(0), end=True)
            nursery.cancel_scope.cancel(reason="somebody listens")
    else:
        await Carried(stream).run(partial(_open, stream, port), _answer(0))


async def _cancel_when_given_up(stream: ChannelStream, scope: trio.CancelScope) -> None:
    await stream.wait_given_up()
    scope.cancel(reason="the host does not want it any more")


def _answer(error: int) -> bytes:
    return struct.pack(">H", error)


async def _open(stream: ChannelStream, port: int) -> SocketType | None:
    try:
        return await _connect(port)
    except OSError as exc:
        await stream.send_all(_answer(exc.errno or errno.EIO), end=True)
        return None


async def _connect(port: int) -> SocketType:
    failures: list[OSError] = []
    for family, address in _ADDRESSES:
        try:
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            try:
                await sock.connect((address, port))
                # Where nobody listens, TCP can connect a socket to itself, by the chance of the port that it was given.
                if sock.getsockname() == sock.getpeername():
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody but ourselves")
                # Who writes to a stream wants it sent.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                sock.close()
                raise
        except OSError as exc:
            failures.append(exc)
        else:
            return sock
    raise failures[0]


async def _wait_listening(port: int) -> None:
    pause, longest = _LOOKS
    # By looking and not by connecting, which the server would see.
    while not _is_listening(port):
        await trio.sleep(pause)
        pause = min(2 * pause, longest)


def _is_listening(port: int) -> bool:
    wanted = {f"{address}:{port:04X}" for address in _LOCAL_ADDRESSES}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as table:
            next(table, None)
            for line in table:
                _, local, _, state, _ = line.split(maxsplit=4)
                if state != "0A":  # TCP_LISTEN, which come first, and there may be very many of the others
                    break
                if local in wanted:
                    return True
    return False
