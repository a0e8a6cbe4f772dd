"""What becomes of a process that the user's program made by `os.fork` inside one of our blocks.

It has copies of our tasks and descriptors, and all that these would do is about its parent's machines. So it may run on until
it gives control back to Trio, and no further: no cleanup begins in it.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from typing import Final, NoReturn

import trio

#: How many of our blocks are open in this run of Trio.
_open_blocks: Final = trio.lowlevel.RunVar("trio_sandbox._open_blocks", 0)

_WAY_OUT: Final = (
    "it can't go on in its parent's Trio, nor close its parent's sandboxes, so it was ended. End such a process by "
    "os._exit(), or use the subprocess module, or multiprocessing with the start method 'spawn'"
)


def count_block() -> int:
    """Note that a block of ours is open in this run of Trio; return the process that it belongs to."""
    _open_blocks.set(_open_blocks.get() + 1)
    return os.getpid()


def forget_block() -> None:
    """Take back `count_block`: the block has been left."""
    _open_blocks.set(_open_blocks.get() - 1)


def end_if_forked(owner: int, error: BaseException | None) -> None:
    """End this process if it is a fork of *owner*, whose block it is about to leave because of *error*, if any."""
    if os.getpid() != owner:
        _end(error)


class _EndAfterStep(trio.abc.Instrument):
    """Ends the process when the task that forked gives control back to Trio."""

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        _end(None)


def _after_fork_in_child() -> None:
    try:
        blocks = _open_blocks.get()
    except RuntimeError:
        return  # no Trio runs in this thread, and the others are not in the child
    if blocks:
        _replace_epolls()
        trio.lowlevel.add_instrument(_EndAfterStep())


def _replace_epolls() -> None:
    """Give this process epoll objects of its own.

    Those that it inherits are no copies: if it left a nursery, the tasks of its parent's would never be woken again. Nobody
    tells which one is Trio's; the others are of no more use to a process that is about to end.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            is_epoll = os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]"
        except FileNotFoundError:
            continue  # it was the listing itself
        if is_epoll:
            with select.epoll() as own:
                os.dup2(own.fileno(), int(name), inheritable=False)


def _end(error: BaseException | None) -> NoReturn:
    """End this process as Python would because of *error*, but for cleanup: that is its parent's."""
    status = 1
    try:
        if isinstance(error, SystemExit):
            if error.code is None or isinstance(error.code, int):
                status = error.code or 0
            else:
                sys.stderr.write(f"{error.code}\n")
        elif error is not None:
            traceback.print_exception(error)
        else:
            sys.stderr.write(f"process {os.getpid()} was forked inside a block of trio_sandbox: {_WAY_OUT}\n")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status & 0xFF)


os.register_at_fork(after_in_child=_after_fork_in_child)
