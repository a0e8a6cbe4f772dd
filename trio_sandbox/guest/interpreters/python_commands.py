"""`os.system` for the code of runs, in place of the C library's, which ignores SIGINT while it waits.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

A run is cancelled by SIGINT. It ends the command, and the C library's `system` then returns to code that knows nothing of it,
and goes on. Here the code gets `KeyboardInterrupt`, as it does while it waits for a process of `subprocess`.
"""

from __future__ import annotations

import os
import posix
import sys
from os import WNOHANG, environ, fsencode, kill, posix_spawn, waitpid
from signal import SIG_BLOCK, SIG_SETMASK, SIG_UNBLOCK, SIGCHLD, SIGINT, SIGKILL
from time import sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike
    from signal import pthread_sigmask
else:
    from _signal import pthread_sigmask

_audit = sys.audit
_note_fork: Callable[[], None]
#: What a shell exits with that can't be executed, as `waitpid` has it.
_NO_SHELL = 127 << 8
#: Looks, and seconds between two, whether a command that got SIGINT, too, has ended by that. `subprocess` waits as long.
_LOOKS, _LOOK = 25, 0.01


def system(command: str | bytes | PathLike[str] | PathLike[bytes]) -> int:
    """Execute the command in a subshell."""
    _audit("os.system", command)
    arguments = [b"sh", b"-c", b"--", fsencode(command)]
    # A handler of the code's for SIGCHLD must not take the command's end from us, nor SIGINT come before we know its process.
    mask = pthread_sigmask(SIG_BLOCK, [SIGCHLD, SIGINT])
    try:
        _note_fork()
        try:
            process = posix_spawn("/bin/sh", arguments, environ, setsigmask=mask)
        except OSError:
            return _NO_SHELL
        try:
            if SIGINT not in mask:
                pthread_sigmask(SIG_UNBLOCK, [SIGINT])
            return waitpid(process, 0)[1]
        except ChildProcessError:
            return -1
        except BaseException:
            _end(process)
            raise
    finally:
        pthread_sigmask(SIG_SETMASK, mask)


def _end(process: int) -> None:
    try:
        for _ in range(_LOOKS):
            if waitpid(process, WNOHANG)[0]:
                return
            sleep(_LOOK)
        kill(process, SIGKILL)
        waitpid(process, 0)
    except ChildProcessError:
        pass  # somebody else has waited for it


def install(note_fork: Callable[[], None]) -> None:
    """Have the code find it; *note_fork*: what to call before there is another process."""
    global _note_fork
    _note_fork = note_fork
    system.__module__ = posix.__name__
    system.__doc__ = posix.system.__doc__  # pyright: ignore[reportDeprecated]
    os.system = posix.system = system
