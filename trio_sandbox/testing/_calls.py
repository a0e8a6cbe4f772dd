"""What a script is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Literal, final

import attrs
import trio

from .._checks import check_flag, check_text, or_none, whole_number
from .._display import Display
from ..constants import MAXIMUM_VALUE_BYTES

#: More than a guest says that a run has used: seconds, and bytes.
_MOST_SECONDS, _MOST_BYTES = 10**9, 2**40


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
    One call at a time. If the function raises, this raises a `RuntimeError` with the message that a guest gets."""
    connect: Callable[[str, int], Awaitable[trio.abc.HalfCloseableStream]] = attrs.field(default=_not_asked, eq=False)
    """Connects to a host and a port, as code in a guest would: ``await call.connect("pypi.org", 443)``. The policy in force decides (`SandboxConfig.network`,
    `Sandbox.network`), and `NetworkEvent` reports it; point the name at a service of the test with ``NetworkRule(to=...)``. Close the stream. A refusal or failure is the `OSError` that code in a
    guest gets."""
    state: dict[str, Any] = attrs.field(factory=dict[str, Any], eq=False)
    """What this guest remembers, for the script to read and change. Checkpoints and copies of the sandbox have a copy of it (`copy.deepcopy`), and a revert brings it back."""
    files: MutableMapping[str, bytes] = attrs.field(factory=dict[str, bytes], eq=False)
    """The files of this guest, for the script to read and change: what they hold, by absolute path. Relative paths of the program under test start at
    ``/home/user``. Checkpoints and copies have them, as they have `state`."""


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _check_output(_: object, attribute: attrs.Attribute[Any], value: bytes) -> None:
    if not isinstance(value, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{attribute.name}` must be str or bytes, not {value!r:.100}")


def _check_value(answer: object, attribute: attrs.Attribute[Any], value: str) -> None:
    check_text(answer, attribute, value)
    if (size := len(value.encode())) > MAXIMUM_VALUE_BYTES:
        raise ValueError(f"`value` may have {MAXIMUM_VALUE_BYTES} bytes, not {size}: a guest would cut off the rest")


def _check_displays(_: object, attribute: attrs.Attribute[Any], value: tuple[Display, ...]) -> None:
    if not isinstance(value, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{attribute.name}` must be a tuple of Display, not {value!r:.100}")
    for each in value:
        if not isinstance(each, Display) or not isinstance(each.data, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"`{attribute.name}` must hold Display objects with bytes, not {each!r:.100}")


def _check_cpu_seconds(_: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`{attribute.name}` must be a number of seconds, not {value!r:.100}")
    if not 0 <= value <= _MOST_SECONDS:  # NaN is not, either
        raise ValueError(f"`{attribute.name}` must be from 0 to {_MOST_SECONDS} seconds, not {value!r:.100}")


@final
@attrs.frozen(kw_only=True)
class Answer:
    """How a run or a process ends, and what it prints before."""

    stdout: bytes = attrs.field(default=b"", converter=_bytes, validator=_check_output)
    """What it prints to standard output; text is encoded as UTF-8."""
    stderr: bytes = attrs.field(default=b"", converter=_bytes, validator=_check_output)
    """What it prints to standard error, likewise."""
    exit_code: int = attrs.field(default=0, validator=whole_number(-64, 255))
    """As in `RunResult.exit_code`, from 0; of a process as in `GuestProcess.returncode`."""
    value: str | None = attrs.field(default=None, validator=or_none(_check_value))
    """`RunResult.value`; of runs only."""
    displays: tuple[Display, ...] = attrs.field(default=(), validator=_check_displays)
    """`RunResult.displays`; of runs only."""
    cpu_seconds: float = attrs.field(default=0.0, validator=_check_cpu_seconds)
    """`RunResult.cpu_seconds`, or that of `GuestProcess.usage`, to the microsecond."""
    peak_memory_bytes: int = attrs.field(default=0, validator=whole_number(0, _MOST_BYTES, unit="bytes"))
    """The same of memory, to the KiB; 0 is None to a `RunResult`."""
    disk_written_bytes: int = attrs.field(default=0, validator=whole_number(0, _MOST_BYTES, unit="bytes"))
    """The same of what it wrote, to 512 bytes."""
    state_kept: bool = attrs.field(default=True, validator=check_flag)
    """Whether the interpreter lives on; if not, the next run says that it was restarted."""
    oom: bool = attrs.field(default=False, validator=check_flag)
    """`RunResult.oom` and `GuestProcess.oom`: it is killed because the guest has no memory left. Say 137 for the
    `exit_code` of a run then, -9 for that of a process, and False for `state_kept`."""


Answerer = Callable[[Call], Awaitable[Answer]]
