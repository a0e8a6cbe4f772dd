"""Made by tests/generate_doors.py from the API for Trio; do not edit it."""

from __future__ import annotations

import signal
from typing import final

import trio

import trio_sandbox

from .. import Display, OutputChunk, ProcessUsage, RunResult
from .._refused import refuse
from ._door import BlockingDoor


@final
class GuestInput(BlockingDoor[trio_sandbox.GuestInput]):
    """The standard input of a process in the guest. When you close it, the process reads end of file."""

    __slots__ = ()

    def close(self) -> None:
        """Close it. The process reads what was sent, then end of file."""
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestInput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*; a process that does not read makes this wait. Cancelled: some of it may have been sent.

        See `trio_sandbox.GuestInput.send_all`.
        """
        self._call(lambda: self._inner.send_all(data))


@final
class GuestOutput(BlockingDoor[trio_sandbox.GuestOutput]):
    """The output of a process in the guest. If you don't read it, the process waits."""

    __slots__ = ()

    def close(self) -> None:
        """Stop reading; if the process prints more, it gets a broken pipe."""
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for some output; ``b""`` at its end. Cancelled: nothing is lost.

        See `trio_sandbox.GuestOutput.receive_some`.
        """
        return self._call(lambda: self._inner.receive_some(max_bytes))

    def __iter__(self) -> GuestOutput:
        return self

    def __next__(self) -> bytes | bytearray:
        return self._next(self._inner.__anext__)


@final
class GuestTerminal(BlockingDoor[trio_sandbox.GuestTerminal]):
    r"""The user's side of the terminal that controls a process in the guest.

    See `trio_sandbox.GuestTerminal`.
    """

    __slots__ = ()

    def close(self) -> None:
        """Hang up."""
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for what is shown next; ``b""`` at the end. Cancelled: nothing is lost.

        See `trio_sandbox.GuestTerminal.receive_some`.
        """
        return self._call(lambda: self._inner.receive_some(max_bytes))

    def __iter__(self) -> GuestTerminal:
        return self

    def __next__(self) -> bytes | bytearray:
        return self._next(self._inner.__anext__)

    def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Type *data*; a process that does not read makes this wait. Cancelled: some of it may have been typed.

        See `trio_sandbox.GuestTerminal.send_all`.
        """
        self._call(lambda: self._inner.send_all(data))


@final
class GuestProcess(BlockingDoor[trio_sandbox.GuestProcess]):
    """A process in the guest, like `trio.Process` on the host. Made by `Sandbox.open_process`."""

    __slots__ = ()

    @property
    def args(self) -> list[str]:
        """The argv it was started with."""
        return self._inner.args

    @property
    def pid(self) -> int:
        """Its process id, as processes in the guest see it."""
        return self._inner.pid

    @property
    def stdin(self) -> GuestInput | None:
        """What it reads on its standard input; None if it was opened with ``stdin=False`` or with a terminal."""
        inner = self._inner.stdin
        return None if inner is None else GuestInput(self._portal, inner)

    @property
    def stdout(self) -> GuestOutput | None:
        """What it prints to standard output; None if it was opened with ``stdout=False`` or with a terminal."""
        inner = self._inner.stdout
        return None if inner is None else GuestOutput(self._portal, inner)

    @property
    def stderr(self) -> GuestOutput | None:
        """What it prints to standard error; None unless it was opened with ``stderr="pipe"``, or with a terminal."""
        inner = self._inner.stderr
        return None if inner is None else GuestOutput(self._portal, inner)

    @property
    def stdio(self) -> GuestTerminal | None:
        """The terminal of a process that was opened with one; the other three are None then."""
        inner = self._inner.stdio
        return None if inner is None else GuestTerminal(self._portal, inner)

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit status, or ``-n`` if signal *n* ended it."""
        return self._now(lambda: self._inner.returncode)

    @property
    def oom(self) -> bool:
        """Whether the process was killed because the guest had no memory left; False while it runs."""
        return self._now(lambda: self._inner.oom)

    @property
    def usage(self) -> ProcessUsage | None:
        """What the process has used; None while it runs, and if its end is not known."""
        return self._now(lambda: self._inner.usage)

    @refuse("timeout")
    def wait(self) -> int:
        """Wait until the process ends, then return `returncode`. Cancelled: the process keeps running.

        See `trio_sandbox.GuestProcess.wait`.
        """
        return self._call(self._inner.wait)

    def send_signal(self, sig: signal.Signals | int) -> None:
        """Send signal *sig* to the process; nothing happens if it has ended. Does not wait for the guest.

        See `trio_sandbox.GuestProcess.send_signal`.
        """
        self._now(lambda: self._inner.send_signal(sig))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._now(self._inner.terminate)

    def kill(self) -> None:
        """Send SIGKILL, to the process and to every descendant of it."""
        self._now(self._inner.kill)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the process's terminal; its foreground processes get SIGWINCH. Does not wait for the guest.

        See `trio_sandbox.GuestProcess.resize`.
        """
        self._now(lambda: self._inner.resize(rows, columns))


@final
class RunEvents(BlockingDoor[trio_sandbox.RunEvents]):
    """The events of a run in order of arrival: `OutputChunk` and `Display`, and one `RunResult` as the last.

    See `trio_sandbox.RunEvents`.
    """

    __slots__ = ()

    @property
    def stdin(self) -> GuestInput | None:
        """The stream that the code reads as its standard input, with ``stdin=True``; close it, and the code reads the end of the file."""
        inner = self._inner.stdin
        return None if inner is None else GuestInput(self._portal, inner)

    def __iter__(self) -> RunEvents:
        return self

    def __next__(self) -> OutputChunk | Display | RunResult:
        return self._next(self._inner.__anext__)


@final
class GuestConnection(BlockingDoor[trio.abc.HalfCloseableStream]):
    """A TCP connection to a server in the guest."""

    __slots__ = ()

    def close(self) -> None:
        """Close this resource, possibly blocking.

        See `trio_sandbox.HalfCloseableStream.aclose`.
        """
        self._call(self._inner.aclose)

    def __enter__(self) -> GuestConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Wait until there is data available on this stream, and then return some of it.

        See `trio_sandbox.HalfCloseableStream.receive_some`.
        """
        return self._call(lambda: self._inner.receive_some(max_bytes))

    def __iter__(self) -> GuestConnection:
        return self

    def __next__(self) -> bytes | bytearray:
        return self._next(self._inner.__anext__)

    def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Sends the given data through the stream, blocking if necessary.

        See `trio_sandbox.HalfCloseableStream.send_all`.
        """
        self._call(lambda: self._inner.send_all(data))

    def send_eof(self) -> None:
        """Send an end-of-file indication on this stream, if possible.

        See `trio_sandbox.HalfCloseableStream.send_eof`.
        """
        self._call(self._inner.send_eof)
