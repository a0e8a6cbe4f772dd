"""Who gets the signals that come to a Python interpreter: the code of a run, and nobody else.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.
"""

from __future__ import annotations

from signal import (
    SIG_BLOCK,
    SIG_IGN,
    SIG_UNBLOCK,
    SIGALRM,
    SIGCHLD,
    SIGHUP,
    SIGINT,
    SIGPROF,
    SIGURG,
    SIGUSR1,
    SIGUSR2,
    SIGVTALRM,
    default_int_handler,
    raise_signal,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from signal import pthread_sigmask, signal as set_handler
    from types import FrameType
    from typing import Any
else:
    # The wrappers of these two make enumeration members of every number, which takes longer than the calls.
    from _signal import pthread_sigmask, signal as set_handler

#: Signals that are kept from the code's handlers while we run: those that code commonly has handlers
#: for, but for SIGTERM, which is to end an idle interpreter. Plain numbers, and few: they cost time in every run.
_held_back = [int(number) for number in (SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGPROF, SIGUSR1, SIGUSR2, SIGVTALRM)]


class Interrupts:
    """Who gets SIGINT: the code of a run, while it is on the main thread's stack, and nobody else.

    In between it is blocked, and so are those that the code may have handlers for, which may raise.
    The handler is ours as well, since a thread of the code's may take a signal that we block.
    """

    def __init__(self) -> None:
        self.pending: bool = False
        # Trio and asyncio take SIGINT over only from Python's own handler.
        self._users_handler: Any = default_int_handler
        set_handler(SIGINT, self._note)
        # It ends a system call that has begun after a SIGINT came and before Python saw to that, and does nothing else.
        set_handler(SIGURG, _do_nothing)
        pthread_sigmask(SIG_BLOCK, _held_back)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pending = True

    def forget(self) -> None:
        """Drop what has come so far; ignoring a signal discards a blocked one."""
        set_handler(SIGINT, int(SIG_IGN))
        set_handler(SIGINT, self._note)
        self.pending = False

    def call(self, function: Callable[[], object]) -> BaseException | None:
        """Call *function* with signals as the code wants them; return what it raised."""
        error = None
        # Between the two calls in the inner block any line here may raise KeyboardInterrupt. After
        # the second it can't, and one signal is all that the agent sends, so it is done twice at most.
        try:
            try:
                self._arm()
                function()
            except BaseException as exc:  # noqa: BLE001  whatever the code raises is its result
                error = exc
            self._disarm()
        except BaseException as exc:  # noqa: BLE001
            self._disarm()
            if error is None:
                error = exc
        return error

    def _arm(self) -> None:
        set_handler(SIGINT, self._users_handler)
        pthread_sigmask(SIG_UNBLOCK, _held_back)
        if self.pending:
            self.pending = False
            raise_signal(SIGINT)

    def _disarm(self) -> None:
        pthread_sigmask(SIG_BLOCK, _held_back)
        handler = set_handler(SIGINT, self._note)
        if handler != self._note:
            self._users_handler = handler


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    pass
