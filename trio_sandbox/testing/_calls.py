"""What a script is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal, final

import attrs
import trio

from .._display import Display


async def _not_asked(host: str, port: int) -> trio.abc.HalfCloseableStream:
    await trio.lowlevel.checkpoint()
    raise ConnectionError(f"this call was made by a test, and no guest connects to {host}:{port}")


@final
@attrs.frozen(kw_only=True)
class Call:
    """What the program under test asks of its sandbox."""

    kind: Literal["run", "process"]
    """Code for the interpreter, or a process."""
    code: str = ""
    """The source text of a run."""
    language: str = ""
    """The language of a run."""
    argv: tuple[str, ...] = ()
    """The program of a process and its arguments."""
    stdin: bytes = b""
    """All of its standard input: the call is answered when that has ended."""
    env: Mapping[str, str] | None = None
    """The environment that was asked for; None if none was."""
    cwd: str | None = None
    """The directory that was asked for; None if none was."""
    functions: Mapping[str, Callable[..., Awaitable[Any]]] = attrs.field(
        factory=dict[str, Callable[..., Awaitable[Any]]], eq=False
    )
    """What a run may call of the program under test: ``await call.functions["search"]("x", limit=3)``, as code in a guest would.
    One call at a time. What the function raises is a `RuntimeError` with what a guest is told of it."""
    connect: Callable[[str, int], Awaitable[trio.abc.HalfCloseableStream]] = attrs.field(default=_not_asked, eq=False)
    """Connects to a host and a port, as code in a guest would: ``await call.connect("pypi.org", 443)``. The policy in force decides (`SandboxConfig.network`,
    `Sandbox.network`), and `NetworkEvent` tells of it; lead the name to a service of the test's with ``NetworkRule(to=...)``. Close the stream. What is refused, and what
    fails, is the `OSError` that code in a guest gets."""
    state: dict[str, Any] = attrs.field(factory=dict[str, Any], eq=False)
    """What this guest remembers, for the script to read and change. Checkpoints and copies of the sandbox have a copy of it (`copy.deepcopy`), and
    going back brings it back."""
    files: MutableMapping[str, bytes] = attrs.field(factory=dict[str, bytes], eq=False)
    """The files of this guest, for the script to read and change: what they hold, by absolute path. Relative paths of the program under test start at
    ``/home/user``. Checkpoints and copies have them, as they have `state`."""


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


@final
@attrs.frozen(kw_only=True)
class Answer:
    """How a run or a process ends, and what it prints before."""

    stdout: bytes = attrs.field(default=b"", converter=_bytes)
    """What it prints to standard output; text is encoded as UTF-8."""
    stderr: bytes = attrs.field(default=b"", converter=_bytes)
    """What it prints to standard error, likewise."""
    exit_code: int = 0
    """As in `RunResult.exit_code`; of a process as in `GuestProcess.returncode`."""
    value: str | None = None
    """`RunResult.value`; of runs only."""
    displays: tuple[Display, ...] = ()
    """`RunResult.displays`; of runs only."""
    cpu_seconds: float = 0.0
    """`RunResult.cpu_seconds`, or that of `GuestProcess.usage`, to the microsecond."""
    peak_memory_bytes: int = 0
    """The same of memory, to the KiB; 0 is None to a `RunResult`."""
    disk_written_bytes: int = 0
    """The same of what it wrote, to 512 bytes."""
    state_kept: bool = True
    """Whether the interpreter lives on; if not, the next run says that it was restarted."""
    oom: bool = False
    """`RunResult.oom` and `GuestProcess.oom`: it is killed because the guest has no memory left. Say 137 for the
    `exit_code` of a run then, -9 for that of a process, and False for `state_kept`."""


Answerer = Callable[[Call], Awaitable[Answer]]
