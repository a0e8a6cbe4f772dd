"""Functions of the host's that the code of a run may call: what the guest says is checked, the calls are tasks of the run.

On a stream of their own, a line each: "NUMBER NAME [[ARGUMENT, ...], {NAME: ARGUMENT}]" from the guest, and "NUMBER r RESULT" or
"NUMBER e MESSAGE" to it, all but the first two in JSON and in ASCII. The lines come from the code itself, which may say anything: what is
no call ends the calls of this run, and nothing else.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import keyword
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import NoReturn, TypeAlias, cast, final

import attrs
import trio

from .._nurseries import hide_nursery
from .._observe import part_logger, serving
from .._quiet_log import QuietLog
from .._rate import Rate
from ..constants import CALLS_AT_ONCE, CALLS_PER_SECOND, MAXIMUM_CALL_BYTES, MAXIMUM_CALL_VALUES, MAXIMUM_FUNCTIONS
from ..wire import ChannelStream
from ._failures import STREAM_GONE
from ._json import has_more_values

_log = part_logger("functions")

Functions: TypeAlias = Mapping[str, Callable[..., object]]

_LONGEST_NAME = 100
#: Seconds that reading arguments may take without any pause.
_LONG = 0.001
#: Bytes of arguments of which it takes about as long to count the values.
_LONG_TEXT = 100_000
#: Characters of what an exception says that the guest is told.
_MESSAGE_LIMIT = 10_000
_CALL = re.compile(rb"([0-9]{1,10}) ([A-Za-z_][A-Za-z0-9_]*) (.*)")
#: Bytes of a line before its arguments.
_HEAD_LIMIT = 11 + _LONGEST_NAME + 1
#: What code in JavaScript can't have as a variable, or can't do without.
_JAVASCRIPT_WORDS = frozenset(
    """
    arguments await break case catch class const continue debugger default delete do else enum eval export extends false finally for
    function globalThis if implements import in instanceof interface let new null package private protected public return static
    super switch this throw true try typeof undefined var void while with yield NaN Infinity require process console
    """.split()
)


@attrs.frozen
class Call:
    """A call that a guest makes: which function, and arguments that were not looked at."""

    number: int
    name: str
    arguments: bytes


class BadCallError(Exception):
    """What came is no call, or its arguments are none."""


@final
class CallDecoder:
    """Cuts what a guest sends into calls; does no I/O."""

    def __init__(self) -> None:
        self._unfinished = bytearray()

    def feed(self, data: bytes | bytearray) -> Iterator[Call]:
        """Take the next bytes; return the calls that are complete, each of which is looked at when it is asked for.

        Raises:
          BadCallError: if what is not complete is too long. From the iterator: if one is none, or too long.

        """
        start = len(self._unfinished)
        self._unfinished += data
        if b"\n" not in data:
            self._check_length(start + len(data))
            return iter(())
        *lines, rest = self._unfinished.split(b"\n")
        self._unfinished = rest
        self._check_length(len(rest))
        return map(self._parse, lines)

    def _parse(self, line: bytearray) -> Call:
        self._check_length(len(line))
        match = _CALL.fullmatch(line)
        if match is None or len(match[2]) > _LONGEST_NAME or len(match[3]) > MAXIMUM_CALL_BYTES:
            raise BadCallError(f"it sent something that is not a call: {bytes(line[:80])!r}")
        return Call(int(match[1]), match[2].decode(), bytes(match[3]))

    def _check_length(self, length: int) -> None:
        if length > _HEAD_LIMIT + MAXIMUM_CALL_BYTES:
            raise BadCallError(f"it sent a call of more than {MAXIMUM_CALL_BYTES} bytes")


def check_arguments(text: bytes) -> None:
    """Refuse arguments that would take long to read; `BadCallError`."""
    if has_more_values(text, MAXIMUM_CALL_VALUES):
        raise BadCallError(
            f"the arguments may have {MAXIMUM_CALL_VALUES} values; call it more often, or pass them as one text"
        )


def parse_arguments(text: bytes) -> tuple[list[object], dict[str, object]]:
    """Return the arguments of a call, by place and by name; `BadCallError` if they are none. `check_arguments` comes first."""
    try:
        value: object = json.loads(text.decode(), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as exc:
        raise BadCallError(f"the arguments are no JSON that is taken here: {exc}"[:200]) from None
    match value:
        case [list(), dict()]:
            return cast("tuple[list[object], dict[str, object]]", tuple(cast("list[object]", value)))
        case _:
            raise BadCallError("the arguments are not a list and an object")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.20} is more than a float can be")
    return number


def encode_result(value: object) -> str:
    """Return the JSON of a function's result.

    Raises:
      TypeError, ValueError, RecursionError: if it is not JSON, or too much.

    """
    _check_result(value)
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as exc:
        raise TypeError(f"the result is not JSON: {exc}") from exc
    if len(text) > MAXIMUM_CALL_BYTES:
        raise ValueError(f"the result may have {MAXIMUM_CALL_BYTES} bytes as JSON, not {len(text)}")
    return text


def _check_result(value: object) -> None:
    """Refuse a result that would take long to encode."""
    values, characters = 1, 0
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            characters += len(each)
        elif isinstance(each, (dict, list, tuple)):
            members = cast("dict[object, object] | list[object] | tuple[object, ...]", each)
            values += len(members)
            if values > MAXIMUM_CALL_VALUES:
                raise ValueError(
                    f"the result may have {MAXIMUM_CALL_VALUES} values, and has more, or contains itself; "
                    "return less at a time, or one text"
                )
            waiting += members
            if isinstance(members, dict):
                waiting += members.values()
        if characters > MAXIMUM_CALL_BYTES:
            raise ValueError(f"the result may have {MAXIMUM_CALL_BYTES} bytes as JSON, and has more")


def describe_exception(exc: Exception) -> str:
    """Return what the guest is told of an exception: its type and its text; no path of the host's."""
    try:
        text = exc.strerror or "" if isinstance(exc, OSError) and exc.errno is not None else str(exc)
    except Exception:  # noqa: BLE001 - it is the exception's own, which has no text then
        text = ""
    name = type(exc).__name__
    return f"{name}: {text}"[:_MESSAGE_LIMIT] if text else name


def check_functions(functions: object, language: str) -> dict[str, Callable[..., object]]:
    """Return *functions* as they are now, or refuse what can be none; `TypeError` and `ValueError`."""
    if functions is None:
        return {}
    if not isinstance(functions, Mapping):
        raise TypeError(f"`functions` must be a mapping of names to functions, not {type(functions).__name__}")
    named = dict(cast("Mapping[object, object]", functions))
    if named and language == "shell":
        raise ValueError("`functions` can't be called from a shell: leave them out, or run Python or JavaScript")
    if len(named) > MAXIMUM_FUNCTIONS:
        raise ValueError(
            f"`functions` must be at most {MAXIMUM_FUNCTIONS}, not {len(named)}; one function can take what to do as an argument"
        )
    for name, function in named.items():
        if type(name) is not str:
            raise TypeError(f"a name in `functions` must be str, not {name!r:.80}")
        _check_name(name)
        if not callable(function):
            raise TypeError(f"`functions[{name!r}]` must be a function, not {function!r:.80}")
    return cast("dict[str, Callable[..., object]]", named)


def _check_name(name: str) -> None:
    if not (name.isascii() and name.isidentifier()) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"a name in `functions` must have ASCII letters, digits and _, no digit first, and be {_LONGEST_NAME} long at most, "
            f"which {name!r:.120} is not"
        )
    if keyword.iskeyword(name) or name in _JAVASCRIPT_WORDS or name.startswith("__"):
        raise ValueError(
            f"a name in `functions` must be free in Python and in JavaScript, which {name!r} is not; use another, such as 'host_{name.lstrip('_')}'"
        )


@final
class HostFunctions:
    """The functions that one run may call, and its calls of them.

    Args:
      functions: What `check_functions` returned.
      sandbox_id: Whose run it is, for the log.
      run_id: The same.

    """

    def __init__(
        self, functions: dict[str, Callable[..., object]], sandbox_id: str | None = None, run_id: str | None = None
    ) -> None:
        self.names: list[str] = list(functions)
        self._functions = functions
        self._ids = sandbox_id, run_id
        self._rate = Rate(CALLS_PER_SECOND, CALLS_AT_ONCE)
        self._log = QuietLog(_log)
        self._slots = trio.Semaphore(CALLS_AT_ONCE)
        self._sending = trio.Lock()
        self._parsing = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def is_calling(self) -> bool:
        """Whether the current task is in one of the calls."""
        nursery = trio.lowlevel.current_task().parent_nursery
        while nursery is not None:
            if nursery is self._nursery:
                return True
            nursery = nursery.parent_task.parent_nursery
        return False

    @asynccontextmanager
    async def served(self, stream: ChannelStream) -> AsyncGenerator[None]:
        """Serve the calls that come on *stream* for a block; leaving it cancels those that are underway, and waits for them."""
        with hide_nursery("Sandbox.stream()"):
            async with trio.open_nursery() as self._nursery:
                with serving(*self._ids):
                    self._nursery.start_soon(self._serve, stream, self._nursery)
                try:
                    yield
                finally:
                    self._nursery.cancel_scope.cancel(reason="the run is over")
                    self._log.tell_untold()

    async def _serve(  # noqa: ASYNC910 - receiving is a checkpoint
        self, stream: ChannelStream, nursery: trio.Nursery
    ) -> None:
        decoder = CallDecoder()
        try:
            async for data in stream:
                for call in decoder.feed(data):
                    # What comes meanwhile waits in the guest.
                    await self._rate.wait()
                    await self._slots.acquire()
                    nursery.start_soon(self._answer, stream, call)
        except BadCallError as exc:
            _log.warning("the code of a run can call no functions of the host any more: %s", exc)
            stream.reset("that is no call")
        except STREAM_GONE:
            await trio.lowlevel.checkpoint()  # the code has closed it; where the guest is gone, the run says so

    async def _answer(self, stream: ChannelStream, call: Call) -> None:
        try:
            answer = await self._call(call)
            with contextlib.suppress(*STREAM_GONE):
                async with self._sending:
                    await stream.send_all(f"{call.number} {answer}\n".encode())
        finally:
            self._slots.release()

    async def _parse(self, text: bytes) -> tuple[list[object], dict[str, object]]:
        """Read arguments, which may take some milliseconds of the loop's time where they are many; then others have as long."""
        async with self._parsing:
            began = perf_counter()
            error: BadCallError | None = None
            arguments: tuple[list[object], dict[str, object]] = [], {}
            try:
                check_arguments(text)
                if len(text) > _LONG_TEXT:
                    await trio.sleep(perf_counter() - began)
                    began = perf_counter()
                arguments = parse_arguments(text)
            except BadCallError as exc:
                error = exc
            busy = perf_counter() - began
            if busy > _LONG:
                await trio.sleep(busy)
        if error is not None:
            raise error
        return arguments

    async def _call(self, call: Call) -> str:
        """Do what the guest wants; return what comes of it."""
        function = self._functions.get(call.name)
        if function is None:
            await trio.lowlevel.checkpoint()
            return f"e {json.dumps(f'NameError: no function {call.name}')}"
        try:
            arguments, options = await self._parse(call.arguments)
        except BadCallError as exc:
            return f"e {json.dumps(f'TypeError: {exc}')}"  # noqa: ASYNC910 - the lock is a checkpoint
        try:
            result = function(*arguments, **options)
            if inspect.isawaitable(result):
                result = await result
            return f"r {encode_result(result)}"
        except Exception as exc:  # noqa: BLE001 - the guest's code is told
            self._log.warning(
                "the function %r that the code of a run has called raised an exception", call.name, cause=exc
            )
            return f"e {json.dumps(describe_exception(exc))}"
