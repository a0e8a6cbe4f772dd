"""``trio-sandbox shell``: our terminal becomes one in a fresh virtual machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import termios
import tty
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol, final

import attrs
import trio

from .._config import HostConfig, SandboxConfig
from .._image import AnyImage
from ..client import GuestProcess, Terminal
from ..host import Host, open_host
from ..image import image_for_program
from . import _status
from ._configs import host_config, sandbox_config
from ._progress import ShowProgress, open_progress
from ._report import complain
from ._signals import end_on_signal
from ._streams import write_output

#: Ctrl-], as with telnet(1): ends the shell and its machine from outside.
DETACH_KEY = b"\x1d"
#: The login shell that the image gives the user.
LOGIN_SHELL = ("/bin/sh", "-c", 'exec "${SHELL:-/bin/sh}" -l')
#: Seconds that what was printed before the shell's end may take to come, where a process left behind keeps the terminal.
DRAIN_SECONDS = 0.5
#: Undoes what a full-screen program that can't do so itself any more may have set: the reporting of the mouse, pasted
#: text and the focus, the alternate screen, a hidden cursor, colours, keypad modes (xterm's ctlseqs).
RESET_MODES = b"\x1b[?1000;1002;1003;1004;1006;2004l\x1b[?1047l\x1b[?25h\x1b[m\x1b[?1l\x1b>"

_CHUNK = 4096


@attrs.frozen(kw_only=True)
class ShellRequest:
    """What the command line asked for."""

    command: tuple[str, ...] = LOGIN_SHELL
    user: str | int | None = None
    image: AnyImage
    host: HostConfig
    sandbox: SandboxConfig
    quiet: bool = False


OpenHost = Callable[[HostConfig], AbstractAsyncContextManager[Host]]


class LocalTerminal(Protocol):
    """The terminal that we were started on."""

    def size(self) -> tuple[int, int]:
        """Give its rows and columns."""
        ...

    async def read(self) -> bytes:
        """Wait for what is typed; ``b""`` once it is gone."""
        ...

    async def write(self, data: bytes | bytearray) -> None:
        """Show something."""
        ...

    def raw(self) -> contextlib.AbstractContextManager[None]:
        """Pass every key on for a block; however that is left, the terminal is as before."""
        ...

    def reset_modes(self) -> None:
        """Undo what a program that could not do so itself has left it in."""
        ...


@final
class StandardTerminal:
    """Standard input, which is a terminal, and standard output."""

    def size(self) -> tuple[int, int]:
        try:
            columns, rows = os.get_terminal_size(0)
        except OSError:  # it is gone
            columns = rows = 0
        # Serial lines do not know their size, and say 0.
        return rows or 24, columns or 80

    async def read(self) -> bytes:
        # Not non-blocking: that would be so for the shell that we were started from as well.
        await trio.lowlevel.wait_readable(0)
        try:
            return os.read(0, _CHUNK)
        except OSError:
            return b""  # EIO: it hung up

    async def write(self, data: bytes | bytearray) -> None:
        await write_output("stdout", bytes(data))

    @contextlib.contextmanager
    def raw(self) -> Generator[None]:
        before = termios.tcgetattr(0)
        # At once, and without waiting for output to drain: a terminal that nobody looks at would never let us end.
        tty.setraw(0, termios.TCSANOW)
        try:
            yield
        finally:
            with contextlib.suppress(termios.error):  # it hung up
                termios.tcsetattr(0, termios.TCSANOW, before)

    def reset_modes(self) -> None:
        if os.isatty(1) and select.select([], [1], [], 0)[1]:
            with contextlib.suppress(OSError):
                os.write(1, RESET_MODES)


def shell(options: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status."""
    if not os.isatty(0):
        complain("standard input is not a terminal; use `trio-sandbox run` to run code without one")
        return _status.USAGE
    try:
        request = ShellRequest(
            command=tuple(options.argv) or LOGIN_SHELL,
            user=int(options.user) if (options.user or "").isdecimal() else options.user,
            image=image_for_program(options.image, options.packages),
            host=host_config(options),
            sandbox=sandbox_config(options),
            quiet=options.quiet,
        )
    except ValueError as exc:
        complain(str(exc))
        return _status.USAGE
    return trio.run(end_on_signal, partial(run_shell, request, StandardTerminal()))


async def run_shell(request: ShellRequest, terminal: LocalTerminal, *, open_host: OpenHost = open_host) -> int:
    """Open a machine and run the shell in it; return the exit status."""
    # Before the size is first asked for, so that no change of it is missed.
    with trio.open_signal_receiver(signal.SIGWINCH) as sizes, contextlib.ExitStack() as display:
        show: ShowProgress = display.enter_context(open_progress(quiet=request.quiet))
        async with open_host(attrs.evolve(request.host, progress=show)) as host:
            await host.prepare(request.image)
            async with host.open_sandbox(request.image, request.sandbox) as sandbox:
                display.close()  # the shell has the terminal to itself
                if not request.quiet:
                    complain("Ctrl-] ends the shell and its virtual machine")
                rows, columns = terminal.size()
                guest = Terminal(rows=rows, columns=columns, term=os.environ.get("TERM") or "dumb")
                async with sandbox.open_process(request.command, pty=guest, user=request.user) as process:
                    with terminal.raw():
                        return await converse(process, terminal, sizes)


async def converse(  # noqa: ASYNC910 (nurseries are checkpoints)
    process: GuestProcess, terminal: LocalTerminal, sizes: AsyncIterator[int]
) -> int:
    """Connect two terminals until the process is over or the detach key is typed; return the exit status."""
    stdio = process.stdio
    assert stdio is not None
    detached = False

    async def type_keys() -> None:  # noqa: ASYNC910 - reading is a checkpoint
        nonlocal detached
        with contextlib.suppress(trio.BrokenResourceError):  # nobody takes it any more; how that came is told elsewhere
            while True:
                keys = await terminal.read()
                typed, detach, _ = keys.partition(DETACH_KEY)
                if typed:
                    await stdio.send_all(typed)
                if detach or not keys:
                    detached = True
                    nursery.cancel_scope.cancel(reason="the detach key was typed, or the terminal is gone")
                    return

    async def follow_size() -> None:
        async for _ in sizes:
            rows, columns = terminal.size()
            process.resize(rows, columns)

    async def wait_end() -> None:
        await process.wait()
        nursery.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS

    try:
        async with trio.open_nursery() as nursery:
            for task in (type_keys, follow_size, wait_end):
                nursery.start_soon(task)
            with contextlib.suppress(trio.BrokenResourceError):  # waiting for the process says why
                async for data in stdio:
                    await terminal.write(data)
            await process.wait()
            nursery.cancel_scope.cancel(reason="the process is over, and all that it printed was shown")
    finally:
        if process.returncode is None:
            terminal.reset_modes()
    if process.returncode is None:
        assert detached
        return _status.SIGNAL_BASE + signal.SIGHUP
    status = process.returncode
    return _status.SIGNAL_BASE - status if status < 0 else status
