"""A process in the guest that has our standard input, output and error."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import attrs
import trio

from .. import Sandbox
from ..client import GuestProcess
from . import _status
from ._report import complain
from ._streams import Read, Stream, Write

#: Seconds without any output after which what a process printed before its end has come, where another process that it
#: left behind keeps its output open.
DRAIN_SECONDS: Final = 2.0


@attrs.frozen
class Ended:
    """How a process ended."""

    status: int
    """Its exit status, 128 + n after signal n, or what env(1) returns where it can't be started."""
    oom: bool = False
    """It was killed for want of memory."""


async def run_process(sandbox: Sandbox, argv: Sequence[str], *, cwd: str | None, write: Write, read: Read) -> Ended:
    """Run a process to its end.

    What it prints is passed on as it comes, and what *read* gives is its input, each no faster than it is taken.
    Cancelled: it is killed with all of its descendants.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(sandbox.open_process(argv, cwd=cwd))
        except OSError as exc:
            complain(f"{exc.filename or argv[0]}: {exc.strerror or exc}")
            return Ended(_status.NOT_FOUND if isinstance(exc, FileNotFoundError) else _status.CANNOT_RUN)
        await _Conversation(process, write, read).hold()
        status = process.returncode
    assert status is not None
    return Ended(_status.SIGNAL_BASE - status if status < 0 else status, process.oom)


class _Conversation:
    def __init__(self, process: GuestProcess, write: Write, read: Read) -> None:
        self._process = process
        self._write = write
        self._read = read
        self._ended = False
        self._waiting: dict[Stream, trio.CancelScope] = {}

    async def hold(self) -> None:
        """Carry bytes until the process is over and what it printed has come."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        async with trio.open_nursery() as services:
            services.start_soon(self._feed)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, "stdout", self._process.stdout)
                nursery.start_soon(self._pass_on, "stderr", self._process.stderr)
                await self._process.wait()
                self._ended = True
                for scope in self._waiting.values():
                    scope.deadline = trio.current_time() + DRAIN_SECONDS
            services.cancel_scope.cancel(reason="the process is over")

    async def _feed(self) -> None:  # noqa: ASYNC910 - reading is a checkpoint
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(trio.BrokenResourceError):  # a process need not want its input
            while data := await self._read():
                await stdin.send_all(data)
            await stdin.aclose()

    async def _pass_on(  # noqa: ASYNC910 - receiving is a checkpoint
        self, name: Stream, output: trio.abc.ReceiveStream
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # waiting for the process says why
            while data := await self._receive(name, output):
                await self._write(name, data)

    async def _receive(self, name: Stream, output: trio.abc.ReceiveStream) -> bytes:
        """Wait for some output; ``b""`` where there will be none of the process's own any more."""
        with trio.CancelScope() as scope:
            if self._ended:
                scope.deadline = trio.current_time() + DRAIN_SECONDS
            self._waiting[name] = scope
            return bytes(await output.receive_some())
        return b""
