"""How long a network may be silent: a connection is given up when its peer's kernel says nothing any more, and never because a program is busy."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
from typing import Final, NoReturn, final

import trio

from ._tls import TlsStream

#: Seconds of silence after which the kernel asks whether the peer is there, and between two questions: at least, and at most.
_PROBE: Final = 1
_LONGEST: Final = 32767
#: Questions that it asks at most.
_MOST_PROBES: Final = 127
#: Seconds between two looks at all connections.
_LOOK: Final = 1.0
#: The beginning of ``struct tcp_info`` of ``linux/tcp.h``, up to ``tcpi_last_ack_recv``.
_TCP_INFO: Final = struct.Struct("8B13I")


@final
class Lease:
    """Watches over the connections of one program, or of one node.

    A connection on which nothing is under way the kernels watch by themselves, by keepalive. What is under way they send again for a quarter of
    an hour, so that is looked at here. ``TCP_USER_TIMEOUT`` would do that in the kernel. But it also breaks off a connection whose peer
    answers each question, and has not read for so long: 256 KiB of output, and a program that computes for some seconds.

    Args:
      seconds: See `FleetConfig.lease`.

    """

    def __init__(self, seconds: float) -> None:
        self.seconds: float = seconds
        """How long the network may be silent."""
        self._watched: dict[TlsStream, bool] = {}  # whether it was silent when it was looked at last

    def watch(self, stream: TlsStream) -> None:
        """Give a TCP connection up when its peer is silent, until it is closed."""
        for option, value in keepalive(self.seconds).items():
            stream.set_option(socket.IPPROTO_TCP, option, value)
        stream.set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._watched[stream] = False

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> NoReturn:
        """Look at all of them once a second, until cancelled."""
        task_status.started()
        while True:  # noqa: ASYNC913 - it begins with a sleep
            await trio.sleep(_LOOK)
            self._watched = {
                stream: self._look(stream, before) for stream, before in self._watched.items() if stream.is_open
            }

    def _look(self, stream: TlsStream, before: bool) -> bool:
        """Tell whether a connection's peer is silent. At the second look in a row it is given up.

        One look may come between a question and its answer, when the question before was long ago.
        """
        silent = is_silent(stream.get_option(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size), self.seconds)
        if silent and before:
            stream.give_up(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        return silent


def keepalive(seconds: float) -> dict[int, int]:
    """Return the options of TCP by which the kernel gives an idle connection up after so many *seconds*, as nearly as it can."""
    interval = math.ceil(min(max(seconds / _MOST_PROBES, _PROBE), _LONGEST))
    count = min(max(round(seconds / interval), 1), _MOST_PROBES) if math.isfinite(seconds) else _MOST_PROBES
    return {socket.TCP_KEEPIDLE: interval, socket.TCP_KEEPINTVL: interval, socket.TCP_KEEPCNT: count}


def is_silent(info: bytes, seconds: float) -> bool:
    """Tell by a connection's ``tcp_info`` whether its peer owes an answer, and has said nothing for so many *seconds*."""
    if len(info) < _TCP_INFO.size:
        return False
    values = _TCP_INFO.unpack_from(info)
    retransmits, probes, milliseconds = values[2], values[3], values[20]
    return bool(retransmits or probes) and milliseconds > seconds * 1000
