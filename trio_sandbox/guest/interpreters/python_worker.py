"""The program that a Python interpreter in an image runs to take code from the agent.

The agent sends this text to the interpreter (see `BOOT` in `languages`), so it stands alone: the
standard library of Python 3.9 or later. It runs in the process of code that nobody trusts, and
guards itself against accidents only. What that code can do on purpose is break its own interpreter:
the agent then ends that, and starts another.

- The agent's messages come over a private socket, the `_control` of our globals. Everything that
  we use is bound at the start, and our builtins are a copy: code may redefine what it sees.
- Each run has pipes of its own on descriptors 1 and 2 (and 0, if it has input). In between these
  are /dev/null, so that the pipes end with the run unless something in the background holds them.
- SIGINT reaches the code of a run and nothing else. It can come late, after the run it was meant
  for; the agent then sends "sync" before the next run, which forgets it.
- What the parts do that come as texts of their own says each: `python_imports`, `python_interrupts`, `python_commands`, `python_streams`,
  `python_surroundings`, `python_displays`, `python_functions`, `python_sources`, `python_debugging` and `python_renewal`. The program that the interpreter
  is started with puts their names into our `_parts`.
- Code that awaits at its top level runs on an event loop of asyncio that is kept for the next such code. In between it
  does not turn, nor while other code runs, so that this can run loops of its own.
"""

from __future__ import annotations

import array
import io
import os
import sys
import traceback
from _ast import Call, Expr, Expression, Load, Module, Name, PyCF_ALLOW_TOP_LEVEL_AWAIT, PyCF_ONLY_AST, Raise
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET, socket
from _struct import Struct
from contextvars import copy_context
from errno import EINVAL
from fcntl import F_DUPFD_CLOEXEC, fcntl
from marshal import loads
from os import _exit, close, getpid, write
from signal import SIGINT
from types import CoroutineType

try:
    import resource as _resource
except ImportError:  # an image may have left it out
    _resource = None  # type: ignore[assignment]
else:
    del sys.modules["resource"]  # the code may have one of that name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Sequence
    from types import CodeType, FrameType, TracebackType
    from typing import Any, NoReturn

    from .python_commands import install as install_commands
    from .python_debugging import hide_from_debuggers, hide_from_stacks, patch_inspect, stop_debugging
    from .python_displays import Displays
    from .python_functions import Functions
    from .python_imports import Imports
    from .python_interrupts import Interrupts
    from .python_renewal import renew
    from .python_sources import Sources
    from .python_streams import StandardStreams
    from .python_surroundings import Surroundings
else:
    _parts = globals()["_parts"]
    install_commands = _parts["commands"]["install"]
    hide_from_debuggers, hide_from_stacks, patch_inspect, stop_debugging = map(
        _parts["debugging"].get, ("hide_from_debuggers", "hide_from_stacks", "patch_inspect", "stop_debugging")
    )
    Displays = _parts["displays"]["Displays"]
    Functions = _parts["functions"]["Functions"]
    Imports = _parts["imports"]["Imports"]
    Interrupts = _parts["interrupts"]["Interrupts"]
    Sources = _parts["sources"]["Sources"]
    StandardStreams = _parts["streams"]["StandardStreams"]
    Surroundings = _parts["surroundings"]["Surroundings"]
    renew = _parts["renewal"]["renew"]

#: Out of the way of code that counts on low numbers, or closes them.
_LOWEST_DESCRIPTOR = 100
#: Longer than any message of the agent; longer texts come in memory files.
_MESSAGE_LIMIT = 1 << 17
_ANCILLARY_SPACE = CMSG_SPACE(8 * array.array("i").itemsize)  # for the descriptors that come with one
#: Bytes of a value's text that the agent takes.
_VALUE_LIMIT = 1 << 16
#: Characters of code whose last expression's value is looked for. Taking code apart takes a hundred times its size.
_PARSED_LIMIT = 1 << 18
#: In the flags of code that awaits at its top level.
_CO_COROUTINE = 0x80
#: Python exits with -1 for what does not fit into C's `long`.
_LONG_LIMIT = 1 << 63
#: As in `languages`.
_WARM_UP = 1 << 31
#: The kernel's number of a socket, for `getsockopt`; Python has no name for it.
_SO_COOKIE = 57
#: What an interpreter ends with that can't go on for a reason of its own.
_EX_SOFTWARE = 70

_READY = b"R"
_BEGUN = b"B"
_DONE = b"D"
_DONE_WITH_VALUE = b"V"
_FAILED = b"F"
_SYNCED = b"S"
#: What is behind the first two of an end: the number of the run, its status, KiB, and blocks.
_pack_end = Struct(">IBIQ").pack
#: In place of the blocks.
_UNCOUNTED = (1 << 64) - 1

_modules = sys.modules  # as code may put something else there
_main = _modules["__main__"].__dict__
_print_exception = traceback.print_exception
#: What needs nothing but the interpreter itself, where that one fails, and shows less.
_print_plainly = sys.__excepthook__
# The code's own classes may have other ideas of their attributes.
_get_traceback: Callable[[BaseException], TracebackType | None] = BaseException.__dict__["__traceback__"].__get__
_set_traceback: Callable[[BaseException, TracebackType | None], None] = BaseException.__dict__["__traceback__"].__set__


class _Worker:
    def __init__(self, control: socket) -> None:
        moved = fcntl(control.fileno(), F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
        control.close()
        self._control = socket(fileno=moved)
        self._identity = self._identify_control()
        self._pid = getpid()
        self._interrupts = Interrupts()
        install_commands(self._note_fork)
        self._streams = StandardStreams(_main)
        self._sources = Sources(globals()["_program_of_spawned"])
        self._number = 0
        self._loop: AbstractEventLoop | None = None
        self._context = copy_context()  # of all runs
        self._buffer = bytearray(_MESSAGE_LIMIT)  # made while there is memory
        self._displays = Displays(self._post, self._streams.flush, lambda: self._number)
        self._has_paths = False
        self._imports = Imports(
            {
                "matplotlib.pyplot": self._displays.use_backend,
                "multiprocessing.popen_forkserver": self._sources.patch_multiprocessing,
                "multiprocessing.popen_spawn_posix": self._sources.patch_multiprocessing,
            },
            {
                "bdb": lambda bdb: hide_from_debuggers(bdb, _is_of_a_part),
                "inspect": lambda inspect: patch_inspect(inspect, _is_of_a_part, self._sources.find_class),
            },
        )
        hide_from_stacks(traceback, _is_of_a_part)
        _modules["builtins"].display = self._displays.display  # type: ignore[attr-defined]
        sys.argv = [""]  # instead of how we were started, as where code is typed in
        if sys.version_info >= (3, 10):  # noqa: UP036  an image may have an older one
            sys.orig_argv = ["python3"]
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(0)  # it guards servers against who sends them numbers
        self._has_forked = False
        os.register_at_fork(after_in_parent=self._note_fork, after_in_child=self._close_control)
        _take_name()
        self._streams.disconnect()  # until here, what goes wrong is told on the second

    def _is_control_ours(self) -> bool:
        try:
            return self._identify_control() == self._identity
        except OSError:
            return False  # closed, or no socket

    def _identify_control(self) -> bytes:
        """Return what no other socket of this machine has, which takes less than what `fstat` tells."""
        return self._control.getsockopt(SOL_SOCKET, _SO_COOKIE, 8)

    def _close_control(self) -> None:
        # Its number may be another file's by now.
        if self._is_control_ours():
            self._control.close()

    def serve(self) -> int:
        """Take code until the agent is gone; return the exit status of a process that code forked off."""
        self._send(_READY)
        functions: Functions | None = None
        while True:
            message, descriptors = self._receive()
            if message[0] == "sync":
                self._interrupts.forget()
                self._send(_SYNCED)
                continue
            if message[0] == "renew":
                renew(message[1])
                continue
            if message[0] == "functions":
                functions = Functions(message[1], descriptors[0], descriptors[1], _main)
                continue
            _, self._number, code, env, cwd = message
            surroundings = None
            if env is not None or cwd is not None:
                try:
                    surroundings = Surroundings(env, cwd)
                except (OSError, ValueError) as exc:
                    for descriptor in descriptors:
                        close(descriptor)
                    failure = exc.errno if isinstance(exc, OSError) and exc.errno else EINVAL
                    if functions is not None:
                        functions.end()
                        functions = None
                    self._send(_FAILED + self._number.to_bytes(4, "big") + b"%d" % failure)
                    continue
            stdin = -1 if len(descriptors) == 2 else descriptors.pop(0)
            self._streams.connect(stdin, *descriptors)
            if stdin >= 0 or functions is not None:
                self._send(_BEGUN + self._number.to_bytes(4, "big"))
            status, value = self._run(code)
            if getpid() != self._pid:
                return status
            if not self._is_control_ours():
                # The code closed it. The agent takes our exit status for the run's.
                self._streams.flush()
                _exit(status)
            if functions is not None:
                functions.end()
                functions = None
            self._streams.disconnect()
            if surroundings is not None:
                surroundings.restore()
            end = self._describe_end(status)
            self._send(_DONE + end if value is None else _DONE_WITH_VALUE + end + value)

    def _describe_end(self, status: int) -> bytes:
        """Say of a run how it ended, the most memory that this process has had, and how many blocks it and its children wrote."""
        if _resource is None:
            return _pack_end(self._number, status, 0, _UNCOUNTED)
        used = _resource.getrusage(_resource.RUSAGE_SELF)
        peak, written = used.ru_maxrss, used.ru_oublock
        # That takes a three-hundredth of a run, and most have no children.
        if self._has_forked or "_posixsubprocess" in _modules:
            written += _resource.getrusage(_resource.RUSAGE_CHILDREN).ru_oublock
        return _pack_end(self._number, status, peak, written)

    def _note_fork(self) -> None:
        self._has_forked = True

    def _receive(self) -> tuple[Any, list[int]]:
        size, ancillary, _, _ = self._control.recvmsg_into([self._buffer], _ANCILLARY_SPACE, MSG_CMSG_CLOEXEC)
        if not size:
            _exit(0)
        descriptors = array.array("i")
        for _, _, payload in ancillary:
            descriptors.frombytes(payload)
        numbers = descriptors.tolist()
        if self._buffer.startswith(b"M"):
            with io.FileIO(numbers.pop()) as file:
                return loads(file.readall()), numbers
        return loads(memoryview(self._buffer)[1:size]), numbers

    def _send(self, data: bytes) -> None:
        self._control.send(data)

    def _post(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send the agent a message in the middle of a run."""
        if not self._is_control_ours():
            raise OSError("this process can't display anything: it is no interpreter, or has closed all descriptors")
        self._control.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", descriptors))])

    def _run(self, code: str) -> tuple[int, bytes | None]:
        """Run *code* and show what it raised, as a Python that runs a script would.

        Return the exit status, and the text of what its last expression came to, if it is one and that is not None.
        """
        number = self._number
        name = f"<run {number}>" if number < _WARM_UP else f"<warm-up {number - _WARM_UP}>"
        code = code[1:] if code[:1] == "\ufeff" else code  # as at the start of a file
        self._sources.add(name, code)
        _main.pop("__warningregistry__", None)  # a warning is for each run that comes to it
        value: bytes | None = None

        def execute() -> None:
            nonlocal value
            if not self._has_paths:
                self._complete_paths()
            try:
                result = self._evaluate(name, code)
                if result is not None:
                    value = self._show(result, name, code)
                    if type(result) is CoroutineType:
                        # That it was never awaited is a warning about the line that came to it.
                        results: list[object] = [result]
                        result = None
                        place = _last_place(name, code)
                        call = Call(Name("clear", Load(), **place), [], [], **place)
                        exec(compile(Expression(call), name, "eval", dont_inherit=True), {"clear": results.clear})
            except (Exception, SystemExit):
                self._displays.show_figures()
                raise
            if "matplotlib.pyplot" in _modules:
                self._displays.show_figures()

        error = self._interrupts.call(execute)
        stop_debugging()
        if error is None:
            return 0, value
        status = 1

        def conclude() -> None:
            nonlocal status
            status = self._exit_status(error)

        failure = self._interrupts.call(conclude)
        if failure is not None and not isinstance(failure, KeyboardInterrupt):
            # Formatting it takes more memory than is left, or the code has broken what it takes.
            self._interrupts.call(lambda: write(2, type(error).__name__.encode("utf-8", "replace") + b"\n"))
        return status, None

    def _complete_paths(self) -> None:
        """Put the user's site directory on the path, in the first run's time: its `.pth` files may do anything."""
        self._has_paths = True
        try:
            self._imports.add_user_site()
        except (Exception, SystemExit) as exc:  # noqa: BLE001  as `site` does of most
            self._show_error(exc)

    def _show(self, result: object, name: str, code: str) -> bytes:
        """Show what the last expression came to; return its text."""
        try:
            text = _encode_value(repr(result))
            self._displays.show_value(result)
        except (Exception, SystemExit) as exc:
            # It is the expression's line that is to blame. Nothing of the code's own may have been underway.
            _set_traceback(exc, self._without_ours(exc))
            place = _last_place(name, code)
            blame = Raise(Name("error", Load(), **place), None, **place)
            exec(compile(Module([blame], []), name, "exec", dont_inherit=True), {"error": exc})
            raise AssertionError("unreachable") from exc
        return text

    def _evaluate(self, name: str, code: str) -> object:
        """Run *code*; return what its last expression came to, if it is one that no semicolon follows."""
        if "\n" in code.rstrip() or ";" in code:
            return self._evaluate_statements(name, code)
        # Most of what is a single line is an expression, or a call: this takes less time than taking it apart would.
        try:
            expression = compile(code, name, "eval", PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError:
            expression = None
        if expression is not None:
            return self._call(expression)
        return self._call(compile(code, name, "exec", PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True))

    def _evaluate_statements(self, name: str, code: str) -> object:
        flags = PyCF_ALLOW_TOP_LEVEL_AWAIT
        if len(code) > _PARSED_LIMIT:
            return self._call(compile(code, name, "exec", flags, dont_inherit=True))
        tree = compile(code, name, "exec", flags | PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body[-1] if tree.body else None
        if not isinstance(last, Expr) or _is_muted(last, code):
            return self._call(compile(tree, name, "exec", flags, dont_inherit=True))
        tree.body.pop()
        return self._call(
            compile(tree, name, "exec", flags, dont_inherit=True),
            compile(Expression(last.value), name, "eval", flags, dont_inherit=True),
        )

    def _call(self, *codes: CodeType) -> object:
        """Run some code, on the event loop if any of it awaits; return what the last comes to."""
        if any(code.co_flags & _CO_COROUTINE for code in codes):
            return self._wait(codes)
        result = None
        for code in codes:
            result = self._context.run(eval, code, _main)
        return result

    def _wait(self, codes: Sequence[CodeType]) -> object:
        """Run some code, some of which awaits, on our event loop; return what the last comes to."""
        self._imports.load("asyncio")
        from asyncio import CancelledError, new_event_loop

        if self._loop is None or self._loop.is_closed():
            self._loop = new_event_loop()
        loop = self._loop
        # Made here: of one that an interrupt of the import above leaves, a later run would be warned, and could lose its own.
        coroutine = _call_awaiting(codes)
        if sys.version_info >= (3, 11):  # noqa: UP036  an image may have an older one
            # As a task's own would be, but what it sets is there in the next run.
            task = loop.create_task(coroutine, context=self._context)
        else:
            task = self._context.run(loop.create_task, coroutine)
        try:
            return loop.run_until_complete(task)
        except BaseException:
            # KeyboardInterrupt while the loop waited: the code has yet to clean up.
            if not task.done():
                task.cancel()
                try:
                    loop.run_until_complete(task)
                except CancelledError:
                    pass
            raise

    def _exit_status(self, error: BaseException) -> int:
        """Show *error* as a Python that runs a script would, and return what that would exit with."""
        # Its own `__class__` is not to be trusted.
        kind = type(error)
        if issubclass(kind, SystemExit):
            value: Any = error.code  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            if value is None:
                return 0
            if isinstance(value, int):
                number = int.__index__(value)
                return number & 0xFF if -_LONG_LIMIT <= number < _LONG_LIMIT else 0xFF
            self._streams.stderr.write(f"{value}\n")
            return 1
        _set_traceback(error, self._without_ours(error))
        self._show_error(error)
        return 128 + SIGINT if issubclass(kind, KeyboardInterrupt) else 1

    def _show_error(self, error: BaseException) -> None:
        hook = getattr(sys, "excepthook", None)
        if hook is None or hook is sys.__excepthook__:
            self._print_error(error)
            return
        try:
            hook(type(error), error, _get_traceback(error))
        except Exception as exc:  # noqa: BLE001  as Python has it
            self._streams.stderr.write("Error in sys.excepthook:\n")
            _set_traceback(exc, self._without_ours(exc))
            self._print_error(exc)
            self._streams.stderr.write("\nOriginal exception was:\n")
            self._print_error(error)

    def _print_error(self, error: BaseException) -> None:
        try:
            # `traceback` imports these when it needs them.
            self._imports.load("ast", "tokenize", "unicodedata")
            if issubclass(type(error), SyntaxError):
                self._sources.complete(error)  # type: ignore[arg-type]
            _print_exception(type(error), error, _get_traceback(error), file=self._streams.stderr)
        except Exception:  # noqa: BLE001  the exception is a strange one, or the code has broken what formats it
            _print_plainly(type(error), error, _get_traceback(error))

    def _without_ours(self, error: BaseException) -> TracebackType | None:
        """Return the traceback of *error* from the code's first frame on."""
        trace = _get_traceback(error)
        while trace is not None and self._is_ours(trace.tb_frame):
            trace = trace.tb_next
        return trace

    def _is_ours(self, frame: FrameType) -> bool:
        """Whether a frame that no frame of the code's has called is of what we do to run that."""
        return _is_of_a_part(frame) or str(frame.f_globals.get("__name__")).startswith("asyncio.")


def _is_of_a_part(frame: FrameType) -> bool:
    return any(frame.f_globals is part for part in globals()["_parts"].values())


def _take_name() -> None:
    """Be called what we are in lists of processes: the kernel calls what it starts from a descriptor by that one's number."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(os.path.basename(sys.executable))
    except OSError:
        pass


def _encode_value(text: str) -> bytes:
    data = str.encode(text[:_VALUE_LIMIT], "utf-8", "backslashreplace")
    if len(text) <= _VALUE_LIMIT and len(data) <= _VALUE_LIMIT:
        return data
    end = b" ... (cut: it has %d characters)" % len(text)
    return data[: _VALUE_LIMIT - len(end)].decode("utf-8", "ignore").encode() + end


def _last_place(name: str, code: str) -> dict[str, int]:
    """Return where the last statement of *code* is, as nodes of a syntax tree have it."""
    last = compile(code, name, "exec", PyCF_ALLOW_TOP_LEVEL_AWAIT | PyCF_ONLY_AST, dont_inherit=True).body[-1]
    return {key: getattr(last, key) for key in ("lineno", "col_offset", "end_lineno", "end_col_offset")}


async def _call_awaiting(codes: Sequence[CodeType]) -> object:
    result = None
    for code in codes:
        result = eval(code, _main)
        if code.co_flags & _CO_COROUTINE:
            result = await result
    return result


def _is_muted(last: Expr, code: str) -> bool:
    """Whether a semicolon follows the last expression."""
    line = code.replace("\r\n", "\n").replace("\r", "\n").split("\n")[(last.end_lineno or 1) - 1]
    return line.encode("utf-8")[last.end_col_offset :].lstrip().startswith(b";")


def _serve() -> NoReturn:
    worker = _Worker(globals()["_control"])
    try:
        status = worker.serve()
    except BaseException:  # noqa: BLE001
        # Something of the code's own, a thread's signal or a trace function, reached into our loop.
        _exit(_EX_SOFTWARE)
    # Only in a process that the code forked off, which ends as it would have in a script.
    sys.exit(status)


_serve()
