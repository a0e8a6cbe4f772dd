"""The standard streams of a Python interpreter, from run to run.

Like the worker, whose part it is, it stands alone: the standard library of Python 3.9 or later, in the process of code
that nobody trusts.

`sys.stdin`, `sys.stdout` and `sys.stderr` are made as Python makes its own, once. Each run puts its pipes on their descriptors,
so whatever keeps one of them, such as a handler of `logging`, prints to the run that is current. One that code has closed is made anew.

What is in a buffer belongs to the run that put it there. At a run's end what was printed goes out of the buffers of the standard
streams, of C's stdio, and of file objects on the same files that are variables of the code. Before the next run
what is left of the last one's input is read out of the same three. Other buffers can't be found.
"""

from __future__ import annotations

import io
import sys
from _thread import _count as _count_threads  # pyright: ignore[reportPrivateUsage]
from collections import deque
from os import O_RDWR, close, dup, dup2, fstat, open as open_descriptor, pipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NAMES = ("stdin", "stdout", "stderr")
#: How many streams that the code has put in place of ours live on when it puts others there.
_KEPT = 100
_READERS = frozenset({io.TextIOWrapper, io.BufferedReader})
_WRITERS = frozenset({io.TextIOWrapper, io.BufferedWriter})


class StandardStreams:
    """sys.stdin, sys.stdout and sys.stderr, on descriptors that never close.

    Args:
      variables: Those of the code, among which its own file objects are looked for.

    """

    def __init__(self, variables: dict[str, Any]) -> None:
        self._variables = variables
        self._encodings: list[tuple[str, str]] = []
        for name in _NAMES:
            stream = getattr(sys, name)
            self._encodings.append((stream.encoding, stream.errors))
        self._had_input = False
        self._had_threads = False
        """Threads of the code's lived on when its last run ended."""
        self._flush_stdio, self._forget_stdio = _find_stdio()
        self._kept: deque[object] = deque(maxlen=_KEPT)
        """The code's own streams around ours, which would be closed with them."""
        self._streams: list[io.TextIOWrapper] = [self._make(descriptor) for descriptor in range(3)]
        for name, stream in zip(_NAMES, self._streams):  # noqa: B905  new in Python 3.10
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    @property
    def stderr(self) -> Any:
        """`sys.stderr`, or ours where the code has put nothing in its place."""
        current = getattr(sys, "stderr", None)
        return self._streams[2] if current is None else current

    def connect(self, stdin: int, stdout: int, stderr: int) -> None:
        """Give a run its descriptors, which are closed; *stdin* may be -1 for no input."""
        # What threads printed since the last run goes where that was to go: nowhere.
        in_place = self._flush()
        if self._had_threads:
            self._flush_stdio()
        if self._had_input or stdin >= 0:
            self._forget_input()
        self._had_input = stdin >= 0
        if not (in_place and self._are_usable()):
            self._put_in_place()
        for descriptor, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            if descriptor >= 0:
                dup2(descriptor, target)
                close(descriptor)

    def disconnect(self) -> None:
        """Send on what is still in buffers, and let go of the run's descriptors."""
        in_place = self._flush()
        self._flush_stdio()
        self._had_threads = _count_threads() > 0
        for stream in self._find_variables(_WRITERS, 1, 2):
            try:
                stream.flush()
            except BaseException:  # noqa: BLE001  the code may have put it around an object of its own
                pass
        if not in_place:
            self._keep_others()
        # Opened each time: code may close, or reuse, what we would keep open.
        null = open_descriptor("/dev/null", O_RDWR)
        for target in range(3):
            dup2(null, target)
        if null > 2:
            close(null)

    def flush(self) -> None:
        """Empty the buffers of sys.stdout and sys.stderr, ours and the code's own, and C's."""
        self._flush()
        self._flush_stdio()

    def _flush(self) -> bool:
        """Empty the buffers but C's; tell whether the code has put nothing in the place of ours, as in most runs."""
        stdin, stdout, stderr = self._streams
        try:
            in_place = sys.stdin is stdin and sys.stdout is stdout and sys.stderr is stderr
        except AttributeError:
            in_place = False
        streams: tuple[Any, ...] = (stdout, stderr)
        if not in_place:
            # The code's own first: they may write to ours.
            streams = getattr(sys, "stdout", None), getattr(sys, "stderr", None), stdout, stderr
        for stream in streams:
            try:
                stream.flush()
            except BaseException:  # noqa: BLE001  None, the code's own object, or one of ours that it closed
                pass
        return in_place

    def _make(self, descriptor: int) -> io.TextIOWrapper:
        """Make a stream as Python makes its own for a pipe, but for output to go out with each line.

        Python's own does that at a terminal: here, too, somebody reads along, and child processes print in between.
        """
        # It looks once whether it can be sought in, which /dev/null can be.
        reader, writer = pipe()
        before = dup(descriptor)
        dup2(writer if descriptor else reader, descriptor)
        try:
            buffer: Any = open(descriptor, "wb" if descriptor else "rb", closefd=False)  # noqa: SIM115
            buffer.raw.name = f"<{_NAMES[descriptor]}>"
            encoding, errors = self._encodings[descriptor]
            stream: Any = io.TextIOWrapper(buffer, encoding, errors, newline="\n", line_buffering=descriptor > 0)
            stream.mode = "w" if descriptor else "r"
        finally:
            dup2(before, descriptor)
            for number in (reader, writer, before):
                close(number)
        return stream  # type: ignore[no-any-return]

    def _are_usable(self) -> bool:
        try:
            stdin, stdout, stderr = self._streams
            return not (stdin.closed or stdout.closed or stderr.closed)
        except ValueError:
            return False  # detached

    def _put_in_place(self) -> None:
        """Put ours where nothing is that can be used, made anew if need be."""
        for descriptor, name in enumerate(_NAMES):
            ours = self._streams[descriptor]
            current = getattr(sys, name, None)
            if not _is_usable(ours):
                self._replace(descriptor)
            # A stream that the code put there is its own affair, as long as it can be used at all.
            if current is ours or not _is_usable(current):
                setattr(sys, name, self._streams[descriptor])

    def _keep_others(self) -> None:
        for name, ours in zip(_NAMES, self._streams):  # noqa: B905
            current = getattr(sys, name, None)
            if current is not ours and type(current) is io.TextIOWrapper and current not in self._kept:
                self._kept.append(current)

    def _replace(self, descriptor: int) -> None:
        name = _NAMES[descriptor]
        old, new = self._streams[descriptor], self._make(descriptor)
        self._streams[descriptor] = new
        setattr(sys, f"__{name}__", new)
        if getattr(sys, name, None) is old:
            setattr(sys, name, new)

    def _forget_input(self) -> None:
        """Drop what is left of the last run's input, or that it had none, while /dev/null is where that was."""
        self._forget_stdio()
        if not self._had_input:
            return
        for stream in self._find_variables(_READERS, 0):
            _drain(stream)
        current = getattr(sys, "stdin", None)
        if current is not self._streams[0] and _is_on(current, 0) and not _drain(current):
            sys.stdin = self._streams[0]
        if not _drain(self._streams[0]):
            self._replace(0)  # closed, or the input ended in the middle of a character

    def _find_variables(self, types: frozenset[type], *descriptors: int) -> list[Any]:
        """Return those of the code's variables that are file objects on the same file as one of *descriptors*."""
        try:
            values = self._variables.values()
            # In most runs there are none, and this is all C.
            if types.isdisjoint(map(type, values)):
                return []
            return [value for value in values if type(value) in types and _is_on(value, *descriptors)]
        except RuntimeError:
            return []  # threads of the code are making variables


def _find_stdio() -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two functions: one empties the buffers of C's stdout and stderr, the other forgets what C's stdin has read."""
    try:
        from _ctypes import FUNCFLAG_CDECL, CFuncPtr, _SimpleCData, dlopen, dlsym  # pyright: ignore[reportPrivateUsage]

        class Pointer(_SimpleCData):  # type: ignore[type-arg]
            _type_ = "P"

        class Function(CFuncPtr):
            _flags_ = FUNCFLAG_CDECL
            _restype_ = None

        library = dlopen(None, 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        stdin, stdout, stderr = (Pointer.from_address(dlsym(library, name)) for name in _NAMES)
        # Not `fflush(NULL)`, nor what locks stdin: that would wait for a thread that reads it.
        fflush, purge, clear = (Function(dlsym(library, name)) for name in ("fflush", "__fpurge", "clearerr_unlocked"))
    except (ImportError, OSError):
        return _do_nothing, _do_nothing  # a Python without ctypes, or an unknown C library

    def flush() -> None:
        fflush(stdout)
        fflush(stderr)

    def forget() -> None:
        purge(stdin)
        clear(stdin)

    return flush, forget


def _do_nothing() -> None:
    pass


def _drain(stream: Any) -> bool:
    """Read *stream* to its end; tell whether it is as good as new then."""
    try:
        stream.read()
    except BaseException:  # noqa: BLE001  the code's own object, or one of ours that it closed
        try:
            # It holds what is no text. This drops what it has decoded before that.
            stream.read(1 << 30)
        except BaseException:  # noqa: BLE001
            pass
        return False
    return True


def _is_usable(stream: Any) -> bool:
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except BaseException:  # noqa: BLE001  detached, if it is ours; the code's own may raise anything
        return False


def _is_on(stream: Any, *descriptors: int) -> bool:
    """Whether *stream* is on the same file as one of the descriptors."""
    try:
        return _identity(stream.fileno()) in map(_identity, descriptors)
    except BaseException:  # noqa: BLE001  on none, closed, or the code's own
        return False


def _identity(descriptor: int) -> tuple[int, int]:
    status = fstat(descriptor)
    return status.st_dev, status.st_ino
