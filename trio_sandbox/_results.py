"""How code and processes of a guest ended, and the errors that say that they failed."""

from __future__ import annotations

import signal
import subprocess
from typing import Literal, final

import attrs

from ._display import Display
from ._errors import SandboxError
from ._metadata import mark_public
from ._quote import quote_guest, quote_lines, quote_tail

#: Characters of each output that a `repr` shows.
_REPR_LIMIT = 400


def decode(data: bytes) -> str:
    """Return output as text; bytes that are not UTF-8 become U+FFFD."""
    return data.decode("utf-8", "replace")


@final
@attrs.frozen(kw_only=True)
class RunTimings:
    """The times of one run, in seconds on the host's clock, counted from the call of `Sandbox.run` or `Sandbox.stream`."""

    sent: float = 0.0
    """When the code was sent to the guest. Before that the run waits for its turn, or for a sandbox that wakes up."""
    first_output: float | None = None
    """When the first of what it printed or displayed was there; None if there was nothing."""
    ended: float = 0.0
    """When its end was known, and all of its output was there. It is later than `sent` by `RunResult.duration`."""


@final
@attrs.frozen(kw_only=True)
class ProcessUsage:
    """What a process in the guest has used: `GuestProcess.usage`.

    Processes that it has started and waited for count as well. The guest's kernel counts all of it, so a hostile guest can
    lie about it: `Sandbox.usage` has what the host counts.
    """

    cpu_seconds: float
    """Processor time, in seconds."""
    peak_memory_bytes: int
    """The most memory that one of them had at once, in bytes: what was resident, shared libraries included. It is some MiB
    at least, which any process has before it executes its program."""
    disk_written_bytes: int
    """What they wrote to files on a disk, in bytes, in whole blocks of the file system. A block that is written again before
    the kernel has taken it to the disk counts once."""


@final
@attrs.frozen(kw_only=True, repr=False)
class RunResult:
    """How a run ended and what it printed."""

    exit_code: int
    """0 after success, 1 after an uncaught exception, n after ``sys.exit(n)`` or ``os._exit(n)``, 128 + n after signal n."""
    stdout_bytes: bytes = b""
    """Its standard output. In the result of `Sandbox.stream` only the end; see `streamed`."""
    stderr_bytes: bytes = b""
    """Its standard error, including the traceback of an uncaught exception. In the result of `Sandbox.stream` only the end;
    see `streamed`."""
    value: str | None = None
    """The value of the code's last expression, as text; None if it was None, or the code did not end with an expression.

    At most `constants.MAXIMUM_VALUE_BYTES` as UTF-8; the end of a longer one says how much was cut off.
    """
    displays: tuple[Display, ...] = ()
    """What it displayed; empty in the result of `Sandbox.stream`, which has delivered it already."""
    duration: float
    """Seconds on the host's clock, from sending the request to its end."""
    timings: RunTimings = RunTimings()
    """When the run was sent, printed something for the first time, and ended."""
    cpu_seconds: float = 0.0
    """Processor time of the code and of everything that it started, in seconds, as the guest's kernel counted it until the
    run's end. Processes that an earlier run of that language left behind count, too. A hostile guest can lie about it:
    `Sandbox.usage` has what the host counts."""
    peak_memory_bytes: int | None = None
    """The most memory that the interpreter had at once during the run, in bytes: what was resident, shared libraries
    included. Processes that the code started don't count. Memory that the run before freed less than 50 ms earlier may still
    count. If the run ended its interpreter, it is the most that a Python
    interpreter or a process that it has ever waited for had, and None for other languages. None for a shell, too."""
    disk_written_bytes: int | None = None
    """What the interpreter, and processes that it started and waited for, wrote to files on a disk, in bytes, in whole blocks
    of the file system; None if the run ended another interpreter than Python's. A block that is written again before the kernel has taken it to the disk counts once."""
    restarted: bool
    """Whether the interpreter was a new one, because an earlier run had ended the one before."""
    state_kept: bool
    """Whether the interpreter lives on, with its variables. If False, the next run starts a new one."""
    accelerator: str
    """What ran the guest: "kvm", or "tcg", which QEMU does not count as a security boundary."""
    oom: bool = False
    """Whether the interpreter was killed because the guest ran out of memory. The last line of `stderr` says so too."""
    streamed: bool = False
    """Whether it is the result of `Sandbox.stream`, which has delivered the output already. Then `stdout_bytes` and
    `stderr_bytes` hold only the last `constants.OUTPUT_TAIL_BYTES`, and `displays` is empty."""

    @property
    def ok(self) -> bool:
        """Whether the code succeeded: `exit_code` is 0."""
        return self.exit_code == 0

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are not UTF-8 become U+FFFD."""
        return decode(self.stdout_bytes)

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are not UTF-8 become U+FFFD."""
        return decode(self.stderr_bytes)

    def check(self) -> RunResult:
        """Return the result itself if the code succeeded.

        Raises:
          RunFailedError: if `exit_code` is not 0.

        """
        if not self.ok:
            raise RunFailedError(self)
        return self

    def __repr__(self) -> str:
        # The exit code comes first and the end of stderr last: pytest cuts a long repr in the middle.
        parts = [f"exit_code={self.exit_code}"]
        parts += [f"{name}={value}" for name, value in (("oom", self.oom), ("streamed", self.streamed)) if value]
        parts.append(f"state_kept={self.state_kept}, restarted={self.restarted}, accelerator={self.accelerator!r}")
        parts.append(f"duration={self.duration:.3f}")
        if self.displays:
            parts.append(f"displays=<{len(self.displays)} displays>")
        if self.value is not None:
            parts.append(f"value='{quote_guest(self.value, _REPR_LIMIT)}'")
        parts.append(f"stdout='{quote_tail(self.stdout, _REPR_LIMIT)}'")
        parts.append(f"stderr='{quote_tail(self.stderr, _REPR_LIMIT)}'")
        return f"RunResult({', '.join(parts)})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """Show it in a notebook: text and pictures. HTML of the guest's is shown as text, since nobody trusts it."""
        from ._notebook import mime_bundle  # few need it

        return mime_bundle(self)


@final
@attrs.frozen(kw_only=True)
class RunOutput:
    """The end of a run's output, and how it ended, even if there was no `RunResult`."""

    language: str
    """The language of the code."""
    outcome: Literal["unsent", "running", "ended", "stopped", "refused", "broken"]
    """How far it got, and how it ended.

    - "unsent": nothing was sent to the guest; the run waits for its turn, or was cancelled while it waited.
    - "running": the code runs.
    - "ended": the code ended by itself.
    - "stopped": the code was stopped: by a deadline or another cancellation, because it printed too much, or because
      its block was left.
    - "refused": the guest did not start it.
    - "broken": the virtual machine ended, or the guest broke the protocol.
    """
    exit_code: int | None
    """As in `RunResult.exit_code`, where the guest said it; of a run that was stopped, too."""
    stdout_bytes: bytes
    """The last `constants.OUTPUT_TAIL_BYTES` of what it has printed to standard output so far."""
    stderr_bytes: bytes
    """The same of standard error."""

    @property
    def stdout(self) -> str:
        """The end of standard output as text; bytes that are not UTF-8 become U+FFFD."""
        return decode(self.stdout_bytes)

    @property
    def stderr(self) -> str:
        """The end of standard error as text; bytes that are not UTF-8 become U+FFFD."""
        return decode(self.stderr_bytes)


@final
class RunFailedError(SandboxError):
    """The code of a run failed, and you asked for an error, by ``check=True`` or `RunResult.check`.

    The message has the end of standard error, the traceback for instance. The sandbox lives on.
    """

    retry_safe = False
    """False: the code ran."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result)
        self.result = result
        """The whole result of the run."""

    def __str__(self) -> str:
        how = _describe_exit(self.result.exit_code)
        if self.result.oom:
            how += " (out of memory)"
        return f"the code {how}" + _excerpt("stderr", self.result.stderr)


@final
class ProcessFailedError(subprocess.CalledProcessError):
    """A process in the guest failed: what `Sandbox.run_process` raises as `subprocess.CalledProcessError`.

    The message has the end of its standard error, even if that was not captured. It is not a `SandboxError`: nothing is
    wrong with the sandbox.
    """

    retry_safe: bool = False
    """False: the process may have had its effect."""

    def __init__(
        self,
        returncode: int,
        cmd: list[str],
        output: bytes | None = None,
        stderr: bytes | None = None,
        stderr_tail: bytes = b"",
        oom: bool = False,
    ) -> None:
        super().__init__(returncode, cmd, output, stderr)
        self.stderr_tail = stderr_tail
        """The last `constants.OUTPUT_TAIL_BYTES` of what it printed to standard error; where that went to standard output
        or to a terminal, and that was captured, the end of that."""
        self.oom = oom
        """The guest had no memory left, and the process was killed for that."""

    def __reduce__(self) -> tuple[object, ...]:
        output: bytes | None = self.output
        error: bytes | None = self.stderr
        return type(self), (self.returncode, self.cmd, output, error, self.stderr_tail, self.oom)

    def __str__(self) -> str:
        status = self.returncode
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
        if self.oom:
            how += " (out of memory)"
        return f"the process {self.cmd!r} in the sandbox {how}" + _excerpt("stderr", decode(self.stderr_tail))


def _describe_exit(exit_code: int) -> str:
    by_signal = f" (128 + {_signal_name(exit_code - 128)})" if 128 < exit_code <= 128 + signal.SIGRTMAX else ""
    return f"ended with exit code {exit_code}{by_signal}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _excerpt(name: str, text: str) -> str:
    return f"; the end of its {name}:\n{quote_lines(text)}" if text.strip() else f"; its {name} is empty"


mark_public(__name__, globals())
