"""How our children end, also in a program that ignores SIGCHLD or whose handler of it reaps every child."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
from types import TracebackType
from typing import Final, final

from .._programs import find_program

#: ``struct pidfd_info``, the version of 64 bytes: mask, control group, 11 ids, exit status (ioctl_pidfd(2)).
_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")
_PIDFD_INFO_EXIT: Final = 1 << 3
#: ``_IOWR(0xFF, 11, struct pidfd_info)``
_PIDFD_GET_INFO: Final = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11


def is_ended(pidfd: int) -> bool:
    """Tell whether a child of ours has ended, reaped or not."""
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True  # somebody else has reaped it


def reap(pidfd: int) -> int | None:
    """Reap a child that has ended and return its exit status, negative for a signal.

    Where the kernel or somebody else in this program was faster, the kernel still tells the status since Linux 6.15.
    Before, it can't be known any more: None.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return _status_of_reaped(pidfd)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _status_of_reaped(pidfd: int) -> int | None:
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _PIDFD_INFO.unpack(info)
    return os.waitstatus_to_exitcode(status) if mask & _PIDFD_INFO_EXIT else None


@final
class Gate:
    """Holds a new child before its program until we watch it, where it could be gone before that: see above.

    Where SIGCHLD has its default action it does nothing. Otherwise the child starts as a shell, which waits at its
    standard input. It then gives the program SIGCHLD's default action, without which programs that start
    others fail, mmdebstrap above all.
    """

    def __init__(self) -> None:
        self._fds = [] if signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL else list(os.pipe())

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._fds:
            os.close(self._fds.pop())

    @property
    def stdin(self) -> int:
        """What to give the child as its standard input."""
        return self._fds[0] if self._fds else subprocess.DEVNULL

    def command(self, argv: list[str]) -> list[str]:
        """Return what to start in place of *argv*."""
        if not self._fds:
            return argv
        env = find_program("env")
        reset = [] if env is None else [env, "--default-signal=CHLD", "--"]
        return ["/bin/sh", "-c", 'read -r _ && exec "$@" < /dev/null', "sh", *reset, *argv]

    def open(self) -> None:
        """Let the child go on."""
        if self._fds:
            with contextlib.suppress(BrokenPipeError):  # it was killed
                os.write(self._fds[1], b"\n")
