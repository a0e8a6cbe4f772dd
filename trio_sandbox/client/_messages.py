"""What the guest's services say, checked: bytes of a hostile guest in, values of ours out.

The service protocols are described in `docs/design.md`. Nothing here does I/O.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Final, TypeVar, cast

import attrs

from .._errors import GuestProtocolError
from .._quote import quote_guest
from ..constants import MAXIMUM_REQUEST_BYTES, MAXIMUM_VALUE_BYTES
from ..wire import MIME_TYPE
from ._json import has_more_values

T = TypeVar("T")

#: Numbers that fit into 32 bits, which is more than the guest has bytes, or objects to show.
_HIGHEST_NUMBER = 2**32 - 1

#: Bytes of a message: of the end of a run, whose value may take six for each of its own, and of others, which have a path at
#: most. Reading what is longer, or an end with more values than any has, could take a turn of the event loop that others notice.
_LONGEST_END = 6 * MAXIMUM_VALUE_BYTES + 4096
_LONGEST = 2**15
_MOST_IN_END = 100
_BEGINNING_OF_END = b'{"finished"'

#: What a run without a language is told, in a container image that has none of ours.
NO_INTERPRETER: Final = (
    "the container image has no interpreter for runs: python3 (3.11 or newer), node or bash. If a step has installed one, name its language, "
    "run(..., language=...). Programs of the image are run by run_process() and open_process()"
)

#: Characters of a user's name; no system has longer ones.
_LONGEST_USER = 256
#: More than a machine can use: microseconds that all its processors take in a century, and blocks of its disks.
_MOST_MICROSECONDS: Final = 10**18
_MOST_BLOCKS: Final = 2**64 - 1

#: Variables that bash sets itself and lets nobody set.
_READ_ONLY = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"})


@attrs.frozen
class Used:
    """What a run or a process has used."""

    microseconds: int = 0  # of processor time
    peak_kib: int = 0  # of memory at once; 0 if that is not counted
    blocks_written: int = -1  # of 512 bytes; -1 if they are not counted


@attrs.frozen
class Finished:
    """A run is over; *expired*: the guest stopped it at its deadline, without us; *oom*: killed for want of memory."""

    exit_code: int
    value: str | None
    restarted: bool
    state_kept: bool
    expired: bool = False
    oom: bool = False
    used: Used = Used()


@attrs.frozen
class Shown:
    """A run shows an object numbered *item* in the form *mime*; its *size* bytes follow."""

    mime: str
    size: int
    item: int


@attrs.frozen
class Failed:
    """The guest could not start what was asked for; errno is 0 where no system call failed."""

    errno: int
    reason: str  # quoted: it goes into messages as it is
    filename: str | None


@attrs.frozen
class Started:
    """A process runs in the guest."""

    pid: int


@attrs.frozen
class Exited:
    """A process is over; *status* as in `subprocess.Popen.returncode`, *expired* and *oom* as for a run."""

    status: int
    expired: bool = False
    oom: bool = False
    used: Used = Used()


@attrs.frozen
class Mounted:
    """So many of the host's directories are mounted in the guest."""

    count: int


Message = Finished | Shown | Failed | Started | Exited | Mounted


def parse_message(payload: bytes) -> Message:
    """Decode one JSON record of a service.

    Raises:
      GuestProtocolError: if it is anything but one of the messages above, well-formed.

    """
    if len(payload) > _LONGEST and (
        not payload.startswith(_BEGINNING_OF_END)
        or len(payload) > _LONGEST_END
        or has_more_values(payload, _MOST_IN_END)
    ):
        raise GuestProtocolError(f"the guest sent a message of {len(payload)} bytes: {payload[:80]!r}")
    try:
        # Decoded here: of bytes it would take UTF-16 as well.
        message: object = json.loads(payload.decode())
    except (ValueError, RecursionError) as exc:
        raise GuestProtocolError(f"the guest sent a record that is not JSON: {payload[:80]!r}") from exc
    if isinstance(message, dict) and len(cast("dict[object, object]", message)) == 1:
        ((kind, body),) = cast("dict[str, object]", message).items()
        if kind == "started":
            return Started(_checked(body, int, "started"))
        if kind == "mounted":
            return Mounted(_checked(body, int, "mounted"))
        if kind == "exited":
            fields = _fields(body, kind)
            return Exited(
                _number(fields.get("status"), "status", lowest=-64),
                expired=_checked(fields.get("expired", False), bool, "expired"),
                oom=_checked(fields.get("oom", False), bool, "oom"),
                used=_used(fields),
            )
        if kind == "finished":
            fields = _fields(body, kind)
            return Finished(
                exit_code=_number(fields.get("exit_code"), "exit_code", lowest=0),
                value=_value(fields.get("value")),
                restarted=_checked(fields.get("restarted"), bool, "restarted"),
                state_kept=_checked(fields.get("state_kept"), bool, "state_kept"),
                expired=_checked(fields.get("expired", False), bool, "expired"),
                oom=_checked(fields.get("oom", False), bool, "oom"),
                used=_used(fields),
            )
        if kind == "display":
            fields = _fields(body, kind)
            return Shown(
                mime=_mime_type(fields.get("mime")),
                size=_number(fields.get("size"), "size", lowest=0, highest=_HIGHEST_NUMBER),
                item=_number(fields.get("item"), "item", lowest=0, highest=_HIGHEST_NUMBER),
            )
        if kind == "failed":
            fields = _fields(body, kind)
            filename = fields.get("filename")
            return Failed(
                errno=_number(fields.get("errno", 0), "errno", lowest=0),
                reason=quote_guest(_checked(fields.get("strerror"), str, "strerror")),
                filename=None if filename is None else _checked(filename, str, "filename")[:4096],
            )
    raise GuestProtocolError(f"the guest sent a message of no known kind: {payload[:80]!r}")


def _fields(body: object, kind: str) -> dict[str, object]:
    if not isinstance(body, dict):
        raise GuestProtocolError(f"the guest's message {kind!r} holds no object")
    return cast("dict[str, object]", body)


def _checked(value: object, wanted: type[T], name: str) -> T:
    # bool is an int to isinstance(), and never one of ours where a number belongs.
    if type(value) is not wanted:
        raise GuestProtocolError(f"the guest's field {name!r} must be {wanted.__name__}, not {value!r:.80}")
    return value


def _number(value: object, name: str, *, lowest: int, highest: int = 255) -> int:
    if type(value) is int and lowest <= value <= highest:
        return value
    number = _checked(value, int, name)
    raise GuestProtocolError(f"the guest's field {name!r} must be from {lowest} to {highest}, not {number!r:.80}")


def _used(fields: dict[str, object]) -> Used:
    numbers = cast("list[object]", _checked(fields.get("used", [0, 0, -1]), list, "used"))
    if len(numbers) != 3:
        raise GuestProtocolError(f"the guest's field 'used' must have 3 numbers, not {numbers!r:.80}")
    microseconds, peak_kib, blocks_written = numbers
    return Used(
        _number(microseconds, "used", lowest=0, highest=_MOST_MICROSECONDS),
        _number(peak_kib, "used", lowest=0, highest=_HIGHEST_NUMBER),
        _number(blocks_written, "used", lowest=-1, highest=_MOST_BLOCKS),
    )


def _value(value: object) -> str | None:
    if value is None:
        return None
    text = _checked(value, str, "value")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise GuestProtocolError("the guest's field 'value' is no text: it has a lone surrogate") from exc
    if size > MAXIMUM_VALUE_BYTES:
        raise GuestProtocolError(f"the guest's field 'value' may have {MAXIMUM_VALUE_BYTES} bytes, not {size}")
    return text


def _mime_type(value: object) -> str:
    mime = _checked(value, str, "mime")
    if not MIME_TYPE.fullmatch(mime):
        raise GuestProtocolError(f"the guest's field 'mime' is no MIME type: {mime!r:.80}")
    return mime


def code_request(code: str, *, language: str, env: Mapping[str, str] | None, cwd: str | None) -> dict[str, object]:
    """The request of the service `code`, or `TypeError`/`ValueError` for what can't be one."""
    if type(code) is not str:
        raise TypeError(f"`code` must be str, not {type(code).__name__}")
    _check_text(language, "`language`")
    if "\0" in code:
        at = code.index("\0")
        raise ValueError(
            f"`code` must not hold the character NUL, which no interpreter takes, but has it at position {at},"
            f" in line {code.count(chr(10), 0, at) + 1}; write it as an escape of the language instead"
        )
    request: dict[str, object] = {"language": language, "code": code}
    # What is not said need not be read by an interpreter under emulation.
    if env is not None:
        request["env"] = _environment(env)
        if language == "shell":
            _check_shell_names(env)
    if cwd is not None:
        request["cwd"] = _directory(cwd)
    _check_size([code], "the code of a run")
    return request


def process_request(
    command: Sequence[str | PathLike[str]],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | int | None,
) -> dict[str, object]:
    """The request of the service `process`, its streams still to be filled in."""
    if isinstance(command, (str, bytes, PathLike)) or not isinstance(command, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError("`command` must be a sequence of arguments; for a shell command line pass shell=True")
    check_user(user)
    argv = [fspath(argument) for argument in command]
    if not argv:
        raise ValueError("`command` must name a program, not be empty")
    for argument in argv:
        _check_text(argument, "an argument")
    request: dict[str, object] = {
        "argv": argv,
        "env": _environment(env),
        "cwd": _directory(cwd),
        "user": user,
        "stdin": None,
        "stdout": None,
        "stderr": None,
    }
    _check_size([*argv, *(env or {}).keys(), *(env or {}).values()], "the arguments and environment of a process")
    return request


def input_bytes(stdin: bytes | bytearray | memoryview) -> memoryview:
    """Return a standard input as single bytes, or refuse what can be none."""
    if not isinstance(stdin, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]
        way = "; encode it, as in 'yes'.encode()" if isinstance(stdin, str) else ""
        raise TypeError(f"`stdin` must be bytes, not {type(stdin).__name__}{way}")
    try:
        return memoryview(stdin).cast("B")
    except TypeError as exc:
        raise TypeError(f"`stdin` must be bytes, not {type(stdin).__name__}: {exc}") from None


def check_user(user: object) -> None:
    """Refuse what can be no user of the guest's."""
    if user is None:
        return
    if isinstance(user, int) and not isinstance(user, bool):
        if not 0 <= user < _HIGHEST_NUMBER:
            raise ValueError(f"`user` must be from 0 to {_HIGHEST_NUMBER - 1}, not {user}")
        return
    if type(user) is not str:
        raise TypeError(f"`user` must be str or int, not {type(user).__name__}")
    if not 0 < len(user) <= _LONGEST_USER or "\0" in user:
        raise ValueError(f"`user` must be the name of a user, of at most {_LONGEST_USER} characters, not {user!r:.80}")


def _environment(env: Mapping[str, str] | None) -> dict[str, str] | None:
    if env is None:
        return None
    if not isinstance(env, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"`env` must be a mapping from names to values, as in {{'TZ': 'UTC'}}, not {type(env).__name__}"
        )
    for name, value in env.items():
        _check_text(name, "a name in `env`")
        _check_text(value, f"`env[{name!r}]`")
        if not name or "=" in name:
            raise ValueError(f"a name in `env` must not be empty or hold '=', but {name!r} does")
    return dict(env)


def _check_shell_names(names: Iterable[str]) -> None:
    for name in names:
        if not (name.isidentifier() and name.isascii()):
            raise ValueError(
                f"a shell can't have a variable of the name {name!r} in `env`: only ASCII letters, digits and _ make one,"
                " and no digit is the first; Sandbox.run_process() takes any name"
            )
        if name in _READ_ONLY:
            raise ValueError(f"the variable {name!r} in `env` is the shell's own, and nobody can set it")


def _directory(cwd: str | None) -> str | None:
    if cwd is None:
        return None
    _check_text(cwd, "`cwd`")
    if not cwd.startswith("/"):
        raise ValueError(
            f"`cwd` must be an absolute path in the guest, not {cwd!r}; Sandbox.path({cwd!r}) starts at the user's home"
        )
    return cwd


def _check_text(value: object, what: str) -> None:
    if type(value) is not str:
        raise TypeError(f"{what} must be str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{what} must not hold a NUL character: {value[:80]!r}")


def _check_size(texts: Iterable[str], what: str) -> None:
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > MAXIMUM_REQUEST_BYTES:
        raise ValueError(
            f"{what} must be at most {MAXIMUM_REQUEST_BYTES} bytes, not {size}; send large data through stdin or a file"
        )
