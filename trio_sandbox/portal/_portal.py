"""A Trio loop in a thread of its own, for the length of one block."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar, final

import trio

from .._entries import act_for
from .._errors import SandboxError
from ._work import Delivery, Look, Work, block_was_left

T = TypeVar("T")

#: Seconds that Trio has to start, in a thread that was just started.
_PATIENCE: Final = 10.0


@final
class Portal:
    """A thread in which Trio runs, and other threads' way into it.

    Trio runs for as long as one block is open, the *root*: a host, or a sandbox on a host of its own. What else the thread
    does is for what that block yields. A program that ends without leaving the block has it left for it.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._ended: Callable[[], object] = _do_nothing
        # What follows is changed with the lock held.
        self._lock = threading.Lock()
        self._over = False
        self._up = threading.Event()
        self._pending: set[Work] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None  # in the Trio thread only

    def start(self, root: Work, who: object, ended: Callable[[], object]) -> None:
        """Start the thread, and have it do *root*, on behalf of *who*; call *ended* when it is about to end."""
        self._pending.add(root)
        self._ended = ended
        # A daemon: one that is not would keep Python from ending, before `atexit` has a say.
        self._thread = threading.Thread(
            target=_context_of(who).run, args=(self._run, root), name="trio_sandbox portal", daemon=True
        )
        atexit.register(self._end_with_program)
        self._thread.start()

    def submit(self, work: Work, who: object) -> None:
        """Have a task do *work*, on behalf of *who*. Whatever happens, it delivers something."""
        context = _context_of(who)
        with self._lock:
            over = self._over
            if not over:
                self._pending.add(work)
        if over:
            work.fail(block_was_left())
        else:
            self._soon(lambda: self._begin(work, context))

    def abandon(self, work: Work) -> None:
        """Have *work* end early. It still delivers something, once it has ended."""
        self._soon(lambda: self._abandon(work))

    def tell(self, function: Callable[[], object]) -> None:
        """Call *function* in the Trio thread, soon, if that is still there."""
        self._soon(function)

    def now(self, function: Callable[[], T], who: object) -> T:
        """Call *function*, which does not wait for anything, in the Trio thread, on behalf of *who*, and return its result.

        Once that thread has ended nothing changes any more, and it is called here.
        """
        if threading.current_thread() is self._thread:
            return function()
        self.check()
        done = threading.Event()
        result = Delivery[T](done.set)
        self.submit(Look(partial(_context_of(who).run, function), result), who)
        done.wait()
        return result.take()

    def check(self) -> None:
        """Refuse to be asked where nobody would answer.

        Raises:
          RuntimeError: in a fork of the process that the portal is of, and in the Trio thread itself.

        """
        if self.forked:
            raise RuntimeError(
                f"nothing was done: process {os.getpid()} is a fork of {self._pid}, whose sandbox this is, and has no thread "
                "for it. Open a sandbox here, or start such a process by the subprocess module, or by multiprocessing with "
                "the start method 'spawn'"
            )
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "nothing was done: this is the thread in which Trio runs, which would wait for itself. A callback, such as "
                "`progress`, can't call the sandbox; have another thread do that"
            )

    @property
    def forked(self) -> bool:
        """Whether this is a fork of the process that the portal is of."""
        return os.getpid() != self._pid

    # --- In the Trio thread ---

    def _run(self, root: Work) -> None:
        failure: BaseException = block_was_left()
        try:
            trio.run(self._main, root)
        except BaseException as exc:  # noqa: BLE001, ASYNC103 - it is for who waits, and Trio is over
            failure = SandboxError("the thread in which Trio ran has crashed")
            failure.__cause__ = exc
        finally:
            with self._lock:
                self._over = True
                pending = list(self._pending)
                self._pending.clear()
            self._up.set()
            atexit.unregister(self._end_with_program)
            for work in pending:
                work.fail(failure)
            self._ended()

    async def _main(self, root: Work) -> None:
        async with trio.open_nursery() as nursery:
            with self._lock:
                self._token = trio.lowlevel.current_trio_token()
                self._nursery = nursery
            self._up.set()
            root.begun = True
            await root.serve()
            self._nursery = None
            self._abandon_all()
            nursery.cancel_scope.cancel(reason="the block was left")

    def _begin(self, work: Work, context: contextvars.Context) -> None:
        if work.begun:
            return  # it was cancelled before
        work.begun = True
        if self._nursery is None:
            self._forget(work)
            work.fail(block_was_left())
        else:
            context.run(self._nursery.start_soon, self._serve, work)

    async def _serve(self, work: Work) -> None:
        try:
            await work.serve()
        finally:
            self._forget(work)

    def _abandon(self, work: Work) -> None:
        work.abandon()
        if not work.begun:
            work.begun = True
            self._forget(work)
            work.fail(block_was_left())

    def _abandon_all(self) -> None:
        for work in list(self._pending):
            work.abandon()

    def _forget(self, work: Work) -> None:
        with self._lock:
            self._pending.discard(work)

    def _soon(self, function: Callable[[], object]) -> None:
        self._up.wait(_PATIENCE)  # as a rule it is set
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):  # who waits has been told
                self._token.run_sync_soon(function)

    def _end_with_program(self) -> None:
        if not self.forked:
            self._soon(self._abandon_all)
            if self._thread is not None:
                self._thread.join()


def _do_nothing() -> None:
    """For a portal that was not started."""


def _context_of(who: object) -> contextvars.Context:
    """Return a copy of the context of this thread in which what is asked is asked by *who*."""
    context = contextvars.copy_context()
    context.run(act_for, who)
    return context
