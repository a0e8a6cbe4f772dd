"""Signals that end the command; the sandbox is closed first, as if its block had been left."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from .._errors import SandboxError
from . import _status
from ._report import complain, complain_about
from ._streams import OutputClosedError

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def end_on_signal(main: Callable[[], Awaitable[int]], closing: str = "closing the sandbox") -> int:
    """Run *main* and return its exit status.

    The first signal cancels it, which closes the sandbox in the usual way; *closing* says so. The second ends this process at once; its
    reaper then closes the sandbox. A signal that is ignored, as nohup(1) has it, stays ignored.
    """
    status = _status.SANDBOX_FAILURE
    received: list[int] = []
    awaited = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    async def watch(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*awaited) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                for each in awaited:
                    signal.signal(each, signal.SIG_DFL)
                complain(f"{signal.Signals(number).name}: {closing}; once more ends it at once")
                work.cancel(reason=f"signal {number}")

    work = trio.CancelScope()
    try:
        async with trio.open_nursery() as nursery:
            if awaited:
                await nursery.start(watch)
            # The watch goes on meanwhile: at its end it would put Python's own handler in the place of the default action.
            with work:
                status = await main()
            nursery.cancel_scope.cancel(reason="the command is over")
    except* (OutputClosedError, BrokenPipeError):
        # As a program that does not handle SIGPIPE.
        status = _status.SIGNAL_BASE + signal.SIGPIPE
    except* (SandboxError, OSError) as group:
        complain_about(group)
    return _status.SIGNAL_BASE + received[0] if received else status  # noqa: ASYNC910 (nurseries are checkpoints)
